"""Triton kernels: every NVIDIA GPU from compute capability 8.0 on, without a compiler.

Each pass is a tap convolution (``kernels.tap_conv``) that reads x by its own strides. The pair
keeps u or, where nothing needs u, z = act(norm(u)) between its two as ``Problem.mid_shape``.
Under ``TRITON_INTERPRET=1`` the same code runs on CPU tensors, when asked for by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ...problem.spec import Problem
from . import backward, launch, pair, tiles
from .backward import conv2plus1d_backward
from .pair import conv2plus1d
from .parallel import parallel_conv2plus1d
from .parallel_backward import parallel_conv2plus1d_backward
from .rehearsal import rehearse

__all__ = [
    "avoid",
    "conv2plus1d",
    "conv2plus1d_backward",
    "mids",
    "output_statistics",
    "parallel_conv2plus1d",
    "parallel_conv2plus1d_backward",
    "rehearse",
    "trial",
    "ways",
    "why_not",
]

_ON_CPU = "runs on CUDA tensors; on CPU tensors only with TRITON_INTERPRET=1 set at start"


def why_not(problem: Problem, phase: str) -> str | None:
    device = problem.device
    if device.type not in ("cuda", "cpu") or torch.version.hip is not None:
        return f"runs on NVIDIA GPUs, not on {device.type} tensors"
    # Asked first: importing Triton takes half a second that calls on a CPU need not pay.
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return _ON_CPU
    _, missing = launch.found()
    if missing is not None:
        return missing
    if device.type == "cpu":
        return None if launch.interpreted() else _ON_CPU
    if launch.interpreted():
        return (
            "interprets its kernels because TRITON_INTERPRET is set, and that on CPU tensors only"
        )
    has, least = launch.capability(device), tiles.LEAST_CAPABILITY
    if has < least:
        return "needs compute capability {}.{}, but {} has {}.{}".format(*least, device, *has)
    return None


def mids(problem: Problem) -> int:
    return 2  # u and dv


def output_statistics(problem: Problem) -> bool:
    """Whether y comes with its statistics; always, from the epilogue that writes it."""
    return problem.op == "conv2plus1d"


def ways(problem: Problem, phase: str) -> list[str]:
    """What ``tune`` may choose from."""
    return pair.ways(problem, phase) if phase == "forward" else backward.ways(problem)


def trial(problem: Problem, phase: str, way: str) -> Callable[[], None]:
    """Run the problem once in one of its ways, on random tensors, to the end."""
    return pair.trial(problem, phase, way) if phase == "forward" else backward.trial(problem, way)


def avoid(problem: Problem, phase: str) -> str | None:
    if problem.device.type == "cpu":
        return "interprets its kernels on CPU tensors, when asked for by name"
    from ...dispatch import selfcheck

    return selfcheck.why_broken("triton", problem)
