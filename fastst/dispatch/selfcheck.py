"""Comparison of a kernel family with float64 on small random data, the first time it is to be used.

A GPU, a driver or a compiler may be broken in ways that no test here has seen; so may PyTorch's
own convolutions (pytorch#163539). Kernels of this library that run on a GPU are checked in a
process of their own (``quarantine``), so that what faults or hangs ends only that. Verdicts are
kept in ``selfcheck.json`` beside the tuning cache, by device, driver, versions and kernel source:
docs/first-contact.md.
"""

from __future__ import annotations

import errno
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..backends import reference
from ..backends.contract import Backend, Later
from ..machine import cache
from ..problem.spec import PairSpec, Problem
from . import quarantine
from .quarantine import Postponed, Request

# Largest error allowed, in units of the rounding of the dtype and of the largest output: the
# roundings of a right result stay under 2 of these, a wrong tap is off by tens of percent.
_ULPS = 8
_AGAIN_SECONDS = 60.0  # until what could not be checked is tried again
_verdicts: dict[str, str] = {}  # by key; empty: passed
_postponed: dict[str, tuple[float, str]] = {}  # by key: when, and why
_lock = RLock()


class SelfCheckWarning(UserWarning):
    """A kernel family failed its self-check here, or had none, and is not chosen by ``auto``."""


def why_broken(backend: Backend, problem: Problem, kind: str) -> str | None:
    """Why the backend's kernels for such problems are not to be launched here, or None.

    Checks on first use and warns once if that fails. Inside a CUDA graph capture nothing is
    checked, but what is known is read.
    """
    device, dtype = problem.device, problem.dtype
    key = _key(backend.name, kind, device, dtype)
    if key in _verdicts:  # without the lock: a check in another thread may take long
        return _verdicts[key] or None
    with _lock:
        if _known(key):
            return _verdicts[key] or None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "has not been checked before this graph capture"
        when, why = _postponed.get(key, (0.0, ""))
        if why and time.monotonic() - when < _AGAIN_SECONDS:
            return why
        what = f"{kind} layers in {dtype}"
        with cache.locked(_file()):  # ranks of a node share one check
            if not _known(key):
                try:
                    _verdicts[key] = _checked(backend, kind, device, dtype, problem)
                except Postponed as reason:
                    why = f"could not be checked: {reason}"
                    _postponed[key] = time.monotonic(), why
                    _warn(f"fastst leaves backend {backend.name!r} out for {what}: it {why}")
                    return why
                cache.add(_file(), {key: _verdicts[key]})
        if _verdicts[key]:
            _warn(
                f"fastst no longer chooses backend {backend.name!r} for {what}: it {_verdicts[key]}"
            )
        return _verdicts[key] or None


def verdict(
    backend: Backend, kind: str, device: torch.device, dtype: torch.dtype, again: bool = False
) -> tuple[str, str]:
    """State and reason of a check without a call, which is made where there is none or again."""
    key = _key(backend.name, kind, device, dtype)
    with _lock, cache.locked(_file()):
        if again or not _known(key):
            try:
                found = _checked(backend, kind, device, dtype, None)
            except Postponed as why:
                return "unknown", f"could not be checked: {why}"
            _verdicts[key] = found
            cache.add(_file(), {key: found})
        return state(_verdicts[key]), _verdicts[key]


def _known(key: str) -> bool:
    """Whether there is a verdict, here or on the disk."""
    if key not in _verdicts:
        found = cache.read(_file())
        _verdicts.update({k: v for k, v in found.items() if k not in _verdicts})
    return key in _verdicts


def _warn(message: str) -> None:
    warnings.warn(message, SelfCheckWarning, stacklevel=4)


def _checked(
    backend: Backend, kind: str, device: torch.device, dtype: torch.dtype, like: Problem | None
) -> str:
    """The verdict on kernels that nobody has seen run here; empty: passed."""
    if backend.device == "cuda":
        return quarantine.checked(Request(backend.name, kind, device, dtype, like, _tf32(device)))
    return check(backend, kind, device, dtype, like) or ""


def check(
    backend: Backend,
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    like: Problem | None = None,
    begin: Callable[[str], object] = lambda name: None,
    only: int | None = None,
) -> str | None:
    """Compare a backend with float64 on small random data, twice, in this process.

    Args:
        backend: whose kernels; ``aten``'s for PyTorch's own convolutions.
        kind: as ``Backend.check_kind`` names it.
        device, dtype: what to run on.
        like: a problem whose kernels are checked, where the backend has a rehearsal of it; what is
            compiled for the check then serves the call.
        begin: told the name of each example before anything of it is launched.
        only: the one example that is run, counted from 0; None for all.

    Returns:
        None, or what is wrong, as the end of a sentence about the backend.

    Raises:
        Postponed: it cannot be told, for want of memory or of something else around the kernels.
    """
    allowed = _ULPS * _rounding(dtype, device)
    # Whatever the caller's modes are: default device, autocast, inference, fake tensors.
    with (
        _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False),
        torch.autocast(device.type, enabled=False),
    ):  # fmt: skip
        found = (backend.examples or backend.usual_examples)(kind, dtype, like)
        for number, example in enumerate(found, 1):
            if only is not None and number != only + 1:
                continue
            name = example.name or f"example {number} of {len(found)} of {kind!r} in {dtype}"
            begin(name)
            spec, tensors, run, dy, _ = example.make() if isinstance(example, Later) else example
            try:
                there = type(tensors)(*(None if t is None else t.to(device) for t in tensors))
                true = _truth(spec, there, dy)
                runs = []
                for _ in range(2):
                    with torch.no_grad():
                        results = run(Problem.of(there, spec), there)
                    # Where a fault is reported: at the latest when results are copied.
                    runs.append([t.cpu() for t in results])
            except Exception as failure:  # a compiler or a driver that fails is a verdict, too
                return _failure(failure, name)
            for (what, t), got, again in zip(true, *runs, strict=True):
                error = float((got.double() - t).abs().max() / t.abs().max())
                if not error <= allowed:
                    return (
                        f"is off by {error:.2g} of the largest {what} in its self-check, "
                        f"over {allowed:.2g} ({name})"
                    )
                if not torch.equal(got, again):
                    return f"gave another {what} when it ran again in its self-check ({name})"
    return None


# What CUDA calls errors of a kernel, all of which end the context; out of memory is none of them.
_FAULTS = (
    "illegal memory access", "illegal instruction", "misaligned address", "launch failure",
    "invalid address space", "invalid program counter", "hardware stack", "device-side assert",
    "launch timed out", "AcceleratorError",
)  # fmt: skip
_AROUND = ("devices unavailable", "busy or unavailable", "no CUDA-capable device")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOMEM}


def _failure(failure: Exception, name: str) -> str:
    """The verdict on what an example raised."""
    text = f"{type(failure).__name__}: {failure}"
    memory = isinstance(failure, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in text
    room = isinstance(failure, OSError) and failure.errno in _NO_ROOM
    if memory or room or any(words in text for words in _AROUND):
        raise Postponed(text) from failure
    if any(words in text for words in _FAULTS):
        return f"faulted in {name} in its self-check with {text}"
    return f"failed its self-check with {text} ({name})"


_STATES = {
    "is off": "wrong", "gave another": "wrong", "hangs": "hang", "faulted": "fault",
    "ended the process": "fault",
}  # fmt: skip


def state(verdict: str) -> str:
    """ "passed", "wrong", "hang", "fault" or "failed" (to compile or to launch)."""
    found = (s for start, s in _STATES.items() if verdict.startswith(start))
    return next(found, "failed") if verdict else "passed"


def _truth(spec: Any, tensors: Any, dy: Tensor | None) -> list[tuple[str, Tensor]]:
    """The output or, with dy, the gradients, in float64 and by name."""
    pair = isinstance(spec, PairSpec)
    compose: Any = reference.compose_pair if pair else reference.compose_parallel
    double = {n: t.double() for n, t in tensors._asdict().items() if t is not None}
    if dy is None:
        with torch.no_grad():
            return [("output", compose(tensors._replace(**double), spec).cpu())]
    with torch.enable_grad():
        leaves = {n: t.requires_grad_() for n, t in double.items() if n not in ("mean", "var")}
        y = compose(tensors._replace(**double), spec)
        grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y))
    return [(f"gradient of {n}", g.cpu()) for n, g in zip(leaves, grads, strict=True)]


def verdicts() -> dict[str, str]:
    """Every verdict in memory and on disk, by a description of the check; empty: passed."""
    return {**cache.read(_file()), **_verdicts}


def seen() -> dict[str, dict[str, int]]:
    """How many kinds of each backend are in each state on this machine; for tables of status."""
    found: dict[str, dict[str, int]] = {}
    for key, verdict in verdicts().items():
        _, *rest = key.split(" | ")
        if len(rest) == 4:  # versions, backend, kind, dtype
            states = found.setdefault(rest[1], {})
            states[state(verdict)] = states.get(state(verdict), 0) + 1
    return found


def forget() -> None:
    """Drop what this process knows, not the file."""
    _verdicts.clear()
    _postponed.clear()


def postponed() -> dict[str, str]:
    """What could not be checked in this process, by a description of the check, and why."""
    return {key: why for key, (_, why) in _postponed.items()}


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float32 and _tf32(device):
        return 2.0**-10
    # Sums of many rounded terms in the wide types; those of 16 bits are rounded at the end only.
    return float(torch.finfo(dtype).eps) * (8 if dtype.itemsize >= 4 else 1)


def _tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def _key(backend: str, kind: str, device: torch.device, dtype: torch.dtype) -> str:
    precision = " tf32" if _tf32(device) and dtype == torch.float32 else ""
    return f"{cache.machine(device)} | {cache.versions()} | {backend} | {kind} | {dtype}{precision}"


def _file() -> Path:
    return cache.folder() / "selfcheck.json"
