"""The picture of the house in CONTRIBUTING is that of the code."""

from __future__ import annotations

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
