"""Backward of ``conv2plus1d``: of what is as large as u, only dv is written.

    dv = (Wtᵀ∗dy)·act'(v)        with Σdv and Σdv·(u − mean) from the same kernel
    du = scale·dv + rate·u + shift        formed as the kernels below read dv and u

so dz, v, z and du never exist in memory. Wt here is the weight of the second pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import collectives, configs
from ...shapes import PairSpec, PairTensors, Problem
from .gradients import channel_sums, input_gradient, norm_gradient, sum_rows, weight_gradient
from .passes import conv_pass, finish_norm


def why_not(problem: Problem) -> str | None:
    """What of the problem has no backward kernel."""
    if problem.op != "conv2plus1d":
        return "has no backward kernels for the parallel layer yet"
    if any(configs.thin(p.in_channels // p.groups, p.groups) for p in problem.passes):
        return "has no backward kernels yet for groups of at most 4 channels"
    return None


def conv2plus1d_backward(
    problem: Problem,
    tensors: PairTensors,
    dy: Tensor,
    u: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    first, second = problem.passes
    need: Any = PairTensors(*needs)  # type: ignore[arg-type]
    (w1, w2), (b1, b2) = tensors[1:3], tensors[3:5]
    (need_w1, need_w2), (need_b1, need_b2) = need[1:3], need[3:5]
    if first.kind == "temporal":
        w1, w2, b1, b2 = w2, w1, b2, b1
        need_w1, need_w2, need_b1, need_b2 = need_w2, need_w1, need_b2, need_b1
    below = need.x or need_w1 or need_b1 or need.norm_weight or need.norm_bias

    if u is None and (need_w2 or spec.norm != "none" or spec.activation != "none"):
        u = tensors.x.new_empty(problem.mid_shape)
        conv_pass(first, tensors.x, w1, _video(u), shift=b1)
    mid = None if u is None else _video(u)
    if spec.norm == "frozen":
        mean, var = tensors.mean, tensors.var
    scale = shift = None
    if spec.norm != "none":
        scale, shift = finish_norm(problem, tensors._replace(mean=mean, var=var))

    dx = dw1 = dw2 = db1 = db2 = dgamma = sums = None
    if need_w2:
        assert mid is not None
        dw2 = weight_gradient(
            second, mid, dy, w2, x_scale=scale, x_shift=shift, x_activation=spec.activation,
            slope=spec.slope,
        )  # fmt: skip
    if need_b2:
        assert b2 is not None
        db2 = channel_sums(dy, b2)
    if below:
        dv = dy.new_empty(problem.mid_shape)
        if second.groups > 1 and first.groups == 1:
            dv[..., problem.mid_channels :].zero_()  # channels that belong to no group
        partial = input_gradient(
            second, dy, w2, _video(dv), u=mid, u_scale=scale, u_shift=shift,
            mean=None if spec.norm == "none" else mean, activation=spec.activation,
            slope=spec.slope,
            sums=spec.norm == "batch" or need_b1 or need.norm_weight or need.norm_bias,
        )  # fmt: skip
        above: dict[str, Any] = {}
        if partial is not None:
            sums = sum_rows(partial, partial.new_empty(partial.shape[1:]))
            db1 = sums[0]
        if spec.norm != "none":
            above["scale"] = scale
        if spec.norm != "none" and sums is not None:
            assert mean is not None and var is not None and scale is not None
            pooled = sums if spec.norm == "batch" else None
            if spec.group:
                count = dv[..., 0].numel()
                pooled = collectives.pool_means(sums, count, collectives.resolve(spec.group))
                pooled *= count
            dgamma, db1, rate, offset = norm_gradient(
                problem, tensors, sums, pooled, mean, var, scale
            )
            if spec.norm == "batch":
                above.update(shift=offset, other=mid, rate=rate)
            if (
                b1 is not None and need_b1 and spec.group
            ):  # no longer 0: only all ranks together take their mean away
                db1 = channel_sums(_video(dv), b1, **above)
        if need_w1:
            dw1 = weight_gradient(first, tensors.x, _video(dv), w1, **above)
        if need.x:
            dx = torch.empty_like(tensors.x)
            input_gradient(first, _video(dv), w1, dx, **above)
    dbeta = None if sums is None else sums[0]
    if first.kind == "temporal":
        dw1, dw2, db1, db2 = dw2, dw1, db2, db1
    grads = (dx, dw1, dw2, db1, db2, dgamma, dbeta)
    return [_like(g, t) for g, t, n in zip(grads, tensors, needs, strict=False) if n]


def _video(rows: Tensor) -> Tensor:
    """(N, M', T, H, W) view of rows."""
    return rows.permute(0, 4, 1, 2, 3)


def _like(g: Any, t: Any) -> Tensor:
    """A gradient in the dtype of its tensor; those of statistics are in the accumulation dtype."""
    return g if g.dtype == t.dtype else g.to(t.dtype)
