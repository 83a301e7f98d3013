"""The floors of ``fastst/`` as text: the import contract, and what each folder says of itself.

``python -m tests.support.house`` writes it into CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from tests.support import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def drawn() -> str:
    """One line for a file or folder, the highest floor first; folders with what they hold."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    (floors,) = (c["layers"] for c in contracts if c["type"] == "layers")
    lines = []
    for floor in floors:
        for name in floor.split(" | "):
            lines += _room(ROOT / "fastst" / name.strip("()"))
    return "\n".join(lines)


def _room(path: Path) -> list[str]:
    if not path.is_dir():
        return [f"    {path.name + '.py':<16}{_says(path.with_suffix('.py'))}"]
    inside = sorted(
        p.name + "/" * p.is_dir()
        for p in path.iterdir()
        if p.name != "__init__.py" and (p.suffix == ".py" or (p / "__init__.py").exists())
    )
    return [
        f"    {path.name + '/':<16}{_says(path / '__init__.py')}",
        *_wrapped(" ".join(inside), 20),
    ]


def _says(file: Path) -> str:
    text = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0]
    return " ".join(text.replace("``", "").split()).split(": ``")[0].rstrip(".")


def _wrapped(words: str, indent: int) -> list[str]:
    lines, line = [], ""
    for word in words.split():
        if len(line) + len(word) + 1 > 96 - indent:
            lines.append(line)
            line = ""
        line += f"{word} "
    return [" " * indent + done.rstrip() for done in (*lines, line)]


def with_house(page: str) -> str:
    """The page with what is drawn now between its markers."""
    before, _, rest = page.partition("<!-- house -->\n")
    _, _, after = rest.partition("<!-- /house -->\n")
    return f"{before}<!-- house -->\n\n{drawn()}\n\n<!-- /house -->\n{after}"


if __name__ == "__main__":
    contributing = ROOT / "CONTRIBUTING.md"
    contributing.write_text(with_house(contributing.read_text()))
