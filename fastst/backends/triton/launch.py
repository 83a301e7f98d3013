"""What the machine has, and how a kernel is started. Tests replace functions of this module."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...machine import devices, gpu
from . import tiles

if TYPE_CHECKING:
    from .plans import Recorder


@functools.cache
def load_kernels() -> tuple[ModuleType | None, str | None]:
    """The kernels, or why there are none."""
    if importlib.util.find_spec("triton") is None:
        return None, "needs the package triton, which is not installed"
    try:
        from . import kernels
        from .kernels import (  # noqa: F401
            depthwise,
            depthwise_backward,
            input_gradient,
            norm,
            pack,
            pair,
            parallel,
            statistics,
            tap_conv,
            weight_gradient,
        )
    except Exception as error:  # a broken Triton must not break the other backends
        return None, f"needs a working Triton: importing it failed with {error!r}"
    return kernels, None


def kernels() -> ModuleType:
    """The kernels, where ``found`` says that there are some."""
    modules, missing = load_kernels()
    if modules is None:
        raise RuntimeError(f"backend 'triton' {missing}")
    return modules


@functools.cache
def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (set before Triton was imported)."""
    modules, _ = load_kernels()
    return modules is not None and type(modules.tap_conv.tap_conv).__name__ == "InterpretedFunction"


def serves_cpu() -> bool:
    """Whether CPU tensors can be computed; tests that execute compiled kernels replace this."""
    return is_interpreted()


def capability(device: torch.device) -> gpu.Capability:
    """Compute capability; that of the data-centre Hopper where the interpreter stands in."""
    if device.type == "meta" and _watch.device:
        device = _watch.device
    return devices.capability(device) if devices.is_gpu(device) else (9, 0)


@functools.cache
def triton_version() -> tuple[int, ...]:
    """The numbers of the version of Triton, whatever package has brought it."""
    import triton

    return tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:3])


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a usual number where the interpreter stands in."""
    if device.type == "meta" and _watch.device:
        device = _watch.device
    if devices.is_gpu(device):
        return devices.processors(device)
    return gpu.processors(capability(device))


def allows_tf32() -> bool:
    """Whether float32 convolutions may round their operands to TF32, by PyTorch's own switch."""
    if devices.is_rocm():
        return False  # most of AMD's GPUs have no such product, and Triton refuses to compile it
    return devices.convolves_in_tf32()


class Launch(NamedTuple):
    """A kernel that is to be started, and with what."""

    kernel: Any
    config: tiles.Config | None
    args: tuple[Any, ...]
    meta: Mapping[str, Any]

    @property
    def instance(self) -> str:
        """Its name with what it is compiled for.

        Left out is WIDE: no check can have the 2³¹ positions from which coordinates have 64 bits.
        """
        unseen = getattr(self.kernel, "do_not_specialize", None)
        if unseen is None:  # the interpreter keeps it elsewhere
            unseen = self.kernel.kwargs["do_not_specialize"] or ()
        names = self.kernel.arg_names
        known = [
            _specialisation(v, n not in unseen) for n, v in zip(names, self.args, strict=False)
        ]
        constants = sorted((k, v) for k, v in self.meta.items() if k != "WIDE")
        text = repr((known, self.config, constants))
        return f"{self.kernel.__name__} {hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def compile(self, device: torch.device) -> None:
        """Compile it, where that has not been done, and start nothing."""
        options = {} if self.config is None else tiles.launch_options(self.config)
        with devices.guard(device):
            self.kernel.warmup(*self.args, grid=(1,), **self.meta, **options)


_compiling: dict[tuple[str, torch.device], Future[None]] = {}  # by instance


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def compile_all(launches: Sequence[Launch], device: torch.device, wait: bool = True) -> None:
    """Compile kernels side by side, each once: an assembler of its own takes a part of the time.

    What does not compile says so when it is launched.

    Args:
        wait: until all are compiled; otherwise that goes on meanwhile.
    """
    for each in launches:
        key = each.instance, device
        if key not in _compiling:
            _compiling[key] = _pool().submit(each.compile, device)
    for each in launches if wait else ():
        _compiling[each.instance, device].exception()


def _specialisation(value: Any, specialised: bool = True) -> Any:
    """What the compiler knows of an argument."""
    if isinstance(value, tuple):  # whose integers it knows in any case
        return tuple(_specialisation(v) for v in value)
    if isinstance(value, Tensor):
        return value.dtype, value.storage_offset() * value.itemsize % 16 == 0
    if isinstance(value, int):
        wide = not -(1 << 31) <= value < 1 << 31
        return (wide, value == 1, value % 16 == 0) if specialised else wide
    return value if value is None else type(value).__name__


class _Watch(threading.local):
    """Who looks at the launches of this thread: is asked of each, and says whether it is made."""

    permits: Callable[[Launch], bool] | None = None
    device: torch.device | None = None  # that meta tensors stand for


_watch = _Watch()


@contextlib.contextmanager
def watch_launches(
    permits: Callable[[Launch], bool], device: torch.device | None = None
) -> Iterator[None]:
    """Ask ``permits`` before every launch of this thread.

    Args:
        permits: whether to make it.
        device: that tensors on "meta" stand for.
    """
    before = _watch.permits, _watch.device
    _watch.permits, _watch.device = permits, device
    try:
        yield
    finally:
        _watch.permits, _watch.device = before


def list_launches(device: torch.device, call: Callable[[], object]) -> list[Launch]:
    """The launches that a call on meta tensors would make on a device; none is made."""
    found: list[Launch] = []

    def note(launch: Launch) -> bool:
        found.append(launch)
        return False

    with watch_launches(note, device):
        call()
    return found


# ---- launches, which are recorded as steps of a plan

_recording = threading.local()


@contextlib.contextmanager
def recording(into: Recorder) -> Iterator[None]:
    """Launches of this thread become steps of a plan."""
    _recording.recorder = into
    try:
        yield
    finally:
        del _recording.recorder


def recorder() -> Recorder:
    """What launches of this thread are recorded by."""
    found: Recorder = _recording.recorder
    return found


def device() -> torch.device:
    """Where what is recorded will run."""
    return recorder().device


def keeps_plans(device: torch.device) -> bool:
    """Whether plans are kept for later calls.

    Not in the interpreter, which tests change at will, and not where somebody looks at launches.
    """
    return devices.is_gpu(device) and not is_interpreted() and _watch.permits is None


@dataclass(frozen=True)
class Pointer:
    """What the compiler knows of a tensor."""

    dtype: torch.dtype
    address: int  # modulo 16

    def data_ptr(self) -> int:
        return self.address


def run(
    kernel: Any,
    grid: tuple[int, ...],
    config: tiles.Config | None,
    *args: Any,
    **meta: Any,
) -> None:
    """Launch a kernel with these arguments, those in ``meta`` by their names."""
    permits = _watch.permits
    if permits is not None and not permits(Launch(kernel, config, args, meta)):
        return
    args = (*args, *(meta[name] for name in kernel.arg_names[len(args) :]))
    options = {} if config is None else tiles.launch_options(config)
    recorder().launch(start(kernel, grid, args, options), args, hasattr(kernel, "device_caches"))


def start(
    kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, int]
) -> Callable[..., None]:
    """What starts a kernel on a grid, compiled for such arguments; called with all of them."""
    if not hasattr(kernel, "device_caches"):  # the interpreter's
        found: Callable[..., None] = kernel[grid]
        return found
    address = recorder().address
    known = [Pointer(a.dtype, address(a)) if isinstance(a, Tensor) else a for a in args]
    with devices.guard(device()):
        compiled = kernel.warmup(*known, grid=grid, **options)
        found = compiled[(*grid, 1, 1)[:3]]
    return found


def stream(device: torch.device) -> Any:
    """PyTorch's current stream of a device, as Triton takes it."""
    from triton.runtime import driver

    return driver.active.get_current_stream(device.index)
