"""Compile the Triton kernels for a GPU, execute their PTX, and hold the results to the rule.

A process of its own: Triton decides when it is imported whether it interprets. The configurations
are those of the fuzz, forward and every gradient, against float64:

    python -m tests.emulator.ptx.triton                           every case on 8.0 and 9.0
    python -m tests.emulator.ptx.triton --fuzz 20 --arch 9.0      random configurations as well
    python -m tests.emulator.ptx.triton --count FILE              what a profiler would count
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = os.environ.get("FASTST_PTX_CACHE") or str(
    Path(tempfile.gettempdir()) / f"fastst-ptx-{os.getuid()}"
)

import torch
import triton

from emulator.ptx.executed import Executed
from emulator.ptx.machine import Error
from emulator.ptx.triton import executing
from fastst.backends.triton import launch
from tests.emulator.ptx import EXECUTED
from tests.support import fuzz
from tests.support.fuzz import Config, ConvConfig

BF16, HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64
CHANNELS_LAST = {"x_layout": "channels_last"}
WIDE = {"channels": 64, "mid": 144, "out": 64, "size": (4, 8, 8), "norm": "batch", **CHANNELS_LAST}
# Every kernel that ships, at least once, on the smallest shape that reaches it.
CASES: dict[str, Config | ConvConfig] = {
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
    "residual": Config(dtype=BF16, residual=True, outer_activation="relu"),
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
        dtype=BF16, channels=16, out=16, groups=16, norm="batch", past=1, input_activation="relu",
        **CHANNELS_LAST,
    ),
}  # fmt: skip


@contextlib.contextmanager
def serving(capability: tuple[int, int]) -> Iterator[Executed]:
    """Within, the Triton backend takes CPU tensors and its compiled kernels are executed."""
    launch.kernels()
    with (
        executing(capability) as executed,
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # what a CPU tensor is asked for
        mock.patch.object(launch, "serves_cpu", lambda: True),
        mock.patch.object(launch, "capability", lambda device: capability),
        mock.patch.object(launch, "processors", lambda device: 4),
        mock.patch.object(launch, "tf32_allowed", lambda: False),
    ):
        yield executed


def nth(pattern: str, replacement: str) -> Callable[[str], str]:
    """Change what a pattern finds in a kernel, everywhere."""
    return lambda text: re.sub(pattern, replacement, text)


# A fault in compiled code, and the error that must tell it.
PLANTS: dict[str, tuple[str, str, Callable[[str], str], str]] = {
    "no proxy fence": (
        "64-144-64", "9.0", nth(r"\tfence\.proxy\.async[^;]*;", "\t"), "fence.proxy.async",
    ),
    "no wgmma fence": (
        "64-144-64", "9.0", nth(r"\twgmma\.fence\.sync\.aligned;", "\t"), "wgmma.fence",
    ),
    "products not waited for": (
        "64-144-64", "9.0", nth(r"wgmma\.wait_group\.sync\.aligned (\d+)",
                                "wgmma.wait_group.sync.aligned 7"),
        "under way",
    ),
    "copies not waited for": (
        "64-144-64", "8.0", nth(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 7"),
        "copy under way",
    ),
    "no barriers": ("small", "8.0", nth(r"\tbar\.sync[^;]*;", "\t"), "nothing has written|error"),
    "operands exchanged": (
        "small", "8.0",
        nth(r"(mma\.sync.*?\{.*?\},\s*\{) ?(%r\d+), (%r\d+)", r"\1 \3, \2"), "error",
    ),
    "one word beyond": (
        "small", "8.0", nth(r"(st\.global\.b16 \[ ?%rd\d+ ?\+ ?)0", r"\g<1>99999998"),
        "outside of every tensor",
    ),
}  # fmt: skip


def planted(name: str) -> str | None:
    """Run a kernel with a fault in it; returns what is wrong with how it was seen, or None."""
    case, arch, plant, telling = PLANTS[name]
    major, minor = arch.split(".")
    with serving((int(major), int(minor))) as executed:
        executed.plant = plant
        try:
            fuzz.hold(CASES[case], "triton", device="cpu")
        except (Error, AssertionError) as error:
            return None if re.search(telling, str(error)) else f"told otherwise: {error}"
    return "not seen"


def counts(executed: Executed) -> list[dict[str, object]]:
    """A row for each kernel that ran: what a profiler would count.

    sectors: of 32 bytes, for each request of a warp to global memory; passes: over the banks, for
    each request to shared memory, 1 where there are no conflicts.
    """
    rows = []
    for name, counted in executed.counted:
        kinds = counted["kinds"]
        products = sum(n for kind, n in kinds.items() if re.match(r"(wg)?mma\.(mma_|sync)", kind))
        row = {"kernel": name, "instructions": counted["instructions"], "products": products}
        row |= {key: counted[key] for key in ("bytes_read", "bytes_written")}
        for key, space in (("sectors", "global"), ("passes", "shared")):
            requests, parts = (sum(s[n] for s in counted[space].values()) for n in (0, 1))
            row[key] = round(parts / requests, 2) if requests else None
        rows.append(row)
    return rows


def write(path: Path, rows: dict[str, list[dict[str, object]]]) -> None:
    """A table with a line for each kernel."""
    lines = [
        f'  "{case}": [\n   ' + ",\n   ".join(json.dumps(row) for row in kernels) + "\n  ]"
        for case, kernels in rows.items()
    ]
    head = f'{{\n "triton": "{triton.__version__}",\n "rows": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n }\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", help="compute capabilities; default 8.0 and 9.0")
    parser.add_argument("--only", action="append", help="cases by name")
    parser.add_argument("--plant", action="append", default=[], help="faults by name")
    parser.add_argument("--count", metavar="FILE", help="write what was counted, as JSON")
    parser.add_argument("--fuzz", type=int, default=0, help="random configurations as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wrong, table = 0, {}
    for name in args.plant:
        said = planted(name)
        print(f"planted {name}: {said or 'seen'}", flush=True)
        wrong += said is not None
    for arch in args.arch or EXECUTED:
        only = args.only or ([] if args.plant else EXECUTED[arch] if args.count else CASES)
        major, minor = arch.split(".")
        with serving((int(major), int(minor))) as executed:
            executed.count = args.count is not None
            for name in only:
                try:
                    fuzz.hold(CASES[name], "triton", device="cpu")
                    print(f"{arch} {name}: {len(executed.kernels)} kernels", flush=True)
                except (Error, AssertionError) as error:
                    wrong += 1
                    print(f"{arch} {name}: {error}", flush=True)
                if args.count:
                    table[f"{arch} {name}"] = counts(executed)
                executed.kernels.clear()
                executed.counted.clear()
            if args.fuzz:
                fuzz.fuzz("triton", args.fuzz)
    if args.count:
        write(Path(args.count), table)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
