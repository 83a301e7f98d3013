"""A small problem that runs the very kernels of a large one: what the self-check compares.

Triton compiles a kernel anew for every tile configuration, for what is known of each integer
(that it is 1, or a multiple of 16) and for which tensors there are. A check on a problem of its own
would double what a first call compiles; one on this problem compiles what the call needs anyway.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...problem.examples import filled, of_kind
from ...problem.spec import (
    PairProblem,
    PairTensors,
    ParallelProblem,
    ParallelSpec,
    ParallelTensors,
    Pass,
    Problem,
)
from ..contract import Example, apply_ending
from . import arguments, pair
from .parallel import parallel_conv2plus1d

_FEW, _SAME = 256, 128  # channels up to which all are kept; beyond, the same modulo 128


def examples(kind: str, dtype: torch.dtype, like: Problem | None = None) -> list[Example]:
    """Of a problem its rehearsal; where none is known, a call of the kind."""
    if like is None:
        spec, tensors = of_kind(kind, dtype)
        if isinstance(spec, ParallelSpec):
            return [Example(spec, tensors, lambda p, t: [parallel_conv2plus1d(p, t)])]
        return [Example(spec, tensors, lambda p, t: [pair.conv2plus1d(p, t, False).y])]
    return [rehearse(like)]


def rehearse(problem: Problem) -> Example:
    """Run by the kernels of ``problem`` in its configurations, in a small part of its time.

    Of what a problem does not tell, a bias before a norm is taken to be absent, as in most
    networks, every other one to be there.
    """
    first, second = _few_channels(problem)
    size, batch = problem.size, min(problem.batch, 2)
    for axis in (2, 1, 0):  # strides along an axis depend on the sizes of those behind it
        least = max(3, *(p.dilation[axis] * (p.kernel[axis] - 1) + 1 for p in problem.passes))
        for n in range(min(least, size[axis]), size[axis] + 1):
            trial = tuple(n if i == axis else s for i, s in enumerate(size))
            if _known(_tensors(problem, (first, second), batch, trial)) == _known(
                _tensors(problem, problem.passes, problem.batch, problem.size)
            ):
                size = trial  # type: ignore[assignment]
                break
    shapes, spec = _tensors(problem, (first, second), batch, size)
    tensors = filled(shapes)
    if isinstance(problem, ParallelProblem):
        return Example(spec, tensors, lambda p, t: [parallel_conv2plus1d(p, t, problem)])
    assert isinstance(problem, PairProblem)
    save = spec.norm == "batch" and not spec.recompute
    like = replace(problem, spec=spec)

    def run(small: PairProblem, t: PairTensors) -> list[Tensor]:
        return [apply_ending(pair.run(small, t, save, like=like), small, t)]

    return Example(spec, tensors, run)


def _few_channels(problem: Problem) -> tuple[Pass, Pass]:
    """The passes with fewer channels or groups, which the compiler cannot tell from theirs."""
    first, second = problem.passes

    def few(n: int) -> int:
        return n if n < _FEW else _FEW - _SAME + n % _SAME

    if first.groups == second.groups == 1:
        c, m, k = few(first.in_channels), few(first.out_channels), few(second.out_channels)
        if not isinstance(problem, PairProblem):
            return first._replace(in_channels=c, out_channels=m), second._replace(
                in_channels=c, out_channels=k
            )
        return first._replace(in_channels=c, out_channels=m), second._replace(
            in_channels=m, out_channels=k
        )
    groups = math.gcd(first.groups, second.groups)
    widest = max(first.in_channels, first.out_channels, second.out_channels)
    part = groups  # of so many groups is one that looks the same
    for g in range(max(2, (_FEW - _SAME) * groups // widest), groups):
        gone = [(n // groups) * (groups - g) for p in problem.passes for n in p[1:3] + (p.groups,)]
        if all(n % _SAME == 0 for n in gone):
            part = g
            break
    return tuple(  # type: ignore[return-value]
        p._replace(
            in_channels=p.in_channels // groups * part,
            out_channels=p.out_channels // groups * part,
            groups=p.groups // groups * part,
        )
        for p in problem.passes
    )


def _tensors(
    problem: Problem, passes: tuple[Pass, Pass], batch: int, size: tuple[int, ...]
) -> tuple[Any, Any]:
    layout = torch.channels_last_3d if problem.channels_last else torch.contiguous_format

    def empty(*shape: int, like: torch.dtype = problem.dtype) -> Tensor:
        made = torch.empty(shape, dtype=like, device="meta")
        return made.contiguous(memory_format=layout) if made.dim() == 5 else made

    x = torch.empty(batch, passes[0].in_channels, *size, dtype=problem.dtype, device="meta")
    if problem.x_stride[1] == 1:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    weights = [empty(p.out_channels, p.in_channels // p.groups, *p.kernel) for p in passes]
    normed = isinstance(problem, PairProblem) and problem.spec.norm != "none"
    biases = [None if normed and i == 0 else empty(p.out_channels) for i, p in enumerate(passes)]
    groups = {p.kind: p.groups for p in passes}
    spec: Any = problem.spec._replace(groups=(groups["spatial"], groups["temporal"]))
    if not isinstance(problem, PairProblem):
        return ParallelTensors(x, *weights, *biases), spec
    spec = spec._replace(group="")
    norm: dict[str, Tensor] = {}
    if normed:
        names = ("norm_weight", "norm_bias", "mean", "var")[: 4 if spec.norm == "frozen" else 2]
        m = passes[0].out_channels
        norm = {name: empty(m, like=problem.accumulate_dtype) for name in names}
    tensors = PairTensors(x, *weights, *biases, **norm)
    if problem.residual:
        small = Problem.of(tensors, spec)
        tensors = tensors._replace(residual=empty(*small.out_shape))
    return tensors, spec


def _known(made: tuple[Any, Any]) -> list[Any]:
    """What the compiler knows of the tensors that the kernels see."""
    tensors, spec = made
    small = Problem.of(tensors, spec)
    y = small.empty_output(tensors.x)
    seen = [tensors.x, y]
    if isinstance(small, PairProblem):
        seen.append(torch.empty(small.mid_shape, device="meta").permute(0, 4, 1, 2, 3))
    found: list[Any] = [arguments.run_length(tensors.x, y)]
    for t in seen:
        align = arguments.alignment(t, t.shape[1])
        found.append((align, [(s == 1, s % 16 == 0) for s in arguments.strides(t, align)]))
    return found
