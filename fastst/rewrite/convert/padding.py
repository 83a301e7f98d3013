"""Padding that a forward does by itself before a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

Sides = tuple[tuple[int, int], ...]  # (before, after) of t, h, w

_NONE: Sides = ((0, 0),) * 3
_MODES = {
    "constant": "zeros",
    "replicate": "replicate",
    "reflect": "reflect",
    "circular": "circular",
}
_MODULES = {
    nn.ZeroPad3d: "zeros", nn.ConstantPad3d: "zeros", nn.ReplicationPad3d: "replicate",
    nn.ReflectionPad3d: "reflect", nn.CircularPad3d: "circular",
}  # fmt: skip


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


def explicit_padding(node: fx.Node, module: nn.Module | None) -> Pad | None:
    """The padding that a node does, if it does nothing else."""
    if module is not None:
        mode = _MODULES.get(type(module))
        if mode is None or getattr(module, "value", 0) != 0:
            return None
        return _pad(module.padding, mode)
    if node.op != "call_function" or node.target is not F.pad:
        return None
    names = ("input", "pad", "mode", "value")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    if given.get("value") not in (None, 0):
        return None
    return _pad(given["pad"], _MODES[given.get("mode", "constant")])


def _pad(widths: Any, mode: str) -> Pad | None:
    """From PyTorch's order: the last axis first."""
    if not isinstance(widths, (tuple, list)) or len(widths) not in (2, 4, 6):
        return None
    if not all(isinstance(w, int) and w >= 0 for w in widths):
        return None
    w = [*widths, *(0,) * (6 - len(widths))]
    return Pad(((w[4], w[5]), (w[2], w[3]), (w[0], w[1])), mode)


def first_frames(node: fx.Node, among_others: bool = False) -> tuple[list[fx.Node], Pad] | None:
    """Copies of the first frame before a clip: ``cat([z[:, :, :1].repeat(1, 1, n, 1, 1), z], 2)``.

    Args:
        node: z.
        among_others: whether z may have other users.

    Returns:
        The nodes, the concatenation last, and the padding that they do.
    """
    for frame in node.users:
        if not (_is_first_frame(frame) and len(frame.users) == 1):
            continue
        copies = next(iter(frame.users))
        n = _copies(copies)
        if n is None or len(copies.users) != 1:
            continue
        cat = next(iter(copies.users))
        if cat.target not in (torch.cat, torch.concat) or len(cat.args) + len(cat.kwargs) != 2:
            continue
        dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim")
        if list(cat.args[:1]) != [[copies, node]] or dim not in (2, -3):
            continue
        if among_others or set(node.users) == {frame, cat}:
            return [frame, copies, cat], Pad(((n, 0), (0, 0), (0, 0)), "replicate")
    return None


def _is_first_frame(node: fx.Node) -> bool:
    """z[:, :, :1], also with an ellipsis or further full slices."""
    if getattr(node.target, "__name__", "") != "getitem" or not isinstance(node.args[1], tuple):
        return False
    index = node.args[1]
    if index[-1] is ...:
        index = index[:-1]
    if any(i is ... for i in index):
        return False
    full = slice(None)
    if len(index) < 3 or index[2] not in (slice(None, 1), slice(0, 1)):
        return False
    return all(i == full for k, i in enumerate(index) if k != 2)


def _copies(node: fx.Node) -> int | None:
    """n of ``.repeat(1, 1, n, 1, 1)`` or ``.expand(-1, -1, n, -1, -1)``."""
    if node.op != "call_method" or node.target not in ("repeat", "expand"):
        return None
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    still = 1 if node.target == "repeat" else -1
    if len(sizes) != 5 or any(s != still for i, s in enumerate(sizes) if i != 2):
        return None
    return sizes[2] if isinstance(sizes[2], int) and sizes[2] >= 0 else None
