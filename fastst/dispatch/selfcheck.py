"""Comparison of a kernel family with float64 on small random data, the first time it is to be used.

A GPU, a driver or a compiler may be broken in ways that no test here has seen; so may PyTorch's
own convolutions (pytorch#163539). A check takes milliseconds once the kernels are compiled.
Verdicts are kept in ``selfcheck.json`` beside the tuning cache, by device, driver, versions and
kernel source.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.contract import Backend
from ..machine import cache
from ..problem.spec import Problem

# Largest error allowed, in units of the rounding of the dtype and of the largest output: the
# roundings of a right result stay under 2 of these, a wrong tap is off by tens of percent.
_ULPS = 8
_verdicts: dict[str, str] = {}  # by key; empty: passed
_lock = RLock()


class SelfCheckWarning(UserWarning):
    """A kernel family computes wrong numbers here and is no longer chosen by ``auto``."""


def why_broken(backend: Backend, problem: Problem, kind: str) -> str | None:
    """What was wrong when the backend's kernels for such problems were checked here, or None.

    Checks on first use and warns once if that fails. Inside a CUDA graph capture nothing can be
    checked.
    """
    device, dtype = problem.device, problem.dtype
    key = _key(backend.name, kind, device, dtype)
    with _lock:
        if key not in _verdicts:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                # Nobody has seen the Hopper kernels run: they wait for their first check.
                unseen = kind.startswith("hopper")
                return "has not been checked before this graph capture" if unseen else None
            _verdicts.update({k: v for k, v in cache.read(_file()).items() if k not in _verdicts})
        if key not in _verdicts:
            verdict = check(backend, kind, device, dtype, problem) or ""
            _verdicts[key] = verdict
            cache.add(_file(), {key: verdict})
            if verdict:
                warnings.warn(
                    f"fastst no longer chooses backend {backend.name!r} for {kind} layers in "
                    f"{dtype}: it {verdict}",
                    SelfCheckWarning,
                    stacklevel=2,
                )
        return _verdicts[key] or None


def check(
    backend: Backend,
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    like: Problem | None = None,
) -> str | None:
    """Compare a backend with float64 on small random data.

    Args:
        backend: whose kernels; ``aten``'s for PyTorch's own convolutions.
        kind: as ``Backend.check_kind`` names it.
        device, dtype: what to run on.
        like: a problem whose kernels are checked, where the backend has a rehearsal of it; what is
            compiled for the check then serves the call.

    Returns:
        None, or what is wrong, as the end of a sentence about the backend.
    """
    compose: Any = reference.compose_parallel if kind == "parallel" else reference.compose_pair
    found = (backend.examples or backend.usual_examples)(kind, dtype, like)
    allowed = _ULPS * _rounding(dtype, device)
    for spec, tensors, run, dy in found:
        there = type(tensors)(*(None if t is None else t.to(device) for t in tensors))
        try:
            with torch.no_grad():
                results = run(Problem.of(there, spec), there)
        except Exception as failure:  # a compiler or a driver that fails is a verdict, too
            return f"failed its self-check with {type(failure).__name__}: {failure}"
        for (name, true), got in zip(_truth(compose, spec, tensors, dy), results, strict=True):
            error = float((got.cpu().double() - true).abs().max() / true.abs().max())
            if not error <= allowed:
                return (
                    f"is off by {error:.2g} of the largest {name} in its self-check, "
                    f"over {allowed:.2g}"
                )
    return None


def _truth(
    compose: Callable[..., Tensor], spec: Any, tensors: Any, dy: Tensor | None
) -> list[tuple[str, Tensor]]:
    """The output or, with dy, the gradients, in float64 and by name."""
    double = {n: t.double() for n, t in tensors._asdict().items() if t is not None}
    if dy is None:
        with torch.no_grad():
            return [("output", compose(tensors._replace(**double), spec))]
    with torch.enable_grad():
        leaves = {n: t.requires_grad_() for n, t in double.items() if n not in ("mean", "var")}
        y = compose(tensors._replace(**double), spec)
        grads = torch.autograd.grad(y, list(leaves.values()), dy.double())
    return [(f"gradient of {n}", g) for n, g in zip(leaves, grads, strict=True)]


def verdicts() -> dict[str, str]:
    """Every verdict in memory and on disk, by a description of the check; empty: passed."""
    return {**cache.read(_file()), **_verdicts}


def forget() -> None:
    """Drop what this process knows, not the file."""
    _verdicts.clear()


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
