"""Fixtures and report lines shared by all tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, by fastst even

import fastst
from fastst.backends.cuda import library
from fastst.backends.triton import launch
from fastst.machine import choices, gpu
from tests.support import fuzz, interpreter
from tests.support.ranks import Ranks


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tests run side by side
    # What was tuned or checked on this machine must not change which way the tests take.
    cache = tempfile.TemporaryDirectory(prefix="fastst-tests-")
    config.add_cleanup(cache.cleanup)
    os.environ["FASTST_CACHE"] = cache.name


def pytest_report_header() -> str:
    return f"fastst tests: FASTST_SEED={fuzz.SEED}, torch {torch.__version__}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="the first case of each test, and none marked slow"
    )
    parser.addoption("--thorough", action="store_true", help="those marked thorough, too")


def _leave_out(config: pytest.Config, items: list[pytest.Item], left: set[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[i for i in items if i in left])
    items[:] = [i for i in items if i not in left]


def _turn(item: pytest.Item) -> int:
    """Long tests begin first; those that need the pool of ranks follow each other in one worker."""
    return 0 if "long" in item.keywords else 2 - ("ranks" in getattr(item, "fixturenames", ()))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("thorough"):
        _leave_out(config, items, {i for i in items if "thorough" in i.keywords})
    if config.getoption("quick"):
        first: dict[str, pytest.Item] = {}
        for item in items:
            # The emulator compiles for minutes where it has not been used before.
            if "slow" not in item.keywords and "emulated" not in getattr(item, "fixturenames", ()):
                first.setdefault(item.nodeid.partition("[")[0], item)
        _leave_out(config, items, set(items) - set(first.values()))
    items.sort(key=_turn)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The native CUDA library, compiled for the host, in the place of the real one."""
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("FASTST_CUDA_EMULATE", "1")
    return library.library()


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter() -> None:
    if launch.is_interpreted():
        interpreter.quicken()


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tiles: the interpreter pays by the program, not by the element."""
    if launch.is_interpreted():
        monkeypatch.setattr(gpu, "processors", lambda capability: 1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same seed, untuned, and leaves the backend as it found it."""
    torch.manual_seed(fuzz.SEED)
    choices.cache_file().unlink(missing_ok=True)
    choices.forget()
    fastst.dispatch.selection._warned.clear()  # what another test was told is said again
    before = fastst.dispatch.requested_backend()
    yield
    fastst.use_backend(before)
