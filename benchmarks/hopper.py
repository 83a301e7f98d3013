"""What the Hopper kernels are expected to take on an H200: ``python -m benchmarks.hopper``.

Arithmetic, not a measurement: the models that choose the tiles (waves of them, each the longer of
its products and its bytes out of L2, and then what is issued besides products), device memory, and
the small launches of a pair.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from fastst.backends.cuda.hopper import launches, weights
from fastst.problem.spec import PairProblem, Pass

from . import shapes
from .floors import DENSE, MEMORY

PROCESSORS = 132
CLOCK = DENSE / (PROCESSORS * 4096)  # at which products reach the ceiling
LAUNCH = 2.5e-6  # seconds that a small kernel takes: packing, statistics, sums of parts
SMALL = {"inference": 1, "training": 2, "backward": 4}  # of them, by phase
# Shares of the product ceiling that the audit of the machine code expected of the kernels as they
# were, by layer: forward at inference, forward counting.
AUDIT = {
    ("64→144→64", "spatial"): ("62-70", "50-57"), ("128→288→128", "spatial"): ("63-70", "55-62"),
    ("256→576→256", "spatial"): ("60-72", "60-72"), ("512→1152→512", "spatial"): ("60-72", "60-72"),
    ("64→230→128", "spatial"): ("40-60", "40-60"), ("128→460→256", "spatial"): ("40-60", "40-60"),
    ("256→921→512", "spatial"): ("40-60", "40-60"), ("64→144→64", "temporal"): ("42-50", "42-50"),
    ("64→144→64", "dx"): ("38-48", ""), ("64→144→64", "dW"): ("25-58", ""),
}  # fmt: skip
for _layer in ("64→230→128", "128→288→128", "128→460→256", "256→576→256", "256→921→512",
               "512→1152→512"):  # fmt: skip
    AUDIT |= {
        (_layer, "temporal"): ("45-65", "45-65"), (_layer, "dx"): ("50-62", ""),
        (_layer, "dW"): ("25-58", ""),
    }  # fmt: skip


def _share(p: Pass, positions: int, clocks: float, moved: float) -> tuple[float, float]:
    """Microseconds, and per cent of the product ceiling."""
    seconds = max(clocks / CLOCK, moved / MEMORY)
    return seconds * 1e6, 100 * p.flops(positions) / DENSE / seconds


def _moved_bytes(problem: PairProblem) -> tuple[int, int, int]:
    """Bytes of x, of u and of y."""
    x = 2 * problem.batch * problem.passes[0].in_channels * math.prod(problem.size)
    return x, problem.bytes(1) - problem.bytes(0), 2 * math.prod(problem.out_shape)


def _shares(problem: PairProblem, *kernels: tuple[int, Any, int]) -> list[tuple[float, float]]:
    """Of kernels by (pass, tile, bytes moved)."""
    positions = [problem.batch * math.prod(s) for s in problem.pass_sizes]
    return [
        _share(problem.passes[i], positions[i], math.inf if t is None else t.clocks, moved)
        for i, t, moved in kernels
    ]


def _forward(problem: PairProblem) -> list[tuple[float, float]]:
    x, u, y = _moved_bytes(problem)
    return _shares(
        problem, (0, launches.spatial_tile(problem), x + u),
        (1, launches.temporal_tile(problem), u + y),
    )  # fmt: skip


def _backward(problem: PairProblem) -> list[tuple[float, float]]:
    """dz, dWt, dx, dWs."""
    x, u, y = _moved_bytes(problem)
    return _shares(
        problem, (1, launches.temporal_gradient_tile(problem), y + 2 * u),
        (1, weights.temporal_tile(problem, 1), y + u),
        (0, launches.spatial_gradient_tile(problem), 2 * u + x),
        (0, weights.spatial_tile(problem, 2), 2 * u + x),
    )  # fmt: skip


def _row(*cells: object) -> str:
    told = (f"{c:.0f}" if isinstance(c, float) else str(c) for c in cells)
    return f"| {' | '.join(told)} |".replace("|  |", "| |").replace("|  |", "| |")


def _rows(case: shapes.Case) -> tuple[list[str], tuple[float, float]]:
    """Of a layer, and the microseconds of an inference call and of a training step."""
    layer = case.label.split(",")[0]
    name = layer.split(" ")[0]
    training = case.problem(torch.bfloat16)
    serving = replace(case, norm=False).problem(torch.bfloat16)
    assert isinstance(training, PairProblem) and isinstance(serving, PairProblem)
    rows: list[str] = []
    sums = [0.0, 0.0]

    def audit(kernel: str) -> tuple[str, str]:
        return AUDIT.get((name, kernel), ("", ""))

    forward = zip(("spatial", "temporal"), _forward(serving), _forward(training), strict=True)
    for kernel, served, trained in forward:
        first, second = audit(kernel)
        rows.append(_row(layer, kernel, *served, first, *trained, second))
        sums = [sums[0] + served[0], sums[1] + trained[0]]
        layer = ""
    for kernel, gradient in zip(("dz", "dWt", "dx", "dWs"), _backward(training), strict=True):
        told = audit("dW" if kernel.startswith("dW") else kernel)[0]
        rows.append(_row("", kernel, "", "", "", *gradient, told))
        sums[1] += gradient[0]
    small, *others = (1e6 * LAUNCH * n for n in SMALL.values())
    rows.append(_row("", "small launches", small, "", "", sum(others), "", ""))
    return rows, (sums[0] + small, sums[1] + sum(others))


def table() -> str:
    """Markdown, one row a kernel of R(2+1)D-18's pairs, bfloat16; the stem has its own."""
    lines = [
        "| layer | kernel | µs, inference | % | audit | µs, training | % | audit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    totals = [0.0, 0.0]
    found = [c for c in shapes.ALL if c.family == "r2plus1d-18" and c.name != "stem"]
    with (
        mock.patch.object(launches, "_processors", lambda device: PROCESSORS),
        mock.patch.object(weights, "_processors", lambda device: PROCESSORS),
    ):
        for case in found:
            rows, sums = _rows(case)
            lines += rows
            totals = [t + s for t, s in zip(totals, sums, strict=True)]
    return "\n".join([*lines, _row("all", "", totals[0], "", "", totals[1], "", "")])


if __name__ == "__main__":
    print(table())
