"""Execute the PTX of the CUDA library's kernels, and hold the results to the rule.

The library must have been built here (python setup.py build_ext --inplace):

    python -m tests.emulator.ptx.cuda                               every case on 8.0 and 9.0
    python -m tests.emulator.ptx.cuda --only "9.0 stem" --seed 3    warps in another order
    python -m tests.emulator.ptx.cuda --instances                   every kernel that ships
    python -m tests.emulator.ptx.cuda --plant "no wgmma fence"      a fault that must be seen
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

os.environ["FASTST_CUDA_EMULATE"] = "1"

import torch

from emulator.ptx import cuda as machine
from emulator.ptx.executed import Executed
from fastst.backends import cuda
from fastst.backends.contract import Example
from fastst.backends.cuda import examples, hopper, library
from fastst.dispatch import selfcheck
from tests.emulator.ptx.driver import Driver, Plant, Row, everywhere, in_both
from tests.static import cuda as static
from tests.support.fuzz import NAMES, Config, ConvConfig, ConvLimits, Limits

BF16, HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64
DENSE = {
    "batch": 1, "channels": 64, "mid": 72, "out": 64, "size": (4, 8, 8),
    "x_layout": "channels_last", "grad_layout": "channels_last",
}  # fmt: skip
INFERENCE = {"constant": NAMES}
CONV: dict[str, Any] = {"out": 6, "size": (3, 4, 5), "input_activation": "silu"}
CASES = in_both({
    "conv3d": ConvConfig(dtype=HALF, norm="group", norm_groups=2, per_frame=True, past=1, **CONV),
    "conv3d residual": ConvConfig(dtype=BF16, norm="batch", residual=True, **CONV),
    "conv3d positions": ConvConfig(dtype=HALF, norm="layer", past=2, **CONV),
    "conv3d float32": ConvConfig(dtype=SINGLE, norm="rms", **CONV),
    "conv3d float64": ConvConfig(dtype=DOUBLE, norm="l2", **CONV),
    "generic": Config(dtype=HALF, norm="batch", channels=5),
    "generic residual": Config(dtype=BF16, norm="frozen", residual=True, activation="silu"),
    "generic float32": Config(dtype=SINGLE, norm="batch"),
    "generic float64": Config(dtype=DOUBLE, norm="batch"),
    "parallel": Config(
        dtype=BF16, op="parallel_conv2plus1d", mid=8, out=8, branch_activation="relu"
    ),
    "parallel cat": Config(
        dtype=HALF, op="parallel_conv2plus1d", mid=8, out=8, combine="cat", **INFERENCE
    ),
    "depthwise": Config(
        dtype=BF16, channels=16, mid=16, out=16, groups=(16, 16), norm="frozen",
        x_layout="channels_last",
    ),
    "forward": Config(dtype=BF16, norm="batch", **DENSE, **INFERENCE),
    "forward half": Config(
        dtype=HALF, norm="frozen", activation="silu", residual=True, **DENSE, **INFERENCE
    ),
    "deep": Config(dtype=BF16, **{**DENSE, "channels": 256, "mid": 48}, **INFERENCE),
    "stride": Config(dtype=BF16, norm="none", stride=(2, 2, 2), **DENSE, **INFERENCE),
    "backward": Config(dtype=BF16, norm="batch", **DENSE),
    "stem": Config(
        dtype=BF16, norm="batch", batch=1, channels=3, mid=45, out=64, kernel=(3, 7, 7),
        stride=(1, 2, 2), padding=(1, 3, 3), size=(4, 16, 16), **INFERENCE,
    ),
})  # fmt: skip
NUMBERS = {"8.0": "80", "9.0": "90a"}
WGMMA_A = r"(?s)(wgmma\.fence\.sync\.aligned;)((?:(?!wgmma\.fence).)*?\}, \{(%r\d+), )"
PLANTS = {
    "no wgmma fence": Plant(
        "9.0 forward", everywhere(r"wgmma\.fence\.sync\.aligned;", ""), "wgmma.fence",
    ),
    "operand written behind the fence": Plant(
        "9.0 forward", everywhere(WGMMA_A, r"\1 xor.b32 \3, \3, 0; \2"), "wgmma.fence",
    ),
    "operand written in flight": Plant(
        "9.0 forward",
        everywhere(r"(?s)(\}, \{(%r\d+), %r\d+, %r\d+, %r\d+\}, %rd\d+, p(?:(?!mma_async).)*?"
                   r"wgmma\.commit_group\.sync\.aligned;)", r"\1 xor.b32 \2, \2, 0;"),
        "a wgmma under way will read",
    ),
    "operands off by one": Plant(
        "9.0 forward",
        everywhere(r"\}, \{(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}, %rd",
                   r"}, {\2, \3, \4, \1}, %rd"),
        "error",
    ),
    "no proxy fence": Plant(
        "9.0 backward", everywhere(r"fence\.proxy\.async[^;]*;", ""), "fence.proxy.async",
    ),
    "products not waited for": Plant(
        "9.0 forward",
        everywhere(r"(wgmma\.wait_group\.sync\.aligned) \d+", r"\1 7"), "under way",
    ),
    "stage released early": Plant(
        "9.0 deep", everywhere(r"(wgmma\.wait_group\.sync\.aligned) 1", r"\1 2"),
        "still to be read by a product",
    ),
    "too few bytes expected": Plant(
        "9.0 forward",
        everywhere(r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64",
                   "mbarrier.arrive.shared::cta.b64"),
        "deadlock|arrivals|under way|nothing has written",
    ),
}  # fmt: skip


@functools.cache
def readable(kernel: str) -> str:
    return static.names([kernel])[kernel]


@contextlib.contextmanager
def serving(arch: str) -> Iterator[Executed]:
    """Within, the CUDA backend takes CPU tensors and the PTX of its kernels is executed."""
    with (
        machine.executing(NUMBERS[arch], readable) as (module, executed),
        mock.patch.object(library, "load_emulated", lambda: module),
        mock.patch.object(hopper, "is_emulated", lambda: arch == "9.0"),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (8, 0)),
    ):
        yield executed


def compiler() -> str:
    """nvcc and its version, as the PTX says."""
    file, *_ = next(iter(machine.kernels("80").values()))
    found = re.search(r"Cuda compilation tools, release ([\d.]+)", file.read_text())
    return f"nvcc {found[1] if found else 'of an unknown version'}"


def instances(arch: str, executed: Executed, pattern: str) -> Iterator[tuple[str, str | None, Row]]:
    """Run calls of the self-check, each twice, in two orders of warps."""
    cpu = torch.device("cpu")

    def reordered(run: Any) -> Any:
        def first(*call: Any) -> Any:
            executed.seed += 1
            return run(*call)

        return first

    for dtype in (BF16, HALF, SINGLE):
        word = str(dtype).removeprefix("torch.")
        for kind in examples.kinds(cpu, dtype):
            if kind.startswith("hopper") and arch != "9.0":
                continue
            for example in examples.examples(cuda.CALLS, kind, dtype, cpu):
                assert isinstance(example, Example)
                name = f"{arch} {example.name} in {word}"
                if not re.search(pattern, name):
                    continue
                executed.kernels.clear()
                again = example._replace(run=reordered(example.run))
                why = selfcheck.check(cuda.BACKEND, [again], cpu, dtype)
                yield name, why, {
                    "dtype": word,
                    "family": "depthwise" if kind.startswith("depthwise") else "dense",
                    "mode": "training" if kind.endswith("backward") else "inference",
                    "kernels": sorted(set(executed.kernels)),
                }  # fmt: skip


LIMITS = {
    "8.0": [
        Limits(channels=20, frames=4, space=7, work=100_000),
        ConvLimits(batch=2, channels=17, frames=4, space=6, work=60_000),
    ],
    "9.0": [Limits(
        frames=4, space=9, work=2_000_000, dtypes=(BF16, HALF),
        fixed={
            "op": "conv2plus1d", "order": "spatial-first", "kernel": (3, 3, 3), "padding": 1,
            "dilation": (1, 1, 1), "groups": (1, 1), "padding_mode": ("zeros", "zeros"),
            "causal": False, "x_layout": "channels_last", "grad_layout": "channels_last",
        },
        accept=lambda c: all(n % 8 == 0 for n in (c.channels, c.mid, c.out)),
    )],
}  # fmt: skip
GENERAL = ("generic", "conv3d", "parallel", "depthwise")  # what runs on 8.0 as well
RUNS = [f"8.0 {case}" for case in CASES if case.startswith(GENERAL)]
RUNS += [f"9.0 {case}" for case in CASES]
DRIVER = Driver("cuda", compiler(), CASES, RUNS, LIMITS, PLANTS, serving, instances)


if __name__ == "__main__":
    sys.exit(DRIVER.main(__doc__))
