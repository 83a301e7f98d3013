"""Backward of ``conv2plus1d``: of what is as large as u, only dv is written.

dy is let go before dx is made, and each of dv and dx is made after the partial sums of a weight
gradient are gone: the peak is u, dv and one tensor like x.

    dv = (Wtᵀ∗dy)·act'(v)        with Σdv and Σdv·(u − mean) from the same kernel
    du = scale·dv + rate·u + shift        formed as the kernels below read dv and u

so dz, v, z and du never exist in memory. Wt here is the weight of the second pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...machine import choices
from ...problem.examples import example
from ...problem.spec import PairProblem, Pass
from ...ranks import groups, statistics
from ..contract import Gradients, PairBackward
from . import arguments, tiles
from .direct import direct_gradients
from .gradients import channel_sums, input_gradient, norm_gradient, sum_rows, weight_gradient
from .passes import affine, conv_pass, finish_norm

_WAYS = 8  # of the tiles of both kernels, each in its own order, that ``tune`` may try together


def ways(problem: PairProblem) -> list[str]:
    """What ``tune`` may choose from: tiles."""
    return [f"tiles {i}" for i in range(max(_choices(p) for p in problem.passes))]


def _choices(p: Pass) -> int:
    return 1 if tiles.thin(p.in_channels // p.groups, p.groups) else _WAYS


def trial(problem: PairProblem, way: str) -> Callable[[], None]:
    """Run the problem once in one of its ways, on random tensors, to the end."""
    tensors = example(problem)
    u = tensors.x.new_zeros(problem.mid_shape).normal_()
    one = u.new_ones(problem.mid_channels, dtype=problem.accumulate_dtype)
    dy = problem.empty_output(tensors.x).normal_()
    needs = [t is not None and n not in ("mean", "var") for n, t in tensors._asdict().items()]

    def run() -> None:
        call = PairBackward(problem, tensors, [dy], u, one * 0, one, needs)
        _backward(call, int(way.removeprefix("tiles ")))
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)

    return run


def conv2plus1d_backward(call: PairBackward) -> Gradients:
    return run(call, choices.choice("triton", call.problem, "backward"))


def run(call: PairBackward, way: str | None) -> Gradients:
    """Gradients in one of the ``ways``; None: the best guess."""
    known = way is not None and way in ways(call.problem)
    return _backward(call, int(way.removeprefix("tiles ")) if way and known else 0)


def _backward(call: PairBackward, rank: int) -> Gradients:
    problem, tensors, need, spec = call.problem, call.tensors, call.need, call.problem.spec
    first, second = problem.passes
    x, w1, w2, b1, b2, *_ = tensors
    below = need.x or need.first_weight or need.first_bias or need.norm_weight or need.norm_bias

    u = call.u
    if u is None and (need.second_weight or spec.norm != "none" or spec.activation != "none"):
        u = x.new_empty(problem.mid_shape)
        conv_pass(first, x, w1, _video(u), shift=b1)
    mid = None if u is None else _video(u)
    mean, var = call.statistics()
    scale = shift = None
    if spec.norm != "none":
        scale, shift = finish_norm(problem, tensors._replace(mean=mean, var=var))

    processed = spec.norm != "none" or spec.activation != "none"
    dense = [not tiles.thin(p.in_channels // p.groups, p.groups) for p in (first, second)]
    z: Tensor | None = None  # and then, in the same memory, dv

    def empty_dv() -> Tensor:
        dv = x.new_empty(problem.mid_shape) if z is None else z
        if second.groups > 1 and first.groups == 1:
            dv[..., problem.mid_channels :].zero_()  # channels that belong to no group
        return _video(dv)

    dx = dw1 = dw2 = db1 = db2 = dgamma = sums = None
    (dy,) = call.dy_owner
    if dense[1]:
        call.dy_owner.clear()  # so that no more than the copy is held, where one is made
        dy = arguments.channels_last(dy)  # read in all taps
    # Parameters of a slice of the batch: in the dtype that they are added up in.
    wide = None if call.slice is None else problem.accumulate_dtype
    if need.second_bias:
        assert b2 is not None
        db2 = channel_sums(dy, b2, dtype=wide)
    means = call.means
    own = spec.norm == "batch" and means is None
    if need.second_weight and dense[1]:
        assert u is not None
        read = u
        if processed:
            read = z = affine(
                u, torch.empty_like(u), scale=scale, shift=shift, activation=spec.activation,
                slope=spec.slope,
            )  # fmt: skip
        dw2 = weight_gradient(second, _video(read), dy, w2, rank=rank, dtype=wide)
        del read
    scaled = spec.norm == "frozen" and dense[0] and dense[1]
    dv, partial, found_w2 = _late(
        second, mid, dy, w2, empty_dv if below else None, need.second_weight and not dense[1],
        x_scale=scale, x_shift=shift, activation=spec.activation, slope=spec.slope,
        mean=None if spec.norm == "none" else mean,
        sums=below and (own or need.first_bias or need.norm_weight or need.norm_bias), rank=rank,
        dtype=wide, scaled=scaled,
    )  # fmt: skip
    dw2 = found_w2 if dw2 is None else dw2
    call.dy_owner.clear()
    del dy
    if dv is not None:
        above: dict[str, Any] = {}
        if partial is not None:
            sums = sum_rows(partial, partial.new_empty(partial.shape[1:]))
            db1 = sums[0]
        if spec.norm != "none" and not scaled:
            above["scale"] = scale
        if spec.norm == "batch" or (spec.norm == "frozen" and sums is not None):
            assert mean is not None and var is not None and scale is not None
            pooled = sums if spec.norm == "batch" else None
            count = dv[:, 0].numel()
            if spec.group and means is None:
                assert sums is not None
                means = statistics.pool_means(sums, count, groups.resolve(spec.group))
            if means is not None:
                pooled = means * count
            local = pooled if sums is None else sums
            assert local is not None
            dgamma, db1, rate, offset = norm_gradient(
                problem, tensors, local, pooled, mean, var, scale
            )
            if spec.norm == "batch":
                above.update(shift=offset, other=mid, rate=rate)
        bias_of_ranks = b1 if need.first_bias and spec.norm == "batch" and spec.group else None
        if above and dense[0] and (need.x or need.first_weight or bias_of_ranks is not None):
            rows = dv.permute(0, 2, 3, 4, 1)  # du, where dv was
            if "other" in above:
                above["other"] = u
            affine(rows, rows, **above)
            above = {}
        if bias_of_ranks is not None:
            # No longer 0: only all ranks together take their mean away.
            db1 = channel_sums(dv, bias_of_ranks, dtype=wide, **above)
        if need.x or need.first_weight:
            dx, _, dw1 = _late(
                first, x, dv, w1, call.empty_dx if need.x else None, need.first_weight, rank=rank,
                dtype=wide, **above,
            )  # fmt: skip
    dbeta = None if sums is None else sums[0]
    return dx, dw1, dw2, db1, db2, dgamma, dbeta


def _late(
    p: Pass,
    x: Tensor | None,
    dy: Tensor,
    weight: Tensor,
    empty: Callable[[], Tensor] | None,
    needs_weight: bool,
    **options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``pass_gradients`` and the dx that it filled, which is made as late as possible."""
    dw = None
    if needs_weight and not tiles.thin(p.in_channels // p.groups, p.groups):
        _, dw = pass_gradients(p, x, dy, weight, None, True, **options)
    dx = None if empty is None else empty()
    partial, found = pass_gradients(p, x, dy, weight, dx, needs_weight and dw is None, **options)
    return dx, partial, dw if found is None else found


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
    **above: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input of a pass, into dx, and of its weight, each where it is wanted.

    Arguments and results as of ``direct_gradients`` and ``input_gradient``; x is None where only
    its shape would be read. For a dense pass x is what it has read where its weight is asked for,
    and there is nothing ``above``.
    """
    if tiles.thin(p.in_channels // p.groups, p.groups):
        x = dx if x is None else x
        assert x is not None
        return direct_gradients(
            p, x, dy, weight, dx, needs_weight, x_scale=x_scale, x_shift=x_shift,
            activation=activation, slope=slope, mean=mean, sums=sums, dtype=dtype, **above,
        )  # fmt: skip
    assert not above
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
