"""Convolutions by their numbers: which is a pass of a pair, and what two of them are together."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .padding import Pad, merge


class Separable(NamedTuple):
    """A separable convolution as a function call describes it."""

    kind: str  # "spatial" | "temporal"
    stride: tuple[int, int, int]
    padding: Pad
    dilation: tuple[int, int, int]
    groups: int


class First(NamedTuple):
    """A first convolution, and how to compute it alone."""

    pass_: Separable | None  # None where it is no pass of a pair
    shape: torch.Size  # of its output
    names: str  # of the axes of its input
    padded: tuple[int, ...] | None  # by ``F.pad`` before it
    how: tuple[Any, ...]  # its other arguments


class Numbers(NamedTuple):
    """A convolution's numbers, those of a size along time, height and width."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    sides: Any
    dilation: tuple[int, int, int]
    groups: int
    axes: tuple[int, ...]  # which of the three its dimensions are


_NAMES = {(0,): "bct", (0, 1): "bctp", (1, 2): "bchw", (0, 1, 2): "bcthw"}


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
) -> First | None:
    """A convolution of x that may be the first one, or None where it may be refused."""
    read = _numbers(w, stride, padding, dilation, groups)
    if read is None or mode not in ("zeros", "replicate", "reflect", "circular"):
        return None
    if mode != "zeros":
        read = read._replace(sides=_as_three(sides_of(widths), read.axes, (0, 0)))
    groups, kind = read.groups, _kind(read)
    if x[1] != w[1] * groups or w[0] % groups or (b and tuple(b) != (w[0],)):
        return None
    limit = {"reflect": 1, "circular": 0}.get(mode)
    size = []
    for n, k, i in zip(x[2:], w[2:], read.axes, strict=True):
        s, d, p = read.stride[i], read.dilation[i], read.sides[i]
        if limit is not None and max(p) > n - limit:
            return None
        size.append((n + sum(p) - d * (k - 1) - 1) // s + 1)
    if any(n < 1 for n in (*size, x[0], *x[2:])):
        return None
    first = None
    if kind is not None:
        first = Separable(kind, read.stride, Pad(read.sides, mode), read.dilation, groups)
    strides, dilations = ([v[i] for i in read.axes] for v in (read.stride, read.dilation))
    how = strides, padding if mode == "zeros" else 0, dilations, groups
    padded = None if mode == "zeros" else tuple(widths)
    return First(first, torch.Size((x[0], w[0], *size)), _NAMES[read.axes], padded, how)


def _numbers(
    w: Sequence[int], stride: Any, padding: Any, dilation: Any, groups: Any
) -> Numbers | None:
    """The arguments of a convolution, or None where they are odd."""
    rank = len(w) - 2
    try:
        strides, dilations = _sizes(stride, rank), _sizes(dilation, rank)
        extent = [d * (k - 1) for d, k in zip(dilations, w[2:], strict=True)]
        if padding == "valid":
            sides = [(0, 0)] * rank
        elif padding == "same":
            if max(strides) > 1:
                return None
            sides = [(e // 2, e - e // 2) for e in extent]
        else:
            pairs = padding if _are_pairs(padding) else [(p, p) for p in _sizes(padding, rank)]
            sides = list(pairs)
        groups = operator.index(groups)
    except (TypeError, ValueError):
        return None
    if groups < 1 or min(strides) < 1 or min(dilations) < 1 or min(map(min, sides)) < 0:
        return None
    axes = {1: (0,), 2: (1, 2), 3: (0, 1, 2)}[rank]
    if (
        rank == 2
        and (w[2] > 1 or strides[0] > 1)
        and (w[3], strides[1], sides[1]) == (1, 1, (0, 0))
    ):
        axes = (0, 1)  # of frames and pixels
    kernel, strides, dilations = (_as_three(v, axes, 1) for v in (w[2:], strides, dilations))
    return Numbers(kernel, strides, _as_three(sides, axes, (0, 0)), dilations, groups, axes)


def _are_pairs(padding: Any) -> bool:
    return type(padding) is tuple and bool(padding) and type(padding[0]) is tuple


def _as_three(values: Sequence[Any], axes: Sequence[int], fill: Any) -> Any:
    """Values of some of time, height and width as those of all three."""
    found = [fill] * 3
    for i, value in zip(axes, values, strict=True):
        found[i] = value
    return tuple(found)


def sides_of(widths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Padding (before, after) of each axis from ``F.pad``'s."""
    return tuple(zip(widths[::2], widths[1::2], strict=True))[::-1]


def padding_of(conv: Any) -> Any:
    """What a convolution pads by: it asks its ``padding`` only where that is of zeros."""
    if conv.padding_mode == "zeros":
        return conv.padding
    return sides_of(conv._reversed_padding_repeated_twice)


def pad_of(w: Sequence[int], conv: Any) -> Pad | None:
    """The padding of a convolution over time, height and width, or None where it is odd."""
    read = _numbers(w, conv.stride, padding_of(conv), conv.dilation, conv.groups)
    return None if read is None else Pad(read.sides, conv.padding_mode)


def _sizes(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    values = values * rank if len(values) == 1 else values
    if len(values) != rank:
        raise ValueError
    return tuple(map(operator.index, values))


def _kind(read: Numbers) -> str | None:
    """Along which axes a convolution does something, if they are those of one pass."""
    acts = [
        k != 1 or s != 1 or tuple(p) != (0, 0)
        for k, s, p in zip(read.kernel, read.stride, read.sides, strict=True)
    ]
    if acts[0] and not any(acts[1:]):
        return "temporal"
    return "spatial" if any(acts[1:]) and not acts[0] else None


def second_dims(first: Separable, w: Sequence[int], *settings: Any) -> tuple[int, ...] | None:
    """Which dimensions of its input are those of a second convolution, of any rank."""
    read = _numbers(w, *settings)
    if read is None or _kind(read) in (None, first.kind):
        return None
    wanted = (1, 2) if first.kind == "temporal" else (0,)
    return tuple(2 + read.axes.index(i) for i in wanted) if set(wanted) <= set(read.axes) else None


def second_pass(
    first: Separable,
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

    None where it is none. z is 5-D and padded, the weight of any rank.
    """
    read = _numbers(w, stride, padding, dilation, groups)
    if read is None:
        return None
    _, stride, sides, dilation, groups, _ = read
    other = "temporal" if first.kind == "spatial" else "spatial"
    if _kind(read) != other:
        return None
    around = merge([*pads, Pad(tuple(map(tuple, sides)), "zeros")], other)
    if around is None or z[1] != w[1] * groups or w[0] % groups:
        return None
    if b and tuple(b) != (w[0],):
        return None
    size = [
        (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, k, s, d, p in zip(z[2:], read.kernel, stride, dilation, sides, strict=True)
    ]
    if any(n < 1 for n in size):
        return None
    second = Separable(other, stride, around, dilation, groups)
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
