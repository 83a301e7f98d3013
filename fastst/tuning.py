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
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import cache, dispatch
from .shapes import PairSpec, PairTensors, ParallelTensors, Problem

Name = TypeVar("Name", bound=Hashable)
Key = tuple[str, Problem, str, int]  # backend, problem, phase, threads
_chosen: dict[Key, str | None] = {}
_stored: dict[str, str] | None = None  # the file's contents, once it was read
_lock = Lock()


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
    with dispatch.recording() as calls:
        _run(model, sample)
    found: dict[Key, Measurement] = {}
    for call in calls:
        backend = dispatch.BACKENDS.get(call.chosen)
        if call.problem is None or not hasattr(backend, "ways"):
            continue
        key = (call.chosen, call.problem, call.phase, torch.get_num_threads())
        names = backend.ways(call.problem, call.phase)  # type: ignore[union-attr]
        if len(names) < 2 or key in found:
            continue
        trials = {n: backend.trial(call.problem, call.phase, n) for n in names}  # type: ignore[union-attr]
        times = race(trials, seconds)
        found[key] = Measurement(call.chosen, call.problem, call.phase, times)
    _remember({key: m.way for key, m in found.items()})
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


def choice(backend: str, problem: Problem, phase: str) -> str | None:
    """The way that was measured to be the fastest on this machine, or None."""
    key = (backend, problem, phase, torch.get_num_threads())
    try:
        return _chosen[key]
    except KeyError:
        _chosen[key] = found = _load().get(_name(key))
        return found


def forget() -> None:
    """Drop what this process knows, not the file: it is read again when it is needed."""
    global _stored
    with _lock:
        _stored = None
        _chosen.clear()


def example(problem: Problem) -> PairTensors | ParallelTensors:
    """Random tensors of a problem, of magnitudes as in a network."""
    layout = torch.channels_last_3d if problem.channels_last else torch.contiguous_format

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(shape, dtype=problem.dtype, device=problem.device)
        return drawn.contiguous(memory_format=layout)

    parts = {}
    for p in problem.passes:
        fan = p.in_channels // p.groups
        weight = normal(p.out_channels, fan, *p.kernel)
        parts[f"{p.kind}_weight"] = weight / (weight[0].numel() ** 0.5)
    x = normal(problem.batch, problem.passes[0].in_channels, *problem.size)
    if not isinstance(problem.spec, PairSpec):
        return ParallelTensors(x, **parts)
    if problem.spec.norm == "frozen":
        one = torch.ones(problem.mid_channels, dtype=problem.accumulate_dtype, device=x.device)
        parts.update(norm_weight=one, norm_bias=one * 0, mean=one * 0, var=one)
    residual = normal(*problem.out_shape) if problem.residual else None
    return PairTensors(x, **parts, residual=residual)


def cache_file() -> Path:
    """Where choices are kept."""
    return cache.folder() / "tuning.json"


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


def _name(key: Key) -> str:
    """A key as it stands in the file."""
    backend, problem, phase, threads = key
    layout = "channels_last" if problem.channels_last else "contiguous"
    parts: Sequence[object] = (
        cache.machine(problem.device), cache.versions(), threads, backend, phase, problem.op,
        tuple(problem.spec), [tuple(p) for p in problem.passes], problem.batch, problem.size,
        problem.dtype, layout, problem.residual,
    )  # fmt: skip
    return " | ".join(map(str, parts))


def _load() -> dict[str, str]:
    """What the file says, read once; nothing if there is none or it is broken."""
    global _stored
    with _lock:
        if _stored is None:
            _stored = cache.read(cache_file())
        return _stored


def _remember(choices: dict[Key, str]) -> None:
    """Use the choices from here on, and add them to the file, which others may have written to."""
    global _stored
    _chosen.update(choices)
    if not choices:
        return
    with _lock:
        _stored = cache.add(cache_file(), {_name(k): way for k, way in choices.items()})
