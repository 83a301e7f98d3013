"""Norms of positions and of frames, as people write them before a convolution.

``nn.LayerNorm`` and ``nn.RMSNorm`` see the last dimension, so channels are moved there and back;
others write the root mean square out, or make a batch of all frames for ``nn.GroupNorm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...problem.norms import Norm
from .chain import as_view, extend, is_open
from .graphs import is_promise
from .link import Link
from .plain import are_plain, needs_grad
from .promise import Promise
from .readings import BIAS, WEIGHT, Reading, add_norm, channel_axis, keep, reading_of

# By what a reading is ("" is N, C, T, H, W) and how it is permuted: what it is then.
_TURNS: dict[tuple[str, Sequence[int]], str] = {
    ("", (0, 2, 3, 4, 1)): "last",
    ("last", (0, 4, 1, 2, 3)): "",
    ("", (0, 2, 1, 3, 4)): "by frame",
    ("by frame", (0, 2, 1, 3, 4)): "",
}


def _as_view(p: Promise, form: str, shape: Sequence[int], call: Callable[[Tensor], Tensor]) -> Any:
    plan = reading_of(p)
    assert plan is not None
    if p.link is plan.source:  # a shortcut may ask for it again
        p.link.readers += 1
    return as_view(p, call, torch.Size(shape), plan._replace(form=form))


def reorder(p: Promise, order: Sequence[int], call: Callable[[Tensor], Tensor]) -> Any:
    """A promise that convolutions read, with its dimensions in another order."""
    plan = reading_of(p)
    if plan is None or plan.past or plan.pads:
        return NotImplemented
    form = _TURNS.get((plan.form, tuple(order)))
    if form is None:
        return NotImplemented
    return _as_view(p, form, [p.link.shape[i] for i in order], call)


def resize(p: Promise, sizes: Sequence[int], call: Callable[[Tensor], Tensor]) -> Any:
    """Clips as frames, and back."""
    plan = reading_of(p)
    if plan is None or not all(type(n) is int for n in sizes):
        return NotImplemented
    n, _, t, *_ = plan.source.shape
    clips, frames = tuple(p.link.shape[-3:]), (n * t, *p.link.shape[-3:])
    if plan.form == "by frame" and tuple(sizes) == frames:
        return _as_view(p, "frames", frames, call)
    if plan.form == "frames" and tuple(sizes) == (n, t, *clips):
        return _as_view(p, "by frame", sizes, call)
    return NotImplemented


# ---- of positions


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
) -> Any:
    plan = reading_of(input)
    if (
        plan is None
        or not _is_over_channels(input, plan, normalized_shape)
        or type(eps) is not float
    ):
        return NotImplemented

    def run(v: Tensor, **given: Tensor) -> Tensor:
        return F.layer_norm(v, normalized_shape, given.get(WEIGHT), given.get(BIAS), eps)

    return add_norm(input, Norm("layer", weight, bias, eps=eps), run)


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Any:
    plan = reading_of(input)
    if plan is None or not _is_over_channels(input, plan, normalized_shape):
        return NotImplemented
    least = eps
    if eps is None and input.link.dtype in (torch.float32, torch.float64):
        least = torch.finfo(input.link.dtype).eps
    if type(least) is not float:
        return NotImplemented

    def run(v: Tensor, **given: Tensor) -> Tensor:
        return F.rms_norm(v, normalized_shape, given.get(WEIGHT), eps)

    return add_norm(input, Norm("rms", weight, eps=least), run)


def _is_over_channels(p: Promise, plan: Reading, shape: Any) -> bool:
    """Whether a norm is over the channels of each position, which stand last."""
    return plan.form == "last" and tuple(shape) == tuple(p.link.shape[-1:])


class Root(NamedTuple):
    """What becomes of the squares of a promise on the way to 1/√(mean of squares + eps)."""

    of: Link
    stage: str = "squares"  # then "mean", "sum", "factor"
    eps: float = 0.0

    def note_separate(self, link: Link, why: str) -> None:
        """It is computed as separate calls."""


def _square(input: Any, exponent: Any = 2) -> Any:
    plan = reading_of(input)
    if plan is None or type(exponent) is not int or exponent != 2 or plan.activation or plan.unit:
        return NotImplemented
    if plan.norm is not None or plan.past or plan.pads or plan.form not in ("", "last"):
        return NotImplemented
    link = input.link
    if link is plan.source:
        link.readers += 1
    return extend(input, lambda v: v.pow(2), Root(link))


def _mean(input: Any, dim: Any = None, keepdim: Any = False, **kwargs: Any) -> Any:
    if kwargs or keepdim is not True or type(dim) not in (int, tuple, list):
        return NotImplemented
    if not (is_open(input, Root) and input.link.plan.stage == "squares"):
        return NotImplemented
    axes = (dim,) if type(dim) is int else tuple(dim)
    axis, shape = _axis_of(input.link.plan.of), list(input.link.shape)
    if axes not in ((axis,), (axis - 5,)):
        return NotImplemented
    shape[axis] = 1
    plan = input.link.plan._replace(stage="mean")
    return extend(input, lambda v: v.mean(dim, keepdim=True), plan, shape=torch.Size(shape))


def _axis_of(link: Link) -> int:
    return channel_axis(link.plan if type(link.plan) is Reading else None)


def add_eps(p: Any, eps: Any) -> Any:
    """A mean of squares with eps."""
    if not (is_open(p, Root) and p.link.plan.stage == "mean" and type(eps) is float and eps >= 0):
        return NotImplemented
    return extend(p, lambda v: v + eps, p.link.plan._replace(stage="sum", eps=eps))


def _rsqrt(input: Any) -> Any:
    if not (is_open(input, Root) and input.link.plan.stage in ("mean", "sum")):
        return NotImplemented
    return extend(input, torch.rsqrt, input.link.plan._replace(stage="factor"))


def apply_root(p: Any, factor: Any) -> Any:
    """A promise times 1/√(mean of its own squares + eps): an RMS norm."""
    plan = reading_of(p)
    if plan is None or not is_open(factor, Root):
        return NotImplemented
    root: Root = factor.link.plan
    if root.stage != "factor" or root.of is not p.link:
        return NotImplemented
    calls: list[Callable[..., Tensor]] = []
    link: Any = factor.link
    while link is not p.link:
        calls.insert(0, link.run)
        link = link.before

    def run(v: Tensor) -> Tensor:
        r = v
        for call in calls:
            r = call(r)
        return v * r

    return add_norm(p, Norm("rms", eps=root.eps), run)


# ---- of groups and frames


def _group_norm(
    input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
) -> Any:
    if not is_promise(input) or type(num_groups) is not int or type(eps) is not float:
        return NotImplemented
    n, c = input.link.shape[:2]
    if num_groups < 1 or c % num_groups or input.link.shape.numel() <= n * num_groups:
        return NotImplemented

    def run(v: Tensor, **given: Tensor) -> Tensor:
        return F.group_norm(v, num_groups, given.get(WEIGHT), given.get(BIAS), eps)

    norm, plan = Norm("group", weight, bias, num_groups, eps=eps), reading_of(input)
    if plan is None or plan.form:
        return _norm_frames(input, norm, run)
    return add_norm(input, norm, run)


class Frames(NamedTuple):
    """Some frames of a promise that is a batch of frames, and the norm that they have had."""

    of: Promise
    link: Link  # of that promise, when it was split
    frames: tuple[int, int]  # from one to before the other
    size: int  # of all chunks but the last
    norm: Norm | None = None

    def note_separate(self, link: Link, why: str) -> None:
        self.link.plan.note_separate(self.link, why)


def _split(input: Any, size: Any, dim: Any = 0) -> Any:
    plan = reading_of(input)
    if plan is None or plan.form != "frames" or type(size) is not int or size < 1 or dim != 0:
        return NotImplemented
    link, count, made = input.link, input.link.shape[0], []
    for start in range(0, count, size):
        stop = min(start + size, count)
        part = Frames(input, link, (start, stop), size)
        shape = torch.Size((stop - start, *link.shape[1:]))
        made.append(as_view(input, _narrow(start, stop), shape, part))
    return tuple(made)


def _narrow(start: int, stop: int) -> Callable[[Tensor], Tensor]:
    return lambda v: v.narrow(0, start, stop - start)


def _norm_frames(input: Any, norm: Norm, run: Callable[..., Tensor]) -> Any:
    """A group norm of all frames of a batch, or of some."""
    plan = reading_of(input)
    if plan is not None and plan.form == "frames":
        return add_norm(input, norm._replace(per_frame=True), run)
    if not is_open(input, Frames) or input.link.plan.norm is not None:
        return NotImplemented
    given = {n: t for n, t in ((WEIGHT, norm.weight), (BIAS, norm.bias)) if t is not None}
    part, kept = input.link.plan, keep(given)
    if kept is None or not are_plain(input.link.state.device, norm.weight, norm.bias):
        return NotImplemented
    if needs_grad(input.link.state, norm.weight, norm.bias):
        return NotImplemented
    return extend(input, run, part._replace(norm=norm), kept)


def join_frames(tensors: Sequence[Any], dim: Any) -> Any:
    """All frames of a batch again, each with the same norm."""
    if dim != 0 or not all(is_promise(t) and is_open(t, Frames) for t in tensors):
        return NotImplemented
    plans: list[Frames] = [t.link.plan for t in tensors]
    first, at = plans[0], 0
    for t, plan in zip(tensors, plans, strict=True):
        if plan.link is not first.link or plan.frames[0] != at:
            return NotImplemented
        if not (_are_alike(plan.norm, first.norm) and t.link.is_unchanged()):
            return NotImplemented
        at = plan.frames[1]
    norm, size, run = first.norm, first.size, tensors[0].link.run
    if norm is None or at != first.link.shape[0] or first.of.link is not first.link:
        return NotImplemented
    return add_norm(
        first.of, norm._replace(per_frame=True),
        lambda v, **given: torch.cat([run(part, **given) for part in v.split(size)]),
    )  # fmt: skip


def _are_alike(one: Norm | None, other: Norm | None) -> bool:
    return (
        one is not None
        and other is not None
        and one.weight is other.weight
        and one.bias is other.bias
        and one._replace(weight=None, bias=None) == other._replace(weight=None, bias=None)
    )


RULES: dict[Any, Callable[..., Any]] = {
    F.group_norm: _group_norm, F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm, torch.rms_norm: _rms_norm,
    Tensor.mean: _mean, torch.mean: _mean, Tensor.rsqrt: _rsqrt, torch.rsqrt: _rsqrt,
    Tensor.pow: _square, Tensor.__pow__: _square, torch.pow: _square,
    Tensor.square: _square, torch.square: _square, Tensor.split: _split, torch.split: _split,
}  # fmt: skip
