"""Native kernels for x86-64 CPUs: AVX-512 or AVX2, on PyTorch's own threads.

Tensors are in float32, bfloat16 or float16; arithmetic, accumulation and statistics in float32, but
for products of bfloat16 where the processor has them (AVX512_BF16, AMX).

Both passes of a pair are tap convolutions (csrc/cpu/tap_conv.cpp): what lies between them is done
where the first stores and the second loads.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...problem import slicing
from ...problem.conv3d import ConvProblem
from ...problem.spec import PairProblem, PairTensors, Problem
from ..contract import (
    COMMON_CONV_FIELDS,
    COMMON_PAIR_FIELDS,
    COMMON_PARALLEL_FIELDS,
    Backend,
    Begun,
    PairResult,
    Phase,
)
from . import backward, convolution, library
from .backward import conv2plus1d_backward
from .library import STORED, buffer, floats, load, outdoes, rows
from .norm import norm_backward
from .parallel import parallel_conv2plus1d, parallel_conv2plus1d_backward

# Fewer output channels of a group than this leave most lanes of a vector empty.
_LEAST_PER_GROUP = 8


def _why_not(problem: Problem, phase: Phase) -> str | None:
    if (why := _why_unfit(problem, phase)) is not None:
        return why
    found = load()
    return found if isinstance(found, str) else None


@functools.lru_cache(maxsize=4096)
def _why_unfit(problem: Problem, phase: Phase) -> str | None:
    """Why it cannot run a problem on any machine."""
    if problem.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {problem.device}"
    if problem.dtype not in STORED:
        return "computes float32, bfloat16 and float16, the tensors are in float64"
    if phase == "backward" and not isinstance(problem, ConvProblem):
        return backward.why_not(problem)
    return None


def _mid_tensors_alive(problem: PairProblem) -> int:
    return 2  # u and dv


def _why_not_auto(problem: Problem, phase: Phase) -> str | None:
    if outdoes(problem.dtype):
        name = str(problem.dtype).removeprefix("torch.")
        return f"does not use the instructions by which this processor multiplies {name}"
    return _why_slow(problem)


@functools.lru_cache(maxsize=4096)
def _why_slow(problem: Problem) -> str | None:
    """Why it is slow on any machine with its library."""
    if isinstance(problem, ConvProblem) and problem.in_channels < _LEAST_PER_GROUP:
        return (
            f"is slow with fewer than {_LEAST_PER_GROUP} input channels, here {problem.in_channels}"
        )
    in_pairs = problem.dtype == torch.bfloat16 and library.library().multiplies_pairs()
    for p in problem.passes:
        if in_pairs and p.groups > 1 and p.in_channels // p.groups < _LEAST_PER_GROUP:
            return (
                f"is slow with fewer than {_LEAST_PER_GROUP} input channels per group in "
                f"bfloat16, here {p.in_channels // p.groups}"
            )
        if p.groups == p.in_channels == p.out_channels:
            continue  # depthwise: a vector holds channels of different groups
        if p.groups > 1 and p.out_channels // p.groups < _LEAST_PER_GROUP:
            return (
                f"is slow with fewer than {_LEAST_PER_GROUP} output channels per group, here "
                f"{p.out_channels // p.groups}"
            )
    return None


def conv2plus1d(problem: PairProblem, tensors: PairTensors, save: bool) -> PairResult:
    spec, y = problem.spec, problem.empty_output(tensors.x)
    if not (save or spec.norm == "batch"):
        library.pair(problem, tensors, y)
        return PairResult(y, outer=True)
    kept = save and not spec.recompute
    # Where backward is cut into parts, no buffer as large as u is to stay behind.
    cut = save and slicing.count(problem, _mid_tensors_alive(problem)) > 1
    mid = rows(problem) if kept or cut else buffer(problem)
    inner = _statistics(spec.norm == "batch", problem.mid_channels)
    outer = _statistics(spec.output_statistics, problem.out_channels)
    lib, plan = library.library(), library.plan(problem)
    lib.pair_training(plan, tensors, mid, kept, *inner, y, *outer, torch.get_num_threads())
    return PairResult(y, mid if kept else None, *inner, None, True, *outer)


def first_pass(problem: PairProblem, tensors: PairTensors) -> Begun:
    u, m = rows(problem), problem.mid_channels
    mean, var = floats(m), floats(m)
    lib, plan = library.library(), library.plan(problem)
    lib.pair_first(plan, tensors, u, mean, var, torch.get_num_threads())
    return Begun(u, mean, var)


def second_pass(problem: PairProblem, tensors: PairTensors, begun: Begun) -> PairResult:
    y = problem.empty_output(tensors.x)
    outer = _statistics(problem.spec.output_statistics, problem.out_channels)
    lib, plan = library.library(), library.plan(problem)
    lib.pair_second(plan, tensors, *begun[:3], y, *outer, torch.get_num_threads())
    return PairResult(y, *begun, True, *outer)


def _statistics(wanted: bool, channels: int) -> tuple[Tensor | None, Tensor | None]:
    """Where mean and variance are to be written, if they are wanted."""
    return (floats(channels), floats(channels)) if wanted else (None, None)


BACKEND = Backend(
    name="cpu",
    device="cpu",
    pair_fields=COMMON_PAIR_FIELDS | {"output_statistics", "outer_norm"},
    parallel_fields=COMMON_PARALLEL_FIELDS,
    why_not=_why_not,
    conv2plus1d=conv2plus1d,
    conv2plus1d_backward=conv2plus1d_backward,
    first_pass=first_pass,
    second_pass=second_pass,
    parallel_conv2plus1d=parallel_conv2plus1d,
    parallel_conv2plus1d_backward=parallel_conv2plus1d_backward,
    why_not_auto=_why_not_auto,
    conv_fields=COMMON_CONV_FIELDS | {"output_statistics", "output_norm"},
    conv3d=convolution.conv3d,
    conv3d_backward=convolution.conv3d_backward,
    forms_statistics=True,
    gives_output_statistics=lambda problem: True,  # from the epilogue that writes y
    norm_backward=norm_backward,
    mid_tensors_alive=_mid_tensors_alive,
)
