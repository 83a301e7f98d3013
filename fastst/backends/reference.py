"""Ground truth: ``nn.Conv3d`` composed, differentiable any number of times.

``compose`` runs in the dtype it is given and is what functorch transforms, double backward and
layers with foreign children use. As a backend the same composition runs in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import activations
from ..problem.spec import (
    PairProblem,
    PairSpec,
    PairTensors,
    ParallelProblem,
    ParallelSpec,
    ParallelTensors,
    Pass,
    Problem,
)
from ..ranks import groups, statistics
from .contract import (
    COMMON_PAIR_FIELDS,
    COMMON_PARALLEL_FIELDS,
    Backend,
    Gradients,
    PairBackward,
    PairResult,
    Phase,
)

_PAD_MODE = {"zeros": "constant"}
_DIFFERENTIABLE = PairTensors._fields.index("norm_bias") + 1  # tensors that have a gradient


def pad(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """Pad (N, C, T, H, W) by (before, after) of t, h, w; pads nothing that is 0."""
    t0, t1, h0, h1, w0, w1 = padding
    if not any(padding):
        return x
    return F.pad(x, (w0, w1, h0, h1, t0, t1), _PAD_MODE.get(mode, mode))


def conv_pass(x: Tensor, weight: Tensor, bias: Tensor | None, p: Pass) -> Tensor:
    """One pass as ``nn.Conv3d`` computes it; of 16 bits on CPUs, where oneDNN's is wrong, wider."""
    if x.device.type == "cpu" and x.dtype.itemsize == 2:
        wide = conv_pass(x.float(), weight.float(), None if bias is None else bias.float(), p)
        return wide.to(x.dtype)
    if x.device.type == "cpu":
        # oneDNN's gradients of strided channels-last 3D convolutions read out of bounds.
        x, weight = x.contiguous(), weight.contiguous()
    steps, p = p.subsampling()
    t0, t1, h0, h1, w0, w1 = p.padding
    padding = (t0, h0, w0)
    strided = any(step > 1 and pad for step, pad in zip(steps, padding, strict=True))
    if p.padding_mode != "zeros" or padding != (t1, h1, w1) or strided:
        x, padding = pad(x, p.padding, p.padding_mode), (0, 0, 0)
    st, sh, sw = steps
    x = x[:, :, ::st, ::sh, ::sw]
    return F.conv3d(x, weight, bias, p.stride, padding, p.dilation, p.groups)


def batch_norm(t: PairTensors, spec: PairSpec) -> Callable[[Tensor], Tensor]:
    """Norm of the spec as a function of u."""
    if spec.norm == "none":
        return lambda u: u
    if spec.group:
        affine, group = (t.norm_weight, t.norm_bias), groups.resolve(spec.group)
        return lambda u: statistics.batch_norm(u, *affine, spec.eps, group)[0]
    mean, var = (t.mean, t.var) if spec.norm == "frozen" else (None, None)
    training = spec.norm == "batch"
    return lambda u: F.batch_norm(u, mean, var, t.norm_weight, t.norm_bias, training, 0.0, spec.eps)


def compose_pair(
    t: PairTensors, spec: PairSpec, norm: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``conv2plus1d`` by PyTorch's own differentiable operators, in the dtype of its tensors.

    ``norm`` replaces the spec's normalisation, for callers that own running statistics.
    """
    first, second = Problem.of(t, spec).passes
    u = conv_pass(t.x, t.first_weight, t.first_bias, first)
    v = (norm or batch_norm(t, spec))(u)
    z = activations.apply(spec.activation, v, spec.slope)
    y = conv_pass(z, t.second_weight, t.second_bias, second)
    y = y if t.residual is None else y + t.residual
    return activations.apply(spec.outer_activation, y, spec.slope)


def compose_parallel(t: ParallelTensors, spec: ParallelSpec) -> Tensor:
    """``parallel_conv2plus1d`` by PyTorch's own differentiable operators."""
    spatial, temporal = Problem.of(t, spec).passes
    a = conv_pass(t.x, t.spatial_weight, t.spatial_bias, spatial)
    b = conv_pass(t.x, t.temporal_weight, t.temporal_bias, temporal)
    a = activations.apply(spec.branch_activation, a, spec.slope)
    b = activations.apply(spec.branch_activation, b, spec.slope)
    y = a + b if spec.combine == "add" else torch.cat((a, b), 1)
    return activations.apply(spec.activation, y, spec.slope)


def _why_not(problem: Problem, phase: Phase) -> str | None:
    if problem.device.type == "mps":
        return "needs float64, which MPS devices lack"
    return None


def conv2plus1d(problem: PairProblem, tensors: PairTensors, save: bool) -> PairResult:
    spec = problem.spec
    mids: list[Tensor] = []
    norm = batch_norm(_double(tensors), spec)

    def keep(u: Tensor) -> Tensor:
        mids.append(u)
        return norm(u)

    with torch.no_grad():
        y = problem.empty_output(tensors.x).copy_(compose_pair(_double(tensors), spec, keep))
        (u,) = mids
        saved = mean = var = count = None
        if save and not spec.recompute:
            saved = y.new_zeros(problem.mid_shape)
            saved[..., : problem.mid_channels] = u.permute(0, 2, 3, 4, 1)
        if spec.norm == "batch":
            var, mean = torch.var_mean(u, (0, 2, 3, 4), correction=0)
            if spec.group:
                group, n = groups.resolve(spec.group), u.numel() // u.shape[1]
                mean, var, count = statistics.pool_statistics(mean, var, n, group)
                count = count.to(problem.accumulate_dtype)
            mean, var = mean.to(problem.accumulate_dtype), var.to(problem.accumulate_dtype)
    return PairResult(y, saved, mean, var, count, outer=True)


def conv2plus1d_backward(call: PairBackward) -> Gradients:
    return gradients(
        compose_pair,
        call.tensors,
        call.problem.spec,
        call.dy_owner[0],
        call.needs[:_DIFFERENTIABLE],
    )


def parallel_conv2plus1d(problem: ParallelProblem, tensors: ParallelTensors) -> Tensor:
    spec = problem.spec
    with torch.no_grad():
        return problem.empty_output(tensors.x).copy_(compose_parallel(_double(tensors), spec))


def parallel_conv2plus1d_backward(
    problem: ParallelProblem, tensors: ParallelTensors, dy: Tensor, needs: Sequence[bool]
) -> Gradients:
    return gradients(compose_parallel, tensors, problem.spec, dy, needs)


def _double(tensors: Any) -> Any:
    return type(tensors)(*(None if t is None else t.detach().double() for t in tensors))


def gradients(
    compose: Callable[..., Tensor], tensors: Any, spec: Any, dy: Tensor, needs: Sequence[bool]
) -> Gradients:
    """A gradient for each need, through the float64 composition; None where there is no need."""
    leaves = _double(tensors)
    wanted = [t.requires_grad_() for t, n in zip(leaves, needs, strict=False) if n]
    with torch.enable_grad():
        y = compose(leaves, spec)
    found = iter(torch.autograd.grad(y, wanted, dy.double()))
    return [next(found) if n else None for n in needs]


BACKEND = Backend(
    name="reference",
    pair_fields=COMMON_PAIR_FIELDS | {"group"},
    parallel_fields=COMMON_PARALLEL_FIELDS,
    why_not=_why_not,
    conv2plus1d=conv2plus1d,
    conv2plus1d_backward=conv2plus1d_backward,
    parallel_conv2plus1d=parallel_conv2plus1d,
    parallel_conv2plus1d_backward=parallel_conv2plus1d_backward,
)
