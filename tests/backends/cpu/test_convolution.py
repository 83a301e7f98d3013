"""``conv3d`` on the native CPU kernels: its numbers, ways to sum, and what is written."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastst
from fastst.backends import cpu
from fastst.backends.cpu import convolution, library
from fastst.functional import BatchNorm, Norm, conv3d
from tests.backends.cpu.test_cpu import built
from tests.support import fuzz
from tests.support.fuzz import ConvLimits
from tests.support.made import Made, watched

pytestmark = built
ZEROS = dict(padding_mode=("zeros", "zeros"), past=0)
WINOGRAD = dict(kernel=(3, 3, 3), stride=(1, 1, 1), dilation=(1, 1, 1))


def limits(**fixed: Any) -> ConvLimits:
    return ConvLimits(dtypes=(torch.float32, torch.bfloat16, torch.float16), fixed=fixed)


@pytest.mark.parametrize("sums", ["best", "winograd"])
def test_forward(sums: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.Launcher, "sums", sums)
    fuzz.fuzz("cpu", 60, limits(), first=fuzz.SEED + 100, backward=False, least=1.0)


def test_backward() -> None:
    fuzz.fuzz("cpu", 40, limits(), first=fuzz.SEED + 200, least=1.0)


def test_residues_of_a_stride_read_weights_whose_channels_are_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each of eight residues reads all of the weight, which takes longer than the products."""
    given: list[int] = []
    lib = library.library()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(lib, name)

        def input_gradient(self, source: Any, weight: torch.Tensor, *rest: Any) -> Any:
            given.append(weight.stride(1))
            return lib.input_gradient(source, weight, *rest)

    monkeypatch.setattr(library, "library", Watched)
    x, weight = torch.randn(1, 16, 4, 6, 6, requires_grad=True), torch.randn(32, 16, 3, 3, 3)
    for stride in (1, 2):
        with fastst.use_backend("cpu"):
            conv3d(x, weight, stride=stride, padding=1).sum().backward()
    assert given == [27, 1]


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_winograd(stride: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and every gradient, by the same rule as without."""
    monkeypatch.setattr(library.Launcher, "sums", "winograd")
    fixed = WINOGRAD | ZEROS | dict(stride=stride, padding=1, causal=False)
    fuzz.fuzz("cpu", 12, limits(**fixed), first=fuzz.SEED + 300, least=1.0)


def test_winograd_over_several_blocks_and_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.Launcher, "sums", "winograd")
    large = dict(channels=40, out=70, size=(4, 17, 26), groups=1, batch=1, padding=1, causal=False)
    several = ConvLimits(work=10**9, dtypes=(torch.float32,), fixed=WINOGRAD | ZEROS | large)
    fuzz.fuzz("cpu", 1, several, least=1.0)


def test_winograd_is_chosen_where_it_pays() -> None:
    def taken(c: int, size: tuple[int, int, int], k: int) -> int:
        ways: list[int] = []

        class Launcher(library.Launcher):
            def tap_conv(self, *args: Any) -> int:
                ways.append(super().tap_conv(*args))
                return ways[-1]

        patch = pytest.MonkeyPatch()
        with patch.context() as p, fastst.use_backend("cpu"):
            p.setattr(convolution, "Launcher", Launcher)
            conv3d(torch.zeros(1, c, *size), torch.zeros(k, c, 3, 3, 3), padding=1)
        return ways[0]

    assert taken(64, (4, 28, 28), 64)
    assert not taken(256, (2, 5, 5), 256)
    assert not taken(3, (4, 28, 28), 64)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_statistics_of_long_rows_and_columns(
    size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    """Values that are summed one after the other lose digits with their number."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 1, *size).to(memory_format=memory_format)
    launcher: Any = SimpleNamespace(lib=library.library(), threads=1)
    mean, var = convolution.moments(launcher, Norm("batch"), x)
    truth, about = torch.var_mean(x.double(), (0, 2, 3, 4), correction=0)
    assert mean is not None
    assert float((mean - about).abs().max()) < 1e-7
    assert float((var / truth - 1).abs().max()) < 12 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_nan_and_infinity_reach_what_pytorch_lets_them(bad: float) -> None:
    torch.manual_seed(3)
    x, w = torch.randn(1, 16, 4, 12, 12), torch.randn(20, 16, 3, 3, 3)
    x[0, 3, 1, 5, 6] = bad
    results = []
    for backend in ("cpu", "reference"):
        with fastst.use_backend(backend):
            results.append(conv3d(x, w, padding=1, input_activation="relu"))
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(*map(kind, results))


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (3, 1, 1)])
def test_rows_longer_than_what_is_read_together(kind: Any, kernel: tuple[int, int, int]) -> None:
    """Each position has its own mean and factor; several vectors of channels."""
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    settings: Any = dict(padding=padding, input_norm=Norm(kind, groups=4), input_activation="silu")
    x = torch.randn(1, 40, 3, 5, 37).contiguous(memory_format=torch.channels_last_3d)
    w, found = torch.randn(24, 40, *kernel), {}
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        given = [t.to(dtype).requires_grad_() for t in (x, w)]
        with fastst.use_backend(backend):
            y = conv3d(*given, **settings)
            found[backend] = [y, *torch.autograd.grad(y.square().sum(), given)]
    for ours, true in zip(found["cpu"], found["reference"], strict=True):
        scale = float(true.detach().abs().max())
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 24, 5, 21, 19, requires_grad=True)
    w = torch.randn(40, 24, 3, 3, 3)
    found = []
    for n in (1, threads):
        torch.set_num_threads(n)
        try:
            with fastst.use_backend("cpu"):
                y = conv3d(x, w, padding=1, input_activation="silu")
                found.append((y, *torch.autograd.grad(y.square().sum(), x)))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- what is written


@pytest.mark.parametrize(
    "settings",
    [
        dict(input_norm=Norm("group", groups=2), input_activation="silu", padding=1),
        dict(
            input_norm=BatchNorm(torch.zeros(8), torch.ones(8)), padding=1, padding_mode="reflect"
        ),
        dict(input_norm=Norm("rms"), past=torch.randn(1, 8, 2, 30, 30), causal=True),
        dict(residual=torch.randn(1, 4, 8, 30, 30), padding=1, activation="relu"),
    ],
)
def test_nothing_is_written_but_y_and_statistics(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made()
    monkeypatch.setattr(cpu.BACKEND, "conv3d", watched(convolution.conv3d, made))
    x, w = torch.randn(1, 8, 8, 30, 30), torch.randn(4, 8, 3, 3, 3)
    with fastst.use_backend("cpu"), torch.no_grad():
        y = conv3d(x, w, **settings)
    own = y.untyped_storage().nbytes()
    assert made.largest == own
    kind = settings.get("input_norm", Norm("none"))
    positions = 8 if getattr(kind, "kind", None) == "rms" else 0  # floats of each, C = 8
    assert made.total - own <= 4 * (positions * x[0, 0].numel() + 200 * 8)
