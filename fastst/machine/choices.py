"""What was measured to be the fastest way of computing a problem, kept on disk.

Names are kept in ``$FASTST_CACHE/tuning.json`` (``$XDG_CACHE_HOME/fastst``, ``~/.cache/fastst``),
by machine, versions, threads, backend, phase and problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import torch

from ..problem.spec import Problem
from . import cache

Key = tuple[str, Problem, str, int]  # backend, problem, phase, threads
_chosen: dict[Key, str | None] = {}
_stored: dict[str, str] | None = None  # the file's contents, once it was read
_lock = Lock()


def choice(backend: str, problem: Problem, phase: str) -> str | None:
    """The way that was measured to be the fastest on this machine, or None."""
    if not (_load() if _stored is None else _stored):
        return None
    key = (backend, problem, phase, torch.get_num_threads())
    try:
        return _chosen[key]
    except KeyError:
        _chosen[key] = found = _load().get(_name(key))
        return found


def forget() -> None:
    """Drop what this process knows, not the file: it is read again when it is needed."""
    global _stored
    with _lock:
        _stored = None
        _chosen.clear()


def cache_file() -> Path:
    """Where choices are kept."""
    return cache.folder() / "tuning.json"


def _name(key: Key) -> str:
    """A key as it stands in the file."""
    backend, problem, phase, threads = key
    layout = "channels_last" if problem.channels_last else "contiguous"
    parts: Sequence[object] = (
        cache.machine(problem.device), cache.versions(), threads, backend, phase, problem.op,
        tuple(problem.spec), [tuple(p) for p in problem.passes], problem.batch, problem.size,
        problem.dtype, layout, getattr(problem, "residual", False), getattr(problem, "past", 0),
    )  # fmt: skip
    return " | ".join(map(str, parts))


def _load() -> dict[str, str]:
    """What the file says, read once; nothing if there is none or it is broken."""
    global _stored
    if _stored is not None:
        return _stored
    with _lock:
        if _stored is None:
            _stored = cache.read(cache_file())
        return _stored


def remember(choices: dict[Key, str]) -> None:
    """Use the choices from here on, and add them to the file, which others may have written to."""
    global _stored
    _chosen.update(choices)
    if not choices:
        return
    with _lock:
        _stored = cache.add(cache_file(), {_name(k): way for k, way in choices.items()})
