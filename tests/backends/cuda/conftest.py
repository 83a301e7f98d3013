"""Fixtures of the tests of the CUDA backend."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastst.backends.cuda import library
from tests.support import planted
from tests.support.planted import Plant


@pytest.fixture
def plant(emulated: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts a bug into the emulated library, as ``planted.library`` describes, for one test.

    A Hopper kernel has few tiles.
    """

    def put(file: str, right: str = "", wrong: str = "", **options: Any) -> ModuleType:
        planted.few_tiles(monkeypatch, file)
        found = planted.library(tmp_path, file, right, wrong, **options)
        monkeypatch.setattr(library, "load_emulated", lambda: found)
        return found

    return put
