"""Small problems that run the very kernels of a large one: what the self-check compares.

A kernel with all that it is compiled for, and its tile, is an *instance*; each backend names those
that a problem launches. A rehearsal runs all instances of its problem and, as far as that goes, no
others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..problem.conv3d import ConvProblem, ConvTensors, problem_of
from ..problem.examples import (
    gradient_like,
    kind_of,
    move,
    off_kinks,
    random_gradient,
    random_like,
    resemble,
)
from ..problem.spec import (
    PairProblem,
    PairTensors,
    ParallelProblem,
    ParallelTensors,
    Pass,
    Problem,
    Triple,
)
from .contract import (
    BatchSlice,
    Begun,
    ConvBackward,
    ConvResult,
    Example,
    Gradients,
    Later,
    PairBackward,
    PairResult,
    Phase,
    apply_ending,
)

# Of a rehearsal on a GPU: several waves of blocks, and more partial sums than one program combines.
POSITIONS = 9 << 14


@contextmanager
def bare(device: torch.device) -> Iterator[None]:
    """Without the caller's modes: default device, autocast, inference, fake tensors, gradients."""
    kind = "cpu" if device.type == "meta" else device.type  # where nothing is computed
    with (
        _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False),
        torch.autocast(kind, enabled=False), torch.no_grad(),
    ):  # fmt: skip
        yield


Smaller = tuple[Sequence[Pass], int, Triple]  # passes, clips and size


@dataclass(frozen=True)
class Calls:
    """The functions of a backend, each with the problem in whose configurations it is to run."""

    forward: Callable[[PairProblem, PairTensors, bool, PairProblem], PairResult]
    first: Callable[[PairProblem, PairTensors], Begun]
    second: Callable[[PairProblem, PairTensors, Begun], PairResult]
    backward: Callable[[PairBackward], Gradients]
    parallel: Callable[[ParallelProblem, ParallelTensors, ParallelProblem], Tensor]
    parallel_backward: Callable[
        [ParallelProblem, ParallelTensors, Tensor, Sequence[bool]], Gradients
    ]
    conv: Callable[[ConvProblem, ConvTensors, ConvProblem], ConvResult] | None = None
    conv_backward: Callable[[ConvBackward], Gradients] | None = None


class Way(NamedTuple):
    """One of the ways that calls of a phase take through the kernels."""

    name: str
    run: Callable[[Any, Any, Any, Any], list[Tensor]]  # of problem, tensors, like which one, dy
    wanted: tuple[str, ...] | None = None  # gradients by their tensors; None: all


def ways(calls: Calls, problem: Problem, phase: Phase) -> list[Way]:
    if phase == "backward":
        few: tuple[tuple[str, ...], ...] = ("x",), ("first_weight", "second_weight")
        if isinstance(problem, ParallelProblem):
            few = ("x",), ("spatial_weight", "temporal_weight")
        if isinstance(problem, ConvProblem):
            few = ("x",), ("weight",)
        found = [
            Way(f" of {' and '.join(w or ('all',))}", partial(_gradients, calls, w, False), w)
            for w in (None, *few)
        ]
        if isinstance(problem, PairProblem) and problem.spec.recompute:
            found.append(Way(" of a slice", partial(_gradients, calls, None, True)))
        return found
    if isinstance(problem, ParallelProblem):
        return [Way("", lambda p, t, like, _: [calls.parallel(p, t, like)])]
    if (conv := calls.conv) is not None and isinstance(problem, ConvProblem):
        return [Way("", lambda p, t, like, _: [conv(p, t, like).y])]
    assert isinstance(problem, PairProblem)
    found = [Way("", partial(_pair, calls, False))]
    if not problem.has_ending:  # as ops of training are
        found.append(Way(" that keeps u", partial(_pair, calls, True)))
        if problem.spec.norm == "batch":
            found.append(Way(" in two calls", partial(_two_calls, calls)))
    return found


def _pair(calls: Calls, save: bool, problem: Any, t: PairTensors, like: Any, _: None) -> list[Any]:
    result = calls.forward(problem, t, save, like)
    return [apply_ending(result, problem, t)]


def _two_calls(calls: Calls, problem: Any, t: PairTensors, like: Any, _: None) -> list[Tensor]:
    return [calls.second(problem, t, calls.first(problem, t)).y]


def _gradients(
    calls: Calls, wanted: Sequence[str] | None, sliced: bool, problem: Any, t: Any, like: Any,
    dy: Tensor,
) -> list[Tensor]:  # fmt: skip
    needs = [
        v is not None and (n in wanted if wanted else n not in ("mean", "var"))
        for n, v in t._asdict().items()
    ]
    if isinstance(problem, ParallelProblem):
        found = calls.parallel_backward(problem, t, dy, needs)
    elif isinstance(problem, ConvProblem):
        assert calls.conv is not None and calls.conv_backward is not None
        result = calls.conv(problem, t, problem)
        found = calls.conv_backward(ConvBackward.of(problem, t, result, dy, needs))
    else:
        _, u, mean, var, *_ = calls.forward(problem, t, True, problem)
        part = None
        if sliced:
            zeros = t.x.new_zeros(2, problem.mid_channels, dtype=problem.accumulate_dtype)
            part = BatchSlice(None, zeros if problem.spec.norm == "batch" else None)
        found = calls.backward(PairBackward(problem, t, [dy], u, mean, var, needs, part))
    return [g for g, n in zip(found, needs, strict=False) if n and g is not None]


@lru_cache(maxsize=4096)
def strip_ending(problem: Problem, phase: Phase) -> Problem:
    """A problem as a call of a phase sees it: an op with gradients has no ending."""
    if phase == "forward" or isinstance(problem, ParallelProblem):
        return problem
    if isinstance(problem, ConvProblem):
        ending: dict[str, Any] = {
            "activation": "none", "output_norm": False, "output_statistics": False,
        }  # fmt: skip
    else:
        assert isinstance(problem, PairProblem)
        ending = {"outer_activation": "none", "outer_norm": False}
    others = (*problem.others[:-2], None, None)  # neither the residual nor the norm's table
    bare: Any = problem.spec._replace(**ending)
    return replace(problem, spec=bare, residual_stride=None, others=others)


def rehearse(
    problem: Problem,
    phase: Phase,
    found: Iterable[Way],
    instances: Callable[[Way, tuple[Any, Any]], Sequence[str]],
    smaller: Callable[[], Iterable[Smaller]],
) -> list[Later]:
    """Examples that run the instances of ``problem``, as ``strip_ending`` gives it.

    Args:
        found: its ways; those that bring no instance of their own are left out.
        instances: of a way, for tensors on "meta" and a specification.
        smaller: what might have the same instances, from the smallest on; the last one has.
    """
    examples: list[Later] = []
    seen: set[str] = set()
    for way in found:
        whole = instances(way, resemble(problem, problem.batch, problem.size))
        if seen and seen.issuperset(whole):
            continue
        for passes, batch, size in smaller():
            made = resemble(problem, batch, size, passes)
            if set(whole).issubset(instances(way, made)):
                break
        name = f"{kind_of(problem)} {phase}{way.name}: {problem.spec} on {(batch, *size)}"
        make = partial(_example, way, problem, made, phase == "backward", name, whole)
        examples.append(Later(name, make, whole))
        seen |= set(whole)
    return examples


def _example(
    way: Way, problem: Problem, made: tuple[Any, Any], gradients: bool, name: str,
    instances: Sequence[str],
) -> Example:  # fmt: skip
    shapes, spec = made
    tensors, dy, like = random_like(shapes), None, replace(problem, spec=spec)
    if gradients:
        tensors = off_kinks(spec, tensors)
        dy = random_gradient(gradient_like(problem, problem_of(tensors, spec)))

    def run(small: Any, t: Any) -> list[Tensor]:
        return way.run(small, t, like, None if dy is None else move(dy, t.x.device))

    return Example(spec, tensors, run, dy, name, instances, way.wanted)
