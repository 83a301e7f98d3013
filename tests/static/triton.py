"""Compile the shipped Triton kernels for real targets, without a GPU, and measure the machine code.

The backend's own host code runs on meta tensors with its launches recorded, so that kernels,
configurations and argument specialisations are those that a GPU would get. One row each: see
``measured.Row``. Fails on operands that are overwritten in flight, on products that wait for each
other, on a spill in a loop, on more than a vector of local memory outside of loops, on shared
memory over the limit, on a dense kernel of a 16-bit type without tensor cores, and on one that
reads channels one by one where they lie in whole vectors; and where one of these faults is planted
and not seen. What differs from the committed table is printed, and fails where a
loop issues a tenth more: --write writes the table anew.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)  # this file's own name would hide the package triton


def folder(version: str) -> Path:
    """Where another version of Triton lies, installed if it is not yet."""
    found = ROOT / "build" / f"triton-{version}"
    if not found.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", found, f"triton=={version}"], check=True)
    return found


if "--triton" in sys.argv:  # before anything imports the installed one
    sys.path.insert(0, str(folder(sys.argv[sys.argv.index("--triton") + 1])))

import torch

from fastst.backends import triton as backend
from fastst.backends.triton import tiles
from fastst.machine import gpu
from tests.static import keys, measured
from tests.static.cases import CASES, SERVED, SINGLE, Case, ConvCase
from tests.static.measured import Row
from tests.static.sass import Program

NVIDIA = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
AMD = {"gfx942": 64, "gfx1100": 32}  # threads of a warp
# What every change is measured on (``SUBSET``): all cases where most is at stake, some elsewhere.
# --all has every case on every architecture, with every version of Triton.
EVERYWHERE = ("64-144-64",)
SOME = (*EVERYWHERE, "256-576-256", "stem", "64-230-128 s2", "tf32", "one kernel", "depthwise")
# What the committed table has beside: --table.
TABLE = {
    **dict.fromkeys(("8.0", "8.9", "9.0"), (*EVERYWHERE, "128-288-128", "256-576-256", "stem")),
    **dict.fromkeys(("8.6", "10.0", "12.0", *AMD), EVERYWHERE),
}
# The oldest and the newest version that is supported, beside the one that is installed.
OLDEST, NEWEST = "3.6.0", "3.8.0"
# One of each kind: what the oldest is tried on, whose language takes less than the newest's.
KINDS = (
    *EVERYWHERE, "one kernel", "depthwise batch", "parallel add", "conv3d", "conv3d past",
    "conv3d depthwise past",
)  # fmt: skip
SUBSET = {
    "9.0": (
        *SOME, "64-144-64 contiguous", "thin inference", "float64", "depthwise batch",
        "grouped batch", "parallel add", "parallel relu", "parallel depthwise", "parallel apart",
        "gelu", "conv3d", "conv3d past",
    ),
    "8.0": (*EVERYWHERE, "256-576-256", "one kernel", "conv3d", "conv3d past"),
    "8.9": EVERYWHERE, "10.0": EVERYWHERE,
    "12.0": (*EVERYWHERE, "256-576-256"), "gfx942": EVERYWHERE,
}  # fmt: skip
# Bytes of registers that a kernel may keep in local memory while its loops run. Moved once, they
# cost nothing; ptxas does it to stay at 128 registers, or 72, so that more programs run at once.
KEPT = 4 * 4
LOAD_OF_TWO_BYTES = re.compile(r"\bLDG\S*\.U16\b")
READ_OF_TWO_BYTES = re.compile(r"\bds_(read|load)_u16\b")  # from LDS
TENSOR_CORES = re.compile(r"\b(HGMMA|UTCHMMA|UTCQMMA|UTCMMA|HMMA|DMMA)\b")


# ---- compiling without a driver


class OfflineDriver:
    """What Triton asks of a driver before it compiles for an architecture."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        if self.arch in AMD:
            return GPUTarget("hip", self.arch, AMD[self.arch])
        return GPUTarget("cuda", int(self.arch.replace(".", "")), 32)

    def get_current_device(self) -> int:
        return [*NVIDIA, *AMD].index(self.arch)  # Triton keeps compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0


def capability(arch: str) -> gpu.Capability:
    if arch in AMD:
        return gpu.amd(arch)
    major, minor = arch.split(".")
    return int(major), int(minor)


class Kernel(NamedTuple):
    """A compiled kernel."""

    binary: Any
    config: str  # in words
    vectors: bool  # whether it reads x with channels in whole vectors of 16 bytes
    dense: bool  # whether it multiplies matrices


def kernels(case: Case | ConvCase, arch: str) -> Iterator[Kernel]:
    """Every kernel of a case, compiled."""
    import triton

    triton.runtime.driver.set_active(OfflineDriver(arch))
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
        found.append(Kernel(kernel.warmup(*args, grid=grid, **meta), told, whole, dense))

    tf32 = case.tf32 and arch not in AMD
    with (
        mock.patch.object(backend.launch, "run", launch),
        mock.patch.object(backend.launch, "capability", lambda device: capability(arch)),
        mock.patch.object(backend.launch, "allows_tf32", lambda: tf32),
        mock.patch.object(backend.single, "why_miscompiled", lambda device: None),
    ):
        case.run()
    yield from found


# ---- reading the machine code


def tool(name: str, *args: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


@functools.cache
def read(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tool("cuobjdump", "-res-usage", "-sass", file.name)


def compiler() -> str:
    import triton

    return f"triton {triton.__version__}"


def inspect(kernel: Kernel, case: Case | ConvCase, arch: str) -> Row:
    """What the machine code of a kernel tells, and what is wrong with it."""
    measure = of_amd if arch in AMD else of_nvidia
    row, wrong = measure(kernel, case, arch)
    limit = gpu.shared_memory_limit(capability(arch))
    if row.shared > limit:
        wrong.append(f"more than {limit} bytes of shared memory")
    return replace(row, wrong=", ".join(wrong))


def of_nvidia(kernel: Kernel, case: Case | ConvCase, arch: str) -> tuple[Row, list[str]]:
    code = read(kernel.binary.asm["cubin"])
    program = Program(code)
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", code)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    accesses, spills = program.local_accesses()
    name = kernel.binary.metadata.name
    row = Row(
        name, case.name, kernel.config, arch, compiler(), registers, spills,
        stack + local if accesses else 0,  # else reserved, never used
        kernel.binary.metadata.shared, len(program.overwritten()), program.serialised(),
        program.slots(arch), program.load_bytes(), program.copies() if program.innermost else None,
        program.outside(),
    )  # fmt: skip
    wrong = []
    if row.overwritten:
        wrong.append("operands overwritten in flight")
    if row.serialised:
        wrong.append("serialised products")
    if spills:
        wrong.append("spills in a loop")
    if row.kept > KEPT:
        wrong.append(f"more than {KEPT} bytes in local memory")
    if kernel.dense and case.dtype.itemsize == 2 and not TENSOR_CORES.search(code):
        wrong.append("no tensor-core instruction")
    # A bias per channel takes up to 4 of them.
    reads_vectors = name in FORWARD and kernel.dense and kernel.vectors
    if reads_vectors and len(LOAD_OF_TWO_BYTES.findall(code)) > 4:
        wrong.append("loads of 2 bytes")
    return row, wrong


def of_amd(kernel: Kernel, case: Case | ConvCase, arch: str) -> tuple[Row, list[str]]:
    """From the assembly and its metadata; spills are those that the compiler counts anywhere."""
    code = kernel.binary.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    row = Row(
        kernel.binary.metadata.name, case.name, kernel.config, arch, compiler(),
        number("vgpr_count"), number("vgpr_spill_count"), number("private_segment_fixed_size"),
        kernel.binary.metadata.shared, None, None, None, None, None, None,
    )  # fmt: skip
    wrong = []
    if row.spilled_in_loop:
        wrong.append("spills")
    if kernel.dense and case.dtype.itemsize == 2 and not re.search(r"v_(mfma|wmma)_", code):
        wrong.append("no tensor-core instruction")
    # Weights are packed for their products; what is summed over positions is turned as it is read.
    if kernel.vectors and row.kernel in PACKED and READ_OF_TWO_BYTES.search(code):
        wrong.append("reads of 2 bytes")
    return row, wrong


def rows(task: tuple[Case | ConvCase, str]) -> list[Row]:
    case, arch = task
    return [inspect(k, case, arch) for k in kernels(case, arch)]


# ---- faults that the checks must see


def broken(least: int) -> Kernel:
    """A product of what is in registers, as the library forms none."""
    import triton

    from tests.emulator.ptx import hazard

    triton.runtime.driver.set_active(OfflineDriver("9.0"))
    tensors = (
        torch.empty(64, 64, dtype=t, device="meta")
        for t in (torch.bfloat16, torch.bfloat16, SINGLE)
    )
    binary = hazard.scaled_product.warmup(*tensors, 128, least, 64, 64, 64, False, grid=(1,))
    return Kernel(binary, "", False, True)


def planted(fault: str) -> str:
    """What is found wrong with a kernel that has a fault."""
    case = Case("planted", (64, 144, 64), (16, 56, 56), **SERVED)
    if fault in BROKEN:
        return inspect(broken(BROKEN[fault]), case, "9.0").wrong
    arch = "gfx942" if fault in AMD_FAULTS else "9.0"
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
        if fault == "reads of 2 bytes":
            stack.enter_context(patch(backend.arguments, "turned", lambda: False))
        if fault == "no tensor-core instruction":
            found = list(kernels(replace(case, dtype=SINGLE, tf32=False), arch))
        else:
            found = list(kernels(case, arch))
    return ", ".join(inspect(k, case, arch).wrong for k in found)


def every_kernel() -> set[str]:
    """Names of what the library launches."""
    from triton.runtime.jit import JITFunction

    modules = [m for m in vars(backend.launch.kernels()).values() if isinstance(m, ModuleType)]
    functions = [f for m in modules for f in vars(m).values() if isinstance(f, JITFunction)]
    return {f.__name__ for f in functions if f.do_not_specialize}


# By the least depth of the product, of which a step has 64.
BROKEN = {"operands overwritten in flight": 64, "serialised products": 0}
AMD_FAULTS = ("reads of 2 bytes",)
FAULTS = (
    *BROKEN, "spills in a loop", "bytes in local memory", "shared memory",
    "no tensor-core instruction", "loads of 2 bytes", *AMD_FAULTS,
)  # fmt: skip


def compiled(sweep: tuple[str, int]) -> tuple[int, int]:
    """How many kernels a sweep of sizes may compile, and how many it does."""
    import triton

    triton.runtime.driver.set_active(OfflineDriver("9.0"))
    name, most = sweep
    if name == "training":
        return most, keys.training()
    return most, max(keys.inference(channels_last) for channels_last in (True, False))


def measure(args: argparse.Namespace) -> list[Row]:
    """Rows of what is asked for, printed as they come; and of faults that are not seen."""
    named = TABLE if args.table else dict.fromkeys(SUBSET, KINDS) if args.triton else SUBSET
    chosen = args.arch or ([*NVIDIA, *AMD] if args.all else list(named))
    tasks = [
        (c, a)
        for a in chosen for c in CASES
        if c.name in (args.case or ([c.name] if args.all else named.get(a, SOME)))
    ]  # fmt: skip
    print(measured.HEADER)
    found: list[Row] = []
    with ProcessPoolExecutor(2) as pool:
        for some in pool.map(rows, tasks):
            for row in some:
                if row not in found:
                    print(row, flush=True)
                found.append(row)
        if named is SUBSET and not args.case and "9.0" in chosen:
            for fault, told in zip(FAULTS, pool.map(planted, FAULTS), strict=True):
                if fault not in told:
                    sys.exit(f"a planted fault is not seen: {fault}")
            for name in sorted(every_kernel() - {row.kernel for row in found}):
                sys.exit(f"no case has the kernel {name}")
            for most, count in pool.map(compiled, (("inference", 40), ("training", 50))):
                if count > most:
                    sys.exit(f"changes of sizes compile {count} kernels, more than {most}")
    return found


def others(args: argparse.Namespace) -> Iterator[list[str]]:
    """What to run with other versions of Triton, as arguments."""
    if args.triton:
        return
    if args.all or args.table:
        chosen = ["--all" if args.all else "--table"]
        for name in ("arch", "case"):
            if getattr(args, name):
                chosen += [f"--{name}", *getattr(args, name)]
        for version in (OLDEST, NEWEST):
            yield ["--triton", version, *chosen]
    elif not (args.arch or args.case):
        yield ["--triton", OLDEST, "--arch", "8.0"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="*", help=f"of {', '.join([*NVIDIA, *AMD])}")
    parser.add_argument("--case", nargs="*", help="names of cases")
    parser.add_argument(
        "--all", action="store_true", help="every case on every architecture by every version"
    )
    parser.add_argument("--table", action="store_true", help="what the table has beside the subset")
    parser.add_argument("--triton", metavar="VERSION", help="by this one alone")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all rows")
    parser.add_argument("--write", action="store_true", help="put the rows into the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # nothing from an earlier run counts
        found = measure(args)
    written = measured.unique(found)
    if args.json:
        measured.save(written, args.json, add=args.triton is not None)
    table = json.loads(measured.TABLE.read_text())
    if args.write:
        table = measured.merged(written, table)
        measured.save(table, measured.TABLE)
    told, worse = measured.changes(written, table), measured.worse(written, table)
    for line in told:
        print(line)
    if told:
        print("the table differs: is it for the better? make static ARGS=--write")
    for line in worse:
        print(f"slower: {line}")
    bad = sum(bool(row.wrong) for row in found) + len(worse)
    print(f"{len(written)} kernels, {bad} wrong, {len(told)} other than in the table")
    failed = bool(bad or not found)
    for arguments in others(args):
        arguments += ["--json", str(args.json)] if args.json else []
        arguments += ["--write"] if args.write else []
        print(f"\nTriton {arguments[1]}", flush=True)
        failed |= bool(subprocess.run([sys.executable, __file__, *arguments]).returncode)
    return int(failed)


FORWARD = ("tap_conv", "parallel_conv", "pair_conv")
PACKED = ("tap_conv", "parallel_conv", "input_gradient", "parallel_input_gradient")
DENSE = (*PACKED, "pair_conv", "weight_gradient", "parallel_weight_gradient")

if __name__ == "__main__":
    sys.exit(main())
