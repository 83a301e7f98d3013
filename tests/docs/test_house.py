"""The picture of the house in CONTRIBUTING is that of the code."""

from __future__ import annotations

import re
from pathlib import Path

from fastst.backends.cuda.hopper import instances
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


def _sources() -> list[Path]:
    endings = (".py", ".h", ".cpp", ".cu", ".cuh")
    return [p for d in ("fastst", "csrc") for p in (ROOT / d).rglob("*") if p.suffix in endings]


def test_an_activation_is_named_in_three_files_and_in_the_docstring() -> None:
    """As the recipe of CONTRIBUTING says: one that no kernel treats in a way of its own."""
    naming = {p for p in _sources() if re.search(r"\bhardswish\b", p.read_text())}
    assert {p.relative_to(ROOT).as_posix() for p in naming} == {
        "csrc/common/activations.h",
        "fastst/backends/triton/kernels/common.py",
        "fastst/functional.py",
        "fastst/problem/activations.py",
    }


def test_a_hopper_tile_is_named_in_one_file() -> None:
    """As the recipe of CONTRIBUTING says: Python, C++ and what is compiled read the same list."""
    tiles = (*instances.SPATIAL, *instances.TEMPORAL, *instances.TEMPORAL_GRADIENT)
    numbers = "|".join(", ".join(map(str, tile)) for tile in tiles)
    listed = re.compile(rf"[({{]({numbers})[)}}]")
    sources = [p for p in _sources() if listed.search(p.read_text())]
    assert [p.relative_to(ROOT).as_posix() for p in sources] == [
        "fastst/backends/cuda/hopper/instances.py"
    ]
    for tile in tiles:
        assert "{" + ", ".join(map(str, tile)) + "}" in instances.header()
