"""Times of Triton's dense kernels on an H200, told by machine code.

``python -m benchmarks.predicted`` prints the table. A prediction, not a measurement. Of each kernel
the committed table of ``make static`` says how many instructions its loop issues per cycle that the
tensor cores need (slots), and how many stand outside of it; tiles say how often both happen,
registers and shared memory how many programs share a multiprocessor. A tile takes the longer of
what tensor cores and schedulers need, a wave as long as its tiles, a kernel the longer of its
waves and its bytes at 4.3 TB/s. Loads are taken to be there when they are needed: real kernels are
slower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastst.backends.triton import gradient_tiles, tiles
from fastst.machine import gpu
from fastst.problem.spec import PairProblem, Pass

from . import shapes
from .floors import DENSE, MEMORY

TABLE = Path(__file__).parents[1] / "tests/static/table.json"
ARCH, COMPILER = "9.0", "triton 3.7.1"
PROCESSORS, RATE = 132, 2048  # of an H200; FMAs of 16 bits in a cycle of one
CLOCK = DENSE / (2 * RATE * PROCESSORS)  # at which products alone are the roofline
LAYERS = ("64→144→64", "128→288→128")


class Predicted(NamedTuple):
    """Of one kernel; times in µs."""

    kernel: str
    slots: float
    outside: int  # instructions
    programs: int  # that share a multiprocessor
    waves: float
    time: float
    floor: float


def table() -> str:
    """Markdown, one row a kernel of a training step in bfloat16."""
    lines = [
        "| layer, N×T×H×W | kernel | slots | outside | programs | waves | µs, floor | µs | share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in shapes.ALL:
        if case.family == "r2plus1d-18" and case.label.split(",")[0] in LAYERS:
            for p in _kernels(case):
                share = f"{p.floor / p.time:.0%}"
                lines.append(
                    f"| {case.label} | {p.kernel} | {p.slots:.2f} | {p.outside} | {p.programs} | "
                    f"{p.waves:.1f} | {p.floor:.0f} | {p.time:.0f} | {share} |"
                )
    return "\n".join(lines)


def _kernels(case: shapes.Case) -> Iterator[Predicted]:
    problem = case.problem(torch.bfloat16)
    assert isinstance(problem, PairProblem)
    rows = [r for r in json.loads(TABLE.read_text()) if r["arch"] == ARCH]
    name = case.label.split(",")[0].replace("→", "-")
    rows = [r for r in rows if r["compiler"] == COMPILER and r["case"] == name]
    x = problem.batch * problem.passes[0].in_channels * math.prod(problem.size)
    u = problem.batch * math.prod(problem.mid_shape[1:])
    y = math.prod(problem.out_shape)
    read = ((x, u), (u, y))  # elements that each pass reads and writes
    for p, size, (into, out) in zip(problem.passes, problem.pass_sizes, read, strict=True):
        positions, count = problem.batch * math.prod(size), math.prod(p.kernel)
        flops = p.flops(positions)
        for kernel, moved in (
            ("tap_conv", into + out),
            ("input_gradient", into + out + (u if p is problem.passes[1] else 0)),
            ("weight_gradient", into + out),
        ):
            channels, columns = p.in_channels, p.out_channels
            if kernel == "input_gradient":
                channels, columns = columns, channels
            sizes = tiles.Sizes(
                positions, channels, columns, 1, count, torch.bfloat16, True, (9, 0), PROCESSORS
            )
            floor = max(flops / DENSE, 2 * moved / MEMORY)
            yield _predict(kernel, p, sizes, rows, floor, 2 * moved / MEMORY)


def _predict(
    kernel: str, p: Pass, sizes: tiles.Sizes, rows: Sequence[Any], floor: float, memory: float
) -> Predicted:
    c: Any
    if kernel == "weight_gradient":
        c = gradient_tiles.weight_gradient(sizes)[0]
        across, along = gradient_tiles.weight_blocks(
            c, sizes.channels, sizes.out_channels, sizes.taps
        )
        boxes = math.ceil(sizes.positions / c.block_p)
        each = gradient_tiles.boxes_per_split(boxes, across * along, PROCESSORS)
        count, steps = across * along * math.ceil(boxes / each), each
        products = c.block_p * c.block_r * c.columns * steps
    else:
        found = tiles.candidates(sizes)
        if kernel == "input_gradient":
            found = gradient_tiles.input_gradient(sizes, p.kind == "temporal", 1)
        c = found[0]
        count = math.ceil(sizes.positions / c.block_p) * math.ceil(sizes.out_channels / c.columns)
        depth = sizes.taps * gpu.round_up(sizes.channels, c.block_k)
        products = c.block_p * c.columns * depth
    told = str(c).split("(", 1)[1].rstrip(")").replace("block_", "").replace("num_", "")
    (row,) = (r for r in rows if r["kernel"] == kernel and r["config"] == told)
    tensor = products / RATE
    issued = row["slots"] * tensor + row["outside"] * c.num_warps / 4
    programs = min(
        65536 // (row["registers"] * 32 * c.num_warps), 228 * 1024 // (row["shared"] + 1024),
        64 // c.num_warps,
    )  # fmt: skip
    # Programs of one multiprocessor share both; one alone does not overlap its ends with its loop.
    alone = max(1.0, row["slots"]) * tensor + row["outside"] * c.num_warps / 4
    waves = count / (PROCESSORS * programs)
    wave = max(alone, programs * max(tensor, issued))
    time = max(math.ceil(waves) * wave / CLOCK, memory)
    where = "spatial" if p.kind == "spatial" else "temporal"
    return Predicted(
        f"`{kernel}`, {where}", row["slots"], row["outside"], programs, waves, time * 1e6,
        floor * 1e6,
    )  # fmt: skip


if __name__ == "__main__":
    print(table())
