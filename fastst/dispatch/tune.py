"""``tune``: measure the ways of computing a model's calls once, and remember the fastest on disk.

Two things are chosen: on the CPU which backend "auto" takes, and which of its own ways a backend
takes that offers ``candidates``. Names are kept in ``$FASTST_CACHE/tuning.json``
(``$XDG_CACHE_HOME/fastst``, ``~/.cache/fastst``), by machine, versions, threads, backend, phase and
problem.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..backends.contract import ConvBackward, PairBackward, Phase
from ..machine import choices, devices
from ..problem.conv3d import ConvProblem
from ..problem.examples import example
from ..problem.spec import PairProblem, Problem
from . import selection, selfcheck
from .selection import Decision
from .without_trace import DryRun, without_trace

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Measurement:
    """What ``tune`` found for one problem.

    Attributes:
        backend: whose ways were measured; of "auto" these are backends.
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
    with gradients, in eval mode without. Then it times every distinct call on random tensors, in
    turns, keeping what backward needs where the model trains: on the CPU the backends that "auto"
    may take, and the ways of those that have several. On a GPU its own time counts, of captured
    graphs, not that of the host. The model, the sample and random numbers stay as they
    were.

    Args:
        model: a layer of fastst, or a model that contains some.
        sample: what it is called with; its sizes, dtype, device and memory format count.
        seconds: time for each distinct call and each choice.

    Returns:
        One measurement for every distinct call and each of its choices; at least one.

    Raises:
        ValueError: seconds is not positive, or no call has a choice.
    """
    if not seconds > 0:
        raise ValueError(f"tune: seconds must be positive, got {seconds}")
    with without_trace(model, sample) as run:
        with selection.recording() as calls:
            _run(run, model.training)
        found = _measure(calls, model.training, seconds)
    if not found:
        made = sorted({f"{c.what} {c.phase} on {c.chosen!r}" for c in calls})
        raise ValueError(
            "tune: requires a model whose calls of fastst can run in more than one way here, got "
            f"{type(model).__name__}, which made {'; '.join(made) or 'none'}"
        )
    return found


def _measure(calls: Sequence[Decision], training: bool, seconds: float) -> list[Measurement]:
    """Of every distinct call and each of its choices; remembers the fastest."""
    found: dict[choices.Key, Measurement] = {}
    for call in calls:
        if call.problem is None:
            continue
        for name, makers in _choices(call, training):
            key = (name, call.problem, call.phase, torch.get_num_threads())
            if len(makers) < 2 or key in found:
                continue
            trials = {way: make() for way, make in makers.items()}
            if devices.is_gpu(call.problem.device):
                times = race_on_gpu(trials, seconds, call.problem.device)
            else:
                times = race(trials, seconds)
            found[key] = Measurement(name, call.problem, call.phase, times)
            choices.remember({key: found[key].way})  # what is measured next uses it
    return list(found.values())


Maker = Callable[[], Callable[[], object]]  # of what runs a call once


def _choices(call: Decision, training: bool) -> Iterator[tuple[str, dict[str, Maker]]]:
    """Whose ways a call may take, and how each is made: those of backends, and then backends.

    Ways of "auto" whose kernels fail their self-check are left out.
    """
    p, phase = call.problem, call.phase
    assert p is not None
    auto = selection.requested_backend() == "auto"
    able = selection.able(p, phase) if auto else [call.chosen]
    keeps = training and not (isinstance(p, PairProblem) and p.has_ending)
    for name in able:
        backend = selection.BACKENDS[name]
        ways = [
            w for w in backend.candidates(p, phase)
            if not auto or selfcheck.why_broken(backend, p, phase, w) is None
        ]  # fmt: skip
        yield name, {way: partial(backend.candidate, p, phase, way, keeps) for way in ways}
    if isinstance(p, (PairProblem, ConvProblem)) and p.device.type == "cpu":
        trial: Any = _trial if isinstance(p, PairProblem) else _conv_trial
        yield "auto", {name: partial(trial, name, p, phase, keeps) for name in able}


def _conv_trial(name: str, problem: ConvProblem, phase: Phase, keeps: bool) -> Callable[[], object]:
    """A backend's whole call on random tensors."""
    backend, t = selection.BACKENDS[name], example(problem)
    forward, backward = backend.conv3d, backend.conv3d_backward
    assert forward is not None and backward is not None
    if phase == "forward":
        return lambda: forward(problem, t, keeps)
    result = forward(problem, t, True)
    call = ConvBackward.of(problem, t, result, torch.randn_like(result.y))
    return lambda: backward(call)


def _trial(
    name: str, problem: PairProblem, phase: Phase, keeps: bool
) -> Callable[[], Sequence[Tensor | None]]:
    """A backend's whole call on random tensors."""
    backend, tensors = selection.BACKENDS[name], example(problem)
    if phase == "forward":
        return lambda: [backend.conv2plus1d(problem, tensors, keeps).y]
    _, u, mean, var, *_ = backend.conv2plus1d(problem, tensors, True)
    dy = problem.empty_output(tensors.x).normal_()
    needs = [t is not None for t in tensors[:7]]

    def run() -> Sequence[Tensor | None]:
        call = PairBackward(problem, tensors, [dy], u, mean, var, needs)
        return backend.conv2plus1d_backward(call)

    return run


def _run(run: DryRun, training: bool) -> None:
    """Once forward and, in training mode, backward, without touching any ``.grad``."""
    with torch.set_grad_enabled(training):
        found = tree_leaves(run())
    outputs = [t for t in found if isinstance(t, Tensor) and t.requires_grad]
    sources = [t for t in (*run.parameters.values(), *run.args) if t.requires_grad]
    if outputs and sources:
        ones = [torch.ones_like(t) for t in outputs]
        torch.autograd.grad(outputs, sources, ones, allow_unused=True)


def race_on_gpu(
    trials: Mapping[Name, Callable[[], object]], seconds: float, device: torch.device
) -> dict[Name, float]:
    """Median seconds of each on the GPU, in turns; what the host takes to launch does not count.

    Each is captured as a graph of ``_CALLS`` calls, and a graph is timed by events around it.
    """
    gpu_runtime = devices.runtime(device)
    with gpu_runtime.device(device):
        pool = gpu_runtime.graph_pool_handle()  # one for all: they run in turns
        graphs = {name: _capture(gpu_runtime, trial, pool) for name, trial in trials.items()}
        timed = {name: partial(_gpu_seconds, gpu_runtime, graph) for name, graph in graphs.items()}
        return _medians(timed, seconds)


_CALLS = 8  # of a graph: those of a small layer take longer than a replay


def _capture(gpu_runtime: Any, trial: Callable[[], object], pool: Any) -> Any:
    """A graph of several calls, after one that compiles and loads."""
    trial()
    gpu_runtime.synchronize()
    graph = gpu_runtime.CUDAGraph()
    with gpu_runtime.graph(graph, pool=pool):
        for _ in range(_CALLS):
            trial()
    return graph


def _gpu_seconds(gpu_runtime: Any, graph: Any) -> float:
    """Of one call of a graph."""
    start, end = (gpu_runtime.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / _CALLS


def race(trials: Mapping[Name, Callable[[], object]], seconds: float) -> dict[Name, float]:
    """Median seconds of each, measured in turns so that all see the same machine."""

    def measure(trial: Callable[[], object]) -> float:
        start = time.perf_counter()
        trial()
        return time.perf_counter() - start

    return _medians({name: partial(measure, trial) for name, trial in trials.items()}, seconds)


def _medians(timers: Mapping[Name, Callable[[], float]], seconds: float) -> dict[Name, float]:
    """Of what each returns, in turns for so many seconds, after a turn that does not count."""
    for timer in timers.values():
        timer()
    times: dict[Name, list[float]] = {name: [] for name in timers}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(timers))]) < 3:
        for name, timer in timers.items():
            times[name].append(timer())
    import statistics  # and decimal with it: a tenth of what importing this package takes

    return {name: statistics.median(t) for name, t in times.items()}
