"""On a GPU: every instance of every kernel, each where a fault or a hang ends only itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import instances
from fastst.dispatch import quarantine, selfcheck
from tests.support import ROOT
from tests.support.standin import StandIn

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GPU = torch.device("cuda", 0)
UNITS = list(instances.units(GPU, DTYPES, dry=False)) if torch.cuda.is_available() else []


@pytest.mark.gpu
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.name} {unit.dtype}")
def test_instance(unit: instances.Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTST_CHECK_SECONDS", "60")
    print(unit, flush=True)
    request = quarantine.Request(
        unit.backend, GPU, unit.dtype, False, kind=unit.kind, only=unit.number
    )
    try:
        why = quarantine.ask(request)
    except quarantine.Postponed as reason:
        pytest.skip(str(reason))
    assert selfcheck.state(why) == "passed", why


@pytest.mark.gpu
def test_ten_thousand_steps_beside_a_busy_stream_give_the_same_bits() -> None:
    command = [sys.executable, "-m", "benchmarks.probe", "--stress", "10000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def test_units_are_of_every_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a Hopper GPU would be asked for, listed without one."""
    from fastst.backends import cuda
    from fastst.backends.cuda import depthwise, examples
    from fastst.backends.cuda.hopper import instances, weight_tiles

    StandIn(monkeypatch)
    monkeypatch.setattr(depthwise, "_stages", lambda problem, backward: 2)
    assert [*examples.kinds(GPU, torch.bfloat16)] == [
        "depthwise", "depthwise backward", "hopper", "hopper backward"
    ]  # fmt: skip
    assert [*examples.kinds(GPU, torch.float64)] == []
    make = cuda.BACKEND.examples
    assert make is not None
    names = "\n".join(
        e.name for kind in examples.kinds(GPU, torch.bfloat16)
        for e in make(kind, torch.bfloat16, GPU)
    )  # fmt: skip
    for columns, _, _ in instances.SPATIAL:
        assert f"spatial {columns} columns" in names
    for columns, _, _ in instances.TEMPORAL:
        assert f"temporal {columns} columns" in names
    for columns, _, _ in instances.TEMPORAL_GRADIENT:
        assert f"temporal {columns} columns" in names
    for columns, _ in instances.SPATIAL_GRADIENT:
        assert f"gradients: spatial {columns} columns" in names
    for columns, count in weight_tiles.TILES:
        assert f"weight gradients {columns} × {count}" in names
    assert "clusters of 2" in names
    assert "dense backward of all" in names and "on (16, 8, 28, 28)" in names  # waves
    assert "gradients of depthwise 5 × 5² stride 2" in names
