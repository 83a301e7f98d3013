"""Every kernel that ships was executed as compilers made it: executed.json has it.

One that is missing was added or renamed since. ``python -m tests.emulator.ptx.cuda --record`` or
``... --instances NAME --record``, and ``python -m tests.emulator.ptx.triton --record``, add what
runs and is right.
"""

from __future__ import annotations

import ast
import importlib.util
import json

import pytest

from emulator.ptx import cuda as machine
from tests.emulator.ptx.driver import RECORD
from tests.static import cuda as static
from tests.support import ROOT

KERNELS = ROOT / "fastst" / "backends" / "triton" / "kernels"


def recorded(compiler: str, capability: str, dtype: str = "") -> set[str]:
    return {
        kernel
        for name, rows in json.loads(RECORD.read_text()).items() if name.startswith(compiler)
        for run, row in rows.items()
        if run.startswith(capability) and row["dtype"].startswith(dtype)
        for kernel in row["kernels"]
    }  # fmt: skip


def kernels_of_triton() -> set[str]:
    """What is launched, and so names the integers that are not to be compiled for."""
    return {
        node.name
        for file in KERNELS.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Call) for d in node.decorator_list)
    }


# Kernels that are not launched as this Triton compiles them (fastst.backends.triton.single).
REFUSED: dict[str, set[str]] = {"8.0": set(), "9.0": {"pair_conv"}}


@pytest.mark.parametrize("capability", REFUSED)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_kernel_of_triton_was_executed(capability: str, dtype: str) -> None:
    shipped = kernels_of_triton()
    assert len(shipped) > 20
    assert shipped - REFUSED[capability] <= recorded("triton", capability, dtype)


@pytest.mark.skipif(importlib.util.find_spec("fastst._C") is None, reason="no fastst._C")
@pytest.mark.parametrize(("capability", "number"), [("8.0", "80"), ("9.0", "90a")])
def test_every_kernel_of_the_cuda_library_was_executed(capability: str, number: str) -> None:
    """Every instance: the dtype is a part of its name."""
    shipped = {*static.names(sorted(machine.kernels(number))).values()}
    assert shipped and shipped <= recorded("nvcc", capability)
