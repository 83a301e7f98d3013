"""Compile the Triton kernels for a GPU, execute their PTX, and hold the results to the rule.

A process of its own: Triton decides when it is imported whether it interprets. The configurations
are those of the fuzz, forward and every gradient, against float64:

    python -m tests.emulator.ptx.triton                           every case on 8.0 and 9.0
    python -m tests.emulator.ptx.triton --only "9.0 .*"           those on 9.0
    python -m tests.emulator.ptx.triton --fuzz 20                 random configurations
    python -m tests.emulator.ptx.triton --count FILE              what a profiler would count
    python -m tests.emulator.ptx.triton --plant "no barriers"     a fault that must be seen
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = os.environ.get("FASTST_PTX_CACHE") or str(
    Path(tempfile.gettempdir()) / f"fastst-ptx-{os.getuid()}"
)

import torch
import triton

from emulator.ptx.executed import Executed
from emulator.ptx.triton import executing
from fastst.backends.triton import launch, tiles
from tests.emulator.ptx.driver import Driver, Plant, everywhere, in_both
from tests.support.fuzz import CONV_NAMES, NAMES, Config, ConvConfig, ConvLimits, Limits

BF16, HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64
CHANNELS_LAST = {"x_layout": "channels_last"}
WIDE = {"channels": 64, "mid": 144, "out": 64, "size": (4, 8, 8), "norm": "batch", **CHANNELS_LAST}
INFERENCE = {"constant": NAMES}
# Every kernel that ships, in both dtypes of 16 bits, on the smallest shape that reaches it.
CASES = in_both({
    "small": Config(dtype=BF16, norm="batch"),
    "64-144-64": Config(dtype=BF16, **WIDE),
    "64-144-64 half silu": Config(dtype=HALF, **{**WIDE, "activation": "silu", "batch": 1}),
    "frozen": Config(dtype=BF16, norm="frozen", channels=32, mid=48, out=32, **CHANNELS_LAST),
    "stride": Config(dtype=HALF, channels=16, mid=32, out=16, stride=(2, 2, 2), size=(6, 8, 8)),
    "stem": Config(
        dtype=BF16, channels=3, mid=45, out=64, kernel=(3, 7, 7), stride=(1, 2, 2),
        padding=(1, 3, 3), size=(4, 12, 12), norm="batch",
    ),
    "depthwise": Config(
        dtype=BF16, channels=32, mid=32, out=32, groups=(32, 32), norm="batch", **CHANNELS_LAST
    ),
    "grouped": Config(dtype=BF16, channels=32, mid=32, out=32, groups=(2, 2), norm="batch"),
    "temporal-first": Config(dtype=HALF, order="temporal-first", channels=16, mid=24, out=16),
    "parallel add": Config(
        dtype=BF16, op="parallel_conv2plus1d", channels=16, mid=16, out=16,
        branch_activation="relu",
    ),
    "parallel cat": Config(
        dtype=HALF, op="parallel_conv2plus1d", channels=16, mid=24, out=8, combine="cat"
    ),
    "parallel depthwise": Config(
        dtype=BF16, op="parallel_conv2plus1d", channels=16, mid=16, out=16, groups=(16, 16)
    ),
    "float32": Config(dtype=SINGLE, norm="batch"),
    "float64": Config(dtype=DOUBLE, norm="batch"),
    "residual": Config(dtype=BF16, residual=True, outer_activation="silu"),
    "modes": Config(
        dtype=HALF, padding_mode=("reflect", "replicate"), causal=True, padding=(0, 1, 1)
    ),
    "conv3d group": ConvConfig(
        dtype=BF16, channels=32, out=24, size=(3, 6, 6), norm="group", norm_groups=4,
        padding_mode=("zeros", "replicate"), input_activation="silu", residual=True,
        **CHANNELS_LAST,
    ),
    "conv3d past": ConvConfig(
        dtype=HALF, channels=24, out=16, norm="rms", past=2, causal=True, padding=(0, 1, 1),
        input_activation="silu", past_layout="channels_last", **CHANNELS_LAST,
    ),
    "conv3d depthwise": ConvConfig(
        dtype=BF16, channels=16, out=16, groups=16, norm="batch", past=1, input_activation="silu",
        **CHANNELS_LAST,
    ),
    "inference": Config(dtype=BF16, **{**WIDE, "norm": "frozen"}, **INFERENCE),
    "inference one kernel": Config(
        dtype=BF16, channels=16, mid=24, out=16, size=(4, 8, 8), norm="frozen", **CHANNELS_LAST,
        **INFERENCE,
    ),
    "inference statistics of many tiles": Config(
        dtype=BF16, batch=1, channels=2, mid=3, out=2, size=(2, 256, 300), kernel=(1, 1, 1),
        padding=0, norm="batch", **CHANNELS_LAST, **INFERENCE,
    ),
    "inference parallel": Config(
        dtype=BF16, op="parallel_conv2plus1d", channels=16, mid=16, out=16,
        branch_activation="relu", **INFERENCE,
    ),
    "inference depthwise": Config(
        dtype=BF16, channels=32, mid=32, out=32, groups=(32, 32), norm="frozen", **CHANNELS_LAST,
        **INFERENCE,
    ),
    "inference conv3d": ConvConfig(
        dtype=BF16, channels=32, out=24, size=(3, 6, 6), norm="group", norm_groups=4,
        input_activation="silu", constant=CONV_NAMES, **CHANNELS_LAST,
    ),
})  # fmt: skip


@contextlib.contextmanager
def serving(arch: str) -> Iterator[Executed]:
    """Within, the Triton backend takes CPU tensors and its compiled kernels are executed."""
    launch.kernels()
    major, minor = map(int, arch.split("."))
    capability = major, minor
    with (
        executing(capability) as executed,
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # what a CPU tensor is asked for
        mock.patch.object(launch, "serves_cpu", lambda: True),
        mock.patch.object(launch, "capability", lambda device: capability),
        mock.patch.object(launch, "processors", lambda device: 4),
        mock.patch.object(launch, "allows_tf32", lambda: False),
        mock.patch.object(tiles, "pair_slots", lambda config: 1.0),  # so that pair_conv runs, too
    ):
        yield executed


PLANTS = {
    "no proxy fence": Plant(
        "9.0 64-144-64", everywhere(r"\tfence\.proxy\.async[^;]*;", "\t"), "fence.proxy.async",
    ),
    "no wgmma fence": Plant(
        "9.0 64-144-64", everywhere(r"\twgmma\.fence\.sync\.aligned;", "\t"), "wgmma.fence",
    ),
    "products not waited for": Plant(
        "9.0 64-144-64", everywhere(r"wgmma\.wait_group\.sync\.aligned (\d+)",
                                "wgmma.wait_group.sync.aligned 7"),
        "under way",
    ),
    "copies not waited for": Plant(
        "8.0 64-144-64", everywhere(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 7"),
        "copy under way",
    ),
    "no barriers": Plant(
        "8.0 small", everywhere(r"\tbar\.sync[^;]*;", "\t"), "nothing has written|error"
    ),
    "operands exchanged": Plant(
        "8.0 small",
        everywhere(r"(mma\.sync.*?\{.*?\},\s*\{) ?(%r\d+), (%r\d+)", r"\1 \3, \2"), "error",
    ),
    "one word beyond": Plant(
        "8.0 small", everywhere(r"(st\.global\.b16 \[ ?%rd\d+ ?\+ ?)0", r"\g<1>99999998"),
        "outside of every tensor",
    ),
}  # fmt: skip


SMALL = (
    Limits(channels=20, frames=4, space=7, work=100_000),
    ConvLimits(channels=20, frames=4, space=7, work=100_000),
)
DRIVER = Driver(
    "triton", f"triton {triton.__version__}", CASES,
    [f"{arch} {case}" for arch in ("8.0", "9.0") for case in CASES],
    {"8.0": SMALL, "9.0": SMALL}, PLANTS, serving,
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(DRIVER.main(__doc__))
