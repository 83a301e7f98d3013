"""Every variable of the environment in one place, and in the documentation."""

from __future__ import annotations

import re

import pytest

from fastst import info
from fastst.machine import settings
from tests.support import ROOT

NAMES = {v.name for v in settings.VARIABLES}


def test_no_module_reads_the_environment_of_the_library_itself() -> None:
    for file in (ROOT / "fastst").rglob("*.py"):
        if file.name not in ("settings.py", "info.py"):
            found = re.findall(r"os\.(?:environ|getenv)[^\n]*FASTST_\w+", file.read_text())
            assert not found, file


def test_names_that_are_asked_for_exist() -> None:
    for file in (ROOT / "fastst").rglob("*.py"):
        asked = re.findall(r"settings\.(?:value|flag)\(\"(\w+)\"\)", file.read_text())
        assert set(asked) <= NAMES, file
    with pytest.raises(KeyError):
        settings.value("FASTST_STRIKT")


def test_documented_and_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    documented = (ROOT / "docs" / "environment.md").read_text()
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        assert f"`{name}`" in documented
    text = info.report()
    assert all(name in text for name in NAMES)


def test_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, means in (("", False), ("0", False), ("1", True), ("yes", True)):
        monkeypatch.setenv("FASTST_STRICT", said)
        assert settings.flag("FASTST_STRICT") is means
    monkeypatch.delenv("FASTST_STRICT")
    assert settings.value("FASTST_STRICT") == "0"
