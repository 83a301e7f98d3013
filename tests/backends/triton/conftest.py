"""Fixtures of the tests of the Triton backend."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastst.backends import triton as backend


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Names of the kernels that ran."""
    names: Counter[str] = Counter()
    launch = backend.launch.run

    def counted(kernel: Any, *args: Any, **meta: Any) -> None:
        names[kernel.__name__] += 1
        launch(kernel, *args, **meta)

    monkeypatch.setattr(backend.launch, "run", counted)
    return names


@pytest.fixture
def mutated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replace text in the kernels' source, for the time of the test."""
    kernels = pytest.importorskip("fastst.backends.triton.kernels")
    names = [p.stem for p in Path(kernels.__path__[0]).glob("[a-z]*.py")]

    def mutate(module: str, old: str, new: str) -> None:
        package = tmp_path / "mutant"
        package.mkdir()
        (package / "__init__.py").touch()
        for name in names:
            text = Path(
                importlib.import_module(f"fastst.backends.triton.kernels.{name}").__file__ or ""
            ).read_text()
            if name == module:
                assert old in text, f"{module} no longer contains {old!r}"
                text = text.replace(old, new)
            (package / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        modules: dict[str, ModuleType] = {n: importlib.import_module(f"mutant.{n}") for n in names}
        for name, mutant in modules.items():
            monkeypatch.setattr(kernels, name, mutant)

    yield mutate
    for name in [n for n in sys.modules if n == "mutant" or n.startswith("mutant.")]:
        del sys.modules[name]
