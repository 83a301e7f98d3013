"""What is kept on disk holds for the kernels that it was measured or checked with."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastst
from fastst.machine import cache

PACKAGE = Path(fastst.__file__).parent


def test_entries_are_of_all_kernels_and_of_what_calls_them() -> None:
    """Else a verdict of an older kernel would stand for a newer one."""
    covered = {path.relative_to(PACKAGE).as_posix() for path in cache.sources()}
    kernels = {p.relative_to(PACKAGE).as_posix() for p in (PACKAGE / "backends").rglob("*.py")}
    assert len(kernels) > 40
    assert covered >= kernels | {p.name for p in PACKAGE.glob("_C*")}


def test_another_kernel_makes_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tmp_path / "kernel.py"
    monkeypatch.setattr(cache, "sources", lambda: [kernel])
    keys = set()
    for text in ("one", "another"):
        kernel.write_text(text)
        keys.add(cache.versions.__wrapped__())
    assert len(keys) == 2
