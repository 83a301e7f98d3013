"""The second convolution of a pair: what a promise is to it, and both as one operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import functional
from ...functional import BatchNorm
from . import endings, forms
from .chain import Guess, Plan, is_open
from .endings import Operation
from .forms import Form
from .geometry import second_pass
from .layouts import Call, call
from .plain import are_plain, result_dtype
from .promise import Link
from .traced import CONVOLVE

# By the name of a tensor in its own call.
_FIRST = {n: f"first {n}" for n in ("input", "weight", "bias")}
_NORM = {n: f"norm {n}" for n in ("running_mean", "running_var", "weight", "bias")}


def _second_of(rank: int) -> Callable[..., Any]:
    """The rule of a second convolution of tensors of that rank."""

    def rule(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: Any = 1,
    ) -> Any:  # fmt: skip
        if not is_open(input) or not isinstance(weight, Tensor) or len(input.link.shape) != rank:
            return NotImplemented
        if not are_plain(input.link.state.device, weight, bias) or weight.dim() != rank:
            return NotImplemented
        if type(stride) is list or type(padding) is list or type(dilation) is list:
            stride, padding, dilation = (
                tuple(v) if isinstance(v, list) else v for v in (stride, padding, dilation)
            )
        return _second(input.link, weight, bias, (stride, padding, dilation, groups))

    return rule


SECOND = {rank: _second_of(rank) for rank in CONVOLVE}


class _Pair(NamedTuple):
    """Two convolutions as one operation of tensors that are given by name."""

    plan: Plan
    settings: dict[str, Any]  # of ``conv2plus1d``
    form: Form | None
    half: Any  # what the first pass has left
    recompute: bool | None

    def run(self, given: dict[str, Any], second: Any = None, **ending: Any) -> Tensor:
        """``second``: weight and bias in the place of its own; ``ending``: what ends it."""
        plan, form = self.plan, self.form
        x, w1, b1 = given["first input"], given["first weight"], given.get("first bias")
        w2, b2 = second or (given["second weight"], given.get("second bias"))
        temporal = plan.first.kind == "temporal"
        if form is not None:
            x = forms.arranged(x, form.x)
            w1, w2 = forms.lifted(w1, temporal), forms.lifted(w2, not temporal)
        if temporal:
            w1, b1, w2, b2 = w2, b2, w1, b1
        norm = plan.norm
        if norm is not None:
            vectors = [given.get(_NORM[n], t) for n, t in zip(_NORM, norm[:4], strict=True)]
            norm = BatchNorm._make((*vectors, *norm[4:]))
        name, slope = plan.activation or ("none", 0.01)
        ending.setdefault("negative_slope", slope)
        y = functional.conv2plus1d(
            x, w1, w2, b1, b2, **self.settings, activation=name, norm=norm,
            recompute=self.recompute, begun=self.half, **ending,
        )  # fmt: skip
        return y if form is None else forms.laid_out(forms.arranged(y, form.y))


def _second(link: Link, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Any:
    plan: Plan = link.plan
    if not _selected(plan):
        return NotImplemented
    found = _fitting(link, weight.shape, bias is not None and bias.shape, how)
    if found is None or not link.unchanged():
        return NotImplemented
    settings, shape, form = found
    half = plan.half
    if form is not None and half is not None:
        half = form.divided(half)
        if half is None:
            return NotImplemented
    dtype = result_dtype(link.state, *plan.convolved(), weight, bias)
    if dtype is None:
        return NotImplemented
    plan.convolution.taken = True
    link.take()
    activation = plan.activation or ("none", 0.01)
    alike = weight.shape if form is None else forms.lifted_shape(weight.shape, plan.first)
    plan.begun.took(plan, Guess(alike, how, activation))
    given = {_FIRST[n]: kept.tensor for n, kept in plan.convolution.kept}
    for n, kept in link.reads[len(given) :]:
        given[_NORM[n]] = kept.tensor
    given["second weight"] = weight
    if bias is not None:
        given["second bias"] = bias
    for _, kept in link.reads:
        kept.release()
    pair = _Pair(plan, settings, form, half, _recompute(plan))
    shared = activation[1] if activation[0] == "leaky_relu" else None
    op = Operation(
        plan.begun, pair.run, given, shape, dtype, shared, form is None,
        lambda: (*link.calls(_FIRST, _NORM), _convolution(weight.dim(), how)), link.viewed,
    )  # fmt: skip
    y = endings.defer(op, link.state)
    for _, kept in link.reads:
        kept.held_again()
    return y


def _convolution(rank: int, how: tuple[Any, ...]) -> Call:
    """The second one as a call of its own."""
    convolve = CONVOLVE[rank]

    def run(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return convolve(z, weight, bias, *how)

    return call(run, {"weight": "second weight", "bias": "second bias"})


def _fitting(
    link: Link, w: torch.Size, b: Any, how: tuple[Any, ...]
) -> tuple[dict[str, Any], torch.Size, Form | None] | None:
    """Settings of the pair with a second convolution, the shape of y, and the form, if any."""
    plan: Plan = link.plan
    if plan.axes is None and plan.names == "bcthw":
        arguments = plan.first, plan.pads, link.shape, w, b, *how
        try:
            found = second_pass(*arguments)
        except TypeError:  # sizes of a graph, or settings, that do not hash
            found = second_pass.__wrapped__(*arguments)
        return found and (found[0], torch.Size((link.shape[0], w[0], *found[1])), None)
    x = plan.convolution.kept[0][1].tensor
    try:
        form = forms.form(
            plan.first, plan.names, x.shape, plan.convolution.shape, plan.axes_of(link.shape),
            link.shape, w, b, *how,
        )  # fmt: skip
    except TypeError:
        return None
    return None if form is None else (form.settings, form.shape, form)


def _selected(plan: Plan) -> bool:
    """Whether the filters of ``convert`` want the pair."""
    ends = plan.ends
    return bool(plan.begun.wanted or (ends is not None and ends.wanted))


def _recompute(plan: Plan) -> bool | None:
    owner = plan.begun if plan.first.kind == "spatial" else plan.ends
    return None if owner is None else owner.recompute
