"""Random tensors of a problem: to measure it with, and to check a backend by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from .spec import (
    PairProblem,
    PairSpec,
    PairTensors,
    ParallelProblem,
    ParallelSpec,
    ParallelTensors,
    Problem,
)


@overload
def example(problem: PairProblem) -> PairTensors: ...


@overload
def example(problem: ParallelProblem) -> ParallelTensors: ...


def example(problem: Problem) -> PairTensors | ParallelTensors:
    """Random tensors of a problem, of magnitudes as in a network, without biases."""
    layout = torch.channels_last_3d if problem.channels_last else torch.contiguous_format

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, dtype=problem.dtype, device=problem.device)
        return drawn.contiguous(memory_format=layout)

    def weight(*shape: int) -> Tensor:
        drawn = normal(*shape)
        return drawn / (drawn[0].numel() ** 0.5)

    shapes = ((p.out_channels, p.in_channels // p.groups, *p.kernel) for p in problem.passes)
    weights = [weight(*shape) for shape in shapes]
    x = normal(problem.batch, problem.passes[0].in_channels, *problem.size)
    if not isinstance(problem, PairProblem):
        return ParallelTensors(x, *weights)
    norm: dict[str, Any] = {}
    if problem.spec.norm == "frozen":
        one = torch.ones(problem.mid_channels, dtype=problem.accumulate_dtype, device=x.device)
        norm = dict(norm_weight=one, norm_bias=one * 0, mean=one * 0, var=one)
    residual = normal(*problem.out_shape) if problem.residual else None
    one_weight, other_weight = weights
    return PairTensors(x, one_weight, other_weight, **norm, residual=residual)


def pair_tensors(
    dtype: torch.dtype, x: Sequence[int], first: Sequence[int], second: Sequence[int]
) -> PairTensors:
    """Channels-last tensors of these shapes on the CPU, the same in every process."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

    def weight(shape: Sequence[int]) -> Tensor:
        return normal(*shape) / math.prod(shape[1:]) ** 0.5

    m, k = first[0], second[0]
    there = normal(*x).to(memory_format=torch.channels_last_3d)
    main = there, weight(first), weight(second), normal(m), normal(k)
    gamma, beta, mean, var = (normal(m).float() for _ in range(4))
    return PairTensors(*main, gamma, beta, mean, var.abs() + 0.5)


def filled(shapes: Any) -> Any:
    """Random tensors on the CPU like those that are given."""
    generator = torch.Generator("cpu").manual_seed(0)

    def fill(name: str, t: Tensor) -> Tensor:
        drawn = torch.randn(t.shape, generator=generator, device="cpu")
        if name.endswith("_weight") and t.dim() == 5:
            drawn /= math.prod(t.shape[1:]) ** 0.5
        if name == "var":
            drawn = drawn.abs() + 0.5
        return torch.empty_like(t, device="cpu").copy_(drawn)

    return type(shapes)(
        **{n: None if t is None else fill(n, t) for n, t in shapes._asdict().items()}
    )


KINDS = ("dense", "grouped", "depthwise", "parallel")


def of_kind(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Specification and tensors of a problem whose sizes are no multiples of any tile.

    Args:
        kind: one of ``KINDS``.
    """
    c = 18
    g = {"grouped": 3, "depthwise": c}.get(kind, 1)
    tensors = pair_tensors(dtype, (2, c, 5, 9, 7), (c, c // g, 1, 3, 3), (c, c // g, 3, 1, 1))
    common: dict[str, Any] = {"padding": (1,) * 6, "groups": (g, g)}
    if kind == "parallel":
        return ParallelSpec(**common, activation="relu"), ParallelTensors(*tensors[:5])
    return PairSpec(**common, norm="frozen", activation="relu"), tensors


def kind_of(problem: Problem) -> str:
    """The kind of ``of_kind`` that stands for a problem."""
    if not isinstance(problem, PairProblem):
        return "parallel"
    groups = [p.groups for p in problem.passes]
    if all(p.groups == p.in_channels == p.out_channels > 1 for p in problem.passes):
        return "depthwise"
    return "grouped" if max(groups) > 1 else "dense"


def off_kinks(spec: Any, tensors: Any) -> Any:
    """With values so far from the kinks of activations that no rounding leads to another side."""

    def places(t: Tensor) -> Tensor:
        return torch.tensor([-4.5, -1.5, 1.5, 4.5]).repeat(len(t))[: len(t)].to(t)

    if getattr(spec, "norm", "none") != "none":
        near = torch.full_like(tensors.norm_weight, 0.1)
        return tensors._replace(norm_weight=near, norm_bias=places(tensors.norm_bias))
    one, other, bias, second = tensors._fields[1:5]
    found = tensors._replace(
        **{one: getattr(tensors, one) * 0.1, bias: places(getattr(tensors, bias))}
    )
    if isinstance(tensors, PairTensors):
        return found
    above = torch.full_like(getattr(tensors, second), 0.7)
    return found._replace(**{other: getattr(tensors, other) * 0.1, second: above})
