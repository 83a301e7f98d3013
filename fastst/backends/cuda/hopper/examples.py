"""Calls that run every instance of the Hopper kernels, for the self-check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....problem.examples import pair_tensors
from ....problem.spec import PairProblem, PairSpec, PairTensors, Problem
from ...contract import Example, PairBackward
from . import backward, forward, gradient_tiles, tiles


def examples(kind: str, dtype: torch.dtype, like: Problem | None = None) -> list[Example]:
    """
    Args:
        kind: "hopper" or "hopper backward".
    """
    return _forward(dtype) if kind == "hopper" else _backward(dtype)


def _forward(dtype: torch.dtype) -> list[Example]:
    """Every instance of the spatial, the temporal and the stem's kernel."""
    examples = []
    instances = tiles.trials()
    for i, (spatial, temporal, stride) in enumerate(instances):

        def run(problem: PairProblem, t: Any, pair: Any = (spatial, temporal)) -> Sequence[Tensor]:
            return [forward(problem, t, False, pair).y]

        # Half of them with statistics, and a norm and an activation between the two kernels.
        batch = 2 * i < len(instances)
        m, k = spatial.columns + 8, temporal.columns + 8
        tensors = pair_tensors(dtype, (1, 72, 2, 5, 7), (m, 72, 1, 3, 3), (k, m, 3, 1, 1))
        spec = PairSpec(
            stride=(stride, 1, 1), padding=(1,) * 6, norm="batch" if batch else "frozen",
            activation="silu" if batch else "relu",
        )  # fmt: skip
        if batch:
            tensors = tensors._replace(mean=None, var=None)
        examples.append(Example(spec, tensors, run))
    stem = *_stem(dtype, 21, 20), lambda p, t: [forward(p, t, False).y]
    return [*examples, Example(*stem)]


def _backward(dtype: torch.dtype) -> list[Example]:
    """Every instance of the kernels of gradients, and the stem."""

    def example(spec: PairSpec, tensors: PairTensors, forced: Any = None) -> Example:
        dy = Problem.of(tensors, spec).empty_output(tensors.x)
        dy.copy_(
            torch.randn(dy.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
        )
        needs = [t is not None and n not in ("mean", "var") for n, t in tensors._asdict().items()]

        def run(problem: PairProblem, t: Any) -> Sequence[Tensor]:
            _, u, mean, var, *_ = forward(problem, t, True)
            call = PairBackward(problem, t, [dy.to(t.x.device)], u, mean, var, needs)
            found = backward(call, forced)
            return [g for g in found if g is not None]

        return Example(spec, tensors, run, dy)

    examples = []
    for spatial, temporal, (stride, plane) in gradient_tiles.trials():
        c, m = spatial.columns - 8, temporal.columns - 8
        tensors = pair_tensors(dtype, (1, c, 3, 5, 6), (m, c, 1, 3, 3), (24, m, 3, 1, 1))
        spec = PairSpec(
            stride=(stride, plane, plane), padding=(1,) * 6, norm="batch", activation="silu"
        )
        # Statistics take a bias away again: its gradient is 0.
        tensors = tensors._replace(mean=None, var=None, first_bias=None)
        examples.append(example(spec, tensors, (spatial, temporal)))
    tensors = pair_tensors(dtype, (1, 40, 3, 5, 6), (56, 40, 1, 3, 3), (24, 56, 3, 1, 1))
    examples.append(example(PairSpec(padding=(1,) * 6, norm="frozen", activation="silu"), tensors))
    spec, tensors = _stem(dtype, 9, 10)
    spec = spec._replace(activation="silu", recompute=True)
    return [*examples, example(spec, tensors._replace(first_bias=None))]


def _stem(dtype: torch.dtype, height: int, width: int) -> tuple[PairSpec, PairTensors]:
    tensors = pair_tensors(dtype, (1, 3, 3, height, width), (45, 3, 1, 7, 7), (64, 45, 3, 1, 1))
    spec = PairSpec(stride=(1, 2, 2), padding=(1, 1, 3, 3, 3, 3), norm="batch")
    return spec, tensors._replace(mean=None, var=None)
