"""The import contract of pyproject.toml, which ``make lint`` checks; what is imported when."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytest.importorskip("importlinter", reason="import-linter is not installed")

PLANTED = {  # where, what, and the contract that it breaks
    "nothing": ("problem/spec.py", "", None),
    "upward": ("problem/spec.py", "from ..dispatch import tune\n", "A folder imports only"),
    "in a function": (
        "machine/cache.py", "def f():\n    from ..ops import autograd\n", "A folder imports only",
    ),
    "in a circle": ("nn/streaming.py", "from .layers import Conv2Plus1d\n", "No circle"),
    "of another backend": ("backends/aten/onednn.py", "from .. import cpu\n", "A backend knows"),
    "of the tests": ("rewrite/inflate.py", "import tests.support\n", "The library does without"),
    "in a new folder": ("tools/__init__.py", "", "A folder imports only"),
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_import_breaks_the_contract(planted: str, tmp_path: Path) -> None:
    where, line, contract = PLANTED[planted]
    shutil.copytree(ROOT / "fastst", tmp_path / "fastst", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "fastst" / where
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as source:
        source.write(line)
    found = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
        + ["--no-logo", "--no-cache"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert (found.returncode == 0) == (contract is None), found.stdout + found.stderr
    assert contract is None or contract in found.stdout, found.stdout


def test_what_changes_models_is_imported_when_asked_for() -> None:
    code = (
        "import sys, fastst\n"
        "assert not [name for name in sys.modules if name.startswith('fastst.rewrite')]\n"
        "assert {'convert', 'set_memory_budget'} <= {*dir(fastst)}\n"
        "assert fastst.convert is fastst.convert and 'fastst.rewrite.convert' in sys.modules\n"
        "from fastst import *\n"
        "assert inflate.__module__ == 'fastst.rewrite.inflate'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
