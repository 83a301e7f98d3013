"""Every variable of the environment in one place, and in the documentation."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from fastst import functional, info
from fastst.dispatch import quarantine
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
    for said, means in (("", False), ("0", False), ("False", False), ("1", True), ("yes", True)):
        monkeypatch.setenv("FASTST_STRICT", said)
        assert settings.flag("FASTST_STRICT") is means
    monkeypatch.setenv("FASTST_STRICT", "2")
    with pytest.raises(ValueError, match="FASTST_STRICT must be 1 or 0, got '2'"):
        settings.flag("FASTST_STRICT")
    monkeypatch.delenv("FASTST_STRICT")
    assert settings.value("FASTST_STRICT") == "0"


def test_a_switch_that_is_neither_on_nor_off_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ws, wt = torch.randn(1, 8, 2, 4, 4), torch.randn(8, 8, 1, 1, 1), torch.randn(8, 8, 1, 1, 1)
    for said, kept in (("no", True), ("on", False)):
        monkeypatch.setenv("FASTST_RECOMPUTE", said)
        norm = functional.BatchNorm(None, None, training=True)
        assert functional.recomputes(None, norm) is not kept
    monkeypatch.setenv("FASTST_RECOMPUTE", "maybe")
    with pytest.raises(ValueError, match="FASTST_RECOMPUTE must be 1 or 0, got 'maybe'"):
        functional.conv2plus1d(x, ws, wt)


def test_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, means in (("", 60.0), ("2.5", 2.5)):
        monkeypatch.setenv("FASTST_CHECK_SECONDS", said)
        assert quarantine.limit_s() == means
    for said in ("a minute", "0", "nan"):
        monkeypatch.setenv("FASTST_CHECK_SECONDS", said)
        with pytest.raises(ValueError, match=f"FASTST_CHECK_SECONDS must be a positive .*'{said}'"):
            quarantine.limit_s()


def test_an_empty_backend_is_none_that_was_asked_for() -> None:
    code = "import fastst; print(fastst.use_backend.value)"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTST_BACKEND": ""}, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == "auto"
