"""The backward pass of the native CPU kernels: two input and two weight gradients.

dv, the gradient before the norm, is the only tensor that is made between dy and the results. The
norm's and the activation's own gradients are what these four passes load and store::

    dv = (Wtᵀ ∗ dy) · act'(s·u + h)         and Σdv, Σdv·(u − mean) as it is stored
    du = s·dv + p·(u − mean) + q            as it is loaded, for dWs and dx
    z  = act(s·u + h)                       as it is loaded, for dWt
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...problem.spec import PairSpec, PairTensors, Problem
from ..contract import Part
from .library import Call, floats, norm_coefficients


def why_not(problem: Problem) -> str | None:
    for p in problem.passes:
        if p.padding_mode != "zeros" and any(p.padding):
            return f"pads with zeros only in the backward pass, not by {p.padding_mode!r}"
    return None


def conv2plus1d_backward(
    problem: Problem,
    tensors: PairTensors,
    box: list[Tensor],
    u: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    needs: Sequence[bool],
    part: Part | None = None,
) -> list[Tensor]:
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    x, need = tensors.x, PairTensors(*needs)  # type: ignore[arg-type]
    weights, biases = _in_order(problem, tensors)
    need_weights, need_biases = _in_order(problem, need)
    first, second = problem.passes
    k = Call(problem)
    if u is None:
        mid = k.rows()
        k.tap_conv(k.plain(x), weights[0], first, mid, k.epilogue(bias=biases[0]))
    else:
        mid = u.permute(0, 4, 1, 2, 3)
    mid = mid[:, : problem.mid_channels]
    if spec.norm == "frozen":
        mean, var = tensors.mean, tensors.var
    coefficients = None
    if mean is not None and var is not None:
        coefficients = norm_coefficients(k, tensors, mean, var)

    dw: list[Tensor | None] = [None, None]
    db: list[Tensor | None] = [None, None]
    dx = dgamma = dbeta = None
    if need_weights[1]:
        z = k.norm_act(mid, coefficients, spec.activation)
        dw[1] = k.weight_gradient(z, k.plain(box[0]), weights[1], second)
    if need_biases[1]:
        db[1] = box[0].sum((0, 2, 3, 4))
    norm = need.norm_weight or need.norm_bias
    if need.x or need_weights[0] or need_biases[0] or norm:
        dv, sums = k.rows(kept=False), floats(2, problem.mid_channels)
        epilogue = k.epilogue(
            "norm_gradient", coefficients=coefficients, act=spec.activation, aux=mid,
            reductions=sums,
        )  # fmt: skip
        k.input_gradient(k.plain(box[0]), weights[1], second, dv, epilogue)
        box.clear()
        dbeta = sums[0]
        if coefficients is not None and var is not None:
            dgamma = sums[1] * (var + spec.eps).rsqrt()
            means = None if part is None else part.means
            db[0] = _finish_norm(problem, coefficients, var, sums, means)
        else:
            db[0] = sums[0]
        du = k.norm_gradient(dv[:, : problem.mid_channels], mid, coefficients)
        if need_weights[0]:
            dw[0] = k.weight_gradient(k.plain(x), du, weights[0], first)
        if need.x:
            dx = torch.empty_like(x) if part is None or part.dx is None else part.dx
            k.input_gradient(du, weights[0], first, dx, k.epilogue())
    if first.kind == "temporal":
        dw, db = dw[::-1], db[::-1]
    grads = (dx, *dw, *db, dgamma, dbeta)
    return [_like(g, t) for g, t, n in zip(grads, tensors, needs, strict=False) if n]


def _finish_norm(
    problem: Problem, coefficients: Tensor, var: Tensor, sums: Tensor, means: Tensor | None
) -> Tensor:
    """Fills p and q of du = s·dv + p·(u − mean) + q; returns Σdu. Means as of ``Part``."""
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    _, scale, _, p, q = coefficients
    total = scale * sums[0]
    if spec.norm == "frozen":
        return total
    count = problem.batch * math.prod(problem.mid_size)
    if means is None:
        means = sums / count
    torch.mul(scale / (var + spec.eps), -means[1], out=p)
    torch.mul(scale, -means[0], out=q)
    return total + count * q


def _in_order(problem: Problem, t: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """What belongs to the weights and to the biases, each for the first and the second pass."""
    pairs = (t.spatial_weight, t.temporal_weight), (t.spatial_bias, t.temporal_bias)
    spatial_first = problem.passes[0].kind == "spatial"
    return pairs if spatial_first else (pairs[0][::-1], pairs[1][::-1])


def _like(g: Tensor | None, t: Tensor | None) -> Tensor:
    """A gradient in the dtype and strides of its tensor."""
    assert g is not None and t is not None
    if g.dtype == t.dtype and g.stride() == t.stride():
        return g
    like = torch.empty_like(t, device="meta")
    same = g.dtype == like.dtype and g.stride() == like.stride()
    return g if same else torch.empty_like(t).copy_(g)
