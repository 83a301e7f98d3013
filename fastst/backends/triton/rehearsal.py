"""Small problems that run the very kernels of a large one: what the self-check compares.

Triton compiles a kernel anew for every tile configuration, for what is known of each integer
(that it is 1, or a multiple of 16), for which tensors there are, and for tiles that are all whole.
So what the check of a problem compiles then serves its call, and a problem of other sizes with the
same instances needs no check. Which ones a problem has its own host code tells, on tensors without
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from ...machine import choices, devices
from ...problem.conv3d import ConvProblem, problem_of
from ...problem.examples import KINDS, gradient_like, of_kind, problems, resemble
from ...problem.spec import PairProblem, ParallelProblem, Pass, Problem
from .. import rehearsal
from ..contract import Example, Later, Phase
from ..rehearsal import POSITIONS, Calls, Smaller, Way, strip_ending
from . import arguments, backward, convolution, launch, pair, tiles
from .parallel import parallel_conv2plus1d
from .parallel_backward import parallel_conv2plus1d_backward

_FEW, _SAME = 256, 128  # channels up to which all are kept; beyond, the same modulo 128


def instances(problem: Problem, phase: Phase, way: str | None = None) -> Sequence[str]:
    """Kernels, with all that they are compiled for, that a phase of a problem launches.

    Args:
        way: one of its ``ways``; None: the one that its calls take.
    """
    way = way or choices.choice("triton", problem, phase)
    return _instances(problem, phase, way, launch.allows_tf32())


@lru_cache(maxsize=4096)
def _instances(problem: Problem, phase: Phase, way: str | None, tf32: bool) -> tuple[str, ...]:
    problem = strip_ending(problem, phase)
    with rehearsal.bare(problem.device):
        made = resemble(problem, problem.batch, problem.size)
        ways = rehearsal.ways(_calls(way), problem, phase)
        found = [name for w in ways for name in _instance_names(problem, phase, w, made)]
    return tuple(dict.fromkeys(found))


def kinds(device: torch.device, dtype: torch.dtype) -> Sequence[str]:
    """Of the checks that can be made without a call."""
    if devices.is_gpu(device) and launch.capability(device) < tiles.LEAST_CAPABILITY:
        return ()
    return [f"{kind} {phase}" for kind in (*KINDS, "conv3d") for phase in ("forward", "backward")]


def examples(kind: str, dtype: torch.dtype, device: torch.device) -> list[Later]:
    """Of one whose sizes are no multiples of a tile and, on a GPU, of layers of networks."""
    kind, word = kind.split()
    phase: Phase = "backward" if word == "backward" else "forward"
    spec, tensors = of_kind(kind, dtype)
    layers = [replace(problem_of(tensors, spec), device=device)]
    if devices.is_gpu(device):
        layers += problems(kind, dtype, device)
    return [e for p in layers for e in rehearse(p, phase)]


def rehearse(problem: Problem, phase: Phase, way: str | None = None) -> list[Later]:
    """Run the instances of ``problem``, in a small part of its time."""
    way = way or choices.choice("triton", problem, phase)
    problem = strip_ending(problem, phase)
    ways = rehearsal.ways(_calls(way), problem, phase)
    found = rehearsal.rehearse(
        problem, phase, ways, partial(_instance_names, problem, phase), partial(_smaller, problem)
    )
    if devices.is_gpu(problem.device):
        found[0] = found[0]._replace(
            make=partial(_compile_all, found[0].make, problem, phase, ways)
        )
    return found


def _compile_all(
    make: Callable[[], Example], problem: Problem, phase: Phase, ways: Sequence[Way]
) -> Example:
    """The first example, made when the kernels of all are compiled."""
    launch.compile_all(_kernels(problem, phase, ways), problem.device)
    batch = not isinstance(problem, ParallelProblem) and problem.spec.norm == "batch"
    if phase == "forward" and batch:  # in training: backward is the next to be needed
        later = strip_ending(problem, "backward")
        ways = rehearsal.ways(
            _calls(choices.choice("triton", later, "backward")), later, "backward"
        )
        launch.compile_all(_kernels(later, "backward", ways), problem.device, wait=False)
    return make()


def _kernels(problem: Problem, phase: Phase, ways: Sequence[Way]) -> list[launch.Launch]:
    """One launch of each instance."""
    made = resemble(problem, problem.batch, problem.size)
    return [*{e.instance: e for w in ways for e in _launches(problem, phase, w, made)}.values()]


def _calls(way: str | None) -> Calls:
    return Calls(
        lambda problem, t, save, like: pair.run(problem, t, save, way, like),
        pair.first_pass, pair.second_pass, lambda call: backward.run(call, way),
        parallel_conv2plus1d, parallel_conv2plus1d_backward,
        lambda problem, t, like: convolution.run(problem, t, like, way),
        lambda call: convolution.run_backward(call, way),
    )  # fmt: skip


def _instance_names(problem: Problem, phase: Phase, way: Way, made: tuple[Any, Any]) -> list[str]:
    """Instances that a way launches for tensors on "meta"."""
    return [each.instance for each in _launches(problem, phase, way, made)]


def _launches(
    problem: Problem, phase: Phase, way: Way, made: tuple[Any, Any]
) -> list[launch.Launch]:
    tensors, spec = made
    small = problem_of(tensors, spec)
    dy = gradient_like(problem, small) if phase == "backward" else None
    like = replace(problem, spec=spec)
    return launch.list_launches(problem.device, lambda: way.run(small, tensors, like, dy))


def _smaller(problem: Problem) -> Iterator[Smaller]:
    """Passes, clips and size of problems that may have the same instances, small ones first."""
    size = problem.size
    for axis in (2, 1, 0):  # strides along an axis depend on the sizes of those behind it
        least = max(3, *(p.dilation[axis] * (p.kernel[axis] - 1) + 1 for p in problem.passes))
        for n in range(min(least, size[axis]), size[axis] + 1):
            trial: Any = tuple(n if i == axis else s for i, s in enumerate(size))
            if _laid_out(problem, trial) == _laid_out(problem, problem.size):
                size = trial
                break
    for passes, least_size in (
        (_few_channels(problem), size), (problem.passes, size), (problem.passes, problem.size),
    ):  # fmt: skip
        for clips in _clips(problem, least_size):
            yield passes, clips, least_size
    yield problem.passes, problem.batch, problem.size


def _clips(problem: Problem, size: tuple[int, int, int]) -> tuple[int, ...]:
    """On a GPU so many that its multiprocessors go through several waves of tiles.

    The compiler is told whether all tiles are whole, of up to 128 positions: so many, or not.
    """
    if not devices.is_gpu(problem.device):
        return (min(problem.batch, 2),)
    n = max(1, min(POSITIONS, problem.batch * math.prod(problem.size)) // math.prod(size))
    return n // 128 * 128 or n, n | 1


def _few_channels(problem: Problem) -> tuple[Pass, ...]:
    """The passes with fewer channels or groups, which the compiler cannot tell from theirs."""
    passes = problem.passes
    if isinstance(problem, ConvProblem) and problem.spec.norm in ("group", "layer", "rms", "l2"):
        return passes  # groups of channels, or tiles of all of them

    def shrink(n: int) -> int:
        return n if n < _FEW else _FEW - _SAME + n % _SAME

    groups = math.gcd(*(p.groups for p in passes))
    if all(p.groups == 1 for p in passes):
        return tuple(
            p._replace(in_channels=shrink(p.in_channels), out_channels=shrink(p.out_channels))
            for p in passes
        )
    widest = max(n for p in passes for n in (p.in_channels, p.out_channels))
    part = groups  # of so many groups is one that looks the same
    for g in range(max(2, (_FEW - _SAME) * groups // widest), groups):
        gone = [(n // groups) * (groups - g) for p in passes for n in p[1:3] + (p.groups,)]
        if all(n % _SAME == 0 for n in gone):
            part = g
            break
    return tuple(
        p._replace(
            in_channels=p.in_channels // groups * part,
            out_channels=p.out_channels // groups * part,
            groups=p.groups // groups * part,
        )
        for p in passes
    )


def _laid_out(problem: Problem, size: Sequence[int]) -> list[Any]:
    """What the compiler knows of the strides of what the kernels see."""
    tensors, spec = resemble(problem, problem.batch, size)
    small = problem_of(tensors, spec)
    y = small.empty_output(tensors.x)
    seen = [tensors.x, y]
    if isinstance(small, PairProblem):
        seen.append(torch.empty(small.mid_shape, device="meta").permute(0, 4, 1, 2, 3))
    found: list[Any] = [arguments.run_length(tensors.x, y)]
    for t in seen:
        align = arguments.alignment(t, t.shape[1])
        found.append((align, [(s == 1, s % 16 == 0) for s in arguments.strides(t, align)]))
    return found
