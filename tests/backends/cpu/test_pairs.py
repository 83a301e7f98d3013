"""Products in pairs of bfloat16 (vdpbf16ps), which AVX2 does as that instruction would."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fastst.backends import cpu
from fastst.backends.cpu import library
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import fuzz
from tests.support.fuzz import Limits


def why_not() -> str | None:
    native = cpu.load()
    if isinstance(native, str):
        return None if os.environ.get("FASTST_BUILD_CPU") == "1" else f"the backend {native}"
    if native.__name__.endswith("avx512") and not native.multiplies_pairs():
        return "the AVX-512 library has the instruction itself, this processor has no AVX512_BF16"
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(autouse=True)
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.Launcher, "sums", "pairs")


def limits(work: int = 4_000_000, **fixed: Any) -> Limits:
    usual = dict(op="conv2plus1d", branch_activation="none")
    return Limits(dtypes=(torch.bfloat16,), work=work, fixed=usual | fixed)


def test_forward() -> None:
    fuzz.fuzz("cpu", 40, limits(), first=fuzz.SEED + 2000, backward=False, least=1.0)


def test_forward_and_backward() -> None:
    zeros = limits(padding_mode=("zeros", "zeros"))
    fuzz.fuzz("cpu", 20, zeros, first=fuzz.SEED + 3000, least=1.0)


@pytest.mark.parametrize("channels", [5, 70])
def test_odd_and_many_channels(channels: int) -> None:
    fixed = dict(channels=channels, mid=131, out=100, size=(2, 5, 6), groups=(1, 1))
    fuzz.fuzz("cpu", 3, limits(60_000_000, **fixed), backward=False, least=1.0)


@pytest.mark.parametrize("channels", [1, 2, 7, 16])
def test_channels_are_paired_as_weights_are(channels: int) -> None:
    """Whole numbers, whose sums are exact: a channel that met another one's weight would show."""
    torch.manual_seed(channels)
    x = torch.randint(-3, 4, (1, channels, 3, 6, 5)).bfloat16()
    weight = torch.randint(-3, 4, (9, channels, 1, 3, 3)).bfloat16()
    tensors = PairTensors(x, weight, torch.empty(1, 9, 1, 1, 1, dtype=torch.bfloat16))
    problem = Problem.of(tensors, PairSpec(padding=(0, 0, 1, 1, 1, 1)))
    call, u = library.Launcher(problem), library.rows(problem).permute(0, 4, 1, 2, 3)
    call.tap_conv(call.plain(x), weight, problem.passes[0], u, call.epilogue())
    truth = torch.nn.functional.conv3d(x.double(), weight.double(), padding=(0, 1, 1))
    assert torch.equal(u[:, :9].double(), truth.bfloat16().double())
    assert not u[:, 9:].any()
