"""The 4D path on PyTorch's own convolutions (arXiv 2407.16514): any device, no kernel of ours.

Everything between x and y is kept as rows: (N, T, H, W, C) contiguous. The same memory is
(N·T, C, H, W) in channels_last for the spatial pass and (N, C, T, H·W) in channels_last for the
temporal one, so neither pass needs a layout copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...problem import activations
from ...problem.examples import example, kind_of
from ...problem.spec import (
    PairProblem,
    PairTensors,
    ParallelProblem,
    ParallelTensors,
    Problem,
)
from .. import ranks
from ..contract import (
    COMMON_CONV_FIELDS,
    COMMON_PAIR_FIELDS,
    COMMON_PARALLEL_FIELDS,
    Backend,
    Begun,
    Example,
    Gradients,
    PairBackward,
    PairResult,
    Phase,
    by_name,
    no_reason,
)
from . import onednn
from .convolution import conv3d, conv3d_backward
from .rows import as_frames, as_rows, conv, conv_backward, from_frames, leave

aten = torch.ops.aten


def _mid_tensors_alive(problem: PairProblem) -> int:
    return 4  # u, z, dz and what PyTorch's convolutions copy


def _candidates(problem: Problem, phase: Phase) -> Sequence[str]:
    """Inference on the CPU only."""
    if phase == "backward" or not isinstance(problem, PairProblem):
        return ()
    return onednn.ways(problem) if onednn.why_not(problem) is None else ()


def _candidate(problem: Problem, phase: Phase, name: str, save: bool) -> Callable[[], object]:
    assert isinstance(problem, PairProblem)
    tensors = example(problem)
    return lambda: onednn.run(name, problem, tensors)


def _instances(problem: Problem, phase: Phase, way: str | None = None) -> Sequence[str]:
    """On CPUs only, where a check takes tens of milliseconds, and in this process: a crash of
    PyTorch's own convolutions would come with the call, too."""
    if problem.device.type != "cpu":
        return ()
    return (kind_of(problem) if phase == "forward" else f"{kind_of(problem)} backward",)


def _rehearse(problem: Problem, phase: Phase, way: str | None = None) -> Sequence[Example]:
    (kind,) = _instances(problem, phase)
    return BACKEND.usual_examples(kind, problem.dtype)


def conv2plus1d(problem: PairProblem, tensors: PairTensors, save: bool) -> PairResult:
    if not save and onednn.why_not(problem) is None:
        return PairResult(onednn.conv2plus1d(problem, tensors))
    spec = problem.spec
    weights = _PaddedWeights(problem, tensors)
    u = weights.clear(conv(as_rows(tensors.x), *weights.first, problem.passes[0]))
    v, mean, var, total = u, None, None, None
    if spec.norm != "none":
        v, mean, var, total = _normalise(problem, tensors, u)
    owned = v is not u or not save
    z = activations.apply(spec.activation, v, spec.slope, inplace=owned)
    y = conv(z, *weights.second, problem.passes[1])
    saved = _widen(u, problem) if save and not spec.recompute else None
    m = problem.mid_channels
    if spec.norm == "batch":
        assert mean is not None and var is not None
        mean, var = mean[:m], var[:m]
    else:
        mean = var = None
    return PairResult(leave(y, problem.empty_output(tensors.x)), saved, mean, var, total)


def first_pass(problem: PairProblem, tensors: PairTensors) -> Begun:
    weights, m, total = _PaddedWeights(problem, tensors), problem.mid_channels, None
    u = weights.clear(conv(as_rows(tensors.x), *weights.first, problem.passes[0]))
    if problem.dtype == problem.accumulate_dtype and not problem.spec.group:
        var, mean = torch.var_mean(u.flatten(0, 3)[:, :m], 0, correction=0)
    else:
        _, found, biased, total = _normalise(problem, tensors, u)
        assert found is not None and biased is not None
        mean, var = found[:m], biased[:m]
    return Begun(_widen(u, problem), mean, var, total)


def second_pass(problem: PairProblem, tensors: PairTensors, begun: Begun) -> PairResult:
    spec = problem.spec
    weights, u = _PaddedWeights(problem, tensors), begun.u
    if u.shape[-1] != weights.mid:
        u = u[..., : weights.mid].contiguous()
    v = _affine(problem, tensors, u, begun.mean, begun.var)
    z = activations.apply(spec.activation, v, spec.slope, inplace=True)
    y = conv(z, *weights.second, problem.passes[1])
    return PairResult(leave(y, problem.empty_output(tensors.x)), *begun)


def conv2plus1d_backward(call: PairBackward) -> Gradients:
    problem, tensors, u, need = call.problem, call.tensors, call.u, call.need
    spec = problem.spec
    first, second = problem.passes
    need_first = (need.first_weight, need.first_bias)
    weights = _PaddedWeights(problem, tensors)
    x = as_rows(tensors.x)
    if u is None:
        u = weights.clear(conv(x, *weights.first, first))
    elif u.shape[-1] != weights.mid:
        u = u[..., : weights.mid].contiguous()
    mean, var = call.statistics()
    v = u
    if spec.norm != "none":
        assert mean is not None and var is not None
        v = _affine(problem, tensors, u, mean, var)
    # The sign of relu(v) is all that its gradient asks of v, so z may take v's place.
    z = activations.apply(spec.activation, v, spec.slope, spec.activation == "relu" and v is not u)
    below = need.x or any(need_first) or need.norm_weight or need.norm_bias
    needed = (bool(below), need.second_weight, need.second_bias)
    dz, dw2, db2 = conv_backward(as_rows(call.dy_owner[0]), z, weights.second[0], second, needed)
    call.dy_owner.clear()
    dgamma = dbeta = dx = dw1 = db1 = None
    if below:
        assert dz is not None
        if spec.activation == "relu":
            dv = aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)
        else:
            dv = activations.grad(spec.activation, dz, v, spec.slope)
        del dz, z, v
        du = dv
        if spec.norm != "none":
            assert mean is not None and var is not None
            du, dgamma, dbeta = _normalise_backward(problem, tensors, dv, u, mean, var, call.means)
            del dv
        dx, dw1, db1 = conv_backward(du, x, weights.first[0], first, (need.x, *need_first))
        dx = None if dx is None else dx.permute(0, 4, 1, 2, 3)
    m = problem.mid_channels
    dw1, db1, dgamma, dbeta = (None if g is None else g[:m] for g in (dw1, db1, dgamma, dbeta))
    if dw2 is not None and second.groups == 1:
        dw2 = dw2[:, :m]
    return dx, dw1, dw2, db1, db2, dgamma, dbeta


def parallel_conv2plus1d(problem: ParallelProblem, tensors: ParallelTensors) -> Tensor:
    spec = problem.spec
    a, b = _branches(problem, tensors, as_rows(tensors.x))
    a = activations.apply(spec.branch_activation, a, spec.slope, inplace=True)
    b = activations.apply(spec.branch_activation, b, spec.slope, inplace=True)
    y = a.add_(b) if spec.combine == "add" else torch.cat((a, b), -1)
    y = activations.apply(spec.activation, y, spec.slope, inplace=True)
    return leave(y, problem.empty_output(tensors.x))


def parallel_conv2plus1d_backward(
    problem: ParallelProblem, tensors: ParallelTensors, dy: Tensor, needs: Sequence[bool]
) -> Gradients:
    spec = problem.spec
    need = by_name(tensors, needs)
    spatial, temporal = problem.passes
    x, g = as_rows(tensors.x), as_rows(dy)
    a: Any = None
    b: Any = None
    if spec.branch_activation != "none" or spec.activation != "none":
        a, b = _branches(problem, tensors, x)
    if spec.activation != "none":
        fa, fb = (activations.apply(spec.branch_activation, t, spec.slope) for t in (a, b))
        y = fa + fb if spec.combine == "add" else torch.cat((fa, fb), -1)
        g = activations.grad(spec.activation, g, y, spec.slope)
    ga = gb = g
    if spec.combine == "cat":
        ga, gb = (
            t.contiguous() for t in g.split((spatial.out_channels, temporal.out_channels), -1)
        )
    if spec.branch_activation != "none":
        ga = activations.grad(spec.branch_activation, ga, a, spec.slope)
        gb = activations.grad(spec.branch_activation, gb, b, spec.slope)
    dxa, dws, dbs = conv_backward(
        ga, x, tensors.spatial_weight, spatial, (need.x, need.spatial_weight, need.spatial_bias)
    )
    dxb, dwt, dbt = conv_backward(
        gb, x, tensors.temporal_weight, temporal, (need.x, need.temporal_weight, need.temporal_bias)
    )
    dx = None if dxa is None or dxb is None else dxa.add_(dxb).permute(0, 4, 1, 2, 3)
    return dx, dws, dwt, dbs, dbt


def _branches(problem: ParallelProblem, t: ParallelTensors, x: Tensor) -> tuple[Tensor, Tensor]:
    spatial, temporal = problem.passes
    a = conv(x, t.spatial_weight, t.spatial_bias, spatial)
    b = conv(x, t.temporal_weight, t.temporal_bias, temporal)
    return a, b


# ---- weights with mid channels padded to whole vectors


class _PaddedWeights:
    """(weight, bias) of the two passes in order, mid channels padded with zeros where possible.

    Padding needs ungrouped passes: in a grouped one, appended channels would belong to no group.
    On CPUs it pays only while the weights that it copies are smaller than what they are used on.
    """

    def __init__(self, problem: PairProblem, t: PairTensors) -> None:
        first, second = problem.passes
        _, w1, w2, b1, b2, *_ = t
        extra = problem.mid_shape[-1] - problem.mid_channels
        self.mid = problem.mid_channels
        pays = problem.device.type != "cpu" or w1.numel() < math.prod(problem.mid_shape)
        if extra and pays and first.groups == second.groups == 1:
            self.mid += extra
            w1 = F.pad(w1, (0, 0) * 4 + (0, extra))
            b1 = None if b1 is None else F.pad(b1, (0, extra))
            w2 = F.pad(w2, (0, 0) * 3 + (0, extra))
        self.first, self.second = (w1, b1), (w2, b2)
        self.real = problem.mid_channels

    def clear(self, u: Tensor) -> Tensor:
        """u with zeros in the channels beyond M, where an infinite x leaves NaN (0 · inf)."""
        if self.mid > self.real:
            u[..., self.real :] = 0
        return u


def _widen(u: Tensor, problem: PairProblem) -> Tensor:
    """u with the channel count of ``problem.mid_shape``."""
    return F.pad(u, (0, problem.mid_shape[-1] - u.shape[-1])) if u.shape[-1] % 8 else u


def _per_channel(
    t: Tensor | None, problem: PairProblem, channels: int, fill: float
) -> Tensor | None:
    """A per-channel parameter in the accumulation dtype, padded to the channels of u."""
    if t is None:
        return None
    t = t.to(problem.accumulate_dtype)
    return F.pad(t, (0, channels - t.shape[0]), value=fill)


def _affine_parameters(
    problem: PairProblem, t: PairTensors, channels: int
) -> tuple[Tensor, Tensor]:
    """gamma and beta, ones and zeros without affine; 0 on padded channels."""
    like = t.x.new_ones(problem.mid_channels, dtype=problem.accumulate_dtype)
    gamma = _per_channel(like if t.norm_weight is None else t.norm_weight, problem, channels, 0.0)
    beta = _per_channel(like * 0 if t.norm_bias is None else t.norm_bias, problem, channels, 0.0)
    assert gamma is not None and beta is not None
    return gamma, beta


def _normalise(
    problem: PairProblem, t: PairTensors, u: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """v; over the batch, its mean and biased variance, too; over ranks, their number of values."""
    spec = problem.spec
    if spec.norm == "frozen":
        assert t.mean is not None and t.var is not None
        return _affine(problem, t, u, t.mean, t.var), None, None, None
    channels = u.shape[-1]
    if spec.group:
        wide = u.flatten(0, 3).to(problem.accumulate_dtype)
        var, mean = torch.var_mean(wide, 0, correction=0)
        group, m = ranks.resolve(spec.group), problem.mid_channels
        mean, var, total = ranks.pool_statistics(mean[:m], var[:m], wide.shape[0], group)
        return _affine(problem, t, u, mean, var), mean, var, total
    gamma, beta = _affine_parameters(problem, t, channels)
    # With momentum 1 the running statistics are the batch's: no cancellation through 1/std².
    mean, var = gamma.new_zeros(channels), gamma.new_zeros(channels)
    v, _, _ = aten.native_batch_norm(as_frames(u), gamma, beta, mean, var, True, 1.0, spec.eps)
    n = u.numel() // channels
    return from_frames(v, u.shape), mean, var.mul_((n - 1) / n), None


def _affine(problem: PairProblem, t: PairTensors, u: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """v = gamma·(u − mean)/sqrt(var + eps) + beta for given statistics."""
    channels = u.shape[-1]
    gamma, beta = _affine_parameters(problem, t, channels)
    mean_ = _per_channel(mean, problem, channels, 0.0)
    var_ = _per_channel(var, problem, channels, 1.0)
    eps = problem.spec.eps
    v, _, _ = aten.native_batch_norm(as_frames(u), gamma, beta, mean_, var_, False, 0.0, eps)
    return from_frames(v, u.shape)


def _normalise_backward(
    problem: PairProblem,
    t: PairTensors,
    dv: Tensor,
    u: Tensor,
    mean: Tensor,
    var: Tensor,
    means: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """du, dgamma, dbeta; means as of ``BatchSlice``, where they are known."""
    spec = problem.spec
    channels = u.shape[-1]
    gamma, _ = _affine_parameters(problem, t, channels)
    mean_ = _per_channel(mean, problem, channels, 0.0)
    var_ = _per_channel(var, problem, channels, 1.0)
    assert mean_ is not None and var_ is not None
    rstd = (var_ + spec.eps).rsqrt()
    if spec.group or means is not None:
        wide, away = (a.flatten(0, 3).to(problem.accumulate_dtype) for a in (dv, u))
        away = away - mean_
        sums = torch.stack((wide.sum(0), (wide * away).sum(0)))
        m = problem.mid_channels
        if means is None:
            group = ranks.resolve(spec.group)
            means = ranks.pool_means(sums[:, :m], wide.shape[0], group)
        means = F.pad(means, (0, channels - m))
        du = wide.sub(means[0]).addcmul_(away, means[1] * rstd**2, value=-1).mul_(gamma * rstd)
        return du.to(dv.dtype).view(u.shape), sums[1] * rstd, sums[0]
    training = spec.norm == "batch"
    statistics = (None, None, mean_, rstd) if training else (mean_, var_, None, None)
    du, dgamma, dbeta = aten.native_batch_norm_backward(
        as_frames(dv), as_frames(u), gamma, *statistics, training, spec.eps, [True] * 3
    )
    return from_frames(du, u.shape), dgamma, dbeta


BACKEND = Backend(
    name="aten",
    pair_fields=COMMON_PAIR_FIELDS | {"group", "outer_norm"},
    parallel_fields=COMMON_PARALLEL_FIELDS,
    why_not=no_reason,
    conv2plus1d=conv2plus1d,
    conv2plus1d_backward=conv2plus1d_backward,
    first_pass=first_pass,
    second_pass=second_pass,
    parallel_conv2plus1d=parallel_conv2plus1d,
    parallel_conv2plus1d_backward=parallel_conv2plus1d_backward,
    instances=_instances,
    rehearse=_rehearse,
    conv_fields=COMMON_CONV_FIELDS | {"output_statistics", "output_norm"},
    conv3d=conv3d,
    conv3d_backward=conv3d_backward,
    mid_tensors_alive=_mid_tensors_alive,
    candidates=_candidates,
    candidate=_candidate,
)
