"""The PTX of the Triton kernels, executed: right, and planted faults seen.

Each is a process of its own (see ``triton``). What does not run here runs by argument.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator.ptx import EXECUTED

pytest.importorskip("triton")
pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
# Written by python -m tests.emulator.ptx.triton --count tests/emulator/ptx/table.json
TABLE = HERE / "table.json"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ptx")


def executed(cache: Path, module: str, *args: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"FASTST_PTX_CACHE": str(cache), "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, "-m", f"tests.emulator.ptx.{module}", *args],
        capture_output=True, text=True, env=environment, cwd=HERE.parents[2],
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize(("arch", "cases"), EXECUTED.items())
def test_compiled_kernels_are_right_and_do_what_the_table_says(
    arch: str, cases: tuple[str, ...], cache: Path, tmp_path: Path
) -> None:
    """A change of the kernels shows what it did to bytes, sectors, banks and instructions."""
    import triton

    only = [word for case in cases for word in ("--only", case)]
    executed(cache, "triton", "--arch", arch, *only, "--count", str(tmp_path / "table"))
    table = json.loads(TABLE.read_text())
    if table["triton"] == triton.__version__:
        found = json.loads((tmp_path / "table").read_text())["rows"]
        assert found == {case: table["rows"][case] for case in found}


def test_planted_faults_are_seen(cache: Path) -> None:
    plants = ("no proxy fence", "no wgmma fence", "products not waited for", "operands exchanged")
    executed(cache, "triton", *(word for plant in plants for word in ("--plant", plant)))


def test_registers_overwritten_in_flight(cache: Path) -> None:
    """What Triton 3.7.1 makes of a product with an operand in registers, and of the cure."""
    import triton

    plain, cured = executed(cache, "hazard").splitlines()
    if triton.__version__.startswith(("3.6", "3.7")):
        assert "a wgmma under way will read" in plain
    assert cured == "cured: error 3e-06"
