"""Every environment variable that the library reads.

Each is read where it counts, at every call, except ``FASTST_BACKEND``, which is read at import.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple


class Variable(NamedTuple):
    """One variable, as ``python -m fastst.info`` and the documentation list it."""

    name: str
    default: str  # what holds where it is not set
    meaning: str


VARIABLES = (
    Variable("FASTST_BACKEND", "auto", "the backend that calls ask for, as use_backend"),
    Variable("FASTST_STRICT", "0", "1: falling back to something slow is an error"),
    Variable("FASTST_RECOMPUTE", "", "1 or 0: whether pairs keep only x for backward"),
    Variable("FASTST_CACHE", "", "folder of what was measured and checked here"),
    Variable("FASTST_CHECK_SECONDS", "60", "seconds that one example of a kernel's check may take"),
    Variable("FASTST_CUDA_EMULATE", "0", "1: run the CUDA kernels on the host, from a checkout"),
)
_DEFAULTS = {v.name: v.default for v in VARIABLES}


_SWITCHES = {
    "1": True, "true": True, "yes": True, "on": True,
    "": False, "0": False, "false": False, "no": False, "off": False,
}  # fmt: skip


def value(name: str) -> str:
    """What a variable of ``VARIABLES`` says; empty is not set.

    Raises:
        KeyError: no such variable.
    """
    return os.environ.get(name) or _DEFAULTS[name]


def flag(name: str) -> bool:
    """Whether a variable that is 1 or 0 is 1.

    Raises:
        ValueError: it is something else.
    """
    on = _SWITCHES.get(value(name).strip().lower())
    if on is None:
        raise ValueError(f"{name} must be 1 or 0, got {value(name)!r}")
    return on


def number(name: str) -> float:
    """What a variable says that is a positive number.

    Raises:
        ValueError: it is none.
    """
    with suppress(ValueError):
        if (found := float(value(name))) > 0:
            return found
    raise ValueError(f"{name} must be a positive number, got {value(name)!r}")
