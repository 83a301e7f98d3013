"""The native libraries ``fastst._cpu_avx2`` and ``fastst._cpu_avx512``, as functions of tensors."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...problem.spec import PairProblem, PairTensors, Pass
from .. import native

# What torch.backends.cpu.get_cpu_capability() says, and so ATEN_CPU_CAPABILITY may change.
_MODULES = {"AVX2": "_cpu_avx2", "AVX512": "_cpu_avx512"}
_LARGEST_BUFFER = 64 << 20  # floats that a thread keeps between calls
_buffers = threading.local()


@functools.cache
def load() -> ModuleType | str:
    """The library for this processor, or why there is none."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"needs an x86-64 processor, this is {platform.machine()}"
    capability = torch.backends.cpu.get_cpu_capability()
    name = next((_MODULES[c] for c in ("AVX512", "AVX2") if capability.startswith(c)), None)
    if name is None:
        return f"needs a processor with AVX2 or AVX-512, PyTorch finds {capability}"
    found = native.load(name, "a C++ compiler", "FASTST_BUILD_CPU")
    if isinstance(found, str):
        return found
    found.use_openmp(_gomp_parallel())
    return found


def library() -> ModuleType:
    """
    Raises:
        ImportError: there is none; says why.
    """
    return native.required("cpu", load())


def _gomp_parallel() -> int:
    """Address of what starts threads in the OpenMP runtime that PyTorch has loaded, or 0.

    A second runtime would have threads of its own, which fight PyTorch's for the cores.
    """
    for path in _loaded_runtimes():
        try:
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            return ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0


def _loaded_runtimes() -> Iterator[str]:
    """Files of OpenMP runtimes in this process, those that came with PyTorch first."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return
    files = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    found = [f for f in files if Path(f).name.startswith(("libgomp", "libiomp", "libomp"))]
    home = str(Path(torch.__file__).parents[1])
    yield from sorted(found, key=lambda f: (not f.startswith(home), f))


class Launcher(native.Launcher):
    """Launches of one call."""

    sums = "best"  # or "direct", "winograd": how convolutions sum their products
    strip = 192 << 10  # floats of a mid tensor that stay in a second-level cache of 1 MiB
    large = 1 << 20  # floats of a tensor that other layers push out of the last-level one

    def __init__(self, problem: PairProblem) -> None:
        super().__init__(library(), problem, torch.float32)
        self.problem = problem
        self.threads = torch.get_num_threads()
        self.way = getattr(self.lib.Sums, self.sums)

    def rows(self, kept: bool = True) -> Tensor:
        """Uninitialised memory like u: (N, M rounded up to 8, T', H', W'), channels last.

        What nobody keeps lies in a buffer that the thread uses again for its next call: the pages
        of a fresh one cost about as much as filling them.
        """
        n, t, h, w, m = self.problem.mid_shape
        count = n * t * h * w * m
        size, stride = (n, m, t, h, w), (t * h * w * m, 1, h * w * m, w * m, m)
        if kept or count > _LARGEST_BUFFER:
            return torch.empty_strided(size, stride, dtype=torch.float32, device="cpu")
        buffer: Tensor | None = getattr(_buffers, "rows", None)
        if buffer is None or buffer.numel() < count:
            buffer = _buffers.rows = floats(count)
        return buffer.as_strided(size, stride)

    def pair(self, tensors: PairTensors, y: Tensor) -> int:
        """y = a pair without norm or with a frozen one; in how many strips of its mid tensor."""
        lib, t, spec = self.lib, tensors, self.problem.spec
        first, second = self.problem.passes
        frozen = spec.norm == "frozen"
        norm = (t.mean, t.var, t.norm_weight, t.norm_bias) if frozen else (None,) * 4

        def of(p: Pass, weight: Tensor, bias: Tensor | None) -> Any:
            return lib.PairPass(self.view(weight), self.array(bias), self.conv(p))

        residual = None if t.residual is None else self.view(t.residual)
        strips: int = lib.pair(
            lib.Pair(
                self.view(t.x), of(first, t.first_weight, t.first_bias),
                of(second, t.second_weight, t.second_bias), *map(self.array, norm), spec.eps,
                self.act(spec.activation), self.act(spec.outer_activation), self.slope,
                self.problem.mid_shape, self.strip, self.large, residual, self.view(y),
            ),
            self.way, self.threads,
        )  # fmt: skip
        return strips

    def epilogue(
        self,
        write: str = "forward",
        *,
        bias: Tensor | None = None,
        coefficients: Tensor | None = None,
        act: str = "none",
        outer: str = "none",
        aux: Tensor | None = None,
        reductions: Tensor | None = None,
    ) -> Any:
        lib = self.lib
        return lib.Epilogue(
            getattr(lib.Write, write), self.array(bias), self.array(coefficients), self.act(act),
            self.act(outer), self.slope, None if aux is None else self.view(aux),
            self.array(reductions),
        )  # fmt: skip

    def tap_conv(self, source: Any, weight: Tensor, p: Pass, out: Tensor, epilogue: Any) -> int:
        """out = epilogue(one pass of the pair); how many of its groups went Winograd's way."""
        w, y = self.view(weight), self.view(out)
        found: int = self.lib.tap_conv(source, w, self.conv(p), y, epilogue, self.way, self.threads)
        return found

    def input_gradient(
        self, source: Any, weight: Tensor, p: Pass, out: Tensor, epilogue: Any
    ) -> int:
        """out = epilogue(gradient of a pass's input from that of its output); as ``tap_conv``."""
        w, y = self.view(weight), self.view(out)
        found: int = self.lib.input_gradient(
            source, w, self.conv(p), y, epilogue, self.way, self.threads
        )
        return found

    def weight_gradient(self, x: Any, dy: Any, weight: Tensor, p: Pass) -> Tensor:
        """Gradient of a pass's weight, in its strides, from the sources of input and output."""
        dw = torch.empty_like(weight)
        self.lib.weight_gradient(x, dy, self.conv(p), self.view(dw), self.threads)
        return dw


def floats(*shape: int) -> Tensor:
    """Uninitialised memory for the kernels, whatever PyTorch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def norm_coefficients(k: Launcher, tensors: PairTensors, mean: Tensor, var: Tensor) -> Tensor:
    """(5, M): mean, scale and shift of v = (u − mean)·scale + shift, and two rows of zeros."""
    table = floats(5, mean.shape[0])
    norm = (mean, var, tensors.norm_weight, tensors.norm_bias)
    k.lib.norm_coefficients(*map(k.array, norm), k.problem.spec.eps, k.array(table))
    return table
