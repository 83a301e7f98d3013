"""Execute what nvcc makes of the CUDA library's kernels, and hold the results to the rule.

    python -m tests.emulator.ptx.cuda                              every case
    python -m tests.emulator.ptx.cuda --only temporal --seed 3     one, with warps in another order

nvcc compiles a source when a kernel of it is first asked for, once for the same sources.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from unittest import mock

os.environ["FASTST_CUDA_EMULATE"] = "1"

import torch

from emulator.ptx.cuda import executing
from emulator.ptx.machine import Error
from fastst.backends.cuda import library
from tests.support import fuzz
from tests.support.fuzz import Config

BF16, HALF, DOUBLE = torch.bfloat16, torch.float16, torch.float64
DENSE = {
    "batch": 1, "channels": 64, "mid": 72, "out": 64, "size": (4, 8, 8),
    "x_layout": "channels_last", "grad_layout": "channels_last",
}  # fmt: skip
# The case, whether backward runs as well, and a name that one of the kernels must have.
CASES: dict[str, tuple[Config, bool, str]] = {
    "generic": (Config(dtype=HALF, norm="batch", channels=5), True, "tap_conv"),
    "generic float64": (Config(dtype=DOUBLE, norm="batch"), True, "tap_conv"),
    "depthwise": (
        Config(
            dtype=BF16, channels=16, mid=16, out=16, groups=(16, 16), norm="frozen",
            x_layout="channels_last",
        ),
        True,
        "depthwise",
    ),
    "forward": (Config(dtype=BF16, norm="batch", **DENSE), False, "hopper_temporal"),
    "forward half": (
        Config(dtype=HALF, norm="frozen", activation="silu", residual=True, **DENSE), False,
        "hopper_spatial",
    ),
    "stride": (
        Config(dtype=BF16, norm="none", stride=(2, 2, 2), **DENSE), False, "hopper_spatial",
    ),
    "backward": (Config(dtype=BF16, norm="batch", **DENSE), True, "hopper_weight_gradient"),
    "stem": (
        Config(
            dtype=BF16, norm="batch", batch=1, channels=3, mid=45, out=64, kernel=(3, 7, 7),
            stride=(1, 2, 2), padding=(1, 3, 3), size=(4, 16, 16),
        ),
        False,
        "hopper_stem",
    ),
}  # fmt: skip
# Faults in compiled code, and the error that must tell them.
PLANTS: dict[str, tuple[str, Callable[[str], str], str]] = {
    "no wgmma fence": (
        "forward", lambda text: text.replace("wgmma.fence.sync.aligned;", ""), "wgmma.fence",
    ),
    "products not waited for": (
        "forward",
        lambda text: re.sub(r"(wgmma\.wait_group\.sync\.aligned) \d+", r"\1 7", text),
        "under way",
    ),
    "too few bytes expected": (
        "forward",
        lambda text: text.replace("mbarrier.arrive.expect_tx.shared::cta.b64",
                                  "mbarrier.arrive.shared::cta.b64"),
        "deadlock|arrivals|under way|nothing has written",
    ),
}  # fmt: skip


def run(case: str, seed: int = 0, plant: Callable[[str], str] | None = None) -> list[str]:
    """Execute a case; returns the kernels that ran.

    Raises:
        AssertionError: the results are wrong, or another kernel ran than was meant.
        Error: what the machine found.
    """
    config, backward, kernel = CASES[case]
    with (
        executing() as (module, executed),
        mock.patch.object(library, "emulated", lambda: module),
    ):
        executed.seed = seed
        if plant is not None:
            executed.plant = plant
        fuzz.hold(config, "cuda", backward=backward)
    assert any(kernel in name for name in executed.kernels), executed.kernels
    return executed.kernels


def planted(name: str) -> str | None:
    """Returns what is wrong with how a fault was seen, or None."""
    case, plant, telling = PLANTS[name]
    try:
        run(case, plant=plant)
    except (AssertionError, Error, RuntimeError) as error:
        return None if re.search(telling, str(error)) else f"told otherwise: {error}"
    return "not seen"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="cases by name")
    parser.add_argument("--plant", action="append", default=[], help="faults by name")
    parser.add_argument("--seed", type=int, default=0, help="of the order of warps and copies")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    for name in args.plant:
        said = planted(name)
        print(f"planted {name}: {said or 'seen'}", flush=True)
        wrong += said is not None
    for name in args.only or ([] if args.plant else CASES):
        try:
            print(f"{name}: {', '.join(run(name, args.seed))}", flush=True)
        except (AssertionError, Error, RuntimeError) as error:
            wrong += 1
            print(f"{name}: {error}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
