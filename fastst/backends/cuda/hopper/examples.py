"""Small calls that run every tile of the Hopper kernels, for the self-check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....problem.examples import pair_tensors
from ....problem.spec import PairProblem, PairSpec, PairTensors
from ...contract import Example, Gradients, PairBackward, gradient_example
from . import backward, forward, gradient_tiles, tiles, weight_tiles


def examples(kind: str, dtype: torch.dtype) -> list[Example]:
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
        # As many tiles that the turns of a warpgroup come again.
        m, k = spatial.columns * tiles.GROUPS // spatial.groups + 8, temporal.columns + 8
        tensors = pair_tensors(dtype, (1, 72, 2, 5, 7), (m, 72, 1, 3, 3), (k, m, 3, 1, 1))
        spec = PairSpec(
            stride=(stride, 1, 1), padding=(1,) * 6, norm="batch" if batch else "frozen",
            activation="silu" if batch else "relu",
        )  # fmt: skip
        if batch:
            tensors = tensors._replace(mean=None, var=None)
        name = f"spatial {_describe(spatial)}, temporal {_describe(temporal)} stride {stride}"
        examples.append(Example(spec, tensors, run, name=name))
    stem = *_stem(dtype, 21, 20), lambda p, t: [forward(p, t, False).y]
    return [*examples, Example(*stem, name="stem")]


def _describe(tile: Any) -> str:
    turns = " by turns" if getattr(tile, "groups", 0) == 1 else ""
    return f"{tile.columns} columns of {tile.blocks} blocks{turns} in clusters of {tile.cluster}"


def _gradients(
    spec: PairSpec,
    tensors: PairTensors,
    name: str,
    forced: Any = None,
    instances: Any = weight_tiles.TILES,
) -> Example:
    def run(problem: PairProblem, t: Any, dy: Tensor, needs: Sequence[bool]) -> Gradients:
        _, u, mean, var, *_ = forward(problem, t, True)
        call = PairBackward(problem, t, [dy], u, mean, var, needs)
        return backward(call, forced, instances)

    return gradient_example(spec, tensors, run, name)


def _backward(dtype: torch.dtype) -> list[Example]:
    """Every instance of the kernels of gradients, and the stem."""
    examples = []
    for spatial, temporal, (stride, plane) in gradient_tiles.trials():
        c, m = spatial.columns - 8, temporal.columns - 8
        tensors = pair_tensors(dtype, (1, c, 3, 5, 6), (m, c, 1, 3, 3), (24, m, 3, 1, 1))
        spec = PairSpec(
            stride=(stride, plane, plane), padding=(1,) * 6, norm="batch", activation="silu"
        )
        # Statistics take a bias away again: its gradient is 0.
        tensors = tensors._replace(mean=None, var=None, first_bias=None)
        tiles = f"spatial {_describe(spatial)}, temporal {_describe(temporal)}"
        name = f"gradients: {tiles} stride {stride}"
        examples.append(_gradients(spec, tensors, name, (spatial, temporal)))
    for i, instance in enumerate(weight_tiles.TILES):
        m = instance[0] + 8 * (i % 2)  # whole tiles, and one that is cut
        tensors = pair_tensors(dtype, (1, 72, 3, 5, 6), (m, 72, 1, 3, 3), (72, m, 3, 1, 1))
        spec = PairSpec(padding=(1,) * 6, norm="frozen" if i % 2 else "batch", activation="silu")
        if spec.norm == "batch":
            tensors = tensors._replace(mean=None, var=None, first_bias=None)
        name = "weight gradients {} × {}".format(*instance)
        examples.append(_gradients(spec, tensors, name, instances=(instance,)))
    spec, tensors = _stem(dtype, 9, 10)
    spec = spec._replace(activation="silu", recompute=True)
    stem = _gradients(spec, tensors._replace(first_bias=None), "gradients of the stem")
    return [*examples, stem]


def _stem(dtype: torch.dtype, height: int, width: int) -> tuple[PairSpec, PairTensors]:
    tensors = pair_tensors(dtype, (1, 3, 3, height, width), (45, 3, 1, 7, 7), (64, 45, 3, 1, 1))
    spec = PairSpec(stride=(1, 2, 2), padding=(1, 1, 3, 3, 3, 3), norm="batch")
    return spec, tensors._replace(mean=None, var=None)
