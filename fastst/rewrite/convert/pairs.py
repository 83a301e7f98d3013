"""The second convolution of a pair: what a promise is to it, and both as one operation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import functional
from ...functional import BatchNorm
from ...problem.spec import PairTensors, offset_of
from . import endings, forms
from .chain import ChainPlan, Guess, exact_key, have_flags, is_open
from .endings import PendingOperation
from .forms import Form
from .geometry import second_pass
from .layouts import Call, call
from .link import Link
from .plain import Facts, common_dtype, facts
from .traced import CONVOLVE

# By the name of a tensor in its own call.
_FIRST = {n: f"first {n}" for n in ("input", "weight", "bias")}
_NORM = {n: f"norm {n}" for n in ("running_mean", "running_var", "weight", "bias")}
_IN_ORDER = [_NORM[n] for n in ("weight", "bias", "running_mean", "running_var")]


def second(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: Any = 1,
) -> Any:  # fmt: skip
    """The rule of a second convolution."""
    if not is_open(input):
        return NotImplemented
    link, given = input.link, (facts(weight), bias is not None and facts(bias))
    wanted = link.begun.wanted or (link.ends is not None and link.ends.wanted)  # by ``convert``
    if None in given or not wanted:
        return NotImplemented
    if type(stride) is list or type(padding) is list or type(dilation) is list:
        stride, padding, dilation = (
            tuple(v) if isinstance(v, list) else v for v in (stride, padding, dilation)
        )
    how = stride, padding, dilation, groups
    try:
        fit = _fit(link.plan, link.shape, *given, how, exact_key(how))
    except (TypeError, ValueError):  # sizes of a graph, or settings, that do not hash
        fit = _fit.__wrapped__(link.plan, link.shape, *given, how, b"")
    if fit is None or not link.is_unchanged():
        return NotImplemented
    return _join(link, fit, weight, bias)


class Fit(NamedTuple):
    """A second convolution of a chain."""

    settings: dict[str, Any]  # of ``conv2plus1d``
    shape: torch.Size  # of y
    form: Form | None
    dtype: torch.dtype  # of y
    guess: Guess  # that such a one follows again
    last: Call  # it, as a call of its own
    alike: bool  # whether the operation's y lies as that of separate calls, and needs no views
    checked: dict[Any, Any]  # calls of ``conv2plus1d`` that were checked


@lru_cache(maxsize=4096)
def _fit(
    plan: ChainPlan, z: torch.Size, w: Any, b: Any, how: tuple[Any, ...], exact: bytes
) -> Fit | None:
    """A convolution of z with weight and bias of these facts (False for none), if it makes a pair
    of a chain. ``exact``: ``how`` with the types of its numbers."""
    weight, *bias = given = [Facts(*f) for f in (w, b) if f]
    if len(weight.shape) != len(z) or have_flags(how):
        return None
    if any(f.device != plan.given[0].device or f.negative for f in given):
        return None
    dtype = common_dtype({f.dtype for f in (*plan.given, *given)}, plan.autocast)
    arguments = z, weight.shape, bool(bias) and bias[0].shape, *how
    form: Form | None = None
    if plan.axes is None and plan.names == "bcthw":
        found = second_pass(plan.first, plan.pads, *arguments)
        if found is None:
            return None
        settings, shape = found[0], torch.Size((z[0], weight.shape[0], *found[1]))
        lifted: Sequence[int] = weight.shape
    else:
        x, axes = plan.given[0].shape, plan.axes_of(z)
        form = forms.form(plan.first, plan.names, x, plan.shape, axes, *arguments)
        if form is None:
            return None
        settings, shape = form.settings, form.shape
        lifted = forms.lifted_shape(weight.shape, plan.first)
    if dtype is None:
        return None
    guess = Guess(lifted, how, plan.activation or ("none", 0.01))
    alike = form is None and plan.dense and all(f.contiguous for f in given)
    last = _convolution(len(z), how)
    return Fit(settings, shape, form, dtype, guess, last, alike, {})


def _join(link: Link, fit: Fit, weight: Tensor, bias: Tensor | None) -> Any:
    """Both convolutions as one operation."""
    half, state = link.half, link.state
    if fit.form is not None and half is not None:
        half = fit.form.as_clips(half)
        if half is None:
            return NotImplemented
    link.take()
    link.begun.note_pair(link, fit.guess)
    if state.hooks is not None:
        link.let_go()
    x: Tensor = link.convolution.kept[0][1].tensor
    deferred = endings.is_deferred(link.begun, x, state)
    if fit.alike and not (deferred or link.viewed):
        return _run(link, fit, (weight, bias))
    op = _operation(link, fit, half, weight, bias)
    return endings.defer(op, state) if deferred else endings.compute(op)


def _run(link: Link, fit: Fit, second: tuple[Tensor, Tensor | None]) -> Tensor:
    """The operation, without an ending, in the strides that it gives: nothing of it is checked that
    has been checked for a chain that is alike."""
    x, *first = [kept.tensor for _, kept in link.convolution.kept]
    norm: BatchNorm | None = link.norm
    b1 = first[1] if len(first) > 1 else None
    tensors = PairTensors(x, first[0], second[0], b1, second[1], *link.vectors)
    # Without gradients nothing is kept.
    recompute = link.state.grad and functional.recomputes(_recompute(link), norm)
    key = offset_of(x), recompute
    call = fit.checked.get(key)
    if call is None:
        name, slope = fit.guess.activation
        call = fit.checked[key] = functional.check(
            tensors, norm, **fit.settings, activation=name, negative_slope=slope,
            recompute=recompute,
        )  # fmt: skip
    return functional.run(tensors, call, norm, link.half)


def _operation(
    link: Link, fit: Fit, half: Any, weight: Tensor, bias: Tensor | None
) -> PendingOperation:
    """The operation, of tensors by name."""
    convolution, norm = link.convolution, link.norm
    given = {_FIRST[n]: kept.tensor for n, kept in convolution.kept}
    vectors = zip(_IN_ORDER, link.vectors, strict=False)
    given |= {n: t for n, t in vectors if t is not None}
    given["second weight"] = weight
    if bias is not None:
        given["second bias"] = bias
    pair = _Pair(link.plan, norm, fit, half, _recompute(link))
    name, slope = fit.guess.activation
    return PendingOperation(
        link.begun, pair.run, given, fit.shape, fit.dtype, slope if name == "leaky_relu" else None,
        fit.form is None, lambda: (*link.calls(_FIRST, _NORM), fit.last), link.viewed,
    )  # fmt: skip


class _Pair(NamedTuple):
    """Two convolutions as one operation of tensors that are given by name."""

    plan: ChainPlan
    norm: BatchNorm | None
    fit: Fit
    half: Any  # what the first pass has left
    recompute: bool | None

    def run(self, given: dict[str, Any], second: Any = None, **ending: Any) -> Tensor:
        """``second``: weight and bias in the place of its own; ``ending``: what ends it."""
        plan, norm, form = self.plan, self.norm, self.fit.form
        x, w1, b1 = given["first input"], given["first weight"], given.get("first bias")
        w2, b2 = second or (given["second weight"], given.get("second bias"))
        temporal = plan.first.kind == "temporal"
        if form is not None:
            x = forms.arrange(x, form.x)
            w1, w2 = forms.lift(w1, temporal), forms.lift(w2, not temporal)
        if temporal:
            w1, b1, w2, b2 = w2, b2, w1, b1
        if norm is not None:
            vectors = [given.get(_NORM[n], t) for n, t in zip(_NORM, norm[:4], strict=True)]
            norm = BatchNorm._make((*vectors, *norm[4:]))
        name, slope = self.fit.guess.activation
        ending.setdefault("negative_slope", slope)
        y = functional.conv2plus1d(
            x, w1, w2, b1, b2, **self.fit.settings, activation=name, norm=norm,
            recompute=self.recompute, begun=self.half, **ending,
        )  # fmt: skip
        return y if form is None else forms.make_dense(forms.arrange(y, form.y))


def _convolution(rank: int, how: tuple[Any, ...]) -> Call:
    """The second one as a call of its own."""
    convolve = CONVOLVE[rank]

    def run(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return convolve(z, weight, bias, *how)

    return call(run, {"weight": "second weight", "bias": "second bias"})


def _recompute(link: Link) -> bool | None:
    owner = link.begun if link.plan.first.kind == "spatial" else link.ends
    return None if owner is None else owner.recompute
