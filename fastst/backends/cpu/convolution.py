"""``conv3d`` on the native CPU kernels: z exists in packed tiles only, forward and backward.

Norm and activation are what the tap convolution loads, bias, a frozen norm, residual and activation
what it stores; cached frames are a second source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...problem import activations, norms
from ...problem.conv3d import ConvProblem, ConvTensors
from ..contract import ConvBackward, ConvResult, Gradients
from ..conv_pass import unpad
from .library import Launcher, floats


def conv3d(problem: ConvProblem, tensors: ConvTensors, train: bool = False) -> ConvResult:
    spec, t, k = problem.spec, tensors, Launcher(problem)
    mean, var = t.mean, t.var
    if spec.norm != "none" and var is None:
        mean, var = moments(k, spec.norm_form, t.x)
    y = problem.empty_output(t.x)
    out = floats(2, problem.out_channels) if spec.output_statistics else None
    epilogue = k.epilogue(
        bias=t.bias, coefficients=t.output_table, outer=spec.activation, aux=t.residual,
        reductions=out,
    )  # fmt: skip
    source = _source(k, problem, t, mean, var)
    k.tap_conv(source, t.weight, problem.conv, y, epilogue, train)
    taken = (mean, var) if t.var is None else (None, None)
    return ConvResult(y, *taken, *(() if out is None else out))


# Values of a row, and rows of a frame, are summed one after the other in float32, and digits are
# lost with their number: a variance of 60,000 is off by 1e-5.
_LONG = 4096


def moments(k: Launcher, norm: norms.Norm, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """As ``norms.moments``."""
    n, c, t, h, w = x.shape
    if norms.by_position(norm.kind):
        centred = norms.is_centred(norm.kind)
        out = floats(1 + centred, n, t, h, w)
        k.lib.position_moments(x, centred, out.flatten(), k.threads)
        # Memory of their own: they are kept for backward, apart.
        return (out[0].clone(), out[1].clone()) if centred else (None, out[0])
    if max(h, w) > _LONG:
        found = norms.moments(norm, x, torch.float64)
        return tuple(None if s is None else s.float() for s in found)  # type: ignore[return-value]
    out = floats(2, n, t, c)
    k.lib.channel_moments(x, out.flatten(), k.threads)
    mean, var = out.double()
    if norm.kind == "group":
        mean, var = (s.unflatten(2, (norm.groups, -1)).transpose(1, 2) for s in (mean, var))
        axes: tuple[int, ...] = (3,) if norm.per_frame else (2, 3)
    else:
        axes = (0, 1)
    among, whole = torch.var_mean(mean, axes, correction=0, keepdim=True)
    var = var.mean(axes, keepdim=True) + among
    shape = norms.size_of_statistics(norm, x.shape)
    return whole.float().view(shape), var.float().view(shape)


def _source(
    k: Launcher, problem: ConvProblem, t: ConvTensors, mean: Tensor | None, var: Tensor | None
) -> Any:
    """z, as it is loaded."""
    table, positions = None, None
    if var is not None:
        norm = problem.spec.norm_form._replace(weight=t.norm_weight, bias=t.norm_bias)
        table, positions = norms.tables(norm, problem.in_channels, mean, var, torch.float32)
    return k.norm_act(t.x, table, problem.spec.input_activation, positions, t.past)


def conv3d_backward(call: ConvBackward) -> Gradients:
    problem, t, need = call.problem, call.tensors, call.need
    spec, k = problem.spec, Launcher(problem)
    dx = dw = db = dgamma = dbeta = dpast = None
    if need.weight:
        z = _source(k, problem, t, call.mean, call.var)
        if t.past is not None:  # a second source is for the forward pass alone
            v = activations.apply(spec.input_activation, _v(call), spec.slope)
            whole = torch.cat((t.past, v.to(t.x.dtype)), 2)
            z = k.plain(whole)
        dw = k.weight_gradient(z, k.plain(call.dy), t.weight, problem.conv)
    if need.bias:
        db = call.dy.sum((0, 2, 3, 4))
    of_norm = (need.x, need.norm_weight, need.norm_bias)
    if any(of_norm) or need.past:
        padding = _copied_sides(problem)
        if spec.norm == "none" and not problem.past and not any(padding):
            # act'(x) is what dz is multiplied by as it is stored.
            act = spec.input_activation
            masks: dict[str, Any] = {"write": "norm_gradient", "act": act, "aux": t.x}
            dx = _gradient_of_z(k, call, padding, k.epilogue(**(masks if act != "none" else {})))
        else:
            dz = _gradient_of_z(k, call, padding, k.epilogue())
            dpast = dz[:, :, : problem.past] if need.past else None
            if any(of_norm):
                dx, dgamma, dbeta = _norm_backward(call, dz[:, :, problem.past :])
    return dx, dw, db, dgamma, dbeta, None, None, dpast


def _copied_sides(problem: ConvProblem) -> Sequence[int]:
    """Padding, before and after t, h, w, that repeats values."""
    p = problem.conv
    return [n if p.modes[i // 2] != "zeros" else 0 for i, n in enumerate(p.padding)]


def _gradient_of_z(k: Launcher, call: ConvBackward, copied: Sequence[int], epilogue: Any) -> Tensor:
    """That of all that the convolution has read; where values were repeated, first of each copy."""
    problem, x, p = call.problem, call.tensors.x, call.problem.conv
    zeros: Any = tuple(n - c for n, c in zip(p.padding, copied, strict=True))
    size = [n + sum(copied[2 * i : 2 * i + 2]) for i, n in enumerate(problem.read_size)]
    dtype = torch.float32 if any(copied) else x.dtype  # in which copies are added up
    if tuple(size) == problem.size:
        dz = torch.empty_like(x)
    else:
        dz = torch.empty((*x.shape[:2], *size), dtype=dtype, device="cpu")
    plain = p._replace(padding=zeros, padding_mode="zeros", frame_mode=None)
    k.input_gradient(k.plain(call.dy), call.tensors.weight, plain, dz, epilogue)
    return unpad(dz, problem.read_size, copied, p.modes) if any(copied) else dz


def _v(call: ConvBackward) -> Tensor:
    """x behind its norm, in float32, or x where there is none."""
    problem, t = call.problem, call.tensors
    if call.var is None:
        return t.x
    return norms.apply(_norm(call), t.x, call.mean, call.var, problem.accumulate_dtype)


def _norm(call: ConvBackward) -> norms.Norm:
    t = call.tensors
    return call.problem.spec.norm_form._replace(weight=t.norm_weight, bias=t.norm_bias)


def _norm_backward(call: ConvBackward, dz: Tensor) -> tuple[Any, Any, Any]:
    """Gradients of x, γ and β from that of z."""
    need, spec, v = call.need, call.problem.spec, _v(call)
    dv = activations.grad(spec.input_activation, dz.to(v.dtype), v, spec.slope)
    if call.var is None:
        return dv, None, None
    needs = (need.x, need.norm_weight, need.norm_bias)
    wide = call.problem.accumulate_dtype
    return norms.gradient(_norm(call), dv, call.tensors.x, call.mean, call.var, needs, wide)
