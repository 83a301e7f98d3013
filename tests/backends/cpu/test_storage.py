"""bfloat16 and float16 in the native CPU backend: stored in 16 bits, computed in float32."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastst
from fastst.backends import cpu
from fastst.backends.cpu import library
from fastst.functional import conv2plus1d
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import fuzz
from tests.support.fuzz import Limits

HALVES = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(
    isinstance(cpu.load(), str) and os.environ.get("FASTST_BUILD_CPU") != "1",
    reason=f"the backend {cpu.load()}",
)


def limits(dtype: torch.dtype, work: int = 4_000_000, **fixed: Any) -> Limits:
    return Limits(
        dtypes=(dtype,), work=work, fixed=dict(op="conv2plus1d", branch_activation="none") | fixed
    )


# ---- the rule


@pytest.mark.parametrize("dtype", HALVES)
def test_forward(dtype: torch.dtype) -> None:
    fuzz.fuzz("cpu", 30, limits(dtype), first=fuzz.SEED + 2000, backward=False, least=1.0)


@pytest.mark.parametrize("norm", ["batch", "frozen", "none"])
@pytest.mark.parametrize("dtype", HALVES)
def test_forward_and_backward(dtype: torch.dtype, norm: str) -> None:
    zeros = limits(dtype, norm=norm, padding_mode=("zeros", "zeros"))
    fuzz.fuzz("cpu", 15, zeros, first=fuzz.SEED + 3000, least=1.0)


@pytest.mark.parametrize(
    "fixed",
    [
        dict(channels=70, mid=130, out=100, size=(2, 5, 6), groups=(1, 1)),  # several blocks
        dict(channels=3, mid=45, out=64, size=(3, 40, 37), batch=1, groups=(1, 1)),  # and tiles
    ],
    ids=["blocks", "tiles"],
)
def test_sizes(fixed: dict[str, Any]) -> None:
    fuzz.fuzz("cpu", 3, limits(torch.bfloat16, 60_000_000, **fixed), backward=False, least=1.0)


@pytest.mark.parametrize("sums", ["direct", "winograd"])
def test_ways_to_sum(sums: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.Launcher, "sums", sums)
    usual = dict(kernel=(3, 3, 3), stride=(1, 1, 1), padding=1, dilation=(1, 1, 1), causal=False)
    zeros = limits(torch.bfloat16, padding_mode=("zeros", "zeros"), **usual)
    fuzz.fuzz("cpu", 8, zeros, first=fuzz.SEED + 4000, least=1.0)


def test_strips_and_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of the mid tensor, and whole lines of y."""
    monkeypatch.setattr(library.Launcher, "strip", 2000)
    monkeypatch.setattr(library.Launcher, "large", 0)
    fuzz.fuzz("cpu", 20, limits(torch.bfloat16), first=fuzz.SEED + 5000, backward=False, least=1.0)


class Beside(nn.Module):
    """Two convolutions with relu between them, as pair, as single ops or as PyTorch's own."""

    def __init__(self, kind: str, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.pair = fastst.Conv2Plus1d(
            64, 64, 3, padding=1, mid_channels=96, bias=False, norm="batch" if norm else None
        )

    def forward(self, x: Tensor) -> Tensor:
        pair = self.pair
        if self.kind == "pair":
            y: Tensor = pair(x)
            return y
        kind = fastst.functional.conv3d if self.kind == "single" else F.conv3d
        u = kind(x, pair.spatial.weight, padding=(0, 1, 1))
        v = torch.relu(u if pair.norm is None else pair.norm(u))
        return kind(v, pair.temporal.weight, padding=(1, 0, 0))


def as_a_whole(kind: str, dtype: torch.dtype, norm: bool) -> dict[str, float]:
    """Errors of y and of gradients, all elements together, as a share of the whole."""

    def results(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
        net = Beside(kind, norm).to(HALVES[0]).to(dtype)
        generator = torch.Generator().manual_seed(1)
        x, dy = (torch.randn(1, 64, 3, 16, 16, generator=generator) for _ in range(2))
        x = x.to(HALVES[0]).to(dtype).requires_grad_()
        with fastst.use_backend("cpu" if kind != "eager" else "auto"):
            y = net(x)
            y.backward(dy.to(HALVES[0]).to(dtype))
        grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]

    truth, ours = results("eager", torch.float64), results(kind, dtype)
    return {n: float((ours[n].double() - t).norm() / t.norm()) for n, t in truth.items()}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["pair", "single"])
@pytest.mark.parametrize("dtype", HALVES)
def test_training_as_a_whole(kind: str, dtype: torch.dtype, norm: bool) -> None:
    """Of numbers that lie where they like about the kink of relu, which fuzzed ones keep off: an
    error of a sum that is small itself opens a gate or shuts it."""
    own, ours = as_a_whole("eager", dtype, norm), as_a_whole(kind, dtype, norm)
    assert all(ours[n] <= 1.5 * own[n] for n in own), (ours, own)


def test_gates_that_rounding_moves_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Winograd's transforms in bfloat16, which training does not take."""
    if library.library().__name__.endswith("avx512") and not library.library().multiplies_pairs():
        pytest.skip("no AVX512_BF16")
    monkeypatch.setattr(library.Launcher, "sums", "winograd_pairs")
    own = as_a_whole("eager", torch.bfloat16, True)
    assert as_a_whole("pair", torch.bfloat16, True)["x"] > 2 * own["x"]


# ---- rounding


def through(x: Tensor, weight: Tensor) -> Tensor:
    """x·weight, rounded once, by a pair of convolutions with one tap, all channels apart."""
    channels = x.shape[1]
    one = torch.ones(channels, 1, 1, 1, 1, dtype=x.dtype)
    with fastst.use_backend("cpu"):
        return conv2plus1d(x, one, weight.expand_as(one), groups=channels, activation=None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", HALVES)
def test_all_values_are_loaded_and_stored(dtype: torch.dtype, layout: str) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    x = fuzz.lay_out(bits.view(dtype).view(1, 4, 4, 64, 64), layout)
    y = through(x, torch.ones((), dtype=dtype))
    assert torch.equal(y.isnan(), x.isnan())
    same = ~x.isnan() & (x != 0)  # 0·1 + (−0)·1 has no sign to keep
    assert torch.equal(y[same].view(torch.int16), x[same].view(torch.int16))
    assert not y[x == 0].any()


@pytest.mark.parametrize("dtype", HALVES)
def test_products_are_rounded_to_nearest_with_ties_to_even(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 3, 2, 33, 17).mul(100).to(dtype)
    weight = torch.tensor(1.5, dtype=dtype)  # one bit more: every second product is a tie
    exact = x.double() * 1.5
    assert torch.equal(through(x, weight), exact.to(dtype))
    up = exact.float().to(dtype).double() > exact
    assert up.any() and not up.all()


# ---- what is kept, and what autocast asks for


@pytest.mark.parametrize("dtype", HALVES)
def test_u_is_kept_in_16_bits_and_statistics_are_not(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 3, 6, 6, dtype=dtype)
    weights = torch.randn(12, 4, 1, 3, 3, dtype=dtype), torch.randn(5, 12, 3, 1, 1, dtype=dtype)
    problem = Problem.of(PairTensors(x, *weights), PairSpec(padding=(1,) * 6, norm="batch"))
    found = cpu.conv2plus1d(problem, PairTensors(x, *weights), True)
    assert found.u is not None and found.mean is not None and found.var is not None
    assert found.u.dtype == found.y.dtype == dtype and found.u.shape == problem.mid_shape
    assert not found.u[..., 12:].any()
    assert found.mean.dtype == found.var.dtype == torch.float32


@pytest.mark.parametrize("recompute", [False, True])
def test_training_under_autocast(recompute: bool) -> None:
    """As near to float64 as PyTorch's own operators under autocast, twice their error."""
    torch.manual_seed(2)
    layer = fastst.Conv2Plus1d(5, 7, 3, padding=1, norm="batch", bias=False, recompute=recompute)
    eager = torch.nn.Sequential(layer.spatial, layer.norm, torch.nn.ReLU(), layer.temporal)
    clip = torch.randn(3, 5, 4, 9, 8)

    def step(model: torch.nn.Module, x: Tensor, cast: bool) -> list[Tensor]:
        x = x.clone().requires_grad_()
        with fastst.use_backend("cpu"), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y = model(x)
        assert y.dtype == (torch.bfloat16 if cast else x.dtype)
        grads = torch.autograd.grad(y.double().square().sum(), [x, *model.parameters()])
        return [y.detach(), *grads]

    ours, own = step(layer, clip, True), step(eager, clip, True)
    truth = step(eager.double(), clip.double(), False)
    for a, b, t in zip(ours, own, truth, strict=True):
        assert a.dtype == b.dtype
        assert fuzz.error(a, t) <= 2 * fuzz.error(b, t) + 2**-7 * float(t.abs().max())


# ---- choice


@pytest.mark.parametrize("dtype", HALVES)
def test_auto_leaves_16_bits_to_pytorch_where_the_processor_outdoes_the_kernels(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = fastst.Conv2Plus1d(8, 16, 3, padding=1).to(dtype)
    x = torch.randn(1, 8, 3, 5, 5, dtype=dtype)
    for outdoes, expected in ((False, "cpu"), (True, "aten")):
        monkeypatch.setattr(cpu, "outdoes", lambda dtype, answer=outdoes: answer)
        found = fastst.explain(layer, x)
        assert found.backend == expected
    assert "instructions" in found.reasons["cpu"]
