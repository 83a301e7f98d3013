"""The parallel layer on the native CPU kernels: see csrc/cpu/branches.cpp."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...problem import activations
from ...problem.spec import ParallelProblem, ParallelTensors
from .. import native
from ..contract import Gradients, by_name
from .library import Launcher, library


def parallel_conv2plus1d(problem: ParallelProblem, tensors: ParallelTensors) -> Tensor:
    y = problem.empty_output(tensors.x)
    library().parallel(_plan(problem, Launcher.sums), tensors, y, torch.get_num_threads())
    return y


def parallel_conv2plus1d_backward(
    problem: ParallelProblem, tensors: ParallelTensors, dy: Tensor, needs: Sequence[bool]
) -> Gradients:
    need = by_name(tensors, needs)
    of_branches = _activation_gradients(problem, tensors, dy)
    dx = torch.empty_like(tensors.x) if need.x else None
    dws = torch.empty_like(tensors.spatial_weight) if need.spatial_weight else None
    dwt = torch.empty_like(tensors.temporal_weight) if need.temporal_weight else None
    library().parallel_backward(
        _plan(problem, Launcher.sums), tensors, *of_branches, dx, dws, dwt,
        torch.get_num_threads(),
    )  # fmt: skip
    biases = (
        g.sum((0, 2, 3, 4), dtype=torch.float32) if needed else None
        for g, needed in zip(of_branches, needs[3:], strict=True)
    )
    return dx, dws, dwt, *biases


def _activation_gradients(
    problem: ParallelProblem, tensors: ParallelTensors, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what the two convolutions give, which is computed again where it is needed."""
    spec, sizes = problem.spec, [p.out_channels for p in problem.passes]
    a = b = dy
    if spec.branch_activation != "none" or spec.activation != "none":
        both = torch.empty(
            (problem.batch, *problem.out_size, sum(sizes)), dtype=dy.dtype, device=dy.device
        ).permute(0, 4, 1, 2, 3)
        plan = _plan(problem, Launcher.sums, values=True)
        library().parallel(plan, tensors, both, torch.get_num_threads())
        a, b = both.split(sizes, 1)
    if spec.activation != "none":
        fa, fb = (activations.apply(spec.branch_activation, t, spec.slope) for t in (a, b))
        y = fa + fb if spec.combine == "add" else torch.cat((fa, fb), 1)
        dy = activations.grad(spec.activation, dy, y, spec.slope)
    ga, gb = (dy, dy) if spec.combine == "add" else dy.split(sizes, 1)
    if spec.branch_activation != "none":
        ga = activations.grad(spec.branch_activation, ga, a, spec.slope)
        gb = activations.grad(spec.branch_activation, gb, b, spec.slope)
    return ga, gb


@functools.lru_cache(maxsize=4096)
def _plan(problem: ParallelProblem, sums: str, values: bool = False) -> Any:
    """What a call computes, for the library; with ``values`` what its convolutions give, alone."""
    lib, spec = library(), problem.spec
    none = lib.Activation.none
    acts = (getattr(lib.Activation, n) for n in (spec.branch_activation, spec.activation))
    return lib.ParallelPlan(
        [native.conv(lib, p) for p in problem.passes], *((none, none) if values else acts),
        float(spec.slope), spec.combine == "add" and not values, getattr(lib.Sums, sums),
    )  # fmt: skip
