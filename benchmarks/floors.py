"""Least times of the named shapes on an H200: ``python -m benchmarks.floors`` prints the table.

Arithmetic, not a measurement: of each kernel the longer of its products and its bytes, at 788
TFLOP/s of dense bfloat16, 67 TFLOP/s on ordinary cores and 4.3 TB/s.
"""

from __future__ import annotations

import math

import torch

from . import shapes

DENSE, ORDINARY, MEMORY = 788e12, 67e12, 4.3e12
FAMILIES = ("r2plus1d-18", "depthwise", "tokenizer", "latents", "parallel-4d")


def table() -> str:
    """Markdown, one row a shape, bfloat16 inference."""
    lines = [
        "| layer, N×T×H×W | GFLOP | MB, two kernels | MB, one | µs, two kernels | µs, one |",
        "|---|---|---|---|---|---|",
    ]
    for case in shapes.ALL:
        if case.family in FAMILIES:
            cells = " | ".join(f"{n:.0f}" if n >= 9.95 else f"{n:.1f}" for n in _floor(case))
            lines.append(f"| {case.label} | {cells} |".replace("| 0.0 |", "| – |"))
    return "\n".join(lines)


def _floor(case: shapes.Case) -> tuple[float, ...]:
    p = case.problem(torch.bfloat16)
    rate = ORDINARY if case.depthwise else DENSE
    one = max(p.flops() / rate, p.bytes(0) / MEMORY)
    if case.combine is not None:
        return p.flops() / 1e9, 0, p.bytes(0) / 1e6, 0, one * 1e6
    x = 2 * p.batch * p.passes[0].in_channels * math.prod(p.size)
    mid, y = p.bytes(1) - p.bytes(0), 2 * math.prod(p.out_shape)
    two = 0.0
    for q, size, moved in zip(p.passes, p.pass_sizes, (x + mid, mid + y), strict=True):
        two += max(q.flops(p.batch * math.prod(size)) / rate, moved / MEMORY)
    return p.flops() / 1e9, p.bytes(2) / 1e6, p.bytes(0) / 1e6, two * 1e6, one * 1e6


def training_table() -> str:
    """Markdown, one row a pair, bfloat16 training with batch norm."""
    lines = [
        "| layer, N×T×H×W | µs, second pass | µs, first pass | µs, backward | µs, step | eager's |",
        "|---|---|---|---|---|---|",
    ]
    for case in shapes.ALL:
        if case.family in ("r2plus1d-18", "depthwise"):
            numbers = _training_floor(case)
            cells = " | ".join(f"{n:.0f}" if n >= 9.95 else f"{n:.1f}" for n in numbers)
            lines.append(f"| {case.label} | {cells} |")
    return "\n".join(lines)


def _training_floor(case: shapes.Case) -> tuple[float, ...]:
    """Gradients of both passes, all of backward, a step; and a step of separate operators."""
    p = case.problem(torch.bfloat16)
    rate = ORDINARY if case.depthwise else DENSE
    x = 2 * p.batch * p.passes[0].in_channels * math.prod(p.size)
    u, y = p.bytes(1) - p.bytes(0), 2 * math.prod(p.out_shape)
    first, second = (
        q.flops(p.batch * math.prod(size)) / rate
        for q, size in zip(p.passes, p.pass_sizes, strict=True)
    )
    if case.depthwise:  # one kernel for the gradients of a pass
        above = max(2 * second, (y + 2 * u) / MEMORY)
        below = max(2 * first, (2 * x + 2 * u) / MEMORY)
    else:
        above = max(second, (y + u) / MEMORY) + max(second, (y + 2 * u) / MEMORY)
        below = 2 * max(first, (x + 2 * u) / MEMORY)
    forward = max(first, (x + u) / MEMORY) + max(second, (u + y) / MEMORY)
    convolutions = 3 * max(first, (x + u) / MEMORY) + 3 * max(second, (u + y) / MEMORY)
    eager = convolutions + (5 + 8) * u / MEMORY  # norm and activation, forward and backward
    return tuple(1e6 * t for t in (above, below, above + below, forward + above + below, eager))


if __name__ == "__main__":
    print(table())
    print(training_table())
