"""Comparison of a kernel family with float64 on small random data, the first time it is to be used.

A GPU, a driver or a compiler may be broken in ways that no test here has seen; so may PyTorch's
own convolutions (pytorch#163539). A check takes milliseconds once the kernels are compiled.
Verdicts are kept in ``selfcheck.json`` beside the tuning cache, by device, driver, versions and
kernel source.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from . import cache
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
        kind: "dense", "grouped", "depthwise", "parallel", or "hopper" for dense pairs that the CUDA
            library's Hopper kernels take.
        device, dtype: what to run on.

    Returns:
        None, or what is wrong, as the end of a sentence about the backend.
    """
    from . import dispatch
    from .backends import reference

    problem, tensors = _example(kind, dtype)
    with torch.no_grad():
        there = type(tensors)(*(None if t is None else t.to(device) for t in tensors))
        try:
            got = _run(dispatch.BACKENDS[backend], Problem.of(there, problem.spec), there).cpu()
        except Exception as failure:  # a compiler or a driver that fails is a verdict, too
            return f"failed its self-check with {type(failure).__name__}: {failure}"
        compose: Any = reference.compose_parallel if kind == "parallel" else reference.compose_pair
        double = type(tensors)(*(None if t is None else t.double() for t in tensors))
        true = compose(double, problem.spec)
    error = float((got.double() - true).abs().max() / true.abs().max())
    allowed = _ULPS * _rounding(dtype, device)
    if error <= allowed:
        return None
    return f"is off by {error:.2g} of the largest output in its self-check, over {allowed:.2g}"


def verdicts() -> dict[str, str]:
    """Every verdict in memory and on disk, by a description of the check; empty: passed."""
    return {**cache.read(_file()), **_verdicts}


def forget() -> None:
    """Drop what this process knows, not the file."""
    _verdicts.clear()


def _run(module: Any, problem: Problem, tensors: Any) -> Tensor:
    if isinstance(tensors, PairTensors):
        return module.conv2plus1d(problem, tensors, False).y
    return module.parallel_conv2plus1d(problem, tensors)


def _example(kind: str, dtype: torch.dtype) -> tuple[Problem, Any]:
    """A problem whose sizes are no multiples of any tile, with its tensors on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def weight(*shape: int) -> Tensor:
        return normal(*shape) / math.prod(shape[1:]) ** 0.5

    c = 72 if kind == "hopper" else 18
    g = {"grouped": 3, "depthwise": c}.get(kind, 1)
    x = normal(2, c, 5, 9, 7).to(memory_format=torch.channels_last_3d)
    weights = weight(c, c // g, 1, 3, 3), weight(c, c // g, 3, 1, 1), normal(c), normal(c)
    common: dict[str, Any] = {"padding": _PADDING, "groups": (g, g)}
    if kind == "parallel":
        tensors: Any = ParallelTensors(x, *weights)
        spec: Any = ParallelSpec(**common, activation="relu")
    else:
        gamma, beta, mean, var = (normal(c).float() for _ in range(4))
        tensors = PairTensors(x, *weights, gamma, beta, mean, var.abs() + 0.5)
        # Of the Hopper kernels, an activation that only the second one has.
        spec = PairSpec(**common, norm="frozen", activation="silu" if kind == "hopper" else "relu")
    return Problem.of(tensors, spec), tensors


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
