"""Comparison of a kernel family with float64 on small random data, the first time it is to be used.

A GPU, a driver or a compiler may be broken in ways that no test here has seen; so may PyTorch's
own convolutions (pytorch#163539). A check takes milliseconds once the kernels are compiled.
Verdicts are kept in ``selfcheck.json`` beside the tuning cache, by device, driver, versions and
kernel source.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from . import cache, configs_hopper
from .shapes import PairSpec, PairTensors, ParallelSpec, ParallelTensors, Problem

# Largest error allowed, in units of the rounding of the dtype and of the largest output: the
# roundings of a right result stay under 2 of these, a wrong tap is off by tens of percent.
_ULPS = 8
_PADDING = (1,) * 6
_verdicts: dict[str, str] = {}  # by key; empty: passed
_lock = RLock()


class SelfCheckWarning(UserWarning):
    """A kernel family computes wrong numbers here and is no longer chosen by ``auto``."""


def problem_of(problem: Problem) -> str:
    """Name of the check that stands for a problem."""
    if problem.op != "conv2plus1d":
        return "parallel"
    groups = [p.groups for p in problem.passes]
    if all(p.groups == p.in_channels == p.out_channels > 1 for p in problem.passes):
        return "depthwise"
    return "grouped" if max(groups) > 1 else "dense"


def why_broken(backend: str, problem: Problem, kind: str | None = None) -> str | None:
    """What was wrong when the backend's kernels for such problems were checked here, or None.

    Checks on first use and warns once if that fails. Inside a CUDA graph capture nothing can be
    checked. ``kind`` names the check, where the problem alone does not say which kernels will run.
    """
    device, dtype = problem.device, problem.dtype
    kind = kind or problem_of(problem)
    key = _key(backend, kind, device, dtype)
    with _lock:
        if key not in _verdicts:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                # Nobody has seen the Hopper kernels run: they wait for their first check.
                return (
                    "has not been checked before this graph capture" if kind == "hopper" else None
                )
            _verdicts.update({k: v for k, v in cache.read(_file()).items() if k not in _verdicts})
        if key not in _verdicts:
            verdict = check(backend, kind, device, dtype) or ""
            _verdicts[key] = verdict
            cache.add(_file(), {key: verdict})
            if verdict:
                warnings.warn(
                    f"fastst no longer chooses backend {backend!r} for {kind} layers in {dtype}: "
                    f"it {verdict}",
                    SelfCheckWarning,
                    stacklevel=2,
                )
        return _verdicts[key] or None


def check(backend: str, kind: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare a backend with float64 on small random data.

    Args:
        backend: name, "aten" for PyTorch's own convolutions.
        kind: "dense", "grouped", "depthwise", "parallel", or "hopper" for every instance of the
            CUDA library's forward Hopper kernels.
        device, dtype: what to run on.

    Returns:
        None, or what is wrong, as the end of a sentence about the backend.
    """
    from .backends import reference

    compose: Any = reference.compose_parallel if kind == "parallel" else reference.compose_pair
    for spec, tensors, run in _examples(backend, kind, dtype):
        with torch.no_grad():
            there = type(tensors)(*(None if t is None else t.to(device) for t in tensors))
            try:
                got = run(Problem.of(there, spec), there).cpu()
            except Exception as failure:  # a compiler or a driver that fails is a verdict, too
                return f"failed its self-check with {type(failure).__name__}: {failure}"
            double = type(tensors)(*(None if t is None else t.double() for t in tensors))
            true = compose(double, spec)
        error = float((got.double() - true).abs().max() / true.abs().max())
        allowed = _ULPS * _rounding(dtype, device)
        if not error <= allowed:
            return (
                f"is off by {error:.2g} of the largest output in its self-check, over {allowed:.2g}"
            )
    return None


def verdicts() -> dict[str, str]:
    """Every verdict in memory and on disk, by a description of the check; empty: passed."""
    return {**cache.read(_file()), **_verdicts}


def forget() -> None:
    """Drop what this process knows, not the file."""
    _verdicts.clear()


Run = Callable[[Problem, Any], Tensor]


def _examples(backend: str, kind: str, dtype: torch.dtype) -> list[tuple[Any, Any, Run]]:
    """Problems by specification and tensors on the CPU, and what runs them."""
    if kind == "hopper":
        return _hopper_examples(dtype)
    from . import dispatch

    module = dispatch.BACKENDS[backend]
    spec, tensors = _example(kind, dtype)
    if kind == "parallel":
        return [(spec, tensors, module.parallel_conv2plus1d)]
    return [(spec, tensors, lambda problem, t: module.conv2plus1d(problem, t, False).y)]


def _example(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A problem whose sizes are no multiples of any tile."""
    c = 18
    g = {"grouped": 3, "depthwise": c}.get(kind, 1)
    tensors = _tensors(dtype, (2, c, 5, 9, 7), (c, c // g, 1, 3, 3), (c, c // g, 3, 1, 1))
    common: dict[str, Any] = {"padding": _PADDING, "groups": (g, g)}
    if kind == "parallel":
        return ParallelSpec(**common, activation="relu"), ParallelTensors(*tensors[:5])
    return PairSpec(**common, norm="frozen", activation="relu"), tensors


def _hopper_examples(dtype: torch.dtype) -> list[tuple[Any, Any, Run]]:
    """Every instance of the spatial, the temporal and the stem's kernel."""
    from .backends import cuda_hopper

    examples: list[tuple[Any, Any, Run]] = []
    tiles = configs_hopper.trials()
    for i, (spatial, temporal, stride) in enumerate(tiles):

        def run(problem: Problem, t: Any, pair: Any = (spatial, temporal)) -> Tensor:
            return cuda_hopper.forward(problem, t, False, pair).y

        # Half of them with statistics, and a norm and an activation between the two kernels.
        batch = 2 * i < len(tiles)
        m, k = spatial.columns + 8, temporal.columns + 8
        tensors = _tensors(dtype, (1, 72, 3, 5, 7), (m, 72, 1, 3, 3), (k, m, 3, 1, 1))
        spec = PairSpec(
            stride=(stride, 1, 1), padding=_PADDING, norm="batch" if batch else "frozen",
            activation="silu" if batch else "relu",
        )  # fmt: skip
        if batch:
            tensors = tensors._replace(mean=None, var=None)
        examples.append((spec, tensors, run))
    tensors = _tensors(dtype, (1, 3, 3, 21, 20), (45, 3, 1, 7, 7), (64, 45, 3, 1, 1))
    spec = PairSpec(stride=(1, 2, 2), padding=(1, 1, 3, 3, 3, 3), norm="batch")
    tensors = tensors._replace(mean=None, var=None)
    examples.append((spec, tensors, lambda problem, t: cuda_hopper.forward(problem, t, False).y))
    return examples


def _tensors(
    dtype: torch.dtype, x: Sequence[int], first: Sequence[int], second: Sequence[int]
) -> PairTensors:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def weight(shape: Sequence[int]) -> Tensor:
        return normal(*shape) / math.prod(shape[1:]) ** 0.5

    m, k = first[0], second[0]
    there = normal(*x).to(memory_format=torch.channels_last_3d)
    main = there, weight(first), weight(second), normal(m), normal(k)
    gamma, beta, mean, var = (normal(m).float() for _ in range(4))
    return PairTensors(*main, gamma, beta, mean, var.abs() + 0.5)


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    if dtype == torch.float32 and device.type == "cuda" and tf32:
        return 2.0**-10
    # Sums of many rounded terms in the wide types; those of 16 bits are rounded at the end only.
    return float(torch.finfo(dtype).eps) * (8 if dtype.itemsize >= 4 else 1)


def _key(backend: str, kind: str, device: torch.device, dtype: torch.dtype) -> str:
    tf32 = device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    precision = " tf32" if tf32 and dtype == torch.float32 else ""
    return f"{cache.machine(device)} | {cache.versions()} | {backend} | {kind} | {dtype}{precision}"


def _file() -> Path:
    return cache.folder() / "selfcheck.json"
