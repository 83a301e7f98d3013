"""Compiled kernels, executed, in processes of their own: what they compute, and what is counted.

On one core Triton's take a minute, most of it to compile them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator.ptx import EXECUTED
from tests.emulator.ptx.counts import TABLE

pytestmark = pytest.mark.slow
COMPILERS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(importlib.util.find_spec(needed) is None, reason=f"no {needed}"),
    )
    for name, needed in (("triton", "triton"), ("cuda", "fastst._C"))
]
# Faults that must be seen; the others by argument.
PLANTED = {
    "triton": (
        "no proxy fence", "no wgmma fence", "products not waited for", "operands exchanged",
    ),
    "cuda": (
        "no wgmma fence", "operand written behind the fence", "operand written in flight",
        "operands off by one", "no proxy fence", "stage released early",
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ptx")


def executed(cache: Path, module: str, *args: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"FASTST_PTX_CACHE": str(cache), "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, "-m", f"tests.emulator.ptx.{module}", *args],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.long
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_kernels_are_right_and_do_what_the_table_says(
    compiler: str, cache: Path, tmp_path: Path
) -> None:
    """A change of the kernels shows what it did to bytes, sectors, banks and instructions; faults
    that are planted in them are seen."""
    count = ("--count", str(tmp_path / "table"))
    plants = (word for plant in PLANTED[compiler] for word in ("--plant", plant))
    executed(cache, compiler, *EXECUTED[compiler], *count, *plants)
    ((version, found),) = json.loads((tmp_path / "table").read_text()).items()
    told = json.loads(TABLE.read_text()).get(version, {})
    assert {case: found[case] for case in told} == told


@pytest.mark.thorough
@pytest.mark.parametrize("compiler", COMPILERS[:1])
def test_random_kernels_are_right(compiler: str, cache: Path) -> None:
    """Each compiles a dozen of its own."""
    executed(cache, compiler, "--fuzz", "1")


@pytest.mark.parametrize("compiler", COMPILERS[:1])
def test_registers_overwritten_in_flight(compiler: str, cache: Path) -> None:
    """What Triton 3.7.1 makes of a product with an operand in registers, and of the cure."""
    import triton

    plain, cured = executed(cache, "hazard").splitlines()
    if triton.__version__.startswith(("3.6", "3.7")):
        assert "a wgmma under way will read" in plain
    assert cured == "cured: error 3e-06"
