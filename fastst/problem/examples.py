"""Tensors of a problem, to measure it or to check it."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import PairSpec, PairTensors, ParallelTensors, Problem


def example(problem: Problem) -> PairTensors | ParallelTensors:
    """Random tensors of a problem, of magnitudes as in a network."""
    layout = torch.channels_last_3d if problem.channels_last else torch.contiguous_format

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, dtype=problem.dtype, device=problem.device)
        return drawn.contiguous(memory_format=layout)

    named = {}
    for p in problem.passes:
        fan = p.in_channels // p.groups
        weight = normal(p.out_channels, fan, *p.kernel)
        named[f"{p.kind}_weight"] = weight / (weight[0].numel() ** 0.5)
    x = normal(problem.batch, problem.passes[0].in_channels, *problem.size)
    if not isinstance(problem.spec, PairSpec):
        return ParallelTensors(x, **named)
    if problem.spec.norm == "frozen":
        one = torch.ones(problem.mid_channels, dtype=problem.accumulate_dtype, device=x.device)
        named.update(norm_weight=one, norm_bias=one * 0, mean=one * 0, var=one)
    residual = normal(*problem.out_shape) if problem.residual else None
    return PairTensors(x, **named, residual=residual)
