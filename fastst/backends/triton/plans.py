"""Calls that are planned once: what is allocated and launched, for tensors of known strides.

The host code of the backend runs on tensors without memory and is record: each launch with the
kernel that was compiled for it, the few operators of PyTorch, and when memory is needed first and
last. Later calls of the same kind only do what the recording says, with their own addresses. What
makes two calls the same is all that host code and compiler see: the problem and settings, and of
each tensor its dtype, shape, strides and whether its address is a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ...machine import devices
from ...problem.memory import read_address
from . import launch

# Tensors that a call holds, by number: its arguments and what it has made; None: not any more.
Held = list[Any]
_MOST = 4096  # plans that are kept
_plans: dict[Hashable, LaunchPlan] = {}


class Place(NamedTuple):
    """A tensor that is a view of what a call holds."""

    number: int
    offset: int  # bytes from the beginning of that
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    whole: bool  # the view is all of it

    def of(self, held: Held) -> Tensor:
        t = held[self.number]
        assert t is not None
        if self.whole:
            return t
        return t.as_strided(self.shape, self.stride, t.storage_offset() + self.offset // t.itemsize)


@dataclass
class Allocation:
    """Memory of a call's own."""

    number: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __call__(self, held: Held, stream: Any) -> None:
        held[self.number] = torch.empty_strided(
            self.shape, self.stride, dtype=self.dtype, device=self.device
        )


@dataclass
class PlannedLaunch:
    """A kernel, and where the addresses of tensors stand among its arguments."""

    start: Callable[..., None]
    args: list[Any]
    places: list[tuple[int, int, int]]  # index of the argument, number, offset

    def __call__(self, held: Held, stream: Any) -> None:
        args = self.args.copy()
        for i, number, offset in self.places:
            args[i] = read_address(held[number]) + offset
        self.start(*args, stream=stream)


@dataclass
class Interpreted:
    """A kernel that Triton's interpreter runs, which wants tensors."""

    start: Callable[..., None]
    args: list[Any]
    places: list[tuple[int, Place]]

    def __call__(self, held: Held, stream: Any) -> None:
        args = self.args.copy()
        for i, place in self.places:
            args[i] = place.of(held)
        self.start(*args)


@dataclass
class PlannedCall:
    """A function of tensors and what it makes."""

    function: Callable[..., Any]
    args: Sequence[Any]  # with places instead of tensors
    kwargs: dict[str, Any]
    made: tuple[int, ...]

    def __call__(self, held: Held, stream: Any) -> None:
        args = [_real(a, held) for a in self.args]
        out = self.function(*args, **{name: _real(a, held) for name, a in self.kwargs.items()})
        if self.made:
            for number, t in zip(self.made, [out] if isinstance(out, Tensor) else out, strict=True):
                held[number] = t


def _real(a: Any, held: Held) -> Any:
    if isinstance(a, list):
        return [_real(b, held) for b in a]
    return a.of(held) if isinstance(a, Place) else a


@dataclass
class Drop:
    """Memory that nothing reads any more."""

    number: int

    def __call__(self, held: Held, stream: Any) -> None:
        held[self.number] = None


Step = Allocation | PlannedLaunch | Interpreted | PlannedCall | Drop


@dataclass
class LaunchPlan:
    """A record call."""

    device: torch.device
    memories: int
    steps: list[Step]
    results: list[Any]  # with places instead of tensors
    compiled: bool  # whether there are kernels that are not interpreted

    def __call__(self, held: Held) -> list[Any]:
        held += [None] * (self.memories - len(held))
        with devices.guard(self.device):
            stream = launch.stream(self.device) if self.compiled else None
            for step in self.steps:
                step(held, stream)
        return [r.of(held) if isinstance(r, Place) else r for r in self.results]


@dataclass
class Memory:
    """What a recording knows of what a call will hold."""

    tensor: Tensor  # without memory; kept alive, as its storage stands for it
    address: int  # modulo 16
    allocation: Allocation | None  # None: an argument, or what an operator makes
    uses: list[int] = field(default_factory=list)  # steps


class Recorder(TorchDispatchMode):
    """Records what host code does with tensors without memory."""

    def __init__(self, device: torch.device, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.device = device
        self.memories: list[Memory] = []
        self.numbers: dict[int, int] = {}  # by storage
        self.steps: list[Step] = []
        self.early: list[Step] = []  # before all of them
        self.waiting: dict[Callable[..., None], list[Any]] = {}  # what will be among those
        self.begins = False  # whether those are record
        self.inputs = [self._input(t) for t in tensors]

    def _input(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            self.memories.append(Memory(torch.empty(0, device="meta"), 0, None))
            return None
        like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        known = self._memory_of(like)
        known.address, known.allocation = read_address(t) % 16, None
        return like

    def _memory_of(self, t: Tensor) -> Memory:
        """The memory of a tensor, which is new where it was not known."""
        storage = t.untyped_storage()._cdata
        if storage not in self.numbers:
            self.numbers[storage] = number = len(self.memories)
            made = Allocation(number, tuple(t.shape), t.stride(), t.dtype, self.device)
            self.memories.append(Memory(t, 0, made))
        return self.memories[self.numbers[storage]]

    def place(self, t: Tensor) -> Place:
        """Of a tensor that the next step uses."""
        known = self._memory_of(t)
        known.uses.append(-1 if self.begins else len(self.steps))
        offset = int(t.storage_offset()) * t.itemsize
        whole = t.shape == known.tensor.shape and t.stride() == known.tensor.stride()
        number = self.numbers[t.untyped_storage()._cdata]
        return Place(number, offset, tuple(t.shape), t.stride(), whole and not offset)

    def address(self, t: Tensor) -> int:
        """Of a tensor, modulo 16."""
        return (self._memory_of(t).address + int(t.storage_offset()) * t.itemsize) % 16

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = out if isinstance(out, (tuple, list)) else (out,)
        new = [t for t in found if t.untyped_storage()._cdata not in self.numbers]
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            for t in new:
                self._memory_of(t)
        elif new or func._schema.is_mutable:
            self.operation(func, args, kwargs or {}, new)
        return out

    def operation(self, function: Any, args: Any, kwargs: Any, made: Sequence[Tensor]) -> None:
        """A step that makes tensors, or writes to those that there are."""

        def record(a: Any) -> Any:
            if isinstance(a, torch.device):
                return self.device
            return self.place(a) if isinstance(a, Tensor) else a

        args, kwargs = tree_map(record, (args, kwargs))
        numbers = tuple(self.place(t).number for t in made)
        for number in numbers:
            self.memories[number].allocation = None
        self._step(PlannedCall(function, args, kwargs, numbers))

    def _step(self, step: Step) -> None:
        (self.early if self.begins else self.steps).append(step)

    def first(self, launch_all: Callable[[list[Any]], None], reads: Tensor, job: Any) -> None:
        """Do a job before all else, together with others, if it reads an argument; else now."""
        if self.numbers[reads.untyped_storage()._cdata] < len(self.inputs):
            self.waiting.setdefault(launch_all, []).append(job)
        else:
            launch_all([job])

    def launch(self, start: Callable[..., None], args: Sequence[Any], compiled: bool) -> None:
        places = [(i, self.place(a)) for i, a in enumerate(args) if isinstance(a, Tensor)]
        plain = [None if isinstance(a, Tensor) else a for a in args]
        if compiled:
            self._step(PlannedLaunch(start, plain, [(i, p.number, p.offset) for i, p in places]))
        else:
            self._step(Interpreted(start, plain, places))

    def plan(self, results: Sequence[Any]) -> LaunchPlan:
        """With memory taken just before its first use and given back after its last."""
        places = [self.place(r) if isinstance(r, Tensor) else r for r in results]
        self.begins = True
        for launch_all, jobs in self.waiting.items():
            launch_all(jobs)
        returned = {p.number for p in places if isinstance(p, Place)}
        steps: list[Step] = []
        for i in range(-1, len(self.steps) + 1):
            used = [(n, m) for n, m in enumerate(self.memories) if i in m.uses]
            steps += [m.allocation for _, m in used if m.allocation and min(m.uses) == i]
            steps += self.early if i < 0 else self.steps[i : i + 1]
            steps += [Drop(n) for n, m in used if max(m.uses) == i and n not in returned]
        compiled = any(isinstance(step, PlannedLaunch) for step in steps)
        return LaunchPlan(self.device, len(self.memories), steps, places, compiled)


def run(
    host: Callable[..., Sequence[Any]],
    device: torch.device,
    tensors: list[Tensor | None],
    *settings: Hashable,
) -> list[Any]:
    """What ``host(tensors, *settings)`` returns, by a plan of it.

    Args:
        host: launches kernels by ``launch.run``, and uses no value of a tensor.
        device: of all tensors.
        tensors: arguments. The list is emptied: none is held for longer than it is read.
        settings: all else that host code depends on.
    """
    known = [
        None if t is None else (t.dtype, t.shape, t.stride(), read_address(t) % 16) for t in tensors
    ]
    key = (host, settings, launch.allows_tf32(), tuple(known))
    keeps = launch.keeps_plans(device)
    plan = _plans.get(key) if keeps else None
    if plan is None:
        plan = record(host, device, tensors, *settings)
        if keeps:
            while len(_plans) >= _MOST:
                _plans.pop(next(iter(_plans)), None)
            _plans[key] = plan
    held = tensors.copy()
    tensors.clear()
    return plan(held)


def record(
    host: Callable[..., Sequence[Any]],
    device: torch.device,
    tensors: Sequence[Tensor | None],
    *settings: Hashable,
) -> LaunchPlan:
    """The plan of a call."""
    recorder = Recorder(device, tensors)
    with launch.recording(recorder), recorder:
        return recorder.plan(host(recorder.inputs, *settings))


def run_aside(
    function: Callable[..., Sequence[Tensor]], args: Sequence[Tensor], made: Sequence[Tensor]
) -> None:
    """Let a function of real tensors make what stands for its results, when the plan runs.

    For what needs more than launches and operators: collectives.
    """
    launch.recorder().operation(function, args, {}, made)


def forget() -> None:
    """Drop all plans."""
    _plans.clear()
