"""The emulator does what CUDA does on cases worked out by hand, and finds what CUDA does not."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent / "emulator"


@pytest.fixture(scope="session")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulator_build", HERE / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cases(build: ModuleType) -> Path:
    return build.program(HERE / "cases.cpp")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("barrier", ["10 20 30 40 ... 320"]),
        ("missing barrier", ["race: write of 4 bytes", "and a read by thread"]),
        ("overwrite", ["race: write of 4 bytes", "and a read by thread"]),
        ("warp", ["1 0 3 2 ... 30"]),
        ("across warps", ["race: read of 4 bytes", "and a write by thread"]),
        ("shuffle", ["496 496 496 496 ... 496"]),
        ("unwritten", ["thread (5, 0, 0)", "4 bytes at byte 20", "nobody has written"]),
        ("global bounds", ["thread (127, 0, 0)", "1 elements at 128 of a tensor that spans 128"]),
        ("shared bounds", ["thread (63, 0, 0)", "out of bounds: 4 bytes at byte 256"]),
        ("misaligned", ["misaligned: global access of 16 bytes"]),
        ("divergent", ["divergent barrier", "cases.cpp"]),
        ("early exit", ["deadlock; 32 threads have finished", "32 threads (32 to 63) wait for"]),
        ("named", ["32 33 34 35 ... 63"]),
        (
            "named deadlock",
            ["deadlock; 1 threads have finished", "63 threads (0 to 62) wait for named barrier 3"],
        ),
        ("mbarrier", ["0 6 6 6 ... 0"]),
        ("mbarrier deadlock", ["deadlock", "1 threads (0 to 0) wait for parity 0 of the mbarrier"]),
        ("copy", ["0 108 112 100 ... 0"]),
        ("copy without wait", ["with an asynchronous copy under way"]),
        ("copy without barrier", ["4 bytes at byte 16", "nobody has written"]),
        ("copy misaligned", ["misaligned: global access of 16 bytes"]),
        ("two copies", ["103 107 0 0 ... 0"]),
        ("too many threads", ["kernel case for a case could not be launched: invalid config"]),
        ("too much shared memory", ["could not be launched: invalid argument"]),
    ],
)
def test_case(cases: Path, name: str, told: list[str]) -> None:
    run = subprocess.run([cases, name], capture_output=True, text=True, timeout=60, check=True)
    for part in told:
        assert part in run.stdout, run.stdout
