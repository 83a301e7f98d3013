"""Backward of ``conv2plus1d`` over parts of the batch: nothing as large as u is made at once.

Each part computes its u again, and what it makes is gone before the next one begins. Without a norm
or with a frozen one, parts know nothing of each other. The gradient of a batch norm needs two sums
over all of dv, and so two sweeps: the first is the backward pass of a frozen norm with the same
statistics, whose gradients of γ and β are these sums; the second makes u and dv once more. That is
the price: one more first convolution, and one more input gradient of the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import Part
from ..problem.spec import PairSpec, PairTensors, Problem
from ..ranks import collectives


def gradients(
    choose: Callable[[Problem], Any],
    parts: int,
    problem: Problem,
    tensors: PairTensors,
    dy: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """One gradient per need, of one part after the other.

    Those of parameters are added up in the accumulation dtype, in the order of the batch.

    Args:
        choose: the backend of a part's problem.
    """
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    fields = PairTensors._fields
    wanted = {name for name, n in zip(fields, needs, strict=False) if n}
    dx = torch.empty_like(tensors.x) if "x" in wanted else None
    cuts = [problem.batch * i // parts for i in range(parts + 1)]
    sums: dict[str, Tensor] = {}

    def sweep(spec: PairSpec, t: PairTensors, names: set[str], means: Tensor | None = None) -> None:
        statistics = (mean, var) if spec.norm == "batch" else (None, None)
        for start, end in pairwise(cuts) if names else ():
            share = t._replace(x=t.x[start:end])
            part = Part(dx[start:end] if dx is not None and "x" in names else None, means)
            own = Problem.of(share, spec)
            grads = choose(own).conv2plus1d_backward(
                own, share, [dy[start:end]], None, *statistics, [n in names for n in fields], part
            )
            for name, g in zip([n for n in fields if n in names], grads, strict=True):
                if name != "x":
                    g = g.to(problem.accumulate_dtype)
                    sums[name] = sums[name].add_(g) if name in sums else g.clone()
                elif part.dx is not None and g is not part.dx:
                    part.dx.copy_(g)

    if spec.norm != "batch":
        sweep(spec, tensors, wanted)
    else:
        assert mean is not None and var is not None
        kind = problem.passes[0].kind
        weight, bias, norm = f"{kind}_weight", f"{kind}_bias", {"norm_weight", "norm_bias"}
        below = wanted & {"x", weight, bias}
        frozen = spec._replace(norm="frozen", group="")
        summed = bool(below or wanted & norm)  # then other ranks wait for the sums
        sweep(frozen, _frozen(tensors, mean, var), wanted - below | (norm if summed else set()))
        if summed:
            table = torch.stack((sums["norm_bias"], sums["norm_weight"] * (var + spec.eps).sqrt()))
            values = problem.batch * math.prod(problem.mid_size)
            if spec.group:
                means = collectives.pool_means(table, values, collectives.resolve(spec.group))
            else:
                means = table / values
                # The mean of u takes the bias away, that of all ranks only for all of them.
                if bias in below:
                    sums[bias] = torch.zeros_like(mean)
            sweep(spec, tensors, below - sums.keys(), means)
    named = {n: t for n, t in tensors._asdict().items() if n in wanted and n != "x"}
    return ([] if dx is None else [dx]) + [
        torch.empty_like(t).copy_(sums[name]) for name, t in named.items()
    ]


def _frozen(t: PairTensors, mean: Tensor, var: Tensor) -> PairTensors:
    """With these statistics, γ and β, whose gradients then are in the accumulation dtype."""
    gamma = torch.ones_like(mean) if t.norm_weight is None else t.norm_weight.to(mean.dtype)
    beta = torch.zeros_like(mean) if t.norm_bias is None else t.norm_bias.to(mean.dtype)
    return t._replace(norm_weight=gamma, norm_bias=beta, mean=mean, var=var)
