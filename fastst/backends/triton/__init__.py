"""Triton kernels: every NVIDIA GPU from compute capability 8.0 on, and AMD's, without a compiler.

Each pass is a tap convolution (``kernels.tap_conv``) that reads x by its own strides. The pair
keeps u or, where nothing needs u, z = act(norm(u)) between its two as ``Problem.mid_shape``.
Under ``TRITON_INTERPRET=1`` the same code runs on CPU tensors, when asked for by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from ...machine import devices, gpu
from ...problem.conv3d import ConvProblem
from ...problem.spec import PairProblem, Problem
from ..contract import (
    COMMON_CONV_FIELDS,
    COMMON_PAIR_FIELDS,
    COMMON_PARALLEL_FIELDS,
    Backend,
    Phase,
)
from . import backward, convolution, launch, pair, single, tiles
from .parallel import parallel_conv2plus1d
from .parallel_backward import parallel_conv2plus1d_backward
from .rehearsal import examples, instances, kinds, rehearse

_ON_CPU = "runs on CUDA tensors; on CPU tensors only with TRITON_INTERPRET=1 set at start"


def _why_not(problem: Problem, phase: Phase) -> str | None:
    device = problem.device
    if devices.kind(device) not in ("cpu", "gpu"):
        return f"runs on NVIDIA and AMD GPUs, not on {device.type} tensors"
    # Asked first: importing Triton takes half a second that calls on a CPU need not pay.
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return _ON_CPU
    _, missing = launch.load_kernels()
    if missing is not None:
        return missing
    if device.type == "cpu":
        return None if launch.serves_cpu() else _ON_CPU
    if launch.is_interpreted():
        return (
            "interprets its kernels because TRITON_INTERPRET is set, and that on CPU tensors only"
        )
    return _why_not_on(launch.capability(device), device)


def _why_not_on(has: gpu.Capability, device: torch.device) -> str | None:
    """What speaks against a GPU, or against it with this Triton."""
    if has[0] == 0:
        if has not in map(gpu.amd, gpu.AMD):
            return f"runs on AMD's {', '.join(gpu.AMD)}, but {device} is gfx{has[1]:x}"
        return None
    least = tiles.LEAST_CAPABILITY
    if has < least:
        return "needs compute capability {}.{}, but {} has {}.{}".format(*least, device, *has)
    if has[0] == 10 and launch.triton_version() < (3, 7, 1):
        # github.com/triton-lang/triton/issues/9871, mended in #9615; pytorch/pytorch#181248
        return (
            "needs Triton 3.7.1 on compute capability 10.x: those before compute loops of unknown "
            "length differently from run to run there"
        )
    return None


def _why_not_auto(problem: Problem, phase: Phase) -> str | None:
    if problem.device.type == "cpu":
        return "interprets its kernels on CPU tensors, when asked for by name"
    return None


def _avoids(problem: Problem, phase: Phase) -> str | None:
    if not isinstance(problem, PairProblem) or phase == "backward":
        return None
    why = (
        single.why_miscompiled(problem.device)
        if "pair_conv" in single.fitting_kernels(problem)
        else None
    )
    return None if why is None else f"pair_conv, the pair in one kernel, {why}"


def _mid_tensors_alive(problem: PairProblem) -> int:
    return 2  # u and dv


def _candidates(problem: Problem, phase: Phase) -> Sequence[str]:
    if isinstance(problem, ConvProblem):
        return convolution.ways(problem, phase)
    if not isinstance(problem, PairProblem):
        return ()
    return pair.ways(problem) if phase == "forward" else backward.ways(problem)


def _candidate(problem: Problem, phase: Phase, name: str, save: bool) -> Callable[[], object]:
    if isinstance(problem, ConvProblem):
        return convolution.trial(problem, phase, name)
    assert isinstance(problem, PairProblem)
    return pair.trial(problem, name, save) if phase == "forward" else backward.trial(problem, name)


BACKEND = Backend(
    name="triton",
    device="gpu",
    pair_fields=COMMON_PAIR_FIELDS | {"group", "output_statistics"},
    parallel_fields=COMMON_PARALLEL_FIELDS,
    conv_fields=COMMON_CONV_FIELDS | {"output_statistics"},
    why_not=_why_not,
    conv2plus1d=pair.conv2plus1d,
    conv2plus1d_backward=backward.conv2plus1d_backward,
    first_pass=pair.first_pass,
    second_pass=pair.second_pass,
    parallel_conv2plus1d=parallel_conv2plus1d,
    parallel_conv2plus1d_backward=parallel_conv2plus1d_backward,
    conv3d=convolution.conv3d,
    conv3d_backward=convolution.conv3d_backward,
    forms_statistics=True,
    why_not_auto=_why_not_auto,
    instances=instances,
    rehearse=rehearse,
    avoids=_avoids,
    examples=examples,
    kinds=kinds,
    gives_output_statistics=lambda problem: True,  # from the epilogue that writes y
    mid_tensors_alive=_mid_tensors_alive,
    candidates=_candidates,
    candidate=_candidate,
)
