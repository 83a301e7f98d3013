"""Convolutions by their numbers: which is a pass of a pair, and what two of them are together."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .padding import Pad, merge


class Pass(NamedTuple):
    """A separable convolution as a function call describes it."""

    kind: str  # "spatial" | "temporal"
    stride: tuple[int, int, int]
    padding: Pad
    dilation: tuple[int, int, int]
    groups: int


@lru_cache(maxsize=4096)
def first_pass(
    x: Sequence[int],
    w: Sequence[int],
    b: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    mode: str,
    widths: Any,
) -> Any:
    """A first convolution: its pass, the shape of its output, and how to compute it."""
    read = _read(w, stride, padding, dilation, groups)
    if read is None or mode not in ("zeros", "replicate", "reflect", "circular"):
        return None
    triples, groups = read[:3], read[3]
    if mode != "zeros":
        w0, w1, h0, h1, t0, t1 = widths
        sides = ((t0, t1), (h0, h1), (w0, w1))
    else:
        sides = triples[1]
    kind = _kind(w, triples[0], sides)
    if kind is None or x[1] != w[1] * groups or w[0] % groups or (b and tuple(b) != (w[0],)):
        return None
    limit = {"reflect": 1, "circular": 0}.get(mode)
    size = []
    for n, k, s, d, p in zip(x[2:], w[2:], triples[0], triples[2], sides, strict=True):
        if limit is not None and max(p) > n - limit:
            return None
        size.append((n + sum(p) - d * (k - 1) - 1) // s + 1)
    if min(*size, x[0]) < 1 or min(x[2:]) < 1:
        return None
    first = Pass(kind, triples[0], Pad(sides, mode), triples[2], groups)
    padded = tuple(widths) if mode != "zeros" else None
    how = triples[0], (0, 0, 0) if padded else padding, triples[2], groups
    return first, torch.Size((x[0], w[0], *size)), padded, how


def _read(w: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: Any) -> Any:
    """(stride, padding as pairs, dilation, groups) of ``conv3d``, or None where they are odd."""
    try:
        strides, dilations = _triple(stride), _triple(dilation)
        extent = [d * (k - 1) for d, k in zip(dilations, w[2:], strict=True)]
        if padding == "valid":
            sides = ((0, 0),) * 3
        elif padding == "same":
            if strides != (1, 1, 1):
                return None
            sides = tuple((e // 2, e - e // 2) for e in extent)  # type: ignore[assignment]
        else:
            sides = tuple((p, p) for p in _triple(padding))  # type: ignore[assignment]
        groups = operator.index(groups)
    except (TypeError, ValueError):
        return None
    if groups < 1 or min(strides) < 1 or min(dilations) < 1 or min(map(min, sides)) < 0:
        return None
    return strides, sides, dilations, groups


def _triple(value: Any) -> tuple[int, int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    a, b, c = map(operator.index, values * 3 if len(values) == 1 else values)
    return a, b, c


def _kind(w: Sequence[int], stride: Sequence[int], sides: Any) -> str | None:
    """Along which axes a convolution does something, if they are those of one pass."""
    acts = [
        k != 1 or s != 1 or tuple(p) != (0, 0) for k, s, p in zip(w[2:], stride, sides, strict=True)
    ]
    if acts[0] and not any(acts[1:]):
        return "temporal"
    return "spatial" if any(acts[1:]) and not acts[0] else None


@lru_cache(maxsize=4096)
def second_pass(
    first: Pass,
    pads: tuple[Pad, ...],
    z: Sequence[int],
    w: Sequence[int],
    b: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> Any:
    """Settings of ``conv2plus1d`` for a second convolution of z, and (T, H, W) of its output.

    None where it is none.
    """
    read = _read(w, stride, padding, dilation, groups)
    if read is None:
        return None
    stride, sides, dilation, groups = read
    other = "temporal" if first.kind == "spatial" else "spatial"
    if _kind(w, stride, sides) != other:
        return None
    around = merge([*pads, Pad(tuple(map(tuple, sides)), "zeros")], other)
    if isinstance(around, str) or z[1] != w[1] * groups or w[0] % groups:
        return None
    if b and tuple(b) != (w[0],):
        return None
    size = [
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, k, s, d, p in zip(z[2:], w[2:], stride, dilation, sides, strict=True)
    ]
    if min(size) < 1:
        return None
    second = Pass(other, stride, around, dilation, groups)
    spatial, temporal = (first, second) if other == "temporal" else (second, first)
    settings = {
        "stride": (temporal.stride[0], *spatial.stride[1:]),
        "padding": (temporal.padding.sides[0], *spatial.padding.sides[1:]),
        "dilation": (temporal.dilation[0], *spatial.dilation[1:]),
        "groups": (spatial.groups, temporal.groups),
        "padding_mode": (spatial.padding.mode, temporal.padding.mode),
        "order": f"{first.kind}-first",
    }
    return settings, tuple(size)
