"""Which native libraries the installation left out, and why: what setup.py wrote down."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path


def _record() -> Path:
    return Path(__file__).parents[1] / "_left_out.json"


@cache
def reasons() -> dict[str, str]:
    """By name of the library; empty where nothing was left out or nobody wrote it down."""
    try:
        found = json.loads(_record().read_text())
        return {str(name): str(why) for name, why in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def why_not_built(name: str) -> str:
    """That a library was not built and, where it is known, why.

    Every installation writes its record. Where there is none, Python has found the sources before
    the package that was installed, as it does in the folder of a checkout.
    """
    why = reasons().get(name)
    if not _record().exists():
        why = f"{_record().parent} holds sources that are not installed: start Python elsewhere"
    return "was not built" + (f" ({why})" if why else "")
