"""What the documentation says is executed: snippets, commands, links."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest

import fastst

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#]+)")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def snippets(page: Path) -> list[tuple[int, str]]:
    """First line number and source of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(1)].count("\n"), m[1]) for m in _BLOCK.finditer(text)]


@each_page
def test_snippets_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks of a page, in order, in one namespace; slow paths only where they are shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastst.dispatch, "_warned", set())
    namespace: dict[str, object] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastst.FallbackWarning)
        for line, source in snippets(page):
            code = compile("\n" * line + source, str(page), "exec")
            exec(code, namespace)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    missing = [
        link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()
    ]
    assert not missing


@each_page
def test_commands_exist(page: Path) -> None:
    """Every ``make x`` is a target, every ``python -m fastst.x`` or ``benchmarks.x`` a module."""
    text = page.read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    |^)make ([a-z]+)", text, re.MULTILINE)) <= targets
    for module in set(re.findall(r"python -m ((?:fastst|benchmarks)[\w.]*)", text)):
        assert importlib.util.find_spec(module) is not None, module


def test_readme_shows_the_equivalence_first() -> None:
    """The first screen executes a comparison with two convolutions."""
    first, source = snippets(ROOT / "README.md")[0]
    assert first < 30
    assert "assert_close" in source
