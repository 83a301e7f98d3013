"""Native float32 kernels for x86-64 CPUs: AVX-512 or AVX2, on PyTorch's own threads.

Both passes of a pair are tap convolutions (csrc/cpu/tap_conv.cpp): what lies between them is done
where the first stores and the second loads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...problem import slicing
from ...problem.spec import PairProblem, PairTensors, Problem
from ..contract import COMMON_PAIR_FIELDS, Backend, Begun, PairResult, Phase
from . import backward
from .backward import conv2plus1d_backward
from .library import Launcher, floats, load, norm_coefficients
from .norm import norm_backward

# Fewer output channels of a group than this leave most lanes of a vector empty.
_LEAST_PER_GROUP = 8


def _why_not(problem: Problem, phase: Phase) -> str | None:
    if problem.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {problem.device}"
    if problem.dtype != torch.float32:
        return f"computes in float32 only, not in {str(problem.dtype).removeprefix('torch.')}"
    why = backward.why_not(problem) if phase == "backward" else None
    if why is not None:
        return why
    found = load()
    return found if isinstance(found, str) else None


def _mid_tensors_alive(problem: PairProblem) -> int:
    return 2  # u and dv


def _why_not_auto(problem: Problem, phase: Phase) -> str | None:
    for p in problem.passes:
        if p.groups > 1 and p.out_channels // p.groups < _LEAST_PER_GROUP:
            return (
                f"is slow with fewer than {_LEAST_PER_GROUP} output channels per group, here "
                f"{p.out_channels // p.groups}"
            )
    return None


def conv2plus1d(problem: PairProblem, tensors: PairTensors, save: bool) -> PairResult:
    spec = problem.spec
    k = Launcher(problem)
    if not (save or spec.norm == "batch"):
        y = problem.empty_output(tensors.x)
        k.pair(tensors, y)
        return PairResult(y, outer=True)
    first, w1, b1 = problem.passes[0], tensors.first_weight, tensors.first_bias
    m = problem.mid_channels
    mean, var, coefficients = tensors.mean, tensors.var, None
    if spec.norm == "frozen":
        assert mean is not None and var is not None
        coefficients = norm_coefficients(k, tensors, mean, var)
    kept = save and not spec.recompute
    # Where backward is cut into parts, no buffer as large as u is to stay behind.
    mid = k.rows(kept or (save and slicing.count(problem, _mid_tensors_alive(problem)) > 1))
    if kept or spec.norm == "batch":  # u itself is stored
        statistics = floats(2, m) if spec.norm == "batch" else None
        epilogue = k.epilogue(bias=b1, reductions=statistics)
        k.tap_conv(k.plain(tensors.x), w1, first, mid, epilogue)
        if statistics is not None:
            mean, var = statistics
            coefficients = norm_coefficients(k, tensors, mean, var)
        source = k.norm_act(mid[:, :m], coefficients, spec.activation)
    else:  # act(norm(u)) is, in its place
        epilogue = k.epilogue(bias=b1, coefficients=coefficients, act=spec.activation)
        k.tap_conv(k.plain(tensors.x), w1, first, mid, epilogue)
        source = k.plain(mid[:, :m])
    y, out = _second_pass(k, problem, tensors, source)
    batch = spec.norm == "batch"
    return PairResult(
        y, mid.permute(0, 2, 3, 4, 1) if kept else None, mean if batch else None,
        var if batch else None, None, True, *(() if out is None else out),
    )  # fmt: skip


def first_pass(problem: PairProblem, tensors: PairTensors) -> Begun:
    k, statistics = Launcher(problem), floats(2, problem.mid_channels)
    mid, epilogue = k.rows(), k.epilogue(bias=tensors.first_bias, reductions=statistics)
    k.tap_conv(k.plain(tensors.x), tensors.first_weight, problem.passes[0], mid, epilogue)
    return Begun(mid.permute(0, 2, 3, 4, 1), *statistics)


def second_pass(problem: PairProblem, tensors: PairTensors, begun: Begun) -> PairResult:
    k = Launcher(problem)
    u = begun.u.permute(0, 4, 1, 2, 3)[:, : problem.mid_channels]
    coefficients = norm_coefficients(k, tensors, begun.mean, begun.var)
    source = k.norm_act(u, coefficients, problem.spec.activation)
    y, out = _second_pass(k, problem, tensors, source)
    return PairResult(y, *begun, True, *(() if out is None else out))


def _second_pass(
    k: Launcher, problem: PairProblem, tensors: PairTensors, source: Any
) -> tuple[Tensor, Tensor | None]:
    """y and, if asked for, its statistics."""
    spec = problem.spec
    y = problem.empty_output(tensors.x)
    out = floats(2, problem.out_channels) if spec.output_statistics else None
    epilogue = k.epilogue(
        bias=tensors.second_bias, outer=spec.outer_activation, aux=tensors.residual, reductions=out
    )
    k.tap_conv(source, tensors.second_weight, problem.passes[1], y, epilogue)
    return y, out


BACKEND = Backend(
    name="cpu",
    device="cpu",
    pair_fields=COMMON_PAIR_FIELDS | {"output_statistics"},
    why_not=_why_not,
    conv2plus1d=conv2plus1d,
    conv2plus1d_backward=conv2plus1d_backward,
    first_pass=first_pass,
    second_pass=second_pass,
    why_not_auto=_why_not_auto,
    gives_output_statistics=lambda problem: True,  # from the epilogue that writes y
    norm_backward=norm_backward,
    mid_tensors_alive=_mid_tensors_alive,
)
