"""CUDA kernels of the native library ``fastst._C``: what is launched for a call, in which order.

Three families. *depthwise* fuses a depthwise pair in one pass over channels-last memory; *hopper*
runs dense pairs on the matrix units of compute capability 9.0; *generic* runs whatever the
semantics allow, on any architecture, and is what the others are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...problem.conv3d import ConvProblem
from ...problem.spec import PairProblem, PairTensors, ParallelProblem, ParallelTensors, Problem
from ..contract import (
    COMMON_CONV_FIELDS,
    COMMON_PAIR_FIELDS,
    COMMON_PARALLEL_FIELDS,
    Backend,
    Begun,
    Gradients,
    PairBackward,
    PairResult,
    Phase,
    by_name,
)
from ..rehearsal import Calls
from . import convolution, depthwise, examples, hopper
from .library import Launcher, is_emulated, launching, load, load_emulated


def _why_not(problem: Problem, phase: Phase) -> str | None:
    if is_emulated():
        if problem.device.type != "cpu":
            return f"is emulated (FASTST_CUDA_EMULATE) and needs CPU tensors, not {problem.device}"
        found = load_emulated()
        return found if isinstance(found, str) else None
    if problem.device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, the tensors are on {problem.device}"
    found = load()
    if isinstance(found, str):
        return found
    if found.device_count() == 0:
        return f"cannot use the GPU: {found.device_error()}"
    return None


def _mid_tensors_alive(problem: PairProblem) -> int:
    return 0 if depthwise.why_not(problem) is None else 2  # u and dv


def _why_not_auto(problem: Problem, phase: Phase) -> str | None:
    if is_emulated():
        return "is emulated"
    if isinstance(problem, ConvProblem):
        taps = "×".join(map(str, problem.conv.kernel))
        return (
            "has only its generic kernels: its depthwise and its Hopper ones run pairs, and no "
            f"single {taps} convolution"
        )
    if not isinstance(problem, PairProblem):
        return "has only its generic kernels: the others are for conv2plus1d"
    depthwise_lacks = depthwise.why_not(problem)
    hopper_lacks = _hopper_lacks(problem, phase)
    if depthwise_lacks is None or hopper_lacks is None:
        return None
    return (
        f"has only its generic kernels: its depthwise ones {depthwise_lacks}; its Hopper ones "
        f"{hopper_lacks}"
    )


def _hopper_lacks(problem: PairProblem, phase: Phase) -> str | None:
    return hopper.why_not(problem) if phase == "forward" else hopper.backward_why_not(problem)


def _gives_output_statistics(problem: PairProblem) -> bool:
    """Only the Hopper kernels form them as they write y."""
    return depthwise.why_not(problem) is not None and hopper.output_statistics(problem)


def _mid(u: Tensor) -> Tensor:
    """(N, M', T, H, W) view of the mid tensor's rows."""
    return u.permute(0, 4, 1, 2, 3)


def conv2plus1d(problem: PairProblem, tensors: PairTensors, save: bool) -> PairResult:
    if depthwise.why_not(problem) is None:
        return depthwise.forward(problem, tensors, save)
    if hopper.why_not(problem) is None:
        return hopper.forward(problem, tensors, save)
    spec = problem.spec
    first, second = problem.passes
    x, w1, w2, b1, b2, *_ = tensors
    with launching(problem) as k:
        u = x.new_empty(problem.mid_shape)
        k.tap_conv([k.branch(k.plain(x), w1, b1, first)], [_mid(u)])
        mean, var = tensors.mean, tensors.var
        if spec.norm == "batch":
            mean, var = k.statistics(_mid(u)[:, : problem.mid_channels])
        coefficients = None
        if mean is not None and var is not None:
            coefficients = k.norm_coefficients(tensors, mean, var)
        y = problem.empty_output(x)
        z = k.norm_act(_mid(u)[:, : problem.mid_channels], coefficients, spec.activation)
        k.tap_conv([k.branch(z, w2, b2, second)], [y])
    batch = spec.norm == "batch"
    kept = u if save and not spec.recompute else None
    return PairResult(y, kept, mean if batch else None, var if batch else None, k.total)


def first_pass(problem: PairProblem, tensors: PairTensors) -> Begun:
    if depthwise.why_not(problem) is None:
        return depthwise.first_pass(problem, tensors)
    if hopper.why_not(problem) is None:
        return hopper.first_pass(problem, tensors)
    x, weight, bias = tensors.x, tensors.first_weight, tensors.first_bias
    with launching(problem) as k:
        u = x.new_empty(problem.mid_shape)
        k.tap_conv([k.branch(k.plain(x), weight, bias, problem.passes[0])], [_mid(u)])
        mean, var = k.statistics(_mid(u)[:, : problem.mid_channels])
    return Begun(u, mean, var, k.total)


def second_pass(problem: PairProblem, tensors: PairTensors, begun: Begun) -> PairResult:
    if depthwise.why_not(problem) is None:
        return depthwise.second_pass(problem, tensors, begun)
    if hopper.why_not(problem) is None:
        return hopper.second_pass(problem, tensors, begun)
    weight, bias = tensors.second_weight, tensors.second_bias
    with launching(problem) as k:
        coefficients = k.norm_coefficients(tensors, begun.mean, begun.var)
        u = _mid(begun.u)[:, : problem.mid_channels]
        z = k.norm_act(u, coefficients, problem.spec.activation)
        y = problem.empty_output(tensors.x)
        k.tap_conv([k.branch(z, weight, bias, problem.passes[1])], [y])
    return PairResult(y, *begun)


def conv2plus1d_backward(call: PairBackward) -> Gradients:
    problem, tensors, need = call.problem, call.tensors, call.need
    if depthwise.why_not(problem) is None:
        return depthwise.backward(call)
    if hopper.backward_why_not(problem) is None:
        return hopper.backward(call)
    spec = problem.spec
    first, second = problem.passes
    x, w1, w2, b1, *_ = tensors
    positions = [problem.batch * math.prod(s) for s in (problem.mid_size, problem.out_size)]
    dx = dw1 = dw2 = db1 = db2 = dgamma = dbeta = None
    with launching(problem) as k:
        u = call.u
        if u is None:
            u = x.new_empty(problem.mid_shape)
            k.tap_conv([k.branch(k.plain(x), w1, b1, first)], [_mid(u)])
        u = _mid(u)[:, : problem.mid_channels]
        mean, var = call.statistics()
        coefficients = None
        if mean is not None and var is not None:
            coefficients = k.norm_coefficients(tensors, mean, var)
        (dy,) = call.dy_owner
        if need.second_weight:
            z = k.norm_act(u, coefficients, spec.activation)
            dw2 = k.weight_gradient(z, k.plain(dy), second, w2, positions[1])
        if need.second_bias:
            db2 = k.sums(k.plain(dy), dy.shape)[0]
        if need.x or need.first_weight or need.first_bias or need.norm_weight or need.norm_bias:
            dv = k.rows(problem.mid_size, problem.mid_channels)
            k.tap_conv(
                [k.branch(k.plain(dy), w2, None, second)], [dv], "norm_gradient",
                aux=k.norm_act(u, coefficients, spec.activation), transposed=True,
            )  # fmt: skip
            call.dy_owner.clear()
            del dy
            if coefficients is not None and mean is not None and var is not None:
                sums = k.sums(k.plain(dv), dv.shape, k.norm_act(u, coefficients, "none"))
                dgamma = k.norm_gradient_coefficients(
                    tensors, sums, (mean, var), coefficients, call.means
                )
                dbeta = sums[0]
            du = k.norm_gradient(dv, u, coefficients)
            if need.first_weight:
                dw1 = k.weight_gradient(k.plain(x), du, first, w1, positions[0])
            if need.first_bias:
                db1 = k.sums(du, dv.shape)[0]
            if need.x:
                dx = call.empty_dx()
                k.tap_conv([k.branch(du, w1, None, first)], [dx], transposed=True)
    return dx, dw1, dw2, db1, db2, dgamma, dbeta


def _branches(
    k: Launcher,
    tensors: ParallelTensors,
    sources: Sequence[Any],
    activation: str,
    biased: bool = True,
) -> list[Any]:
    """The spatial and the temporal branch of the parallel op."""
    t = tensors
    biases = (t.spatial_bias, t.temporal_bias) if biased else (None, None)
    weights = (t.spatial_weight, t.temporal_weight)
    return [
        k.branch(s, w, b, p, activation)
        for s, w, b, p in zip(sources, weights, biases, k.problem.passes, strict=True)
    ]


def _outputs(problem: ParallelProblem, y: Tensor) -> list[Tensor]:
    """The channels of y, or of a gradient like it, that each tap convolution writes."""
    if problem.spec.combine == "add":
        return [y]
    return list(y.split([p.out_channels for p in problem.passes], 1))


def parallel_conv2plus1d(problem: ParallelProblem, tensors: ParallelTensors) -> Tensor:
    spec = problem.spec
    y = problem.empty_output(tensors.x)
    with launching(problem) as k:
        branches = _branches(k, tensors, [k.plain(tensors.x)] * 2, spec.branch_activation)
        if spec.combine == "add":
            k.tap_conv(branches, [y], "forward", spec.activation)
        else:
            for branch, part in zip(branches, _outputs(problem, y), strict=True):
                k.tap_conv([branch], [part], "forward", spec.activation)
    return y


def parallel_conv2plus1d_backward(
    problem: ParallelProblem, tensors: ParallelTensors, dy: Tensor, needs: Sequence[bool]
) -> Gradients:
    spec = problem.spec
    need = by_name(tensors, needs)
    x = tensors.x
    parts = _outputs(problem, dy)
    gradients = [parts[0], parts[-1]]  # of the two branches before their activation
    dx = None
    with launching(problem) as k:
        if spec.activation != "none" or spec.branch_activation != "none":
            branches = _branches(k, tensors, [k.plain(x)] * 2, spec.branch_activation)
            gradients = [k.rows(problem.out_size, p.out_channels) for p in problem.passes]
            together = [(branches, gradients, dy)]
            if spec.combine == "cat":
                each = zip(branches, gradients, parts, strict=True)
                together = [([b], [g], part) for b, g, part in each]
            for b, g, part in together:
                k.tap_conv(b, g, "branch_gradient", spec.activation, k.plain(part))
        sources = [k.plain(g) for g in gradients]
        weights = (tensors.spatial_weight, tensors.temporal_weight)
        wanted = (need.spatial_weight, need.temporal_weight)
        positions = problem.batch * math.prod(problem.out_size)
        dws, dwt = (
            k.weight_gradient(k.plain(x), s, p, w, positions) if n else None
            for n, s, p, w in zip(wanted, sources, problem.passes, weights, strict=True)
        )
        dbs, dbt = (
            k.sums(s, g.shape)[0] if n else None
            for n, s, g in zip(
                (need.spatial_bias, need.temporal_bias), sources, gradients, strict=True
            )
        )
        if need.x:
            dx = torch.empty_like(x)
            branches = _branches(k, tensors, sources, "none", biased=False)
            k.tap_conv(branches, [dx], transposed=True)
    return dx, dws, dwt, dbs, dbt


CALLS = Calls(
    lambda problem, tensors, save, like: conv2plus1d(problem, tensors, save),
    first_pass, second_pass, conv2plus1d_backward,
    lambda problem, tensors, like: parallel_conv2plus1d(problem, tensors),
    parallel_conv2plus1d_backward,
)  # fmt: skip
BACKEND = Backend(
    name="cuda",
    device="gpu",
    pair_fields=COMMON_PAIR_FIELDS | {"group", "output_statistics"},
    parallel_fields=COMMON_PARALLEL_FIELDS,
    conv_fields=COMMON_CONV_FIELDS | {"output_statistics"},
    why_not=_why_not,
    conv2plus1d=conv2plus1d,
    conv2plus1d_backward=conv2plus1d_backward,
    first_pass=first_pass,
    second_pass=second_pass,
    parallel_conv2plus1d=parallel_conv2plus1d,
    parallel_conv2plus1d_backward=parallel_conv2plus1d_backward,
    conv3d=convolution.conv3d,
    conv3d_backward=convolution.conv3d_backward,
    why_not_auto=_why_not_auto,
    instances=examples.instances,
    rehearse=partial(examples.rehearse, CALLS),
    examples=partial(examples.examples, CALLS),
    kinds=examples.kinds,
    gives_output_statistics=_gives_output_statistics,
    mid_tensors_alive=_mid_tensors_alive,
)
