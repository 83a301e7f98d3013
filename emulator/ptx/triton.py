"""A driver for Triton whose GPU is the machine of this folder: kernels are compiled, then executed.

``activate`` before the first launch; tensors stay on the CPU. Compiled code ends at PTX: what ptxas
makes of it is read elsewhere (tests/static).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from .executed import Executed, live_tensors, young_objects
from .machine import Module


class Launcher:
    """Calls a compiled kernel as Triton's own launcher does."""

    def __init__(self, source: Any, metadata: Any, executed: Executed) -> None:
        self.types = tuple(source.signature.values())
        self.metadata, self.executed = metadata, executed

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, launch_metadata: Any,
        enter: Any, leave: Any, *args: Any,
    ) -> None:  # fmt: skip
        module, name = function
        given: list[int | float] = []
        for type_, value in _passed_arguments(self.types, args):
            if type_[0] == "*":
                given.append(value.data_ptr() if isinstance(value, torch.Tensor) else value or 0)
            else:
                given.append(float(value) if type_.startswith("fp") else int(value))
        given += [0, 0]  # scratch memory, which no kernel of ours asks for
        self.executed.run(
            module, name, (x, y, z), (32 * self.metadata.num_warps,), given, live_tensors(),
            shared=self.metadata.shared,
        )  # fmt: skip


def _passed_arguments(types: tuple[Any, ...], values: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Type and value of what is a parameter of the machine code: no constants, no tuples."""
    for type_, value in zip(types, values, strict=True):
        if isinstance(type_, tuple):
            yield from _passed_arguments(type_, value)
        elif type_ != "constexpr":
            yield type_, value


_devices = itertools.count()


class Driver:
    """What Triton asks of a driver; each is a device of its own, with kernels of its own."""

    def __init__(self, capability: tuple[int, int], executed: Executed) -> None:
        self.capability, self.executed, self.device = capability, executed, next(_devices)
        self.launcher_cls = lambda source, metadata: Launcher(source, metadata, executed)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 228 << 10},
            load_binary=self._load,
        )

    def _load(self, name: str, code: bytes, shared: int, device: int) -> tuple[Any, ...]:
        module = Module(self.executed.plant(code.decode()))
        return module, (module, name), 0, 0, 1024

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        major, minor = self.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def executing(capability: tuple[int, int]) -> Iterator[Executed]:
    """Within, kernels of Triton are compiled for this compute capability and executed.

    Triton must have been imported without TRITON_INTERPRET, and TRITON_CACHE_DIR must be a folder
    of its own: what is kept there has PTX in the place of machine code.
    """
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    executed = Executed()

    def keep_ptx(self: Any, source: str, *args: Any) -> bytes:
        return source.encode()

    with mock.patch.object(CUDABackend, "make_cubin", keep_ptx), young_objects():
        driver.set_active(Driver(capability, executed))
        yield executed
