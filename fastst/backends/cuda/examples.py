"""Calls of every kind of the CUDA kernels that "auto" may choose, for the self-check."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from ...problem.examples import pair_tensors
from ...problem.spec import PairProblem, PairSpec, PairTensors, Problem
from ..contract import Example, Gradients, Later, PairBackward, gradient_example
from . import depthwise
from .hopper import examples as hopper_examples
from .library import emulating


def kinds(device: torch.device, dtype: torch.dtype) -> Sequence[str]:
    """Of the checks that can be made on a device in a dtype."""
    found = []
    if dtype != torch.float64:
        found += ["depthwise", "depthwise backward"]
    hopper = emulating() or torch.cuda.get_device_capability(device)[0] == 9
    if hopper and dtype in (torch.float16, torch.bfloat16):
        found += ["hopper", "hopper backward"]
    return found


def examples(
    kind: str, dtype: torch.dtype, like: Problem | None = None
) -> Sequence[Example | Later]:
    """
    Args:
        kind: one of ``kinds``.
    """
    if kind.startswith("depthwise"):
        return _depthwise(kind.endswith("backward"), dtype)
    return hopper_examples.examples(kind, dtype, like)


def _depthwise(gradients: bool, dtype: torch.dtype) -> list[Example | Later]:
    """Every instance, with borders that no tile ends at and, on a GPU, of several waves."""
    found: list[Example | Later] = []
    for k, kt, stride in product(depthwise.KERNELS, depthwise.KERNELS, depthwise.STRIDES):
        for batch, x in ((True, (1, 24, 5, 9, 10)), (False, (8, 192, 16, 28, 28))):
            name = "gradients of " * gradients + f"depthwise {kt} × {k}² stride {stride} on {x}"
            make = functools.partial(_example, (k, kt, stride), x, batch, dtype, name, gradients)
            if batch:
                found.append(make())
            elif not emulating():
                found.append(Later(name, make))
    return found


def _example(
    instance: tuple[int, int, int],
    x: tuple[int, ...],
    batch: bool,
    dtype: torch.dtype,
    name: str,
    gradients: bool,
) -> Example:
    k, kt, stride = instance
    c = x[1]
    tensors = pair_tensors(dtype, x, (c, 1, 1, k, k), (c, 1, kt, 1, 1))
    pads = (kt // 2,) * 2 + (k // 2,) * 4
    spec = PairSpec((1, stride, stride), pads, groups=(c, c), activation="silu")
    spec = spec._replace(norm="batch" if batch else "frozen")
    if batch:
        tensors = tensors._replace(mean=None, var=None, first_bias=None)
    if not gradients:
        return Example(spec, tensors, lambda p, t: [depthwise.forward(p, t, False).y], name=name)

    def run(problem: PairProblem, t: PairTensors, dy: Tensor, needs: Sequence[bool]) -> Gradients:
        _, u, mean, var, *_ = depthwise.forward(problem, t, True)
        return depthwise.backward(PairBackward(problem, t, [dy], u, mean, var, needs))

    return gradient_example(spec, tensors, run, name)
