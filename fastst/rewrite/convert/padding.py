"""Padding before a convolution, of its own or by calls before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Sides = tuple[tuple[int, int], ...]  # (before, after) of t, h, w


class Pad(NamedTuple):
    """Samples before and after each axis, and what they are."""

    sides: Sides
    mode: str  # as padding_mode of nn.Conv3d


def merge(pads: Sequence[Pad], kind: str) -> Pad | None:
    """Several pads in a row as one of a spatial or temporal convolution, if they are one."""
    total, mode = _total(pads), _mode(pads, range(3))
    foreign = total[:1] if kind == "spatial" else total[1:]
    return None if mode is None or any(map(any, foreign)) else Pad(total, mode)


def merge_axes(pads: Sequence[Pad]) -> tuple[Sides, tuple[str, str]] | None:
    """Several pads in a row as one of a convolution over space and time: sides, and the modes of
    space and of time, each of which keeps to its own axes."""
    space, time = _mode(pads, (1, 2)), _mode(pads, (0,))
    return None if space is None or time is None else (_total(pads), (space, time))


def _total(pads: Sequence[Pad]) -> Sides:
    return tuple(
        (sum(p.sides[i][0] for p in pads), sum(p.sides[i][1] for p in pads)) for i in range(3)
    )


def _mode(pads: Sequence[Pad], axes: Iterable[int]) -> str | None:
    """What pads along some axes are together, or None where that is no pad of one mode."""
    real = [p.mode for p in pads if any(p.sides[i] != (0, 0) for i in axes)]
    if len(set(real)) > 1 or (len(real) > 1 and real[0] in ("reflect", "circular")):
        return None
    return real[0] if real else "zeros"
