"""Host time of the Triton backend's calls, without a GPU: ``python -m benchmarks.triton_host``.

Compiling and the C function that starts a kernel are replaced by nothing; all Python between a
backend's function and that function runs, on tensors in main memory. The least of many.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from fastst.backends import triton as backend
from fastst.backends.contract import PairBackward
from fastst.problem.spec import PairSpec, PairTensors, Problem

CALLS, SAMPLES = 10, 200  # short samples: others may run meanwhile
CASES = (
    ("dense", 1, "none", False), ("dense", 1, "frozen", False), ("dense", 1, "batch", True),
    ("depthwise", 64, "frozen", False), ("depthwise", 64, "batch", True),
)  # fmt: skip


class Driver:
    """What Triton asks of a driver before it would compile for a Hopper."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Launcher:
    """What Triton's launcher does in Python, and instead of its C function nothing."""

    scratch = 0

    def __call__(self, x: int, y: int, z: int, *args: Any) -> None:
        for size in (self.scratch, self.scratch):
            assert size == 0


def compile_nothing(self: Any, key: Any, signature: Any, device: int, *rest: Any) -> CompiledKernel:
    """A kernel that starts nothing, where Triton would compile one."""
    kernel = CompiledKernel.__new__(CompiledKernel)
    given = {"module": 1, "function": 1, "_run": Launcher(), "packed_metadata": (), "src": None}
    for name, value in (given | {"name": self.__name__}).items():
        setattr(kernel, name, value)
    self.device_caches[device][0][key] = kernel
    return kernel


def least(call: Callable[[], object]) -> float:
    """Microseconds."""
    call()
    found = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS)
    return min(found) * 1e6


def measure(groups: int, norm: str, save: bool) -> tuple[float, float | None]:
    """Microseconds of a forward and, where it keeps what that needs, of a backward pass."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    m = 144 if groups == 1 else 64
    x = empty(1, 64, 2, 7, 7).to(memory_format=torch.channels_last_3d)
    weights = empty(m, 64 // groups, 1, 3, 3), empty(64, m // groups, 3, 1, 1)
    vectors: list[torch.Tensor | None] = [empty(m, dtype=torch.float32) for _ in range(4)]
    kept = {"none": 0, "batch": 2, "frozen": 4}[norm]
    vectors[kept:] = [None] * (4 - kept)
    tensors = PairTensors(x, *weights, None, None, *vectors)
    spec = PairSpec(padding=(1,) * 6, norm=norm, output_statistics=save, groups=(groups, groups))
    problem = Problem.of(tensors, spec)
    pair = backend.BACKEND
    forward = least(lambda: pair.conv2plus1d(problem, tensors, save))
    if not save:
        return forward, None
    result = pair.conv2plus1d(problem, tensors, save)
    dy, needs = torch.empty_like(result.y), [t is not None for t in tensors]

    def backward() -> object:
        return pair.conv2plus1d_backward(
            PairBackward(problem, tensors, [dy], result.u, result.mean, result.var, needs)
        )

    return forward, least(backward)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    launch = backend.launch
    with (
        torch.no_grad(),
        mock.patch.object(JITFunction, "_do_compile", compile_nothing),
        mock.patch.object(launch, "keeps_plans", lambda device: True),
        mock.patch.object(launch, "stream", lambda device: 0),
        mock.patch.object(launch, "capability", lambda device: (9, 0)),
    ):
        for name, groups, norm, save in CASES:
            forward, backward = measure(groups, norm, save)
            told = f"{name:10} {norm:7} forward {forward:5.0f} µs"
            print(told if backward is None else f"{told}, backward {backward:5.0f} µs", flush=True)


if __name__ == "__main__":
    main()
