"""Padding before a convolution, of its own or by calls before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Sides = tuple[tuple[int, int], ...]  # (before, after) of t, h, w

_NONE: Sides = ((0, 0),) * 3


class Pad(NamedTuple):
    """Samples before and after each axis, and what they are."""

    sides: Sides
    mode: str  # as padding_mode of nn.Conv3d


def merge(pads: Sequence[Pad], kind: str) -> Pad | str:
    """Several pads in a row as one of a spatial or temporal convolution, or why that cannot be."""
    real = [p for p in pads if p.sides != _NONE]
    modes = {p.mode for p in real}
    if len(modes) > 1 or (len(real) > 1 and modes & {"reflect", "circular"}):
        return f"it is padded {len(real)} times, as {' and '.join(sorted(modes))}"
    total = tuple(
        (sum(p.sides[i][0] for p in real), sum(p.sides[i][1] for p in real)) for i in range(3)
    )
    foreign = total[:1] if kind == "spatial" else total[1:]
    if any(map(any, foreign)):
        axes = "time" if kind == "spatial" else "space"
        return f"its input is padded in {axes} though it is {kind}"
    return Pad(total, modes.pop() if modes else "zeros")
