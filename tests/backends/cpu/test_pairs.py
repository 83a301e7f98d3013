"""Products in pairs of bfloat16 (vdpbf16ps), which AVX2 does as that instruction would."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch

import fastst
from fastst.backends import cpu
from fastst.backends.cpu import library
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import fuzz
from tests.support.fuzz import ConvLimits, Limits


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


@pytest.fixture
def winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.Launcher, "sums", "winograd_pairs")


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


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1), (3, 3, 3)])
def test_norms_of_positions_and_frames(kernel: tuple[int, int, int]) -> None:
    """Statistics of a norm are those of the positions that make a pair."""
    for norm in ("layer", "group"):
        fixed = dict(kernel=kernel, norm=norm, per_frame=True, past=0, groups=1)
        of_norm = ConvLimits(dtypes=(torch.bfloat16,), fixed=fixed)
        fuzz.fuzz("cpu", 3, of_norm, first=fuzz.SEED + 6000, least=1.0)


@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 3, 1)])
def test_padding_behind_alone(kernel: tuple[int, int, int]) -> None:
    """An axis of one tap has no pairs where its last outputs read padding."""
    behind = tuple(0 if k == 3 else (0, 2) for k in kernel)
    fixed = dict(kernel=kernel, padding=behind, stride=(1, 1, 1), groups=1, causal=False)
    only = ConvLimits(dtypes=(torch.bfloat16,), fixed=fixed)
    fuzz.fuzz("cpu", 3, only, first=fuzz.SEED + 7000, least=1.0)


FITTING = dict(
    kernel=(3, 3, 3), padding=1, dilation=(1, 1, 1), stride=(1, 1, 1), causal=False,
    padding_mode=("zeros", "zeros"),
)  # fmt: skip


def test_winograd(winograd: None) -> None:
    """Transforms are rounded to bfloat16 as well; several blocks, tiles and odd channels."""
    fuzz.fuzz("cpu", 15, limits(**FITTING), first=fuzz.SEED + 4000, least=1.0)
    large = dict(channels=71, mid=130, out=100, size=(3, 15, 14), groups=(1, 1))
    fuzz.fuzz("cpu", 2, limits(10**9, **FITTING, **large), least=1.0)


@pytest.mark.parametrize(("sums", "most"), [("pairs", 1.1), ("winograd_pairs", 2.5)])
def test_error_as_a_whole(sums: str, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all outputs together, which the largest error alone does not tell: beside PyTorch's."""
    monkeypatch.setattr(library.Launcher, "sums", sums)
    torch.manual_seed(0)
    layer = fastst.Conv2Plus1d(32, 48, 3, padding=1, mid_channels=64).bfloat16()
    eager = torch.nn.Sequential(layer.spatial, torch.nn.ReLU(), layer.temporal)
    x = torch.randn(1, 32, 4, 16, 16).bfloat16()
    with torch.no_grad(), fastst.use_backend("cpu"):
        y, own = layer(x).double(), eager(x).double()
        truth = eager.double()(x.double())
    assert (y - truth).norm() <= most * (own - truth).norm()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e37])
def test_what_is_no_number_is_where_it_would_be_without_winograd(
    bad: float, winograd: None
) -> None:
    torch.manual_seed(4)
    x, weight = torch.randn(1, 40, 3, 9, 8).bfloat16(), torch.randn(50, 40, 1, 3, 3).bfloat16()
    x[0, 3, 1, 4, 4] = bad
    tensors = PairTensors(x, weight, torch.empty(1, 50, 1, 1, 1, dtype=torch.bfloat16))
    problem = Problem.of(tensors, PairSpec(padding=(0, 0, 1, 1, 1, 1)))
    call, u = library.Launcher(problem), library.rows(problem).permute(0, 4, 1, 2, 3)
    assert not call.tap_conv(call.plain(x), weight, problem.passes[0], u, call.epilogue())
    truth = torch.nn.functional.conv3d(x.float(), weight.float(), padding=(0, 1, 1)).bfloat16()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(u[:, :50]), kind(truth))


@pytest.mark.parametrize("channels", [1, 2, 7, 16])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
def test_channels_are_paired_as_weights_are(channels: int, memory: torch.memory_format) -> None:
    """Whole numbers, whose sums are exact: a channel that met another one's weight would show."""
    torch.manual_seed(channels)
    x = torch.randint(-3, 4, (1, channels, 3, 6, 5)).bfloat16().contiguous(memory_format=memory)
    weight = torch.randint(-3, 4, (9, channels, 1, 3, 3)).bfloat16()
    weight = weight.contiguous(memory_format=memory)
    tensors = PairTensors(x, weight, torch.empty(1, 9, 1, 1, 1, dtype=torch.bfloat16))
    problem = Problem.of(tensors, PairSpec(padding=(0, 0, 1, 1, 1, 1)))
    call, u = library.Launcher(problem), library.rows(problem).permute(0, 4, 1, 2, 3)
    call.tap_conv(call.plain(x), weight, problem.passes[0], u, call.epilogue())
    truth = torch.nn.functional.conv3d(x.double(), weight.double(), padding=(0, 1, 1))
    assert torch.equal(u[:, :9].double(), truth.bfloat16().double())
    assert not u[:, 9:].any()
