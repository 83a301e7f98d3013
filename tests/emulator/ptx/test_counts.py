"""What the notes and tables say of executed kernels: what the runs have written."""

from __future__ import annotations

from pathlib import Path

from benchmarks import executed

NOTES = Path(__file__).parents[3] / "docs/design/performance.md"


def test_the_notes_have_the_table() -> None:
    """Written by python -m benchmarks.executed."""
    told = NOTES.read_text().split("<!-- executed:begin -->")[1].split("<!-- executed:end -->")[0]
    assert told.strip() == executed.block()
