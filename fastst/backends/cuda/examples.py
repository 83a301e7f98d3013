"""Calls of the CUDA kernels that "auto" may choose, for the self-check.

Of a problem those that it launches, on fewer clips and, where that leaves the tiles as they are, on
smaller frames; of a kind every instance.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...problem.examples import pair_tensors, problems, resemble
from ...problem.spec import PairProblem, PairSpec, PairTensors, Problem, Triple
from .. import rehearsal
from ..contract import Example, Gradients, Later, PairBackward, Phase, gradient_example
from ..rehearsal import POSITIONS, Smaller, Way, strip_ending
from . import depthwise, hopper
from .hopper import examples as hopper_examples
from .library import is_emulated

_SIZES: tuple[Triple, ...] = ((8, 28, 28), (16, 56, 56))  # tried before a problem's own


def instances(problem: Problem, phase: Phase, way: str | None = None) -> Sequence[str]:
    """Kernels with their tiles that a phase of a problem launches.

    Of its generic kernels, to which "auto" never comes, none.
    """
    return _instances(problem, phase)


@functools.lru_cache(maxsize=4096)
def _instances(problem: Problem, phase: Phase) -> tuple[str, ...]:
    if not isinstance(problem, PairProblem):
        return ()
    spec = problem.spec
    ending = f", norm {spec.norm}, {spec.activation}" + ", recompute" * spec.recompute
    if depthwise.why_not(problem) is None:
        names = [depthwise.instance(problem, phase)]
    else:
        names = hopper.kernel_names(problem, phase)
    return tuple(name + ending for name in names)


def rehearse(
    calls: rehearsal.Calls, problem: Problem, phase: Phase, way: str | None = None
) -> Sequence[Later]:
    """Run the instances of ``problem`` on few clips: all that blocks need for several waves."""
    problem = strip_ending(problem, phase)

    def names(way: Way, made: tuple[Any, Any]) -> Sequence[str]:
        # Each way launches the same instances; only the first brings some of its own.
        tensors, spec = made
        small = replace(Problem.of(tensors, spec), device=problem.device)
        return [f"{n}{way.name}" for n in _instances(small, phase)]

    found = rehearsal.rehearse(
        problem, phase, rehearsal.ways(calls, problem, phase), names, lambda: _smaller(problem)
    )
    return [e._replace(instances=_instances(problem, phase)) for e in found]


def _smaller(problem: Problem) -> Iterator[Smaller]:
    for size in _SIZES:
        least: Any = tuple(map(min, problem.size, size))
        tensors, spec = resemble(problem, 1, least)
        if min(Problem.of(tensors, spec).out_size) > 0:
            yield problem.passes, _clips(problem, least), least
    yield problem.passes, _clips(problem, problem.size), problem.size
    yield problem.passes, problem.batch, problem.size


def _clips(problem: Problem, size: Triple) -> int:
    """So many that blocks walk over several tiles, where the problem has as many."""
    return max(1, min(POSITIONS, problem.batch * math.prod(problem.size)) // math.prod(size))


def kinds(device: torch.device, dtype: torch.dtype) -> Sequence[str]:
    """Of the checks that can be made on a device in a dtype."""
    found = []
    if dtype != torch.float64:
        found += ["depthwise", "depthwise backward"]
    hopper = is_emulated() or torch.cuda.get_device_capability(device)[0] == 9
    if hopper and dtype in (torch.float16, torch.bfloat16):
        found += ["hopper", "hopper backward"]
    return found


def examples(
    calls: rehearsal.Calls, kind: str, dtype: torch.dtype, device: torch.device
) -> Sequence[Example | Later]:
    """Every tile on small problems and, on a GPU, layers of networks.

    Args:
        kind: one of ``kinds``.
    """
    family = kind.split()[0]
    phase: Phase = "backward" if kind.endswith("backward") else "forward"
    found: list[Example | Later] = []
    if family == "depthwise":
        found += _depthwise(phase == "backward", dtype)
    else:
        found += hopper_examples.examples(kind, dtype)
    if device.type == "cuda":
        for problem in problems("depthwise" if family == "depthwise" else "dense", dtype, device):
            if any(name.startswith(family) for name in _instances(problem, phase)):
                found += rehearse(calls, problem, phase)
    return found


def _depthwise(gradients: bool, dtype: torch.dtype) -> list[Example]:
    """Every instance, with borders that no tile ends at."""
    name = "gradients of " * gradients + "depthwise {} × {}² stride {} on {}"
    x = (1, 24, 5, 9, 10)
    return [
        _example((k, kt, stride), x, dtype, name.format(kt, k, stride, x), gradients)
        for k, kt, stride in product(depthwise.KERNELS, depthwise.KERNELS, depthwise.STRIDES)
    ]


def _example(
    instance: tuple[int, int, int],
    x: tuple[int, ...],
    dtype: torch.dtype,
    name: str,
    gradients: bool,
) -> Example:
    k, kt, stride = instance
    c = x[1]
    tensors = pair_tensors(dtype, x, (c, 1, 1, k, k), (c, 1, kt, 1, 1))
    pads = (kt // 2,) * 2 + (k // 2,) * 4
    spec = PairSpec((1, stride, stride), pads, groups=(c, c), activation="silu", norm="batch")
    tensors = tensors._replace(mean=None, var=None, first_bias=None)
    if not gradients:
        return Example(spec, tensors, lambda p, t: [depthwise.forward(p, t, False).y], name=name)

    def run(problem: PairProblem, t: PairTensors, dy: Tensor, needs: Sequence[bool]) -> Gradients:
        _, u, mean, var, *_ = depthwise.forward(problem, t, True)
        return depthwise.backward(PairBackward(problem, t, [dy], u, mean, var, needs))

    return gradient_example(spec, tensors, run, name)
