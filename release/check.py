"""Whether everything agrees with the tag of a release: ``python release/check.py v0.1.0``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What keeps this tag from being released; empty if nothing does."""

    def read(name: str) -> str:
        return (root / name).read_text(encoding="utf-8")

    found = []
    if not re.fullmatch(r"v\d+\.\d+\.\d+((a|b|rc)\d+)?", tag):
        found.append(f"a tag must look like v1.2.3 or v1.2.3rc1, got {tag!r}")
    version = tag.removeprefix("v")
    if f'__version__ = "{version}"' not in read("fastst/__init__.py"):
        found.append(f'fastst/__init__.py must have __version__ = "{version}"')
    changes = read("CHANGELOG.md")
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changes, re.M):
        found.append(f'CHANGELOG.md must have "## {version} (YYYY-MM-DD)"')
    unreleased = re.search(r"^## Unreleased\n(.*?)(?=^## |\Z)", changes, re.M | re.S)
    if unreleased and unreleased[1].strip():
        found.append(f"CHANGELOG.md: what stands under Unreleased belongs to {version}")
    if f"\nversion: {version}\n" not in read("CITATION.cff"):
        found.append(f"CITATION.cff must have version: {version}")
    for name in ("pyproject.toml", "mkdocs.yml"):
        if "fastst.example" in read(name):
            found.append(f"{name} has the placeholder fastst.example, not real addresses")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python release/check.py TAG")
    if told := problems(sys.argv[1]):
        sys.exit("\n".join(told))
