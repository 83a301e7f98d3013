"""Time, memory, kernels and agreement of a call. Nothing here knows what is called."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastst.backends.cpu.library import load

# What a convolution library falls into when it has no kernel of its own for a call.
SLOW_PATHS = ("vol2col", "col2vol", "im2col", "col2im", "conv_depthwise3d", "slow_conv")

# Relative errors beyond which a result is wrong, PyTorch's own as well.
TRUSTED = {"fp64": 1e-10, "fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
EPSILON = {"fp64": 2**-52, "fp32": 2**-23, "tf32": 2**-10, "fp16": 2**-10, "bf16": 2**-7}
DTYPES = {
    "fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16,
    "bf16": torch.bfloat16,
}  # fmt: skip


class Spread(NamedTuple):
    """Quartiles of repeated measurements."""

    q25: float
    median: float
    q75: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q = statistics.quantiles(values, n=4, method="inclusive")
        return cls(q[0], q[1], q[2])


# ---- time


class Clock:
    """Times single calls on one device, in ms.

    On CUDA by events, with the L2 overwritten before each call and the device held back until the
    host has queued the whole call: the time of the device, without the gaps of a slow host (those
    are ``benchmarks.overhead``'s). On the CPU by the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        if self.cuda:
            p = torch.cuda.get_device_properties(device)
            l2 = getattr(p, "L2_cache_size", 64 << 20)
            self.flush = torch.empty(max(4 * l2, 128 << 20), dtype=torch.uint8, device=device)
            self.cycles_per_ms = getattr(p, "clock_rate", 2_000_000)  # kHz

    def enqueue_ms(self, call: Callable[[int], Any]) -> float:
        """Host time of one call, without waiting for the device."""
        self.synchronize()
        start = time.perf_counter()
        call(0)
        took = (time.perf_counter() - start) * 1e3
        self.synchronize()
        return took

    def time(self, call: Callable[[int], Any], i: int, hold_ms: float = 0.0) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call(i)
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(int(min(hold_ms, 50.0) * self.cycles_per_ms))
        begin.record()
        call(i)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


class Timed(NamedTuple):
    """A call, and what is done before each one outside of the measured time."""

    call: Callable[[int], Any]  # takes the number of the input set
    before: Callable[[], Any] = lambda: None


def interleave(
    clock: Clock,
    calls: Mapping[str, Timed],
    budget_s: float,
    inputs: int,
    seed: int,
    most: int,
    least: int = 5,
) -> dict[str, list[float]]:
    """Samples in ms of each call. Every round calls each once, in a new random order.

    A slow spell of the machine so falls on all of them, and the ratios of one round compare what
    ran within the same moment. Consecutive rounds take different input sets.
    """
    shuffle = random.Random(seed)
    hold, estimate = {}, 0.0
    for name, t in calls.items():
        for _ in range(2):  # the second is warm
            t.before()
            clock.synchronize()
            start = time.perf_counter()
            hold[name] = 1.5 * clock.enqueue_ms(t.call) + 0.05
            took = time.perf_counter() - start
        estimate += took + (hold[name] / 1e3 if clock.cuda else 0)
    rounds = min(most, max(least, int(budget_s / max(estimate, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for r in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            calls[name].before()
            samples[name].append(clock.time(calls[name].call, r % inputs, hold[name]))
    return samples


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """How many times slower the numerator is than the denominator, round by round."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


# ---- memory and kernels


class Observed(NamedTuple):
    peak_bytes: int  # above what was held before the call
    kernels: tuple[str, ...]  # device kernels on CUDA, operators on the CPU
    slow_path: str | None


def observe(call: Callable[[], Any], device: torch.device) -> Observed:
    """Peak memory and kernel names of one (warm) call."""
    peak = 0
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        kept = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - held
        del kept
        activities.append(ProfilerActivity.CUDA)
    memory = device.type == "cpu"
    with _no_stderr(), profile(activities=activities, profile_memory=memory, acc_events=True) as p:
        kept = call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    del kept
    names: dict[str, None] = {}
    held = 0
    assert p.profiler is not None and p.profiler.kineto_results is not None
    for e in p.profiler.kineto_results.events():
        if e.name() == "[memory]" and device.type == "cpu":
            held += e.nbytes()
            peak = max(peak, held)
        elif device.type == "cpu" or "CUDA" in str(e.device_type()):
            names[e.name()] = None
    found = [n for n in names if _tells(n, device)]
    slow = next((s for s in SLOW_PATHS if any(s in n for n in found)), None)
    return Observed(peak, tuple(n[:120] for n in found[:16]), slow)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """The profiler writes two lines of its own for every use; a progress bar lives there too."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _tells(name: str, device: torch.device) -> bool:
    if device.type == "cuda":
        return not name.startswith(("Memset", "Memcpy", "cuda"))
    return any(s in name for s in ("conv", "norm", "copy_", "mkldnn", "fastst", "gemm", "mm"))


def saved_bytes(forward: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that a forward pass keeps for backward."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        s = t.untyped_storage()
        storages[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = forward()
    del kept
    return sum(storages.values())


def poison(nbytes: int, device: torch.device) -> None:
    """Leave NaN in the memory that the next allocations will take, so that unwritten output shows.

    Blocks of several sizes, because the allocator reuses a block of about the size asked for.
    """
    blocks = [
        torch.full((max(nbytes // part // 4, 1),), float("nan"), device=device)
        for part in (1, 2, 4, 8)
    ]
    del blocks


# ---- agreement


class Error(NamedTuple):
    l2: float  # ‖out − ref‖ / ‖ref‖
    largest: float  # max|out − ref| / max|ref|


def errors(outputs: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Error]:
    """Error of each output against float64; NaN where either is not finite or shapes differ."""
    found = {}
    for name, ref in reference.items():
        out = outputs.get(name)
        if out is None or out.shape != ref.shape:
            found[name] = Error(float("nan"), float("nan"))
            continue
        difference = out.double() - ref
        tiny = torch.finfo(torch.float64).tiny
        l2 = difference.norm() / ref.norm().clamp_min(tiny)
        largest = difference.abs().max() / ref.abs().max().clamp_min(tiny)
        found[name] = Error(float(l2), float(largest))
    return found


def why_untrusted(found: Mapping[str, Error], dtype: str) -> str | None:
    """Why a result is wrong by any measure, so that it cannot be a yardstick either; or None."""
    for name, e in found.items():
        if not e.l2 <= TRUSTED[dtype]:
            return f"{name} has a relative error of {e.l2:.2g} in {dtype}"
    return None


def disagreement(
    found: Mapping[str, Error], yardsticks: Sequence[Mapping[str, Error]], dtype: str
) -> str | None:
    """Why the numbers are refused: more than twice PyTorch's own error and a few ulps; or None."""
    ulps = 4 * EPSILON[dtype]
    for name, e in found.items():
        for label, got, own in (
            ("relative", e.l2, max(y[name].l2 for y in yardsticks)),
            ("largest", e.largest, max(y[name].largest for y in yardsticks)),
        ):
            if not got <= 2 * own + ulps:
                return f"{name}: {label} error {got:.2g}, PyTorch's own {own:.2g}"
    return None


# ---- ceilings


def ceilings(device: torch.device, dtypes: Sequence[str], dry: bool = False) -> dict[str, Any]:
    """What this machine reaches now: a large copy, and a large matrix product of each dtype.

    In float32 on the CPU the inner loop of the native kernels counts as well, on panels in cache.
    The fastest of many, so that nothing else that ran meanwhile lowers a ceiling.
    """
    clock = Clock(device)
    nbytes, seconds = 256 << 20, 0.5
    sizes: tuple[int, ...] = (1024, 2048)
    if device.type == "cuda":
        nbytes, sizes = 2 << 30, (4096, 8192)
    if dry:
        nbytes, sizes, seconds = 1 << 20, (64,), 0.0

    def fastest(call: Callable[[int], Any]) -> float:
        for _ in range(3):
            call(0)
        best = clock.time(call, 0, 0.2)
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop:
            best = min(best, clock.time(call, 0, 0.2))
        return best

    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    gbs = 2 * nbytes / fastest(partial(_copy, target, source)) / 1e6
    del source, target
    tflops = {}
    for name in dtypes:
        reached = []
        for n in sizes:
            with precision(name):
                a, b = (torch.randn(n, n, device=device, dtype=DTYPES[name]) for _ in range(2))
                reached.append(2 * n**3 / fastest(partial(_multiply, a, b)) / 1e9)
        if device.type == "cpu" and name == "fp32" and not isinstance(native := load(), str):
            rounds = 10 if dry else 100_000
            flops = native.multiply_panels(rounds, torch.get_num_threads())
            reached.append(flops / fastest(partial(_panels, native, rounds)) / 1e9)
        tflops[name] = max(reached)
    return {"copy_gbs": gbs, "gemm_tflops": tflops}


def _copy(target: Tensor, source: Tensor, _: int) -> None:
    target.copy_(source)


def _multiply(a: Tensor, b: Tensor, _: int) -> None:
    torch.mm(a, b)


def _panels(native: ModuleType, rounds: int, _: int) -> None:
    native.multiply_panels(rounds, torch.get_num_threads())


class precision:
    """Within it, float32 on CUDA is what ``dtype`` names: "fp32", or "tf32" where it may."""

    def __init__(self, dtype: str) -> None:
        self.tf32 = dtype == "tf32"

    def __enter__(self) -> None:
        self.previous = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.tf32

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self.previous
