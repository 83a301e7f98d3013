"""What stands before a convolution and can be read by it: norm, activation, earlier frames, pads.

Such a chain begins at the promise of an operation's output. It is computed call by call where
somebody else reads it; a convolution that reads it runs the operation, and takes in the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...functional import BatchNorm
from ...problem.norms import Norm, frame_by_frame
from .chain import extend, is_open
from .endings import EndingPlan
from .geometry import pad_of
from .kept import CannotDefer, Kept
from .layouts import Call
from .link import Link
from .padding import Pad, merge_axes
from .promise import Promise, is_current

INPUT = "first input"
WEIGHT, BIAS, _MEAN, _VAR = "norm weight", "norm bias", "norm running_mean", "norm running_var"
_PAST = "past"
_OWN = {n: n for n in (WEIGHT, BIAS, _MEAN, _VAR, _PAST)}


class Reading(NamedTuple):
    """What a chain is, as part of the convolution that reads it."""

    begun: Any  # the ``Begins`` whose output it is of
    source: Link  # of that output
    norm: BatchNorm | Norm | None = None  # without its tensors
    unit: bool = False  # so far what ``F.normalize`` gives: not yet times √C
    activation: tuple[str, float] | None = None
    past: bool = False
    pads: tuple[Pad, ...] = ()
    form: str = (
        ""  # "" is (N, C, T, H, W); or "last", "by frame" or "frames", as ``norms`` has them
    )

    def note_separate(self, link: Link, why: str) -> None:
        """The chain is computed as separate calls, the operation before it in any case."""

    @property
    def frame_by_frame(self) -> bool:
        """Whether a frame of it is made of one frame, and of nothing else."""
        if self.past or self.pads or self.form:
            return False
        if isinstance(self.norm, BatchNorm):
            return True
        return self.norm is None or frame_by_frame(self.norm)


def reading_of(p: Any) -> Reading | None:
    """What is known of a promise that convolutions can read; the operation itself may have run."""
    if type(p) is not Promise:
        return None
    link = p.link
    if type(link.plan) is EndingPlan:
        if not is_current(p):
            return None
        if not (link.is_unchanged() if link.value is None else link.lasts):
            return None
        plan = Reading(link.begun, link)
    elif is_open(p, Reading):
        plan = link.plan
    else:
        return None
    state = link.state
    if len(plan.source.shape) != 5 or state.autocast is not None:
        return None
    if 0 in plan.source.shape:  # which some norms refuse
        return None
    if state.grad and any(t.requires_grad for t in link.tensors()):
        return None
    return plan


def keep(tensors: dict[str, Tensor]) -> tuple[tuple[str, Kept], ...] | None:
    """What a call reads, or None where nothing would tell of writes to it."""
    try:
        return tuple((name, Kept(t)) for name, t in tensors.items())
    except CannotDefer:
        return None


def lengthen(
    p: Promise,
    run: Callable[..., Tensor],
    tensors: dict[str, Tensor] | None = None,
    in_place: bool = False,
    shape: torch.Size | None = None,
    **changes: Any,
) -> Any:
    """The promise of what ``run`` makes of one that ``reading_of`` knows."""
    link, plan = p.link, reading_of(p)
    assert plan is not None
    if link.state.grad and any(t.requires_grad for t in (tensors or {}).values()):
        return NotImplemented
    if in_place and link.value is not None:  # others may see its memory
        return NotImplemented
    kept = keep(tensors or {})
    if kept is None or any(k.foreign for name, k in kept if name == _PAST):
        return NotImplemented
    if link is plan.source:  # a shortcut may ask for it again
        link.readers += 1
    return extend(p, run, plan._replace(**changes), kept, shape, in_place)


# ---- norms


def _are_per_channel(
    p: Promise, vectors: Sequence[Tensor | None], shape: Sequence[int] = ()
) -> bool:
    """Whether a norm's tensors are of the dtype, the device and the channels of a promise."""
    link, wanted = p.link, tuple(shape) or (_channels(p),)
    return all(
        t is None
        or (isinstance(t, Tensor) and type(t) is not Promise and tuple(t.shape) == wanted
            and t.dtype == link.dtype and t.device == link.state.device)
        for t in vectors
    )  # fmt: skip


def channel_axis(plan: Reading | None) -> int:
    """Which dimension of a reading that of the channels is."""
    return {"last": 4, "by frame": 2}.get(plan.form, 1) if plan is not None else 1


def _channels(p: Promise) -> int:
    n: int = p.link.shape[channel_axis(reading_of(p))]
    return n


def add_norm(
    p: Promise, norm: BatchNorm | Norm, run: Callable[..., Tensor], unit: bool = False
) -> Any:
    plan = reading_of(p)
    if plan is None or plan.norm is not None or plan.activation or plan.past or plan.pads:
        return NotImplemented
    tensors = {WEIGHT: norm.weight, BIAS: norm.bias}
    if isinstance(norm, BatchNorm):
        tensors |= {_MEAN: norm.running_mean, _VAR: norm.running_var}
    if not _are_per_channel(p, list(tensors.values())):
        return NotImplemented
    given = {n: t for n, t in tensors.items() if t is not None}
    return lengthen(p, run, given, norm=norm, unit=unit)


def batch_norm(p: Promise, norm: BatchNorm) -> Any:
    """A frozen one."""
    plan = reading_of(p)
    if norm.training or plan is None or plan.form:
        return NotImplemented

    def run(v: Tensor, **given: Tensor) -> Tensor:
        mean, var = given[_MEAN], given[_VAR]
        return F.batch_norm(v, mean, var, given.get(WEIGHT), given.get(BIAS), eps=norm.eps)

    return add_norm(p, norm, run)


def _instance_norm(
    input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None,
    bias: Any = None, use_input_stats: Any = True, momentum: Any = 0.1, eps: Any = 1e-5,
) -> Any:  # fmt: skip
    plan = reading_of(input)
    if plan is None or plan.form or not (running_mean is running_var is None and use_input_stats):
        return NotImplemented
    if type(eps) is not float or input.link.shape[2:].numel() < 2:
        return NotImplemented

    def run(v: Tensor, **given: Tensor) -> Tensor:
        return F.instance_norm(v, None, None, given.get(WEIGHT), given.get(BIAS), eps=eps)

    return add_norm(input, Norm("instance", weight, bias, eps=eps), run)


def _normalize(input: Any, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12, out: Any = None) -> Any:
    """Over the channels of a position: with √C and γ behind it, an RMS norm."""
    plan = reading_of(input)
    if plan is None or plan.form not in ("", "last") or (p, out) != (2.0, None):
        return NotImplemented
    if dim not in (channel_axis(plan), channel_axis(plan) - 5) or type(eps) is not float:
        return NotImplemented
    return add_norm(
        input, Norm("l2", eps=eps), lambda v: F.normalize(v, p, dim, eps), unit=True
    )  # fmt: skip


def multiply(p: Any, other: Any) -> Any:
    """√C of a norm by ``F.normalize``, then γ of each channel."""
    plan = reading_of(p)
    norm = _unfinished_norm(plan)
    if plan is None or norm is None:
        return NotImplemented
    if plan.unit:
        if type(other) is not float or not math.isclose(other, math.sqrt(_channels(p))):
            return NotImplemented
        return lengthen(p, lambda v: v * other, unit=False)
    if norm.weight is not None or norm.bias is not None or not _is_per_channel(p, other):
        return NotImplemented
    weighted = norm._replace(weight=other)
    return lengthen(p, lambda v, **given: v * given[WEIGHT], {WEIGHT: other}, norm=weighted)


def add(p: Any, other: Any) -> Any:
    """β of each channel, of a norm by ``F.normalize``; or 0."""
    plan = reading_of(p)
    norm = _unfinished_norm(plan)
    if plan is None or norm is None or plan.unit:
        return NotImplemented
    if type(other) is float and other == 0.0:
        return lengthen(p, lambda v: v + 0.0)
    if norm.bias is not None or not _is_per_channel(p, other):
        return NotImplemented
    return lengthen(
        p, lambda v, **given: v + given[BIAS], {BIAS: other}, norm=norm._replace(bias=other)
    )  # fmt: skip


def _unfinished_norm(plan: Reading | None) -> Norm | None:
    """The norm by ``F.normalize`` of which a factor or a shift would be now, if of nothing else."""
    if plan is None or plan.activation or plan.past or plan.pads:
        return None
    norm = plan.norm
    return norm if isinstance(norm, Norm) and norm.kind in ("l2", "rms") else None


def _is_per_channel(p: Promise, vector: Any) -> bool:
    """Whether a tensor has a value for each channel, as it broadcasts against a promise."""
    after = (1,) * (4 - channel_axis(reading_of(p)))
    return isinstance(vector, Tensor) and _are_per_channel(p, [vector], (_channels(p), *after))


# ---- what follows a norm


def activation(p: Any, kind: str, slope: float, run: Callable[..., Tensor], in_place: bool) -> Any:
    plan = reading_of(p)
    if plan is None or plan.activation or plan.past or plan.pads or plan.unit:
        return NotImplemented
    return lengthen(p, run, in_place=in_place, activation=(kind, slope))


def pad(p: Any, pad: Pad, call: Callable[[Tensor], Tensor], shape: torch.Size) -> Any:
    plan = reading_of(p)
    if plan is None or plan.unit or plan.form:
        return NotImplemented
    return lengthen(p, call, shape=shape, pads=(*plan.pads, pad))


def prepend(p: Any, past: Tensor) -> Any:
    """A promise behind frames that are there."""
    plan, link = reading_of(p), p.link
    if plan is None or plan.past or plan.pads or plan.unit or type(past) is not Tensor:
        return NotImplemented
    if plan.form:
        return NotImplemented
    n, c, t, h, w = link.shape
    if past.dim() != 5 or (*past.shape[:2], *past.shape[3:]) != (n, c, h, w):
        return NotImplemented
    if past.dtype != link.dtype or past.device != link.state.device:
        return NotImplemented
    shape = torch.Size((n, c, t + past.shape[2], h, w))
    return lengthen(
        p, lambda z, past: torch.cat([past, z], 2), {_PAST: past}, shape=shape, past=True
    )


# ---- the convolution


class Read(NamedTuple):
    """What a convolution reads, as arguments of ``conv3d``."""

    tensors: dict[str, Tensor]  # by name
    plan: Reading | None  # of a chain
    padding: Any
    padding_mode: Any
    held: Kept | None = None  # of the tensor that it reads
    calls: tuple[Call, ...] = ()  # of the chain
    viewed: bool = False  # whether some of them turn dimensions

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Of the operation, with tensors of that name."""
        plan = self.plan
        if plan is None:
            return {}
        norm = plan.norm
        name, slope = plan.activation or ("none", 0.01)
        options: dict[str, Any] = {"input_activation": name, "past": given.get(_PAST)}
        if plan.activation is not None:
            options["negative_slope"] = slope
        if norm is not None:
            weight, bias = given.get(WEIGHT), given.get(BIAS)
            if isinstance(norm, BatchNorm):
                norm = norm._replace(running_mean=given[_MEAN], running_var=given[_VAR])
            vectors = [None if v is None else v.view(-1) for v in (weight, bias)]
            options["input_norm"] = norm._replace(weight=vectors[0], bias=vectors[1])
        return options


def read(p: Any, conv: Any, weight: Tensor) -> Read | None:
    """How a convolution reads a promise in one operation; None where it cannot."""
    plan = reading_of(p)
    if plan is None or plan.unit or plan.form or p.link is plan.source:
        return None
    own = pad_of(weight.shape, conv)
    found = None if own is None else merge_axes([*plan.pads, own])
    kept, link = [], p.link
    while link is not plan.source:
        kept += link.kept
        link = link.before
    if found is None or not all(k.same for _, k in kept):
        return None
    tensors = {name: k.tensor for name, k in kept} | {INPUT: plan.source.current_value(keep=True)}
    plan.begun.missed_followers = 0
    held = plan.source.held
    if held is not None and held.tensor is not tensors[INPUT]:
        held = None
    calls = p.link.calls(_OWN, _OWN, plan.source)
    return Read(tensors, plan, *found, held, calls, p.link.viewed)


RULES: dict[Any, Callable[..., Any]] = {
    F.instance_norm: _instance_norm, F.normalize: _normalize,
}  # fmt: skip
