"""What is kept on disk holds for the kernels that it was measured or checked with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastst
from fastst.machine import cache, devices
from tests.support.standin import StandIn

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


def test_keys_name_the_triton_that_is_imported_and_its_assembler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever package it came in, and a ptxas that is set by hand by what it is."""
    module, ptxas = tmp_path / "triton.py", tmp_path / "ptxas"
    module.write_text("__version__ = '3.9.1+git'\n")
    monkeypatch.setattr(
        cache.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=str(module))
    )
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(ptxas))
    keys = set()
    for text in ("one", "another"):
        ptxas.write_text(text)
        keys.add(cache.versions.__wrapped__())
    assert len(keys) == 2
    assert all(f"triton 3.9.1+git TRITON_PTXAS_PATH {ptxas} " in key for key in keys)


@pytest.mark.parametrize(
    ("told", "driver"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Wed Jan 22\nGCC version:",
         "driver 13000 570.86.10 cudnn"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build",
         "driver 13000 580.65.06 cudnn"),
        (None, "driver 13000 cudnn"),
    ],
)  # fmt: skip
def test_keys_name_the_driver(
    told: str | None, driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    StandIn(monkeypatch)
    monkeypatch.setattr(devices, "_MODULE", tmp_path / "version")
    if told is not None:
        (tmp_path / "version").write_text(told)
    assert driver in cache.machine.__wrapped__(torch.device("cuda", 0))


@pytest.mark.parametrize("broken", ["{", "[" * 100_000, "[1]", "\0"])
def test_a_broken_file_is_no_file(broken: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text(broken)
    with pytest.warns(UserWarning, match="fastst ignores the cache"):
        assert cache.read(tmp_path / "file.json") == {}
