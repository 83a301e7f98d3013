"""Lines that only a GPU reaches, run with a stand-in for ``torch.cuda``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastst import check, info
from fastst.backends import triton
from fastst.backends.contract import Phase
from fastst.backends.cuda import examples
from fastst.backends.triton import launch, rehearsal
from fastst.dispatch import quarantine, selfcheck
from fastst.machine import cache, devices
from fastst.problem.examples import of_kind
from fastst.problem.spec import Problem
from tests.support.standin import StandIn

GPUS = [torch.device("cuda", i) for i in range(3)]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    monkeypatch.setenv("FASTST_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTST_CUDA_EMULATE", raising=False)
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(selfcheck, "_postponed", {})
    for cached in (cache.machine, devices.capability, devices.processors):
        cached.cache_clear()
    yield StandIn(monkeypatch)
    for cached in (cache.machine, devices.capability, devices.processors):
        cached.cache_clear()


def on(device: torch.device) -> Problem:
    spec, tensors = of_kind("dense", torch.float16)
    return replace(Problem.of(tensors, spec), device=device)


def test_one_check_serves_all_gpus_of_a_model(
    gpus: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(quarantine, "ask", lambda r: asked.append(r.device) or "")
    for device in GPUS:
        assert selfcheck.why_broken(triton.BACKEND, on(device), "forward") is None
    assert asked == [GPUS[0], GPUS[2]]
    assert "H200 driver 13000" in cache.machine(GPUS[1])
    count = len(set(triton.BACKEND.instances(on(GPUS[0]), "forward", None)))
    other = len(set(triton.BACKEND.instances(on(GPUS[2]), "forward", None)))
    assert selfcheck.count_verdicts() == {"triton": {"passed": count + other}}


def test_a_capture_reads_the_disk_and_checks_nothing(
    gpus: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "ask", lambda request: pytest.fail("checked"))
    gpus.capturing = True
    why = selfcheck.why_broken(triton.BACKEND, on(GPUS[0]), "forward")
    assert why == "has not been checked before this graph capture"
    names = tuple(triton.BACKEND.instances(on(GPUS[0]), "forward", None))
    keys = selfcheck._keys("triton", names, GPUS[0], torch.float16, False)
    for verdict in ("", "is off by 1"):
        selfcheck.forget()
        found = {keys.together: verdict} if verdict else dict.fromkeys(keys.each, "")
        cache.add(selfcheck._file(), found)  # by another process
        found = selfcheck.why_broken(triton.BACKEND, on(GPUS[0]), "forward")
        assert found == (verdict or None)


def test_the_command_takes_a_gpu_of_each_model(gpus: StandIn) -> None:
    assert check.gpus() == [GPUS[2], GPUS[0]]
    assert "hopper" in examples.kinds(GPUS[0], torch.bfloat16)
    assert "hopper" not in examples.kinds(GPUS[2], torch.bfloat16)
    assert launch.capability(GPUS[2]) == (8, 0)
    assert "dense backward" in rehearsal.kinds(GPUS[2], torch.bfloat16)
    assert "cuda:2: NVIDIA A100" in "\n".join(info._devices())


@pytest.mark.parametrize("batch", [1, 7, 16, 5000])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_rehearsals_on_a_gpu_fill_several_waves(gpus: StandIn, batch: int, phase: Phase) -> None:
    """And run what the call would run."""
    spec, tensors = of_kind("dense", torch.float16)
    x = torch.empty(batch, 18, 16, 56, 56, dtype=torch.float16, device="meta")
    x = x.contiguous(memory_format=torch.channels_last_3d)
    problem = replace(Problem.of(tensors._replace(x=x), spec), device=GPUS[0])
    needed = set(triton.BACKEND.instances(problem, phase, None))
    found = [e.make() for e in rehearsal.rehearse(problem, phase)]
    assert needed <= {name for e in found for name in e.instances}
    for e in found:
        n, _, *size = e.tensors.x.shape
        assert min(9 << 14, math.prod((batch, 16, 56, 56))) / 1.5 < n * math.prod(size) < 200_000
