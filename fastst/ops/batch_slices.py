"""Backward of ``conv2plus1d`` over slices of the batch: nothing as large as u is made at once.

Each slice computes its u again, and what it makes is gone before the next one begins. Without a
norm or with a frozen one, slices know nothing of each other. The gradient of a batch norm needs two
sums over all of dv, and so two sweeps: the first is the backward pass of a frozen norm with the
same statistics, whose gradients of γ and β are these sums; the second makes u and dv once more. The
price is one more first convolution, and one more input gradient of the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..backends import ranks
from ..backends.contract import Backend, BatchSlice, Gradients, PairBackward
from ..problem.spec import PairProblem, PairSpec, PairTensors, Problem

_BELOW = ("x", "first_weight", "first_bias")  # whose gradients need du
_NORM = ("norm_weight", "norm_bias")


def gradients(
    choose: Callable[[PairProblem], Backend], count: int, call: PairBackward
) -> Gradients:
    """``conv2plus1d_backward`` of one slice after the other.

    Gradients of parameters are added up in the accumulation dtype, in the order of the batch.

    Args:
        choose: the backend of a slice's problem.
        count: into how many slices the batch is cut.
    """
    sums = _Sums(choose, count, call)
    problem, spec, mean, var = call.problem, call.problem.spec, call.mean, call.var
    wanted = {n for n, needed in zip(PairTensors._fields, call.needs, strict=False) if needed}
    if spec.norm != "batch":
        sums.sweep(spec, call.tensors, wanted)
        return sums.results()
    assert mean is not None and var is not None
    below = wanted.intersection(_BELOW)
    summed = bool(below or wanted.intersection(_NORM))  # then other ranks wait for the sums
    frozen = spec._replace(norm="frozen", group="")
    rest = wanted - below | (set(_NORM) if summed else set())
    sums.sweep(frozen, _freeze(call.tensors, mean, var), rest)
    if summed:
        table = torch.stack((sums["norm_bias"], sums["norm_weight"] * (var + spec.eps).sqrt()))
        values = problem.batch * math.prod(problem.mid_size)
        if spec.group:
            means = ranks.pool_means(table, values, ranks.resolve(spec.group))
        else:
            means = table / values
            # The mean of u takes the bias away, that of all ranks only for all of them.
            if "first_bias" in below:
                sums["first_bias"] = torch.zeros_like(mean)
        sums.sweep(spec, call.tensors, below - sums.keys(), means)
    return sums.results()


class _Sums(dict[str, Tensor]):
    """Gradients by name, added up over slices; that of x is written slice by slice."""

    def __init__(
        self, choose: Callable[[PairProblem], Backend], count: int, call: PairBackward
    ) -> None:
        super().__init__()
        self.choose, self.call, self.dy = choose, call, call.dy_owner[0]
        batch = call.problem.batch
        self.cuts = [batch * i // count for i in range(count + 1)]
        self.dx = torch.empty_like(call.tensors.x) if call.need.x else None

    def sweep(
        self, spec: PairSpec, tensors: PairTensors, names: set[str], means: Tensor | None = None
    ) -> None:
        call = self.call
        statistics = (call.mean, call.var) if spec.norm == "batch" else (None, None)
        needs = [n in names for n in PairTensors._fields]
        for start, end in pairwise(self.cuts) if names else ():
            share = tensors._replace(x=tensors.x[start:end])
            dx = self.dx[start:end] if self.dx is not None and "x" in names else None
            dy = self.dy[start:end]
            own = Problem.of(share, spec).with_gradient(dy)
            grads = self.choose(own).conv2plus1d_backward(
                PairBackward(
                    own, share, [dy], None, *statistics, needs,
                    BatchSlice(dx, means),
                )
            )  # fmt: skip
            for name, grad in zip(PairTensors._fields, grads, strict=False):
                if grad is None or name not in names:
                    continue
                if name != "x":
                    grad = grad.to(call.problem.accumulate_dtype)
                    self[name] = self[name].add_(grad) if name in self else grad.clone()
                elif dx is not None and grad is not dx:
                    dx.copy_(grad)

    def results(self) -> Gradients:
        return [self.dx if n == "x" else self.get(n) for n in PairTensors._fields]


def _freeze(t: PairTensors, mean: Tensor, var: Tensor) -> PairTensors:
    """With these statistics, γ and β, whose gradients then are in the accumulation dtype."""
    gamma = torch.ones_like(mean) if t.norm_weight is None else t.norm_weight.to(mean.dtype)
    beta = torch.zeros_like(mean) if t.norm_bias is None else t.norm_bias.to(mean.dtype)
    return t._replace(norm_weight=gamma, norm_bias=beta, mean=mean, var=var)
