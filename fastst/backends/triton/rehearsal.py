"""A small problem that runs the very kernels of a large one: what the self-check compares.

Triton compiles a kernel anew for every tile configuration, for what is known of each integer
(that it is 1, or a multiple of 16) and for which tensors there are. A check on a problem of its own
would double what a first call compiles; one on this problem compiles what the call needs anyway.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...problem.examples import KINDS, filled, kind_of, of_kind, off_kinks
from ...problem.spec import (
    PairProblem,
    PairSpec,
    PairTensors,
    ParallelProblem,
    ParallelSpec,
    ParallelTensors,
    Pass,
    Problem,
)
from ..contract import (
    Example,
    Gradients,
    PairBackward,
    Phase,
    apply_ending,
    gradient_example,
)
from . import arguments, backward, launch, pair, tiles
from .parallel import parallel_conv2plus1d
from .parallel_backward import parallel_conv2plus1d_backward

_POSITIONS = 1 << 17  # of a rehearsal on a GPU
_FEW, _SAME = 256, 128  # channels up to which all are kept; beyond, the same modulo 128


def check_kind(problem: Problem, phase: Phase) -> str:
    """All that a call's kernels and their configurations depend on, as one name."""
    return f"{kind_of(problem)} {phase} {_digest(problem)}"


@functools.lru_cache(maxsize=4096)
def _digest(problem: Problem) -> str:
    spec: Any = problem.spec
    if isinstance(problem, PairProblem):
        spec = problem.spec._replace(group=""), problem.residual
    known = (
        spec, problem.passes, problem.batch, problem.size, problem.x_stride, problem.x_offset,
        problem.channels_last,
    )  # fmt: skip
    return hashlib.sha256(repr(known).encode()).hexdigest()[:10]


def kinds(device: torch.device, dtype: torch.dtype) -> Sequence[str]:
    """Of the checks that can be made without a call."""
    if device.type == "cuda" and launch.capability(device) < tiles.LEAST_CAPABILITY:
        return ()
    return [f"{kind} {phase}" for kind in KINDS for phase in ("forward", "backward")]


def examples(kind: str, dtype: torch.dtype, like: Problem | None = None) -> list[Example]:
    """Of a problem its rehearsal; where none is known, a call of the kind."""
    gradients = "backward" in kind.split()
    if like is not None:
        example = rehearse(like)
        found = [example._replace(name=f"{kind} of {like.spec} on {(like.batch, *like.size)}")]
    else:
        spec, tensors = of_kind(kind.split()[0], dtype)
        parallel = isinstance(spec, ParallelSpec)
        run = _parallel if parallel else _pair
        found = [Example(spec, tensors, run, name=f"{kind} in {dtype}")]
    return [_gradients(e) if gradients else e for e in found]


def _parallel(problem: ParallelProblem, t: ParallelTensors) -> list[Tensor]:
    return [parallel_conv2plus1d(problem, t)]


def _pair(problem: PairProblem, t: PairTensors) -> list[Tensor]:
    return [pair.conv2plus1d(problem, t, False).y]


def _gradients(example: Example) -> Example:
    """The same tensors, forward and backward."""
    spec, tensors = example.spec, example.tensors
    if isinstance(spec, PairSpec):  # what an op with gradients never has
        spec = spec._replace(outer_activation="none", output_statistics=False)
        tensors = tensors._replace(residual=None)
        if spec.norm == "batch":  # which takes a bias away again: its gradient is 0
            tensors = tensors._replace(first_bias=None)

    def run(problem: Any, t: Any, dy: Tensor, needs: Sequence[bool]) -> Gradients:
        if isinstance(problem, ParallelProblem):
            return parallel_conv2plus1d_backward(problem, t, dy, needs)
        _, u, mean, var, *_ = pair.conv2plus1d(problem, t, True)
        return backward.conv2plus1d_backward(PairBackward(problem, t, [dy], u, mean, var, needs))

    return gradient_example(spec, off_kinks(spec, tensors), run, example.name)


def rehearse(problem: Problem) -> Example:
    """Run by the kernels of ``problem`` in its configurations, in a small part of its time.

    Of what a problem does not tell, a bias before a norm is taken to be absent, as in most
    networks, every other one to be there.
    """
    first, second = _few_channels(problem)
    size = problem.size
    for axis in (2, 1, 0):  # strides along an axis depend on the sizes of those behind it
        least = max(3, *(p.dilation[axis] * (p.kernel[axis] - 1) + 1 for p in problem.passes))
        for n in range(min(least, size[axis]), size[axis] + 1):
            trial = tuple(n if i == axis else s for i, s in enumerate(size))
            if _known(_tensors(problem, (first, second), 2, trial)) == _known(
                _tensors(problem, problem.passes, problem.batch, problem.size)
            ):
                size = trial  # type: ignore[assignment]
                break
    shapes, spec = _tensors(problem, (first, second), _clips(problem, size), size)
    tensors = filled(shapes)
    if isinstance(problem, ParallelProblem):
        return Example(spec, tensors, lambda p, t: [parallel_conv2plus1d(p, t, problem)])
    assert isinstance(problem, PairProblem)
    save = spec.norm == "batch" and not spec.recompute
    like = replace(problem, spec=spec)

    def run(small: PairProblem, t: PairTensors) -> list[Tensor]:
        return [apply_ending(pair.run(small, t, save, like=like), small, t)]

    return Example(spec, tensors, run)


def _clips(problem: Problem, size: tuple[int, int, int]) -> int:
    """On a GPU so many that its multiprocessors go through several waves of tiles."""
    if problem.device.type != "cuda":
        return min(problem.batch, 2)
    some = min(_POSITIONS, problem.batch * math.prod(problem.size))
    few = min(problem.batch, max(2, some // math.prod(size)))
    if problem.batch % 16 == 0:  # as the compiler sees it
        return max(16, few - few % 16)
    return few if few % 16 else few - 1


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
    problem: Problem, passes: tuple[Pass, ...], batch: int, size: tuple[int, ...]
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
