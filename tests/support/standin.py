"""A stand-in for CUDA: two GPUs of one model and one of another, whose memory is the host's.

``StandIn`` answers what the library and the benchmarks ask of ``torch.cuda``. Within ``tensors``
what is asked for on "cuda" is made on the CPU and says that it is on a GPU; streams run at once,
events have the time of the host, and a graph runs as it is captured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fastst.backends import cuda
from fastst.backends.cuda import library
from fastst.backends.triton import launch
from fastst.machine import cache, devices
from fastst.ops import autograd, registered
from fastst.problem.spec import Problem

NAMES = ("NVIDIA H200", "NVIDIA H200", "NVIDIA A100-SXM4-80GB")
CAPABILITIES = ((9, 0), (9, 0), (8, 0))


class StandIn:
    """What was asked of it; ``capturing`` may be set.

    Args:
        processors: multiprocessors of each GPU; None: what it has.
    """

    compile = launch.Launch.compile  # the real one, which needs a driver

    def __init__(self, monkeypatch: pytest.MonkeyPatch, processors: int | None = None) -> None:
        self.processors = processors
        self.current, self.capturing = 0, False
        self.synchronized: list[int] = []
        self.fraction = 1.0  # of the memory, that this process may take
        self.streams = [Stream(self)]
        functions: dict[str, Any] = {
            "is_available": lambda: True,
            "device_count": lambda: len(NAMES),
            "current_device": lambda: self.current,
            "set_device": self._set,
            "get_device_name": lambda device=None: NAMES[self._index(device)],
            "get_device_capability": lambda device=None: CAPABILITIES[self._index(device)],
            "get_device_properties": self._properties,
            "is_current_stream_capturing": lambda: self.capturing,
            "current_stream": lambda device=None: self.streams[-1],
            "Stream": lambda device=None: Stream(self),
            "stream": lambda stream: stream or contextlib.nullcontext(),
            "Event": Event,
            "_sleep": lambda cycles: None,
            "synchronize": lambda device=None: self.synchronized.append(self._index(device)),
            "device": self._device,
            "empty_cache": lambda: None,
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 1 << 20,
            "reset_peak_memory_stats": lambda device=None: None,
            "set_per_process_memory_fraction": self._limit,
            "CUDAGraph": lambda: Graph(self),
            "graph": lambda graph, pool=None, stream=None: graph.capture(),
            "graph_pool_handle": lambda: (0, 0),
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
        monkeypatch.setattr(torch, "Generator", Generator)
        self.compiled: list[launch.Launch] = []
        monkeypatch.setattr(
            launch.Launch, "compile", lambda each, device: self.compiled.append(each)
        )
        for cached in (cache.machine, devices.capability, devices.processors):
            cached.cache_clear()

    def _index(self, device: Any) -> int:
        index = device if isinstance(device, int | None) else torch.device(device).index
        return self.current if index is None else index

    def _set(self, device: Any) -> None:
        self.current = self._index(device)

    def _limit(self, fraction: float, device: Any = None) -> None:
        self.fraction = fraction

    @contextlib.contextmanager
    def _device(self, device: Any) -> Iterator[None]:
        before = self.current
        self._set(device)
        yield
        self.current = before

    def _properties(self, device: Any = None) -> SimpleNamespace:
        i = self._index(device)
        major, minor = CAPABILITIES[i]
        return SimpleNamespace(
            name=NAMES[i], major=major, minor=minor, gcnArchName="gfx942:sramecc+:xnack-",
            multi_processor_count=self.processors or (132 if major == 9 else 108),
            total_memory=141 << 30, L2_cache_size=1 << 20,
        )  # fmt: skip


class Stream:
    """Runs everything at once."""

    cuda_stream = 7

    def __init__(self, gpus: StandIn) -> None:
        self.gpus = gpus
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)

    def __enter__(self) -> Stream:
        self.gpus.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.gpus.streams.pop()


class Event:
    """A time of the host."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


class Graph:
    """Knows what its replay must do only from who captures."""

    def __init__(self, gpus: StandIn) -> None:
        self.gpus, self.replays = gpus, 0
        self.again: Any = lambda: None

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        self.gpus.capturing = True
        try:
            yield
        finally:
            self.gpus.capturing = False

    def replay(self) -> None:
        self.replays += 1
        self.again()


class Generator(torch.Generator):
    """On the CPU whatever it is asked for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")


class Tensors(TorchFunctionMode):
    """Tensors on the CPU that say they are on a GPU."""

    gpu = torch.device("cuda", 0)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            real = func(*args)
            return self.gpu if real.type == "cpu" else real
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_real, args), tree_map(_real, kwargs or {})
        return func(*args, **kwargs)


def _real(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


@contextlib.contextmanager
def kernels(monkeypatch: pytest.MonkeyPatch, native: bool = False) -> Iterator[None]:
    """Within it kernels run on such tensors: Triton's interpreted; ``native``: CUDA's emulated."""
    if native:
        found = library.load_emulated()
        names = [n for n in dir(found) if not n.startswith("__")]
        real: Any = ModuleType("native")  # which hashes, as the library does
        vars(real).update({n: getattr(found, n) for n in names})
        real.device_count, real.device_error = lambda: len(NAMES), lambda: ""
        for module in (cuda, library):
            monkeypatch.setattr(module, "load", lambda: real)
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    inside = registered.without_autocast

    def op(device: str, implementation: Any, *args: Any) -> Any:
        with Tensors():  # which PyTorch takes off as it calls an op
            return inside(device, implementation, *args)

    def problem(*args: Any) -> Any:  # in backward, where no mode is
        with Tensors():
            return Problem.of(*args)

    monkeypatch.setattr(registered, "without_autocast", op)
    monkeypatch.setattr(autograd, "Problem", SimpleNamespace(of=problem))
    with Tensors():
        yield
