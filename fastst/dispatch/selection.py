"""Which backend runs a problem: an ordered list of modules that say why they cannot.

``auto`` takes the first that can. A backend that was named must be able to, or it is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from ..backends import aten, cpu, cuda, reference, triton
from ..backends.contract import Backend, Phase
from ..machine import choices, devices, settings
from ..machine.scoped import Scoped
from ..problem.spec import PairProblem, Problem
from . import said, selfcheck

# In the order of preference of "auto"; reference is only ever chosen by name.
BACKENDS: dict[str, Backend] = {
    module.BACKEND.name: module.BACKEND for module in (cuda, triton, cpu, aten, reference)
}
AUTO = ("cuda", "triton", "cpu", "aten")


class Decision(NamedTuple):
    """One decision of ``choose`` or ``fall_back``, as ``recording`` keeps it."""

    what: str  # the op, or the module that was composed
    problem: Problem | None  # None where a module was composed
    phase: Phase
    chosen: str  # name of the backend, or "composed"
    why: str | None  # why it was composed


class FallbackWarning(UserWarning):
    """``auto`` took a slower way than the one this library exists for; said once per reason."""


class BackendError(ValueError):
    """The backend that was asked for cannot run this call, or no backend can."""


def _check_known(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        known = ", ".join(repr(n) for n in ("auto", *BACKENDS))
        raise ValueError(f"unknown backend {name!r}: expected one of {known}")
    return name


_warned: set[str] = set()
_recorders: list[list[Decision]] = []
_quiet = 0  # how many recordings want no warning


class use_backend(Scoped):
    """Ask for a backend from here on, or within a ``with`` block.

    Process-wide like ``torch.backends`` flags, so that threads of the autograd engine agree.

    Args:
        name: "auto", or one of ``fastst.dispatch.BACKENDS``.

    Raises:
        ValueError: for an unknown name.
    """

    value = _check_known(settings.value("FASTST_BACKEND"))

    def __init__(self, name: str) -> None:
        super().__init__(_check_known(name))


def requested_backend() -> str:
    """The backend that calls made now ask for: "auto" or a name."""
    return use_backend.value


@contextmanager
def recording(quietly: bool = False) -> Iterator[list[Decision]]:
    """Collect the decisions that are made within the block, process-wide.

    ``quietly``: what is slow neither warns nor is an error meanwhile.
    """
    global _quiet
    calls: list[Decision] = []
    _recorders.append(calls)
    _quiet += quietly
    try:
        yield calls
    finally:
        _recorders[:] = [r for r in _recorders if r is not calls]
        _quiet -= quietly


def _record(*call: Any) -> None:
    for calls in _recorders:
        calls.append(Decision(*call))


def reasons(problem: Problem, phase: Phase = "forward") -> dict[str, str | None]:
    """For every backend the reason why it cannot run the problem, or None where it can."""
    auto = requested_backend() == "auto"
    return {
        name: _why_not_auto(backend, problem, phase) if auto else _why_not(backend, problem, phase)
        for name, backend in BACKENDS.items()
    }


def _why_not(backend: Backend, problem: Problem, phase: Phase) -> str | None:
    """Why a backend cannot run a problem."""
    return (
        _why_unhonoured(backend, problem)
        or backend.why_not(problem, phase)
        or _why_no_statistics(backend, problem)
    )


@lru_cache(maxsize=4096)
def _why_unhonoured(backend: Backend, problem: Problem) -> str | None:
    return backend.why_unhonoured(problem.spec)


def _why_no_statistics(backend: Backend, problem: Problem) -> str | None:
    """Why a backend that can run a problem does not give the statistics of y that it asks for."""
    if not isinstance(problem, PairProblem) or not problem.spec.output_statistics:
        return None
    if backend.gives_output_statistics(problem):
        return None
    return "would have to read the output again for its statistics"


def _why_not_auto(backend: Backend, problem: Problem, phase: Phase) -> str | None:
    """Why "auto" does not take a backend: it cannot, need not, or has been seen to be wrong."""
    return (
        _why_not(backend, problem, phase)
        or backend.why_not_auto(problem, phase)
        or selfcheck.why_broken(backend, problem, phase)
    )


def choose_unrecorded(problem: Problem, phase: Phase, name: str) -> Backend:
    """As ``choose``, for a call that no recording is to know of."""
    return _choose(problem, phase, name)


def choose(problem: Problem, phase: Phase, name: str) -> Backend:
    """The backend that runs the problem.

    Raises:
        BackendError: a named backend cannot run it, with its reason; or none can.
    """
    backend = _choose(problem, phase, name)
    if _recorders:
        _record(problem.op, problem, phase, backend.name, None)
    return backend


def able(problem: Problem, phase: Phase) -> list[str]:
    """Names of the backends that "auto" may take, the one that it prefers first."""
    return [
        name
        for name in AUTO
        if BACKENDS[name].device in (None, devices.kind(problem.device))
        and _why_not_auto(BACKENDS[name], problem, phase) is None
    ]


def has_kernels(problem: Problem) -> bool:
    """Whether a call would run forward on kernels of this library, not on PyTorch's operators."""
    if requested_backend() != "auto":
        return _why_not(BACKENDS[requested_backend()], problem, "forward") is None
    return able(problem, "forward")[:1] != [AUTO[-1]]


def fastest_measured(problem: Problem, phase: Phase) -> Backend | None:
    """The backend that ``tune`` has found to be the fastest for a problem, if it can run here."""
    name = choices.choice("auto", problem, phase)
    if name not in AUTO or _why_not_auto(BACKENDS[name], problem, phase) is not None:
        return None
    return BACKENDS[name]


def _choose(problem: Problem, phase: Phase, name: str) -> Backend:
    if name != "auto":
        why = _why_not(BACKENDS[name], problem, phase)
        if why is not None:
            raise BackendError(f"{problem.op}: backend {name!r} cannot run the {phase}: it {why}")
        return BACKENDS[name]
    if (fastest := fastest_measured(problem, phase)) is not None:
        return fastest
    refusals: list[str] = []
    device = devices.kind(problem.device)
    slow = device == "gpu"
    for candidate in AUTO:
        backend = BACKENDS[candidate]
        # Tensors elsewhere it takes at most in an emulation, for who names it.
        if backend.device not in (None, device):
            continue
        why = _why_not_auto(backend, problem, phase)
        if why is None:
            if candidate == AUTO[-1] and slow and refusals:
                _say_slow(
                    f"{problem.op} runs its {phase} on PyTorch's own convolutions ({candidate!r})",
                    "; ".join(refusals),
                )
            return backend
        # On a CPU they are the fast ones where kernels are passed over, or where an op has none.
        offered = getattr(backend, problem.op) is not None
        slow = slow or (offered and _why_not(backend, problem, phase) is not None)
        refusals.append(f"{candidate!r} {why}")
    raise BackendError(f"{problem.op}: no backend can run the {phase}: {'; '.join(refusals)}")


def takes_in(problem: Problem, asking: Problem, name: str) -> bool:
    """Whether the backend that runs a problem forward knows what else another one asks of it."""
    backend = _choose(problem, "forward", name)
    return _why_unhonoured(backend, asking) is None


def choose_with_statistics(problem: PairProblem, asking: PairProblem, name: str) -> Backend | None:
    """The backend that runs a problem forward, if it gives mean and variance of y as well.

    Args:
        asking: the same problem with ``spec.output_statistics``.
    """
    backend = _choose(problem, "forward", name)
    why = _why_unhonoured(backend, asking) or _why_no_statistics(backend, asking)
    if why is None and name == "auto":  # those with the statistics are other kernels
        why = selfcheck.why_broken(backend, asking, "forward")
    if why is not None:
        record_composed("BatchNorm3d after a pair", f"backend {backend.name!r} {why}")
    return backend if why is None else None


def strict() -> bool:
    """Whether falling back to something slow is an error (``FASTST_STRICT=1``)."""
    return settings.flag("FASTST_STRICT")


def fall_back(what: str, why: str) -> None:
    """Warn once that ``what`` is composed of separate operators because of ``why``.

    Raises:
        BackendError: under ``FASTST_STRICT=1``, or where a backend was asked for by name.
    """
    composed = f"{what} runs as separate PyTorch operators"
    record_composed(what, why)
    if requested_backend() != "auto":
        raise BackendError(
            f"{composed}: {why} (refused, as backend {requested_backend()!r} was asked for)"
        )
    _say_slow(composed, why)


def _say_slow(what: str, why: str) -> None:
    """Warn once of each reason."""
    if _quiet:
        return
    if strict():
        raise BackendError(f"{what}: {why} (refused under FASTST_STRICT=1)")
    _warn_once(f"{what}: {why}", why)


def record_composed(what: str, why: str) -> None:
    """Let recordings know of something that no op computes."""
    _record(what, None, "forward", "composed", why)


def _warn_once(message: str, reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        said.warn(message, FallbackWarning)


# Constants to the compiler: they run while it traces, so that a warning breaks no graph. This is
# all that torch.compiler.assume_constant_result does, but that loads the compiler for a second.
for _said in (record_composed, _warn_once):
    vars(_said)["_dynamo_marked_constant"] = True
