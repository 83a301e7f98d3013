"""The backward pass of the native CPU kernels: two input and two weight gradients.

dv, the gradient before the norm, is the only tensor that is made between dy and the results. The
norm's and the activation's own gradients are what these four passes load and store::

    dv = (Wtᵀ ∗ dy) · act'(s·u + h)         and Σdv, Σdv·(u − mean) as it is stored
    du = s·dv + p·(u − mean) + q            as it is loaded, for dWs and dx
    z  = act(s·u + h)                       as it is loaded, for dWt
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...problem.spec import PairProblem, Problem
from ..contract import Gradients, PairBackward
from .library import Launcher, floats, norm_coefficients


def why_not(problem: Problem) -> str | None:
    for p in problem.passes:
        if p.padding_mode != "zeros" and any(p.padding):
            return f"pads with zeros only in the backward pass, not by {p.padding_mode!r}"
    return None


def conv2plus1d_backward(call: PairBackward) -> Gradients:
    problem, tensors, need = call.problem, call.tensors, call.need
    spec, (first, second) = problem.spec, problem.passes
    x, w1, w2, b1, *_ = tensors
    k = Launcher(problem)
    if call.u is None:
        mid = k.rows()
        k.tap_conv(k.plain(x), w1, first, mid, k.epilogue(bias=b1))
    else:
        mid = call.u.permute(0, 4, 1, 2, 3)
    mid = mid[:, : problem.mid_channels]
    mean, var = call.statistics()
    coefficients = None
    if mean is not None and var is not None:
        coefficients = norm_coefficients(k, tensors, mean, var)

    dx = dw1 = dw2 = db1 = db2 = dgamma = dbeta = None
    (dy,) = call.dy_owner
    if need.second_weight:
        z = k.norm_act(mid, coefficients, spec.activation)
        dw2 = k.weight_gradient(z, k.plain(dy), w2, second)
    if need.second_bias:
        db2 = dy.sum((0, 2, 3, 4))
    norm = need.norm_weight or need.norm_bias
    if need.x or need.first_weight or need.first_bias or norm:
        dv, sums = k.rows(kept=False), floats(2, problem.mid_channels)
        epilogue = k.epilogue(
            "norm_gradient", coefficients=coefficients, act=spec.activation, aux=mid,
            reductions=sums,
        )  # fmt: skip
        k.input_gradient(k.plain(dy), w2, second, dv, epilogue)
        call.dy_owner.clear()
        del dy
        dbeta = sums[0]
        if coefficients is not None and var is not None:
            dgamma = sums[1] * (var + spec.eps).rsqrt()
            db1 = _finish_norm(problem, coefficients, var, sums, call.means)
        else:
            db1 = sums[0]
        du = k.norm_gradient(dv[:, : problem.mid_channels], mid, coefficients)
        if need.first_weight:
            dw1 = k.weight_gradient(k.plain(x), du, w1, first)
        if need.x:
            dx = call.empty_dx()
            k.input_gradient(du, w1, first, dx, k.epilogue())
    return dx, dw1, dw2, db1, db2, dgamma, dbeta


def _finish_norm(
    problem: PairProblem, coefficients: Tensor, var: Tensor, sums: Tensor, means: Tensor | None
) -> Tensor:
    """Fills p and q of du = s·dv + p·(u − mean) + q; returns Σdu. Means as of ``BatchSlice``."""
    spec = problem.spec
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
