"""The picture of the house in CONTRIBUTING is that of the code."""

from __future__ import annotations

import re

from tests.support import ROOT
from tests.support.house import drawn, with_house


def test_the_picture_is_up_to_date() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert page == with_house(page), "python -m tests.support.house draws it again"


def test_every_floor_is_drawn() -> None:
    text = drawn()
    assert max(map(len, text.splitlines())) <= 100
    for path in (ROOT / "fastst").iterdir():
        if (path / "__init__.py").exists():
            assert f"    {path.name}/" in text


def test_an_activation_is_named_in_three_files_and_in_the_docstring() -> None:
    """As the recipe of CONTRIBUTING says: one that no kernel treats in a way of its own."""
    endings = (".py", ".h", ".cpp", ".cu", ".cuh")
    sources = [p for d in ("fastst", "csrc") for p in (ROOT / d).rglob("*") if p.suffix in endings]
    naming = {p for p in sources if re.search(r"\bhardswish\b", p.read_text())}
    assert {p.relative_to(ROOT).as_posix() for p in naming} == {
        "csrc/common/activations.h",
        "fastst/backends/triton/kernels/common.py",
        "fastst/functional.py",
        "fastst/problem/activations.py",
    }
