"""``tune``: measure the ways of computing a model's calls once, and remember the fastest on disk.

A backend with more than one way offers two functions and asks ``choice`` before its own rule:

``ways(problem, phase)``          names of those that can run it; fewer than two: nothing to measure
``trial(problem, phase, way)``    a function without arguments that runs it once, to the end

Names are kept in ``$FASTST_CACHE/tuning.json`` (``$XDG_CACHE_HOME/fastst``, ``~/.cache/fastst``),
by machine, versions, threads, backend, phase and problem.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..machine import choices
from ..problem.spec import Problem
from . import selection

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Measurement:
    """What ``tune`` found for one problem.

    Attributes:
        backend: whose ways were measured.
        problem: what was computed.
        phase: "forward" or "backward".
        seconds: median time of each way.
    """

    backend: str
    problem: Problem
    phase: str
    seconds: dict[str, float]

    @property
    def way(self) -> str:
        """The fastest."""
        return min(self.seconds, key=lambda name: self.seconds[name])


def tune(model: nn.Module, sample: Tensor, *, seconds: float = 1.0) -> list[Measurement]:
    """Measure what is fastest here for every call that ``model(sample)`` makes; later calls use it.

    Runs the model once, in the modes that its modules are in, to see its calls: in training mode
    with gradients, which leave no trace, in eval mode without. Then it times every distinct call on
    random tensors, in turns. Calls with one way only, and on backends without a choice, cost
    nothing.

    Args:
        model: a layer of fastst, or a model that contains some.
        sample: what it is called with; its sizes, dtype, device and memory format count.
        seconds: time for each distinct call.

    Returns:
        One measurement for every distinct call with a choice.

    Raises:
        ValueError: seconds is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"tune: seconds must be positive, got {seconds}")
    with selection.recording() as calls:
        _run(model, sample)
    found: dict[choices.Key, Measurement] = {}
    for call in calls:
        backend = selection.BACKENDS.get(call.chosen)
        if call.problem is None or backend is None:
            continue
        key = (call.chosen, call.problem, call.phase, torch.get_num_threads())
        names = backend.candidates(call.problem, call.phase)
        if len(names) < 2 or key in found:
            continue
        trials = {n: backend.candidate(call.problem, call.phase, n) for n in names}
        times = race(trials, seconds)
        found[key] = Measurement(call.chosen, call.problem, call.phase, times)
    choices.remember({key: m.way for key, m in found.items()})
    return list(found.values())


def _run(model: nn.Module, sample: Tensor) -> None:
    """Once forward and, in training mode, backward, without touching any ``.grad``."""
    with torch.set_grad_enabled(model.training):
        found = tree_leaves(model(sample))
    outputs = [t for t in found if isinstance(t, Tensor) and t.requires_grad]
    sources = [t for t in (*model.parameters(), sample) if t.requires_grad]
    if outputs and sources:
        ones = [torch.ones_like(t) for t in outputs]
        torch.autograd.grad(outputs, sources, ones, allow_unused=True)


def race(trials: Mapping[Name, Callable[[], object]], seconds: float) -> dict[Name, float]:
    """Median seconds of each, measured in turns so that all see the same machine."""
    for trial in trials.values():
        trial()
    times: dict[Name, list[float]] = {name: [] for name in trials}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(trials))]) < 3:
        for name, trial in trials.items():
            start = time.perf_counter()
            trial()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}
