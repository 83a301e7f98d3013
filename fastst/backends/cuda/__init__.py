"""CUDA kernels of the native library ``fastst._C``: what is launched for a call, in which order.

Three families. *depthwise* fuses a depthwise pair in one pass over channels-last memory; *hopper*
runs dense pairs on the matrix units of compute capability 9.0; *generic* runs whatever the
semantics allow, on any architecture, and is what the others are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...problem.spec import PairSpec, PairTensors, ParallelSpec, ParallelTensors, Problem
from ..contract import PairResult, Part
from . import depthwise, hopper
from .library import Call, call, emulated, emulating, finish, load


def why_not(problem: Problem, phase: str) -> str | None:
    if emulating():
        if problem.device.type != "cpu":
            return f"is emulated (FASTST_CUDA_EMULATE) and needs CPU tensors, not {problem.device}"
        found = emulated()
        return found if isinstance(found, str) else None
    if problem.device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, the tensors are on {problem.device}"
    found = load()
    if isinstance(found, str):
        return found
    if found.device_count() == 0:
        return f"cannot use the GPU: {found.device_error()}"
    return None


def mids(problem: Problem) -> int:
    if depthwise.why_not(problem) is None:
        return 0
    return 2  # u and dv


def avoid(problem: Problem, phase: str) -> str | None:
    """Why "auto" leaves to the next backend what this one could run."""
    if emulating():
        return "is emulated"
    if depthwise.why_not(problem) is None:
        return None
    forward = phase == "forward"
    why = hopper.why_not(problem) if forward else hopper.backward_why_not(problem)
    if why is None:
        from ...dispatch import selfcheck

        return selfcheck.why_broken("cuda", problem, "hopper" if forward else "hopper backward")
    return (
        f"has only its generic kernels: its depthwise ones {depthwise.why_not(problem)}; "
        f"its Hopper ones {why}"
    )


def output_statistics(problem: Problem) -> bool:
    """Whether y comes with its statistics: only the Hopper kernels form them as they write it."""
    return depthwise.why_not(problem) is not None and hopper.output_statistics(problem)


def _in_order(problem: Problem, t: Any) -> tuple[Any, Any]:
    """What belongs to the first and to the second pass, of (spatial, temporal)."""
    return t if problem.passes[0].kind == "spatial" else t[::-1]


def _mid(u: Tensor) -> Tensor:
    """(N, M', T, H, W) view of the mid tensor's rows."""
    return u.permute(0, 4, 1, 2, 3)


def conv2plus1d(problem: Problem, tensors: PairTensors, save: bool) -> PairResult:
    if depthwise.why_not(problem) is None:
        return depthwise.forward(problem, tensors, save)
    if hopper.why_not(problem) is None:
        return hopper.forward(problem, tensors, save)
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    first, second = problem.passes
    w1, w2 = _in_order(problem, (tensors.spatial_weight, tensors.temporal_weight))
    b1, b2 = _in_order(problem, (tensors.spatial_bias, tensors.temporal_bias))
    x = tensors.x
    with call(problem) as k:
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
    if depthwise.why_not(problem) is None:
        return depthwise.backward(problem, tensors, box[0], mean, var, needs)
    if hopper.backward_why_not(problem) is None:
        return hopper.backward(problem, tensors, box, u, mean, var, needs, part)
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    first, second = problem.passes
    need = PairTensors(*needs)  # type: ignore[arg-type]
    w1, w2 = _in_order(problem, (tensors.spatial_weight, tensors.temporal_weight))
    need_w1, need_w2 = _in_order(problem, (need.spatial_weight, need.temporal_weight))
    need_b1, need_b2 = _in_order(problem, (need.spatial_bias, need.temporal_bias))
    x = tensors.x
    positions = [problem.batch * math.prod(s) for s in (problem.mid_size, problem.out_size)]
    dx = dw1 = dw2 = db1 = db2 = dgamma = dbeta = None
    with call(problem) as k:
        if u is None:
            u = x.new_empty(problem.mid_shape)
            b1, _ = _in_order(problem, (tensors.spatial_bias, tensors.temporal_bias))
            k.tap_conv([k.branch(k.plain(x), w1, b1, first)], [_mid(u)])
        u = _mid(u)[:, : problem.mid_channels]
        if spec.norm == "frozen":
            mean, var = tensors.mean, tensors.var
        coefficients = None
        if mean is not None and var is not None:
            coefficients = k.norm_coefficients(tensors, mean, var)
        if need_w2:
            z = k.norm_act(u, coefficients, spec.activation)
            dw2 = k.weight_gradient(z, k.plain(box[0]), second, w2, positions[1])
        if need_b2:
            db2 = k.sums(k.plain(box[0]), box[0].shape)[0]
        if need.x or need_w1 or need_b1 or need.norm_weight or need.norm_bias:
            dv = k.rows(problem.mid_size, problem.mid_channels)
            k.tap_conv(
                [k.branch(k.plain(box[0]), w2, None, second)], [dv], "norm_gradient",
                spec.activation, u, coefficients, transposed=True,
            )  # fmt: skip
            box.clear()
            if coefficients is not None and var is not None:
                sums = k.sums(k.plain(dv, coefficients), dv.shape, u)
                means = None if part is None else part.means
                dgamma = k.norm_gradient_coefficients(sums, var, coefficients, means)
                dbeta = sums[0]
            du = k.norm_gradient(dv, u, coefficients)
            if need_w1:
                dw1 = k.weight_gradient(k.plain(x), du, first, w1, positions[0])
            if need_b1:
                db1 = k.sums(du, dv.shape)[0]
            if need.x:
                dx = torch.empty_like(x) if part is None or part.dx is None else part.dx
                k.tap_conv([k.branch(du, w1, None, first)], [dx], transposed=True)
    dws, dwt = _in_order(problem, (dw1, dw2))
    dbs, dbt = _in_order(problem, (db1, db2))
    return finish((dx, dws, dwt, dbs, dbt, dgamma, dbeta), tensors, needs, part)


def _branches(
    k: Call, tensors: ParallelTensors, sources: Sequence[Any], activation: str, biased: bool = True
) -> list[Any]:
    """The spatial and the temporal branch of the parallel op."""
    t = tensors
    biases = (t.spatial_bias, t.temporal_bias) if biased else (None, None)
    weights = (t.spatial_weight, t.temporal_weight)
    return [
        k.branch(s, w, b, p, activation)
        for s, w, b, p in zip(sources, weights, biases, k.problem.passes, strict=True)
    ]


def _outputs(problem: Problem, y: Tensor) -> list[Tensor]:
    """The channels of y, or of a gradient like it, that each tap convolution writes."""
    if problem.spec.combine == "add":  # type: ignore[union-attr]
        return [y]
    return list(y.split([p.out_channels for p in problem.passes], 1))


def parallel_conv2plus1d(problem: Problem, tensors: ParallelTensors) -> Tensor:
    spec: ParallelSpec = problem.spec  # type: ignore[assignment]
    y = problem.empty_output(tensors.x)
    with call(problem) as k:
        branches = _branches(k, tensors, [k.plain(tensors.x)] * 2, spec.branch_activation)
        if spec.combine == "add":
            k.tap_conv(branches, [y], "forward", spec.activation)
        else:
            for branch, part in zip(branches, _outputs(problem, y), strict=True):
                k.tap_conv([branch], [part], "forward", spec.activation)
    return y


def parallel_conv2plus1d_backward(
    problem: Problem, tensors: ParallelTensors, dy: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    spec: ParallelSpec = problem.spec  # type: ignore[assignment]
    need = ParallelTensors(*needs)  # type: ignore[arg-type]
    x = tensors.x
    parts = _outputs(problem, dy)
    gradients = [parts[0], parts[-1]]  # of the two branches before their activation
    dx = None
    with call(problem) as k:
        if spec.activation != "none" or spec.branch_activation != "none":
            branches = _branches(k, tensors, [k.plain(x)] * 2, spec.branch_activation)
            gradients = [k.rows(problem.out_size, p.out_channels) for p in problem.passes]
            together = [(branches, gradients, dy)]
            if spec.combine == "cat":
                each = zip(branches, gradients, parts, strict=True)
                together = [([b], [g], part) for b, g, part in each]
            for b, g, part in together:
                k.tap_conv(b, g, "branch_gradient", spec.activation, part)
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
    return finish((dx, dws, dwt, dbs, dbt), tensors, needs)
