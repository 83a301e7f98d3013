"""Backward of ``conv2plus1d``: of what is as large as u, only dv is written.

dy is let go before dx is made, and each of dv and dx is made after the partial sums of a weight
gradient are gone, as its plan takes memory late and gives it back early: the peak is u, dv and one
tensor like x.

    dv = (Wtᵀ∗dy)·act'(v)        with Σdv and Σdv·(u − mean) from the same kernel
    du = s·dv + p·u + r        formed as the kernels below read dv and u

so dz, v, z and du never exist in memory. Wt here is the weight of the second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...machine import choices
from ...problem.examples import example
from ...problem.spec import PairProblem, PairTensors, Pass
from .. import ranks
from ..contract import BatchSlice, Gradients, PairBackward
from . import arguments, plans, tiles
from .direct import direct_gradients
from .gradients import (
    NormTerms,
    channel_sums,
    input_gradient,
    norm_gradient,
    sum_rows,
    weight_gradient,
)
from .passes import affine, conv_pass, finish_norm

_WAYS = 8  # of the tiles of both kernels, each in its own order, that ``tune`` may try together


def ways(problem: PairProblem) -> list[str]:
    """What ``tune`` may choose from: tiles."""
    return [f"tiles {i}" for i in range(max(count_ways(p) for p in problem.passes))]


def count_ways(p: Pass) -> int:
    """Ranks of tiles that the gradients of a pass can run in."""
    return 1 if tiles.is_thin(p.in_channels // p.groups, p.groups) else _WAYS


def trial(problem: PairProblem, way: str) -> Callable[[], object]:
    """Run the problem once in one of its ways, on random tensors."""
    tensors = example(problem)
    u = tensors.x.new_zeros(problem.mid_shape).normal_()
    one = u.new_ones(problem.mid_channels, dtype=problem.accumulate_dtype)
    dy = problem.empty_output(tensors.x).normal_()
    needs = [t is not None and n not in ("mean", "var") for n, t in tensors._asdict().items()]

    zero, rank = torch.zeros_like(one), int(way.removeprefix("tiles "))
    return lambda: _backward(PairBackward(problem, tensors, [dy], u, zero, one, needs), rank)


def conv2plus1d_backward(call: PairBackward) -> Gradients:
    return run(call, choices.choice("triton", call.problem, "backward"))


def run(call: PairBackward, way: str | None) -> Gradients:
    """Gradients in one of the ``ways``; None: the best guess."""
    known = way is not None and way in ways(call.problem)
    return _backward(call, int(way.removeprefix("tiles ")) if way and known else 0)


def _backward(call: PairBackward, rank: int) -> Gradients:
    known = [*call.tensors, call.u, call.mean, call.var, *(call.slice or (None, None))]
    settings = call.problem, tuple(call.needs), call.slice is not None, rank
    return plans.run(_run, call.problem.device, [*known, call.dy_owner.pop()], *settings)


def _run(
    given: Sequence[Any], problem: PairProblem, needs: Sequence[bool], sliced: bool, rank: int
) -> Gradients:
    # One function: when each tensor is made and let go is what it is about (see above), and a part
    # of it would hold those of the others.
    count = len(PairTensors._fields)
    tensors, (u, mean, var, dx, means, dy) = PairTensors(*given[:count]), given[count:]
    part = BatchSlice(dx, means) if sliced else None
    call = PairBackward(problem, tensors, [dy], u, mean, var, needs, part)
    need, spec = call.need, problem.spec
    first, second = problem.passes
    x, w1, w2, b1, b2, *_ = tensors
    below = need.x or need.first_weight or need.first_bias or need.norm_weight or need.norm_bias

    if u is None and (need.second_weight or spec.norm != "none" or spec.activation != "none"):
        u = x.new_empty(problem.mid_shape)
        conv_pass(first, x, w1, _video(u), shift=b1)
    mid = None if u is None else _video(u)
    mean, var = call.statistics()
    scale = shift = None
    if spec.norm != "none":
        scale, shift = finish_norm(problem, tensors._replace(mean=mean, var=var))

    processed = spec.norm != "none" or spec.activation != "none"
    dense = [not tiles.is_thin(p.in_channels // p.groups, p.groups) for p in (first, second)]
    if dense[1]:
        dy = arguments.channels_last(dy)  # read in all taps
    # Parameters of a slice of the batch: in the dtype that they are added up in.
    wide = problem.accumulate_dtype if sliced else None
    dx = dv = dw1 = dw2 = db1 = db2 = dgamma = sums = partial = None
    if need.second_bias:
        assert b2 is not None
        db2 = channel_sums(dy, b2, dtype=wide)
    own = spec.norm == "batch" and means is None
    z: Tensor | None = None  # and then, in the same memory, dv
    if need.second_weight and dense[1]:
        assert u is not None
        read = u
        if processed:
            read = z = affine(
                u, torch.empty_like(u), scale=scale, shift=shift, activation=spec.activation,
                slope=spec.slope,
            )  # fmt: skip
        dw2 = weight_gradient(second, _video(read), dy, w2, rank=rank, dtype=wide)
    scaled = spec.norm == "frozen" and dense[0] and dense[1]
    if below:
        rows = x.new_empty(problem.mid_shape) if z is None else z
        if second.groups > 1 and first.groups == 1:
            rows[..., problem.mid_channels :].zero_()  # channels that belong to no group
        dv = _video(rows)
    if below or (need.second_weight and not dense[1]):
        partial, found = pass_gradients(
            second, mid, dy, w2, dv, need.second_weight and not dense[1],
            x_scale=scale, x_shift=shift, activation=spec.activation, slope=spec.slope,
            mean=None if spec.norm == "none" else mean, sums=below and (
                own or need.first_bias or need.norm_weight or need.norm_bias
            ), scaled=scaled, rank=rank, dtype=wide,
        )  # fmt: skip
        dw2 = found if dw2 is None else dw2
    if dv is not None:
        if partial is not None:
            sums = sum_rows(partial, partial.new_empty(partial.shape[1:]))
            db1 = sums[0]
        norm: NormTerms | None = None
        if spec.norm != "none" and not scaled:
            norm = NormTerms(scale)
        if spec.norm == "batch" or (spec.norm == "frozen" and sums is not None):
            dgamma, db1, p, r = _norm_backward(
                call, means, sums, dv[:, 0].numel(), mean, var, scale
            )
            if spec.norm == "batch":
                norm = NormTerms(scale, r, mid, p)
        bias_of_ranks = b1 if need.first_bias and spec.norm == "batch" and spec.group else None
        if norm and dense[0] and (need.x or need.first_weight or bias_of_ranks is not None):
            rows = dv.permute(0, 2, 3, 4, 1)  # du, where dv was
            other = None if norm.u is None else u
            affine(rows, rows, scale=norm.s, other=other, p=norm.p, shift=norm.r)
            norm = None
        if bias_of_ranks is not None:
            # No longer 0: only all ranks together take their mean away.
            db1 = channel_sums(dv, bias_of_ranks, norm=norm, dtype=wide)
        if need.x or need.first_weight:
            dx = call.empty_dx() if need.x else None
            _, dw1 = pass_gradients(
                first, x, dv, w1, dx, need.first_weight, rank=rank, dtype=wide, norm=norm
            )
    dbeta = None if sums is None else sums[0]
    return dx, dw1, dw2, db1, db2, dgamma, dbeta


def _norm_backward(
    call: PairBackward,
    means: Tensor | None,
    sums: Tensor | None,
    count: int,
    mean: Tensor | None,
    var: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """``norm_gradient`` of the norm: from the sums of these ``count`` positions of a channel.

    Its own means over all that the norm has normalised are ``means`` where the caller knows them
    (it cuts the batch), else those of the ranks, else those of the sums.
    """
    problem, spec = call.problem, call.problem.spec
    assert mean is not None and var is not None and scale is not None
    if spec.group and means is None:
        assert sums is not None
        means = _pool_means(sums, count, spec.group)
    pooled = sums if spec.norm == "batch" else None
    if means is not None:
        pooled = means * count
    local = pooled if sums is None else sums
    assert local is not None
    return norm_gradient(problem, call.tensors, local, pooled, mean, var, scale)


def _pool_means(sums: Tensor, count: int, group: str) -> Tensor:
    """Means over the values of all ranks."""
    means = sums.new_empty(sums.shape)
    plans.run_aside(
        lambda sums: [ranks.pool_means(sums, count, ranks.resolve(group))], [sums], [means]
    )
    return means


def pass_gradients(
    p: Pass,
    x: Tensor | None,
    dy: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    needs_weight: bool,
    *,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.01,
    mean: Tensor | None = None,
    sums: bool = False,
    scaled: bool = False,
    rank: int = 0,
    dtype: torch.dtype | None = None,
    norm: NormTerms | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input of a pass, into dx, and of its weight, each where it is wanted.

    Arguments and results as of ``direct_gradients`` and ``input_gradient``; x is None where only
    its shape would be read. For a dense pass x is what it has read where its weight is asked for,
    and there are no terms of a norm.
    """
    if tiles.is_thin(p.in_channels // p.groups, p.groups):
        x = dx if x is None else x
        assert x is not None
        return direct_gradients(
            p, x, dy, weight, dx, needs_weight, x_scale=x_scale, x_shift=x_shift,
            activation=activation, slope=slope, mean=mean, sums=sums, dtype=dtype, norm=norm,
        )  # fmt: skip
    assert norm is None
    dw = partial = None
    if needs_weight:
        assert x is not None
        dw = weight_gradient(p, x, dy, weight, rank=rank, dtype=dtype)
    if dx is not None:
        u = None if activation == "none" and mean is None else x
        partial = input_gradient(
            p, dy, weight, dx, u=u, u_scale=x_scale, u_shift=x_shift, mean=mean,
            activation=activation, slope=slope, sums=sums, scaled=scaled, rank=rank,
        )  # fmt: skip
    return partial, dw


def _video(rows: Tensor) -> Tensor:
    """(N, M', T, H, W) view of rows."""
    return rows.permute(0, 4, 1, 2, 3)
