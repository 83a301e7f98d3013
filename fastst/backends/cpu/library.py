"""The native libraries ``fastst._cpu_avx2`` and ``fastst._cpu_avx512``, as functions of tensors."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...problem.spec import PairProblem, PairTensors, Pass, Problem
from .. import native

# What torch.backends.cpu.get_cpu_capability() says, and so ATEN_CPU_CAPABILITY may change.
_MODULES = {"AVX2": "_cpu_avx2", "AVX512": "_cpu_avx512"}
STORED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of tensors that kernels take
_INTERFACE = 10  # of csrc/cpu/bindings.cpp
_LARGEST_BUFFER = 256 << 20  # bytes that a thread keeps between calls


class _Buffer:
    """As large as the largest u that a thread's calls needed room for."""

    rows: Tensor | None = None


_buffers: weakref.WeakSet[_Buffer] = weakref.WeakSet()  # of all threads
_own = threading.local()


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
    if getattr(found, "INTERFACE", 1) != _INTERFACE:
        return f"needs fastst.{name} of these sources, it is of others: build fastst again"
    found.use_openmp(_gomp_parallel())
    return found


def library() -> ModuleType:
    """
    Raises:
        ImportError: there is none; says why.
    """
    found = load()
    return native.require("cpu", found) if isinstance(found, str) else found


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


@functools.cache
def outdoes(dtype: torch.dtype) -> bool:
    """Whether the processor has instructions for this dtype that no kernel uses."""
    found: bool = library().outdoes(dtype)
    return found


class Launcher(native.Launcher):
    """Launches of single convolutions of a call; ``pair`` and its like make a call as a whole."""

    # How convolutions sum their products: or "unrounded" (in training), "direct", "winograd",
    # "pairs", "winograd_pairs", "amx".
    sums = "best"
    strip = 192 << 10  # floats of a mid tensor that stay in a second-level cache of 1 MiB
    large = 1 << 20  # floats of a tensor that other layers push out of the last-level one

    def __init__(self, problem: Problem) -> None:
        super().__init__(library(), problem, torch.float32)
        self.threads = torch.get_num_threads()
        self.way = getattr(self.lib.Sums, self.sums)

    def view(self, t: Tensor) -> Tensor:
        return t  # the library asks tensors itself

    def array(self, t: Tensor | None) -> Tensor | None:
        if t is not None:
            t = t.to(self.accumulate).contiguous()
            t = t.flatten() if t.dim() > 2 else t  # as the library asks
            self.kept.append(t)
        return t

    def input_gradient(
        self, source: Any, weight: Tensor, p: Pass, out: Tensor, epilogue: Any
    ) -> None:
        """out = epilogue(gradient of a pass's input from that of its output)."""
        if math.prod(p.stride) > 2:
            # Every residue of the strides packs taps of its own: where input channels are no
            # neighbours, each would read all of the weight.
            weight = weight.contiguous(memory_format=torch.channels_last_3d)
        conv = self.conv(p)
        self.lib.input_gradient(source, weight, conv, out, epilogue, self.way, self.threads)

    def weight_gradient(self, x: Any, dy: Any, weight: Tensor, p: Pass) -> Tensor:
        """Gradient of a pass's weight, in its strides, from the sources of input and output."""
        dw = torch.empty_like(weight)
        self.lib.weight_gradient(x, dy, self.conv(p), dw, self.way, self.threads)
        return dw

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
        return self.lib.Epilogue(
            getattr(self.lib.Write, write), self.array(bias), self.array(coefficients),
            self.act(act), self.act(outer), self.slope, aux, reductions,
        )  # fmt: skip

    def tap_conv(
        self, source: Any, weight: Tensor, p: Pass, out: Tensor, epilogue: Any, train: bool = False
    ) -> int:
        """out = epilogue(one pass of the pair); how many of its groups went Winograd's way."""
        way = self.lib.Sums.unrounded if train and self.sums == "best" else self.way
        found: int = self.lib.tap_conv(
            source, weight, self.conv(p), out, epilogue, way, self.threads
        )
        return found


def plan(problem: PairProblem) -> Any:
    """What a call computes, for the library; made once."""
    return _plan(problem, Launcher.sums, Launcher.strip, Launcher.large)


@functools.lru_cache(maxsize=4096)
def _plan(problem: PairProblem, sums: str, strip: int, large: int) -> Any:
    lib, spec = library(), problem.spec
    return lib.PairPlan(
        [native.conv(lib, p) for p in problem.passes], getattr(lib.Activation, spec.activation),
        getattr(lib.Activation, spec.outer_activation), float(spec.slope), spec.eps,
        getattr(lib.PairNorm, spec.norm), problem.mid_shape, strip, large, getattr(lib.Sums, sums),
    )  # fmt: skip


def pair(problem: PairProblem, tensors: PairTensors, y: Tensor) -> int:
    """y = a pair without norm or with a frozen one; in how many strips of its mid tensor."""
    strips: int = library().pair(plan(problem), tensors, y, torch.get_num_threads())
    return strips


def rows(problem: PairProblem) -> Tensor:
    """Uninitialised u."""
    return torch.empty(problem.mid_shape, dtype=problem.dtype, device="cpu")


def buffer(problem: PairProblem) -> Tensor:
    """Memory as large as u that nobody keeps.

    The thread uses it again for its next call: the pages of a fresh one cost about as much as
    filling them.
    """
    words = -(-math.prod(problem.mid_shape) * problem.dtype.itemsize // 4)
    if 4 * words > _LARGEST_BUFFER:
        return floats(words)
    own: _Buffer | None = getattr(_own, "buffer", None)
    if own is None:
        own = _own.buffer = _Buffer()
        _buffers.add(own)
    found = own.rows
    if found is None or found.numel() < words:
        found = own.rows = floats(words)
    return found


def release_buffers() -> int:
    """Give back the memory that the CPU kernels of all threads keep between calls.

    A thread that computes keeps up to 256 MiB of what it packs weights and inputs into, and one
    that calls up to 256 MiB for what lies between two convolutions: fresh pages cost about as much
    as filling them. The next call takes what it needs again. May be called at any time.

    Returns:
        How many bytes that were.
    """
    released = 0
    for buffer in list(_buffers):
        rows, buffer.rows = buffer.rows, None
        released += 0 if rows is None else rows.nbytes
    found = load()
    if not isinstance(found, str):
        released += found.kept_bytes()
        found.release_kept()
    return released


def floats(*shape: int) -> Tensor:
    """Uninitialised memory for the kernels, whatever PyTorch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")
