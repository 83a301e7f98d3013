"""What the tests share."""

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def hide_native_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an installation without them; what else is asked for stays, as answers are kept."""
    found = importlib.util.find_spec

    def hidden(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name.startswith("fastst._") else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", hidden)
