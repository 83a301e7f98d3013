"""What the installation wrote down reaches those who miss it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastst
from fastst import info
from fastst.backends.cpu import library
from fastst.dispatch import selection
from fastst.machine import left_out
from tests.support import hide_native_libraries

WHY = "the build of fastst._cpu_avx2 failed: error: unrecognized option"


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the package seems to lie, in an installation without native libraries."""
    monkeypatch.setattr(left_out, "__file__", str(tmp_path / "machine" / "left_out.py"))
    hide_native_libraries(monkeypatch)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(selection, "_warned", set())
    left_out.reasons.cache_clear()
    library.load.cache_clear()
    yield tmp_path / "_left_out.json"
    left_out.reasons.cache_clear()
    library.load.cache_clear()


def test_the_reason_is_told_where_the_library_is_missed(record: Path) -> None:
    record.write_text(f'{{"_cpu_avx2": "{WHY}", "_C": "nvcc was not found"}}')
    layer, x = fastst.Conv2Plus1d(2, 2, 3, padding=1), torch.randn(1, 2, 3, 4, 4)
    told = f"fastst._cpu_avx2, which was not built ({WHY}): with a C++ compiler on PATH"
    with pytest.warns(fastst.FallbackWarning) as caught:
        layer(x)
    assert told in str(caught[0].message)
    assert told in fastst.explain(layer, x).reasons["cpu"]
    lines = list(info._native())
    assert any(told in line for line in lines)
    assert any("fastst._C was not built (nvcc was not found)" in line for line in lines)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"another": "reason"}'])
def test_from_a_record_without_a_reason_nothing_is_guessed(record: Path, text: str) -> None:
    record.write_text(text)
    assert left_out.why_not_built("_C") == "was not built"


def test_sources_that_hide_an_installation_are_named(record: Path) -> None:
    """As after ``pip install .``, where Python is started in the checkout."""
    told = left_out.why_not_built("_C")
    assert f"({record.parent} holds sources that are not installed: start Python elsewhere)" in told
