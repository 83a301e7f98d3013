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

from ..machine import exactness
from ..problem import activations
from ..problem.conv3d import ConvProblem, ConvSpec, ConvTensors
from ..problem.norms import Norm, apply_table, moments
from ..problem.spec import (
    PairProblem,
    PairSpec,
    PairTensors,
    ParallelProblem,
    ParallelSpec,
    ParallelTensors,
    Problem,
)
from . import ranks
from .contract import (
    COMMON_CONV_FIELDS,
    COMMON_PAIR_FIELDS,
    COMMON_PARALLEL_FIELDS,
    Backend,
    ConvBackward,
    ConvResult,
    Gradients,
    PairBackward,
    PairResult,
    Phase,
)
from .conv_pass import conv_pass

_DIFFERENTIABLE = PairTensors._fields.index("norm_bias") + 1  # tensors that have a gradient


def with_usual_strides(t: Tensor) -> Tensor:
    """t with PyTorch's own strides along axes of size 1, where a memory format says the others."""
    if t.dim() != 5 or 1 not in t.shape:
        return t
    for fmt in (torch.contiguous_format, torch.channels_last_3d):
        if t.is_contiguous(memory_format=fmt):
            stride = torch.empty(t.shape, device="meta", memory_format=fmt).stride()
            same = t.stride() == stride
            return t if same else t.as_strided(t.shape, stride, t.storage_offset())
    return t


def normalise_batch(x: Tensor, *args: Any) -> Tensor:
    """``F.batch_norm``, whose gradient on a CPU is right.

    That of PyTorch 2.11 to 2.14 is not where x or the gradient of v has an axis of size 1 with a
    stride of no memory format, as ``frames.permute(3, 0, 1, 2)[None]`` has, and they lie in two.
    """
    watched = exactness.is_required() or torch._C._are_functorch_transforms_active()
    if not x.is_cpu or 1 not in x.shape or watched or torch.compiler.is_compiling():
        return F.batch_norm(x, *args)
    v = F.batch_norm(with_usual_strides(x), *args)
    if v.grad_fn is not None:
        v.grad_fn.register_prehook(_with_usual_strides)
    return v


def _with_usual_strides(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(g if g is None else with_usual_strides(g) for g in grads)


def batch_norm(t: PairTensors, spec: PairSpec) -> Callable[[Tensor], Tensor]:
    """Norm of the spec as a function of u."""
    if spec.norm == "none":
        return lambda u: u
    if spec.group:
        affine, group = (t.norm_weight, t.norm_bias), ranks.resolve(spec.group)
        return lambda u: ranks.batch_norm(u, *affine, spec.eps, group)[0]
    mean, var = (t.mean, t.var) if spec.norm == "frozen" else (None, None)
    training = spec.norm == "batch"
    return lambda u: normalise_batch(
        u, mean, var, t.norm_weight, t.norm_bias, training, 0.0, spec.eps
    )


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
    y = y if t.outer_table is None else apply_table(y, t.outer_table)
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


def normalise(x: Tensor, t: ConvTensors, spec: ConvSpec) -> Tensor:
    """The norm of what ``conv3d`` reads, by PyTorch's own operators."""
    gamma, beta = t.norm_weight, t.norm_bias
    if spec.norm == "none":
        return x
    if spec.norm == "frozen":
        return normalise_batch(x, t.mean, t.var, gamma, beta, False, 0.0, spec.eps)
    if spec.norm == "batch":
        return normalise_batch(x, None, None, gamma, beta, True, 0.0, spec.eps)
    if spec.norm == "group":
        if x.device.type == "cpu" and not exactness.is_required():
            x = x.contiguous()  # PyTorch's gradient of γ alone crashes on channels-last memory
        if not spec.per_frame:
            return F.group_norm(x, spec.norm_groups, gamma, beta, spec.eps)
        frames = x.transpose(1, 2).flatten(0, 1)
        frames = F.group_norm(frames, spec.norm_groups, gamma, beta, spec.eps)
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)
    rows, c = x.movedim(1, -1), x.shape[1]
    if spec.norm == "layer":
        return F.layer_norm(rows, (c,), gamma, beta, spec.eps).movedim(-1, 1)
    if spec.norm == "rms":
        v = F.rms_norm(rows, (c,), gamma, spec.eps)
    else:
        v = F.normalize(rows, dim=-1, eps=spec.eps) * c**0.5
        v = v if gamma is None else v * gamma
    return (v if beta is None else v + beta).movedim(-1, 1)


def compose_conv3d(
    t: ConvTensors, spec: ConvSpec, norm: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``conv3d`` by PyTorch's own differentiable operators, in the dtype of its tensors.

    ``norm`` replaces the spec's normalisation, for callers that own running statistics.
    """
    v = normalise(t.x, t, spec) if norm is None else norm(t.x)
    z = activations.apply(spec.input_activation, v, spec.slope)
    if t.past is not None:
        z = torch.cat((t.past, z), 2)
    y = conv_pass(z, t.weight, t.bias, ConvProblem.of(t, spec).conv)
    y = y if t.output_table is None else apply_table(y, t.output_table)
    y = y if t.residual is None else y + t.residual
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
                group, n = ranks.resolve(spec.group), u.numel() // u.shape[1]
                mean, var, count = ranks.pool_statistics(mean, var, n, group)
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


def conv3d(problem: ConvProblem, tensors: ConvTensors, train: bool = False) -> ConvResult:
    t, spec = _double(tensors), problem.spec
    mean = var = out_mean = out_var = None
    with torch.no_grad():
        double = compose_conv3d(t, spec)
        y = problem.empty_output(tensors.x).copy_(double)
        if spec.norm not in ("none", "frozen") and t.var is None:
            mean, var = moments(spec.norm_form, t.x, torch.float64)
        if spec.output_statistics:
            out_mean, out_var = moments(Norm("batch"), double, torch.float64)
    found = (mean, var, out_mean, out_var)
    wide = problem.accumulate_dtype
    return ConvResult(y, *(None if s is None else s.to(wide) for s in found))


def conv3d_backward(call: ConvBackward) -> Gradients:
    bare = call.tensors._replace(residual=None)
    return gradients(compose_conv3d, bare, call.problem.spec, call.dy, call.needs)


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
    pair_fields=COMMON_PAIR_FIELDS | {"group", "outer_norm"},
    parallel_fields=COMMON_PARALLEL_FIELDS,
    why_not=_why_not,
    conv2plus1d=conv2plus1d,
    conv2plus1d_backward=conv2plus1d_backward,
    parallel_conv2plus1d=parallel_conv2plus1d,
    parallel_conv2plus1d_backward=parallel_conv2plus1d_backward,
    conv_fields=COMMON_CONV_FIELDS | {"output_statistics", "output_norm"},
    conv3d=conv3d,
    conv3d_backward=conv3d_backward,
)
