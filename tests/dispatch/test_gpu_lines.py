"""Lines that only a GPU reaches, run with a stand-in for ``torch.cuda``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastst import check, info
from fastst.backends import triton
from fastst.backends.cuda import examples
from fastst.backends.triton import launch, rehearsal
from fastst.dispatch import quarantine, selfcheck
from fastst.machine import cache
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
    for cached in (cache.machine, launch.capability):
        cached.cache_clear()
    yield StandIn(monkeypatch)
    for cached in (cache.machine, launch.capability):
        cached.cache_clear()


def on(device: torch.device) -> Problem:
    spec, tensors = of_kind("dense", torch.float16)
    return replace(Problem.of(tensors, spec), device=device)


def test_one_check_serves_all_gpus_of_a_model(
    gpus: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(quarantine, "checked", lambda r: asked.append(r.device) or "")
    for device in GPUS:
        assert selfcheck.why_broken(triton.BACKEND, on(device), "dense forward") is None
    assert asked == [GPUS[0], GPUS[2]]
    assert "H200 driver 13000" in cache.machine(GPUS[1])
    assert selfcheck.seen() == {"triton": {"passed": 2}}


def test_a_capture_reads_the_disk_and_checks_nothing(
    gpus: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "checked", lambda request: pytest.fail("checked"))
    gpus.capturing = True
    why = selfcheck.why_broken(triton.BACKEND, on(GPUS[0]), "dense forward")
    assert why == "has not been checked before this graph capture"
    key = selfcheck._key("triton", "dense forward", GPUS[0], torch.float16)
    for verdict in ("", "is off by 1"):
        selfcheck.forget()
        cache.add(selfcheck._file(), {key: verdict})  # by another process
        found = selfcheck.why_broken(triton.BACKEND, on(GPUS[0]), "dense forward")
        assert found == (verdict or None)


def test_the_command_takes_a_gpu_of_each_model(gpus: StandIn) -> None:
    assert check.devices() == [GPUS[2], GPUS[0]]
    assert "hopper" in examples.kinds(GPUS[0], torch.bfloat16)
    assert "hopper" not in examples.kinds(GPUS[2], torch.bfloat16)
    assert launch.capability(GPUS[2]) == (8, 0)
    assert "dense backward" in rehearsal.kinds(GPUS[2], torch.bfloat16)
    assert "cuda:2: NVIDIA A100" in "\n".join(info._devices())


@pytest.mark.parametrize("batch", [1, 2, 7, 16, 17, 32, 5000])
def test_rehearsals_on_a_gpu_fill_several_waves(gpus: StandIn, batch: int) -> None:
    problem = replace(on(GPUS[0]), batch=batch, size=(16, 56, 56))
    clips = rehearsal._clips(problem, (3, 8, 8))
    assert 1 <= clips <= batch
    assert (clips % 16 == 0) == (batch % 16 == 0)  # as the compiler sees it
    assert (clips == 1) == (batch == 1)
    assert clips == batch or clips * 3 * 8 * 8 > 120_000
