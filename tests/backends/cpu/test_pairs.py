"""Products in pairs of bfloat16, by vdpbf16ps and by AMX; what is not there is done as it would."""

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


@pytest.fixture(autouse=True, params=["pairs", "amx"])
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.Launcher, "sums", request.param)


winograd = pytest.mark.parametrize("sums", ["winograd_pairs"], indirect=True)


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


@winograd
def test_winograd() -> None:
    """Transforms are rounded to bfloat16 as well; several blocks, tiles and odd channels."""
    fuzz.fuzz("cpu", 15, limits(**FITTING), first=fuzz.SEED + 4000, least=1.0)
    large = dict(channels=71, mid=130, out=100, size=(3, 15, 14), groups=(1, 1))
    fuzz.fuzz("cpu", 2, limits(10**9, **FITTING, **large), least=1.0)


@pytest.mark.parametrize(
    ("sums", "most"), [("pairs", 1.1), ("amx", 1.1), ("winograd_pairs", 2.5)], indirect=["sums"]
)
def test_error_as_a_whole(most: float) -> None:
    """Of all outputs together, which the largest error alone does not tell: beside PyTorch's."""
    torch.manual_seed(0)
    layer = fastst.Conv2Plus1d(32, 48, 3, padding=1, mid_channels=64).bfloat16()
    eager = torch.nn.Sequential(layer.spatial, torch.nn.ReLU(), layer.temporal)
    x = torch.randn(1, 32, 4, 16, 16).bfloat16()
    with torch.no_grad(), fastst.use_backend("cpu"):
        y, own = layer(x).double(), eager(x).double()
        truth = eager.double()(x.double())
    assert (y - truth).norm() <= most * (own - truth).norm()


@winograd
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e37])
def test_what_is_no_number_is_where_it_would_be_without_winograd(bad: float) -> None:
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


@pytest.mark.parametrize("channels", [3, 1, 5, 7])
def test_few_channels(channels: int) -> None:
    """Stems: taps of a row are channels of an output; many rows, an odd number of frames."""
    fixed = dict(channels=channels, mid=45, out=20, groups=(1, 1), size=(3, 21, 19), batch=1)
    few = fixed | dict(padding_mode=("zeros", "zeros"))
    for kernel, stride in (((3, 7, 7), (1, 2, 2)), ((3, 3, 3), (2, 1, 1)), ((1, 5, 4), (1, 1, 3))):
        stem = dict(kernel=kernel, stride=stride, dilation=(1, 1, 1), padding=1, causal=False)
        fuzz.fuzz("cpu", 2, limits(10**8, **few, **stem), first=fuzz.SEED + 8000, least=1.0)
        any_mode = limits(10**8, **fixed, **stem)
        fuzz.fuzz("cpu", 2, any_mode, first=fuzz.SEED + 8100, backward=False, least=1.0)


def test_auto_takes_stems(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not many groups of few channels, of which pairs are half empty."""
    monkeypatch.setattr(cpu, "outdoes", lambda dtype: False)
    monkeypatch.setattr(library.library(), "multiplies_pairs", lambda: True)

    def why_not(groups: int) -> str | None:
        sizes = (1, 6, 3, 9, 9), (48, 6 // groups, 1, 3, 3), (16, 48, 3, 1, 1)
        tensors = PairTensors(*(torch.empty(s, dtype=torch.bfloat16) for s in sizes))
        spec = PairSpec(padding=(1,) * 6, groups=(groups, 1))
        return cpu.BACKEND.why_not_auto(Problem.of(tensors, spec), "forward")

    assert why_not(1) is None
    assert "slow with fewer than 8 input channels per group" in str(why_not(2))


MODES = dict(zeros="constant", replicate="replicate", reflect="reflect", circular="circular")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_channels_last"])
@pytest.mark.parametrize("bad", [1.0, math.inf, math.nan])
def test_taps_of_a_row_meet_their_weights(bad: float, layout: str, mode: str) -> None:
    """Whole numbers, whose sums are exact. What fills the last pair of a row is a zero, not the
    next pixel, which would let infinity reach outputs that do not read it."""
    torch.manual_seed(5)
    x = torch.randint(-3, 4, (2, 3, 3, 12, 29)).bfloat16()
    x[1, 0, 1, 5, 16] = bad  # the pixel behind the taps of output 6
    weight = torch.randint(-3, 4, (18, 3, 1, 7, 7)).bfloat16()
    weight[weight == 0] = 1  # of infinity it would make NaN
    tensors = PairTensors(fuzz.lay_out(x, layout), weight, torch.empty(1, 18, 1, 1, 1).bfloat16())
    spec = PairSpec(stride=(1, 2, 2), padding=(0, 0, 3, 3, 3, 3), padding_mode=(mode, "zeros"))
    problem = Problem.of(tensors, spec)
    call, u = library.Launcher(problem), library.rows(problem).permute(0, 4, 1, 2, 3)
    call.tap_conv(call.plain(tensors.x), weight, problem.passes[0], u, call.epilogue())
    padded = torch.nn.functional.pad(x.double(), (3, 3, 3, 3, 0, 0), MODES[mode])
    truth = torch.nn.functional.conv3d(padded, weight.double(), stride=(1, 2, 2)).bfloat16()
    torch.testing.assert_close(u[:, :18], truth, rtol=0, atol=0, equal_nan=True)


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
