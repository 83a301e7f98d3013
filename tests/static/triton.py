"""Compile the shipped Triton kernels for real targets, without a GPU, and inspect the machine code.

The backend's own host code runs on meta tensors with its launches recorded, so that kernels,
configurations and argument specialisations are those that a GPU would get. One row each: kernel,
case, architecture, registers, bytes kept in local memory, instructions that move them in loops,
shared memory, tensor-core instruction. Fails on a spill in a loop, on more than a vector of local
memory outside of loops, on shared memory over the limit, on a dense kernel of a 16-bit type without
tensor cores, and on one that reads channels one by one where they lie in whole vectors; and where
one of these faults is planted and not seen.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
sys.path[0] = str(Path(__file__).parents[2])  # this file's own name would hide the package triton

import torch

from fastst.backends import triton as backend
from fastst.backends.contract import PairBackward
from fastst.backends.triton import tiles
from fastst.machine import gpu
from fastst.problem.spec import (
    PairSpec,
    PairTensors,
    ParallelSpec,
    ParallelTensors,
    Problem,
    in_execution_order,
)
from tests.static.sass import local_accesses

ARCHITECTURES = (80, 90, 100)
# What is compiled for it alone unless --all is given: kernels that multiply on tensor cores, which
# it has other ones of, without the cases below, whose tiles others have too. The rest is like 9.0.
PARTIAL = 100
NOT_IN_PART = (
    "64-144-64 contiguous", "64-230-128 s2 planes", "128-288-128", "512-1152-512", "thin inference",
)  # fmt: skip
# Bytes of registers that a kernel may keep in local memory while its loops run. Moved once, they
# cost nothing; ptxas does it to stay at 128 registers, or 72, so that more programs run at once.
KEPT = 4 * 4
LOAD_OF_TWO_BYTES = re.compile(r"\bLDG\S*\.U16\b")
TENSOR_CORES = re.compile(r"\b(HGMMA|UTCHMMA|UTCQMMA|UTCMMA|HMMA|DMMA)\b")


@dataclass(frozen=True)
class Case:
    """One call of the backend whose kernels are compiled."""

    name: str
    channels: tuple[int, int, int]  # C, M, K
    size: tuple[int, int, int]
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    temporal_groups: int = 0  # of the parallel op, where they are others
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    norm: str = "batch"
    save: bool = True  # a training call
    recompute: bool = False
    activation: str = "relu"
    combine: str = ""  # of the parallel op
    branch_activation: str = "none"
    tf32: bool = True
    order: str = "spatial-first"
    way: str | None = None  # None: the one that is chosen

    def run(self) -> None:
        """The backend's host code on meta tensors."""

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        c, m, k = self.channels
        x = empty(8, c, *self.size)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last_3d)
        kt, kh, kw = self.kernel
        padding = (kt // 2, kt // 2, kh // 2, kh // 2, kw // 2, kw // 2)
        groups = (self.groups, self.temporal_groups or self.groups)
        common = {"stride": self.stride, "padding": padding, "groups": groups}
        if self.combine:
            weights = empty(k, c // groups[0], 1, kh, kw), empty(k, c // groups[1], kt, 1, 1)
            tensors = ParallelTensors(x, *weights, empty(k), empty(k))
            spec = ParallelSpec(
                **common, branch_activation=self.branch_activation, activation=self.activation,
                combine=self.combine,
            )  # fmt: skip
            problem = Problem.of(tensors, spec)
            y = backend.parallel_conv2plus1d(problem, tensors)
            backend.parallel_conv2plus1d_backward(problem, tensors, y, [True] * 5)
            return
        taps = in_execution_order(self.order, (1, kh, kw), (kt, 1, 1))
        weights = [
            empty(out, into // self.groups, *kernel)
            for (out, into), kernel in zip(((m, c), (k, m)), taps, strict=True)
        ]
        vectors = [empty(m, dtype=torch.float32) for _ in range(4)]
        if self.norm != "frozen":
            vectors[2:] = [None, None]
        if self.norm == "none":
            vectors[:2] = [None, None]
        tensors = PairTensors(x, *weights, None, empty(k), *vectors)
        spec = PairSpec(
            **common, activation=self.activation, norm=self.norm, order=self.order,
            recompute=self.recompute, output_statistics=self.save,
        )  # fmt: skip
        problem = Problem.of(tensors, spec)
        result = backend.pair.run(problem, tensors, self.save, self.way)
        if self.save:
            dy = torch.empty_like(result.y)
            needs = [t is not None for t in tensors]
            backend.BACKEND.conv2plus1d_backward(
                PairBackward(problem, tensors, [dy], result.u, result.mean, result.var, needs)
            )


HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64
# The pairs of R(2+1)D-18 in training and inference, other dtypes, thin and grouped ones.
SERVED: dict[str, Any] = {"norm": "frozen", "save": False}
TEMPORAL: dict[str, Any] = {"order": "temporal-first", **SERVED}
STEM: tuple[Any, ...] = ((3, 45, 64), (16, 112, 112), (3, 7, 7), (1, 2, 2))
CASES = (
    Case("stem", *STEM, channels_last=False),
    Case("stem inference", *STEM, **SERVED),
    Case("thin inference", (64, 64, 64), (16, 56, 56), dtype=HALF, **SERVED),
    Case("64-144-64", (64, 144, 64), (16, 56, 56)),
    Case("64-144-64 contiguous", (64, 144, 64), (16, 56, 56), channels_last=False),
    Case("64-230-128 s2", (64, 230, 128), (16, 56, 56), stride=(2, 2, 2)),
    Case(
        "64-230-128 s2 planes", (64, 230, 128), (16, 56, 56), stride=(2, 2, 2), channels_last=False,
        save=False,
    ),
    Case("128-288-128", (128, 288, 128), (8, 28, 28), **SERVED),
    Case("256-576-256", (256, 576, 256), (4, 14, 14), activation="silu"),
    Case("512-1152-512", (512, 1152, 512), (2, 7, 7), norm="none", save=False, dtype=HALF),
    Case("tf32", (64, 144, 64), (16, 56, 56), dtype=SINGLE),
    Case("float32", (64, 144, 64), (16, 56, 56), dtype=SINGLE, tf32=False),
    Case("float64", (16, 32, 16), (4, 14, 14), dtype=DOUBLE),
    Case("parallel add", (64, 64, 64), (16, 56, 56), combine="add"),
    Case("parallel relu", (64, 64, 64), (16, 56, 56), combine="add", branch_activation="relu"),
    Case("one kernel", (64, 128, 128), (16, 56, 56), way="pair_conv", **SERVED),
    Case("one kernel tf32", *STEM, dtype=SINGLE, way="pair_conv", **SERVED),
    Case(
        "one kernel float32", (32, 32, 32), (16, 56, 56), (5, 3, 3), dtype=SINGLE, tf32=False,
        way="pair_conv", **SERVED,
    ),
    Case("depthwise", (108, 108, 108), (16, 56, 56), groups=108, **SERVED),
    Case("depthwise 5", (80, 80, 80), (16, 40, 40), (5, 5, 5), groups=80, **SERVED),
    Case("depthwise t-first", (108, 108, 108), (16, 56, 56), groups=108, **TEMPORAL),
    Case("depthwise batch", (64, 64, 64), (16, 56, 56), groups=64, channels_last=False),
    Case("grouped", (256, 256, 256), (16, 28, 28), groups=16, **SERVED),
    Case("grouped batch", (256, 256, 256), (16, 28, 28), groups=16),
    Case("grouped t-first", (256, 256, 256), (16, 28, 28), groups=16, dtype=HALF, **TEMPORAL),
    Case(
        "grouped float32", (64, 64, 64), (16, 28, 28), groups=4, dtype=SINGLE, tf32=False, **SERVED
    ),
    Case("thin groups", (64, 64, 64), (16, 28, 28), groups=16, **SERVED),
    Case("parallel cat s2", (64, 0, 96), (16, 56, 56), combine="cat", stride=(2, 2, 2), dtype=HALF),
    Case("parallel depthwise", (64, 64, 64), (16, 56, 56), groups=64, combine="add"),
    Case(
        "parallel grouped", (256, 256, 256), (16, 28, 28), groups=16, combine="add",
        branch_activation="silu",
    ),
    Case(
        "parallel apart", (64, 64, 64), (16, 56, 56), groups=64, temporal_groups=1, combine="add",
        branch_activation="relu",
    ),
    Case("gelu", (32, 96, 32), (8, 28, 28), norm="frozen", activation="gelu", dtype=HALF),
)  # fmt: skip


# ---- compiling without a driver


class OfflineDriver:
    """What Triton asks of a driver before it compiles for an architecture."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton keeps compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0


class Kernel(NamedTuple):
    """A compiled kernel."""

    binary: Any
    config: str  # in words
    vectors: bool  # whether it reads x with channels in whole vectors of 16 bytes
    dense: bool  # whether it multiplies matrices


def kernels(case: Case, architecture: int, part: bool = False) -> Iterator[Kernel]:
    """Every kernel of a case, compiled; ``part``: those on tensor cores."""
    import triton

    triton.runtime.driver.set_active(OfflineDriver(architecture))
    found: list[Kernel] = []

    def launch(kernel: Any, grid: Any, config: Any, *args: Any, **meta: Any) -> None:
        told = ""
        if config is not None:
            meta |= tiles.launch_options(config)
            told = (
                str(config).split("(", 1)[1].rstrip(")").replace("block_", "").replace("num_", "")
            )
        flat = any(meta.get(name) for name in ("FLAT", "SPATIAL_FLAT", "TEMPORAL_FLAT"))
        whole = meta.get("X_ALIGN", 1) * case.dtype.itemsize >= 16 and not flat
        dense = kernel.__name__ in DENSE and not all(meta.get("DIRECT", (False,)))
        if part and not (dense and backend.arguments.uses_tensor_cores(case.dtype)):
            return
        found.append(Kernel(kernel.warmup(*args, grid=grid, **meta), told, whole, dense))

    with (
        mock.patch.object(backend.launch, "run", launch),
        mock.patch.object(backend.launch, "capability", lambda device: divmod(architecture, 10)),
        mock.patch.object(backend.launch, "tf32_allowed", lambda: case.tf32),
    ):
        case.run()
    yield from found


# ---- reading the machine code


def tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Row:
    kernel: str
    case: str
    config: str
    architecture: int
    code: Code
    shared: int
    wrong: str = ""

    def __str__(self) -> str:
        code = self.code
        return (
            f"{self.kernel:17} {self.case:22} sm_{self.architecture:<4} {code.registers:4} "
            f"{code.kept:4} {code.spills:6} {self.shared:7} {code.tensor_cores or '-':8} "
            f"{self.config}" + (f"  <- {self.wrong}" if self.wrong else "")
        )


HEADER = f"{'kernel':17} {'case':22} {'arch':7} regs kept spills  shared tensor   configuration"


class Code(NamedTuple):
    """What the machine code of a kernel tells."""

    registers: int
    kept: int  # bytes of local memory
    spills: int  # instructions that move them in loops
    tensor_cores: str
    loads_of_two_bytes: int


@functools.cache
def read(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = tool("cuobjdump", "-res-usage", "-sass", file.name)
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", code)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    accesses, spills = local_accesses(code)
    return Code(
        registers,
        stack + local if accesses else 0,  # else reserved, never used
        spills,
        ",".join(sorted(set(TENSOR_CORES.findall(code)))),
        len(LOAD_OF_TWO_BYTES.findall(code)),
    )


def inspect(kernel: Kernel, case: Case, architecture: int) -> Row:
    binary = kernel.binary
    code = read(binary.asm["cubin"])
    shared = binary.metadata.shared
    limit = gpu.shared_memory_limit(divmod(architecture, 10))
    name = binary.metadata.name
    wrong = []
    if code.spills:
        wrong.append("spills in a loop")
    if code.kept > KEPT:
        wrong.append(f"more than {KEPT} bytes in local memory")
    if shared > limit:
        wrong.append(f"more than {limit} bytes of shared memory")
    if kernel.dense and case.dtype.itemsize == 2 and not code.tensor_cores:
        wrong.append("no tensor-core instruction")
    # A bias per channel takes up to 4 of them.
    reads_vectors = name in FORWARD and kernel.dense and kernel.vectors
    if reads_vectors and code.loads_of_two_bytes > 4:
        wrong.append("loads of 2 bytes")
    return Row(name, case.name, kernel.config, architecture, code, shared, ", ".join(wrong))


def rows(task: tuple[Case, int, bool]) -> list[Row]:
    case, architecture, part = task
    return [inspect(k, case, architecture) for k in kernels(case, architecture, part)]


# ---- faults that the checks must see


def planted(fault: str) -> str:
    """What is found wrong with a kernel that has a fault."""
    case = Case("planted", (64, 144, 64), (16, 56, 56), **SERVED)
    plain = tiles.candidates
    change: dict[str, Any] = {}
    if fault == "shared memory":
        change = {"num_stages": 9, "num_warps": 8}
    elif fault in ("spills in a loop", "bytes in local memory"):
        change = {"num_warps": 1}

    def worse(sizes: tiles.Sizes) -> list[tiles.TapConfig]:
        return [replace(c, **change) for c in plain(sizes)[:1]]

    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(tiles, "candidates", worse))
        if fault == "loads of 2 bytes":
            apart = lambda t, align: (t.stride(0) // align, 2, 3, 3, 3)  # noqa: E731
            stack.enter_context(patch(backend.arguments, "strides", apart))
        if fault == "no tensor-core instruction":
            found = list(kernels(replace(case, dtype=SINGLE, tf32=False), 90))
        else:
            found = list(kernels(case, 90))
    return ", ".join(inspect(k, case, 90).wrong for k in found)


def every_kernel() -> set[str]:
    """Names of what the library launches."""
    from triton.runtime.jit import JITFunction

    modules = [m for m in vars(backend.launch.kernels()).values() if isinstance(m, ModuleType)]
    functions = [f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)]
    return {f.__name__ for f in functions if f.do_not_specialize}


FAULTS = (
    "spills in a loop", "bytes in local memory", "shared memory", "no tensor-core instruction",
    "loads of 2 bytes",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--case", nargs="*", help="names of cases, compiled whole")
    parser.add_argument("--all", action="store_true", help=f"the whole for {PARTIAL}, too")
    args = parser.parse_args()
    cases = [c for c in CASES if not args.case or c.name in args.case]
    partly = () if args.case or args.all else (PARTIAL,)
    tasks = [
        (c, a, a in partly)
        for c in cases for a in args.arch if a not in partly or c.name not in NOT_IN_PART
    ]  # fmt: skip
    print(HEADER)
    seen: set[tuple[str, str, str, int]] = set()
    bad = 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing from an earlier run counts
        with ProcessPoolExecutor(2) as pool:
            for found in pool.map(rows, tasks):
                for row in found:
                    key = (row.kernel, row.case, row.config, row.architecture)
                    if key not in seen or row.wrong:
                        print(row, flush=True)
                    seen.add(key)
                    bad += bool(row.wrong)
            if not args.case:
                for fault, told in zip(FAULTS, pool.map(planted, FAULTS), strict=True):
                    if fault not in told:
                        print(f"a planted fault is not seen: {fault}")
                        bad += 1
                for name in sorted(every_kernel() - {kernel for kernel, *_ in seen}):
                    print(f"no case has the kernel {name}")
                    bad += 1
    for architecture in set(args.arch) & set(partly):
        print(
            f"skipped for sm_{architecture}: kernels without tensor cores; {', '.join(NOT_IN_PART)}"
        )
    print(f"{len(seen)} kernels, {bad} wrong")
    return 1 if bad or not seen else 0


FORWARD = ("tap_conv", "parallel_conv", "pair_conv")
DENSE = (
    *FORWARD, "input_gradient", "weight_gradient",
    "parallel_input_gradient", "parallel_weight_gradient",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
