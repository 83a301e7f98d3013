"""Fixtures of the tests of the Triton backend."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from fastst.backends import triton as backend
from fastst.machine import gpu
from tests.support.triton import DEVICE


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> Iterator[None]:
    """The interpreter without what it does again and again, or for nothing: half of its time.

    Its functions are put into Triton's language for each launch and for each call of a device
    function: here once. Every sum of integers is computed a second time, in 64 bits, to be compared
    by an assertion that only runs in debug mode.
    """
    if DEVICE == "cuda":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing = SimpleNamespace(restore=lambda: None)
    builder = interpreter.interpreter_builder
    with (
        mock.patch.object(interpreter, "_patch_lang", lambda fn: nothing),
        mock.patch.object(builder, "options", replace(builder.options, sanitize_overflow=False)),
    ):
        yield


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles: the interpreter pays by the program, not by the element."""
    if DEVICE == "cpu":
        assert backend.launch.interpreted()
        monkeypatch.setattr(gpu, "processors", lambda capability: 1)


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
