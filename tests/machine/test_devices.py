"""GPUs are known in one place: who opens another type of them has one to look at."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fastst
from fastst.machine import devices
from tests.support.standin import StandIn

PACKAGE = Path(fastst.__file__).parent
# A type of GPU compared or made, and anything of its runtime.
KNOWS = re.compile(
    r"""torch\.(cuda|xpu|hip)\b|version\.hip|(==|!=|\bin\b|device\()\s*\(?"cuda"|\.is_cuda"""
)


def lines_that_know(text: str) -> list[str]:
    code = re.sub(r'(?s)""".*?"""', "", text)
    return [line.strip() for line in code.splitlines() if KNOWS.search(line.split("#")[0])]


def test_one_module_knows_types_of_gpus() -> None:
    mine = (PACKAGE / "machine/devices.py", PACKAGE / "backends/cuda")  # NVIDIA's alone
    for path in PACKAGE.rglob("*.py"):
        if not any(path.is_relative_to(m) for m in mine):
            assert not lines_that_know(path.read_text()), path


@pytest.mark.parametrize(
    "line",
    [
        'if x.device.type == "cuda":', 'device.type not in ("cuda", "cpu")',
        "torch.cuda.synchronize()", 'torch.device("cuda", 1)', "torch.version.hip is None",
    ],
)  # fmt: skip
def test_a_planted_line_is_seen(line: str) -> None:
    assert lines_that_know(line)
    assert not lines_that_know('AUTO = ("cuda", "triton")')


def test_what_is_asked_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, first = StandIn(monkeypatch), torch.device("cuda", 0)
    assert [d.index for d in devices.present()] == [0, 1, 2]
    assert devices.kind(first) == "gpu" and devices.kind(torch.device("cpu")) == "cpu"
    assert "multiprocessors" in devices.describe(first)
    with devices.guard(torch.device("cuda", 2)):
        assert gpus.current == 2
    with devices.guard(torch.device("cpu")):
        assert gpus.current == 0
    devices.wait_for(first)
    devices.wait_for(torch.device("cpu"))
    assert gpus.synchronized == [0]
