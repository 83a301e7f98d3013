"""Stride, padding, dilation and groups: as users write them, into a specification's plain data."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

from .activations import ACTIVATIONS
from .spec import PADDING_MODES, Padding, Triple


class Geometry(NamedTuple):
    """The first five fields of both specifications."""

    stride: Triple
    padding: Padding
    dilation: Triple
    groups: tuple[int, int]
    padding_mode: tuple[str, str]


def resolve(
    op: str,
    kernel: Triple,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    padding_mode: Any,
    causal: Any,
    past: int = 0,
) -> Geometry:
    """
    Args:
        past: frames before the first that a causal convolution is given, and does not pad.

    Raises:
        TypeError, ValueError: what is no geometry.
    """
    strides, dilations = triple(f"{op}: stride", stride, 1), triple(f"{op}: dilation", dilation, 1)
    both, modes = per_pass(f"{op}: groups", groups, int), padding_modes(op, padding_mode)
    pads = resolve_padding(op, padding, kernel, strides, dilations, modes[1], causal, past)
    return Geometry(strides, pads, dilations, both, modes)


def triple(what: str, value: Any, least: int) -> Triple:
    """An int or three ints as three ints, none below ``least``.

    Raises:
        TypeError: not an int or three of them.
        ValueError: not three, or one below ``least``.
    """
    values = (value,) * 3 if isinstance(value, Integral) else value
    ints = isinstance(values, Sequence) and all(
        isinstance(v, Integral) and not isinstance(v, bool) for v in values
    )
    if isinstance(value, (bool, str)) or not ints:
        raise TypeError(f"{what} must be an int or three ints (t, h, w), got {value!r}")
    if len(values) != 3 or any(v < least for v in values):
        raise ValueError(
            f"{what} must be an int or (t, h, w), each at least {least}, got {value!r}"
        )
    t, h, w = map(int, values)
    return t, h, w


def name(what: str, value: Any, known: Sequence[str]) -> str:
    """One of the known names.

    Raises:
        ValueError: not one of them.
    """
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def activation_name(what: str, value: str | None) -> str:
    return name(what, "none" if value is None else value, tuple(ACTIVATIONS))


def per_pass(what: str, value: Any, kind: type) -> tuple[Any, Any]:
    """A value for both passes or a pair (spatial, temporal).

    Raises:
        TypeError: neither.
    """
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, kind) and not isinstance(v, bool) for v in pair):
        raise TypeError(
            f"{what} must be one {kind.__name__} or two (spatial, temporal), got {value!r}"
        )
    return tuple(pair)


def padding_modes(op: str, value: Any) -> tuple[str, str]:
    spatial, temporal = per_pass(f"{op}: padding_mode", value, str)
    name(f"{op}: padding_mode", spatial, PADDING_MODES)
    name(f"{op}: padding_mode", temporal, PADDING_MODES)
    return spatial, temporal


def resolve_padding(
    op: str,
    padding: Any,
    kernel: Triple,
    stride: Triple,
    dilation: Triple,
    temporal_mode: str,
    causal: Any,
    past: int = 0,
) -> Padding:
    """Padding before and after each axis, from an int, a triple, "same" or "valid", and causal.

    Raises:
        TypeError, ValueError: what cannot be padded so.
    """
    if causal not in (False, True, "strided"):
        raise ValueError(f"{op}: causal must be False, True or 'strided', got {causal!r}")
    extent = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(padding, str):
        name(f"{op}: padding as a string", padding, ("same", "valid"))
        if padding == "same" and any(s != 1 for s in stride):
            raise ValueError(f"{op}: padding='same' requires stride 1, got stride {stride}")
        each = [(e // 2, e - e // 2) if padding == "same" else (0, 0) for e in extent]
        if causal:
            each[0] = (0, 0)
    else:
        each = _each_side(op, padding)
    if causal:
        if each[0] != (0, 0):
            raise ValueError(
                f"{op}: causal pads time by itself and requires a temporal padding of 0, "
                f"got padding {padding!r}"
            )
        if temporal_mode not in ("zeros", "replicate"):
            raise ValueError(
                f"{op}: causal requires a temporal padding_mode of 'zeros' or 'replicate' "
                f"({temporal_mode!r} would show it later frames)"
            )
        left = left_padding(kernel[0], stride[0], dilation[0], causal)
        if left < 0:
            raise ValueError(
                f"{op}: causal='strided' requires a temporal stride of at most "
                f"{extent[0] + 1} for this kernel, got {stride[0]}"
            )
        if past > left:
            raise ValueError(f"{op}: causal takes a past of at most {left} frames, got {past}")
        each[0] = (left - past, 0)
    frames, rows, columns = each
    return *frames, *rows, *columns


def left_padding(kernel: int, stride: int, dilation: int, causal: bool | str) -> int:
    """Frames before the first that a causal temporal convolution reads."""
    return dilation * (kernel - 1) + (1 - stride if causal == "strided" else 0)


def _each_side(op: str, padding: Any) -> list[tuple[int, int]]:
    """(before, after) of each axis from an int or a triple whose entries are ints or such pairs."""
    if not isinstance(padding, Sequence):
        return [(p, p) for p in triple(f"{op}: padding", padding, 0)]
    sides = [[p, p] if isinstance(p, Integral) else p for p in padding]
    what = f"{op}: padding before and after each axis"
    if not all(isinstance(s, Sequence) and len(s) == 2 for s in sides):
        raise TypeError(f"{what} must be ints or pairs of ints, got {padding!r}")
    before = triple(what, [s[0] for s in sides], 0)
    after = triple(what, [s[1] for s in sides], 0)
    return list(zip(before, after, strict=True))
