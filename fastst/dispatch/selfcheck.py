"""Comparison of a kernel family with float64 on small random data, the first time it is to be used.

A GPU, a driver or a compiler may be broken in ways that no test here has seen; so may PyTorch's
own convolutions (pytorch#163539). Kernels of this library that run on a GPU are checked in a
process of their own (``quarantine``), so that what faults or hangs ends only that. Verdicts are
kept in ``selfcheck.json`` beside the tuning cache, by device, driver, versions and kernel source:
docs/first-contact.md.
"""

from __future__ import annotations

import errno
import hashlib
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import reference
from ..backends.contract import Backend, Example, Later, Phase
from ..backends.rehearsal import bare
from ..machine import cache, devices
from ..problem.conv3d import ConvSpec, problem_of
from ..problem.examples import kind_of, move
from ..problem.spec import PairSpec, Problem
from . import quarantine, said
from .quarantine import Postponed, Request

# Largest error allowed, in units of the rounding of the dtype and of the largest output: the
# roundings of a right result stay under 2 of these, a wrong tap is off by tens of percent.
_ULPS = 8
_AGAIN_SECONDS = 60.0  # until what could not be checked is tried again
_ENOUGH = 3  # hangs and faults after which a backend is left out unchecked
_verdicts: dict[str, str] = {}  # by key; empty: passed
_postponed: dict[str, tuple[float, str]] = {}  # by key: when, and why
_lock = RLock()


class SelfCheckWarning(UserWarning):
    """A kernel family failed its self-check here, or had none, and is not chosen by ``auto``."""


def why_broken(
    backend: Backend, problem: Problem, phase: Phase, way: str | None = None
) -> str | None:
    """Why a backend's kernels for a problem are not to be launched here, or None.

    Checks on first use those of which nothing is known, and warns once where one fails. Inside a
    CUDA graph capture nothing is checked, but what is known is read.

    Args:
        way: one of ``Backend.candidates``; None: the one that calls take.
    """
    names = backend.instances(problem, phase, way)
    if not names:
        return None
    keys = _keys(backend.name, tuple(names), problem.device, problem.dtype, _tf32(problem.device))
    found = _find_verdict(keys)  # without the lock: a check in another thread may take long
    if found is not None:
        return found or None
    with _lock:
        _load()
        if (found := _find_verdict(keys)) is not None:
            return found or None
        if devices.capturing(problem.device):
            return "has not been checked before this graph capture"
        when, why = _postponed.get(keys.together, (0.0, ""))
        if why and time.monotonic() - when < _AGAIN_SECONDS:
            return why
        if given_up := _why_given_up(backend.name, problem):
            return given_up
        what = f"{kind_of(problem)} layers such as this one, {phase}, in {problem.dtype}"
        with cache.locked(_file()):  # ranks of a node share one check
            _load()
            if (found := _find_verdict(keys)) is None:
                try:
                    found = _verdict_of(backend, problem, phase, way)
                except Postponed as reason:
                    why = f"could not be checked: {reason}"
                    _postponed[keys.together] = time.monotonic(), why
                    _warn(f"fastst leaves backend {backend.name!r} out for {what}: it {why}")
                    return why
                _keep({keys.together: found} if found else dict.fromkeys(keys.each, ""))
        if found:
            _warn(f"fastst no longer chooses backend {backend.name!r} for {what}: it {found}")
        return found or None


def _verdict_of(backend: Backend, problem: Problem, phase: Phase, way: str | None) -> str:
    """The verdict on kernels that nobody has seen run here; empty: passed."""
    device, dtype = problem.device, problem.dtype
    if backend.device != "gpu":
        with bare(device):
            examples = backend.rehearse(problem, phase, way)
        return check(backend, examples, device, dtype) or ""
    return quarantine.ask(
        Request(
            backend.name, device, dtype, _tf32(device), like=problem, phase=phase, way=way,
        )
    )  # fmt: skip


class _Keys(NamedTuple):
    """Of verdicts on what a call launches."""

    together: str  # on all of it: what is wrong with it as a whole
    each: tuple[str, ...]


@lru_cache(maxsize=4096)
def _keys(
    backend: str, names: tuple[str, ...], device: torch.device, dtype: torch.dtype, tf32: bool
) -> _Keys:
    digest = hashlib.sha256(" | ".join(sorted(names)).encode()).hexdigest()[:10]
    together, *each = (
        _key(backend, name, device, dtype) for name in (f"{len(names)} kernels {digest}", *names)
    )
    return _Keys(together, tuple(each))


def _load() -> None:
    """Add what other processes have found."""
    _verdicts.update({k: v for k, v in cache.read(_file()).items() if k not in _verdicts})


def _find_verdict(keys: _Keys) -> str | None:
    """The verdict on a call, empty where all that it launches has passed; None: there is none."""
    if (found := _verdicts.get(keys.together)) is not None:
        return found
    return "" if all(_verdicts.get(k) == "" for k in keys.each) else None


def _keep(found: dict[str, str]) -> None:
    _verdicts.update(found)
    cache.add(_file(), found)


def _why_given_up(backend: str, problem: Problem) -> str | None:
    """Why a backend is not even checked: each hang of its kernels has cost minutes."""
    start = f"{cache.machine(problem.device)} | {cache.versions()} | {backend} | "
    bad = [v for k, v in _verdicts.items() if k.startswith(start) and state(v) in ("hang", "fault")]
    if len(bad) < _ENOUGH:
        return None
    return (
        f"is left out on this machine, where {len(bad)} of its self-checks ended in a hang or a "
        f"fault (python -m fastst.check --again tries again); the last {bad[-1]}"
    )


def verdict(
    backend: Backend, kind: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, str]:
    """State and reason of a check without a call, which is made where there is none."""
    key = _key(backend.name, kind, device, dtype)
    with _lock, cache.locked(_file()):
        _load()
        if key not in _verdicts:
            try:
                request = Request(backend.name, device, dtype, _tf32(device), kind=kind)
                found = quarantine.ask(request)
            except Postponed as why:
                return "unknown", f"could not be checked: {why}"
            passed: dict[str, str] = {}
            if not found:  # and so did everything that it ran
                examples = examples_of(backend, kind, dtype, device)
                passed = {
                    _key(backend.name, name, device, dtype): ""
                    for e in examples for name in e.instances
                }  # fmt: skip
            _keep({**passed, key: found})
        return state(_verdicts[key]), _verdicts[key]


def examples_of(
    backend: Backend, kind: str, dtype: torch.dtype, device: torch.device
) -> Sequence[Example | Later]:
    """What a check without a call runs."""
    if backend.examples is None:
        return backend.usual_examples(kind, dtype)
    return backend.examples(kind, dtype, device)


def _warn(message: str) -> None:
    said.warn(message, SelfCheckWarning)


def check(
    backend: Backend,
    examples: Sequence[Example | Later],
    device: torch.device,
    dtype: torch.dtype,
    begin: Callable[[str], object] = lambda name: None,
) -> str | None:
    """Compare a backend with float64 on small random data, twice, in this process.

    Args:
        backend: whose kernels; ``aten``'s for PyTorch's own convolutions.
        examples: what is run.
        device, dtype: what to run on.
        begin: told the name of each example before anything of it is launched; and "" before it is
            made.

    Returns:
        None, or what is wrong, as the end of a sentence about the backend.

    Raises:
        Postponed: it cannot be told, for want of memory or of something else around the kernels.
    """
    with bare(device):
        for number, example in enumerate(examples, 1):
            name = example.name or f"example {number} of {len(examples)} in {dtype}"
            begin("")  # compiling is no part of it
            made = example.make() if isinstance(example, Later) else example
            begin(name)
            why = _compare(made, name, device, dtype)
            if why is not None:
                return why
    return None


def _compare(example: Example, name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the results of an example."""
    allowed = _ULPS * _rounding(dtype, device)
    try:
        there = type(example.tensors)(
            *(None if t is None else move(t, device) for t in example.tensors)
        )
        true = _truth(example, there)
    except Exception as failure:  # of PyTorch's float64: it says nothing of the kernels
        raise Postponed(f"no right result to compare with: {_describe(failure)}") from failure
    try:
        runs = [example.run(problem_of(there, example.spec), there) for _ in range(2)]
        for (what, t), got, again in zip(true, *runs, strict=True):
            # Where a fault is reported, at the latest: it waits for the device.
            error = float((got.double() - t).abs().max() / t.abs().max())
            if not error <= allowed:
                return (
                    f"is off by {error:.2g} of the largest {what} in its self-check, "
                    f"over {allowed:.2g} ({name})"
                )
            if not torch.equal(got, again):
                return f"gave another {what} when it ran again in its self-check ({name})"
    except Exception as failure:  # a compiler or a driver that fails is a verdict, too
        return _failure(failure, name)
    return None


# What CUDA calls errors of a kernel, all of which end the context; out of memory is none of them.
_FAULTS = (
    "illegal memory access", "illegal instruction", "misaligned address", "launch failure",
    "invalid address space", "invalid program counter", "hardware stack", "device-side assert",
    "launch timed out", "AcceleratorError",
)  # fmt: skip
_AROUND = (
    "devices unavailable", "busy or unavailable", "no CUDA-capable device",
    # Of what Triton has a C compiler make on the host, whatever the kernel:
    "Failed to find C compiler", "Failed to load newly compiled", "libcuda.so",
)  # fmt: skip
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOMEM}


def _describe(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}"


def _failure(failure: Exception, name: str) -> str:
    """The verdict on what an example raised."""
    text = _describe(failure)
    memory = isinstance(failure, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in text
    room = isinstance(failure, OSError) and failure.errno in _NO_ROOM
    compiler = isinstance(failure, subprocess.CalledProcessError)  # that one: ptxas has its own
    if memory or room or compiler or any(words in text for words in _AROUND):
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


def _truth(example: Example, tensors: Any) -> list[tuple[str, Tensor]]:
    """The output or, with dy, the gradients that are wanted, in float64 and by name."""
    spec, dy = example.spec, example.dy
    compose: Any = reference.compose_parallel
    if isinstance(spec, (PairSpec, ConvSpec)):
        pair = isinstance(spec, PairSpec)
        compose = reference.compose_pair if pair else reference.compose_conv3d
    double = {n: t.double() for n, t in tensors._asdict().items() if t is not None}
    if dy is None:
        return [("output", compose(tensors._replace(**double), spec))]
    with torch.enable_grad():
        wanted = example.wanted or [n for n in double if n not in ("mean", "var")]
        leaves = {n: double[n].requires_grad_() for n in wanted}
        y = compose(tensors._replace(**double), spec)
        # Of a sum: where dy is given, PyTorch imports sympy, for half a second of the first step.
        grads = torch.autograd.grad((y * dy.to(y)).sum(), list(leaves.values()))
    return [(f"gradient of {n}", g) for n, g in zip(leaves, grads, strict=True)]


def verdicts() -> dict[str, str]:
    """Every verdict in memory and on disk, by a description of the check; empty: passed."""
    return {**cache.read(_file()), **_verdicts}


def count_verdicts() -> dict[str, dict[str, int]]:
    """``tally`` of the verdicts with the versions that run here, as for a record of benchmarks."""
    keys = ((key.split(" | "), verdict) for key, verdict in verdicts().items())
    return tally(
        (parts[2], state(verdict)) for parts, verdict in keys
        if len(parts) > 3 and parts[1] == cache.versions()
    )  # fmt: skip


def tally(found: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Counts of states by backend, from (backend, state)."""
    counts: dict[str, dict[str, int]] = {}
    for backend, what in found:
        states = counts.setdefault(backend, {})
        states[what] = states.get(what, 0) + 1
    return counts


def format_counts(counts: Mapping[str, int]) -> str:
    """ "31 passed, 1 hang": the states of kernels in words."""
    return ", ".join(f"{n} {what}" for what, n in counts.items())


def forget() -> None:
    """Drop what this process knows, not the file."""
    _verdicts.clear()
    _postponed.clear()


def discard(device: torch.device) -> None:
    """Drop every verdict on a device, from the file, too."""
    start = f"{cache.machine(device)} | "
    with _lock, cache.locked(_file()):
        forget()
        cache.add(_file(), {}, without=lambda key: key.startswith(start))


def postponed_checks() -> dict[str, str]:
    """What could not be checked in this process, by a description of the check, and why."""
    return {key: why for key, (_, why) in _postponed.items()}


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    if dtype == torch.float32 and _tf32(device):
        return 2.0**-10
    # Sums of many rounded terms in the wide types; those of 16 bits are rounded at the end only.
    return float(torch.finfo(dtype).eps) * (8 if dtype.itemsize >= 4 else 1)


def _tf32(device: torch.device) -> bool:
    return devices.is_gpu(device) and devices.convolves_in_tf32()


def _key(backend: str, kind: str, device: torch.device, dtype: torch.dtype) -> str:
    precision = " tf32" if _tf32(device) and dtype == torch.float32 else ""
    return f"{cache.machine(device)} | {cache.versions()} | {backend} | {kind} | {dtype}{precision}"


def _file() -> Path:
    return cache.folder() / "selfcheck.json"
