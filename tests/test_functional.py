"""What the two functions compute, said once more in the words of torch.nn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst
from fastst.functional import BatchNorm, conv2plus1d, parallel_conv2plus1d
from fastst.problem import checks
from tests.support import fuzz

F64 = dict(rtol=1e-10, atol=1e-10)


def weights(
    c: int = 3, m: int = 5, k: int = 4, kernel: tuple[int, int, int] = (3, 3, 3), dtype: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spatial and temporal weight, spatial and temporal bias, of a spatial-first pair."""
    kt, kh, kw = kernel
    return (
        torch.randn(m, c, 1, kh, kw, dtype=dtype),
        torch.randn(k, m, kt, 1, 1, dtype=dtype),
        torch.randn(m, dtype=dtype),
        torch.randn(k, dtype=dtype),
    )


def sequential(w: tuple[Tensor, ...], *middle: nn.Module, **geometry: Any) -> nn.Sequential:
    """The modules that a call stands for, with one argument for both convolutions."""
    ws, wt, bs, bt = w
    modules = []
    for weight, bias, axes in ((ws, bs, (1, 2)), (wt, bt, (0,))):
        own = {
            name: tuple(v if i in axes else neutral for i, v in enumerate(geometry[name]))
            for name, neutral in (("stride", 1), ("padding", 0), ("dilation", 1))
            if name in geometry
        }
        own |= {n: v for n, v in geometry.items() if n not in own}
        conv = nn.Conv3d(weight.shape[1], weight.shape[0], weight.shape[2:], **own)  # type: ignore[arg-type]
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        modules.append(conv)
    return nn.Sequential(modules[0], *middle, modules[1]).double()


def test_is_two_convolutions_and_what_is_between() -> None:
    w = weights(dtype=torch.float64)
    x = torch.randn(2, 3, 6, 9, 8, dtype=torch.float64)
    geometry = dict(stride=(2, 1, 3), padding=(1, 2, 0), dilation=(1, 2, 1))
    norm = nn.BatchNorm3d(5, eps=0.1).double()
    expected = sequential(w, norm, nn.SiLU(), **geometry)(x)
    bn = BatchNorm(None, None, norm.weight, norm.bias, True, 0.1, 0.1)
    y = conv2plus1d(x, *w, **geometry, activation="silu", norm=bn)
    torch.testing.assert_close(y, expected, **F64)


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_padding_words_and_modes(mode: str, padding: Any) -> None:
    w = weights(kernel=(4, 3, 2), dtype=torch.float64)
    x = torch.randn(1, 3, 5, 6, 7, dtype=torch.float64)
    own = ((0, 1, 1), (1, 0, 0)) if isinstance(padding, int) else (padding, padding)
    spatial = nn.Conv3d(3, 5, (1, 3, 2), padding=own[0], padding_mode=mode)
    temporal = nn.Conv3d(5, 4, (4, 1, 1), padding=own[1], padding_mode=mode)
    for conv, weight, bias in ((spatial, w[0], w[2]), (temporal, w[1], w[3])):
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    y = conv2plus1d(x, *w, padding=padding, padding_mode=mode)
    torch.testing.assert_close(y, nn.Sequential(spatial, nn.ReLU(), temporal)(x), **F64)
    if padding == "same":
        assert y.shape[2:] == x.shape[2:]


def test_temporal_padding_is_of_z_and_zero() -> None:
    """After norm and activation a padded frame is 0; norm and activation of 0 would not be."""
    w = weights(dtype=torch.float64)
    x = torch.randn(1, 3, 1, 5, 5, dtype=torch.float64)
    norm = BatchNorm(torch.zeros(5), torch.ones(5), torch.ones(5), torch.full((5,), 7.0))
    norm = BatchNorm(*(t.double() for t in norm[:4]))
    y = conv2plus1d(x, *w, padding=1, norm=norm)
    z = F.relu(F.conv3d(x, w[0], w[2], padding=(0, 1, 1)) / math.sqrt(1 + 1e-5) + 7)
    # T = 1: the first and last tap meet padding only.
    torch.testing.assert_close(y, F.conv3d(z, w[1][:, :, 1:2], w[3]), **F64)


@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
@pytest.mark.parametrize(("stride", "causal"), [(1, True), (2, True), (3, True), (2, "strided")])
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_causal_sees_no_later_frame(order: str, stride: int, causal: Any, mode: str) -> None:
    ws, wt, bs, bt = weights(c=4, m=4, k=4, dtype=torch.float64)
    x = torch.randn(1, 4, 9, 4, 4, dtype=torch.float64, requires_grad=True)
    y = conv2plus1d(
        x, ws, wt, bs, bt, stride=(stride, 1, 1), padding=(0, 1, 1), dilation=(2, 1, 1),
        padding_mode=("zeros", mode), order=order, causal=causal,
    )  # fmt: skip
    left = 4 if causal is True else 4 + 1 - stride
    assert y.shape[2] == (9 + left - 5) // stride + 1
    for i in range(y.shape[2]):
        (dx,) = torch.autograd.grad(y[:, :, i].square().sum(), x, retain_graph=True)
        seen = dx.abs().amax((0, 1, 3, 4)).nonzero().max().item()
        # Without its padding shortened, output i may reach frame i·st and no further.
        assert seen <= i * stride + (stride - 1 if causal == "strided" else 0)


@pytest.mark.parametrize("combine", ["add", "cat"])
def test_parallel_is_two_branches(combine: str) -> None:
    x = torch.randn(2, 3, 6, 8, 7, dtype=torch.float64)
    ws, wt = torch.randn(4, 3, 1, 3, 5).double(), torch.randn(4, 3, 3, 1, 1).double()
    bs, bt = torch.randn(4).double(), torch.randn(4).double()
    y = parallel_conv2plus1d(
        x, ws, wt, bs, bt, stride=(2, 2, 1), padding=(1, 1, 2), branch_activation="gelu",
        activation="leaky_relu", negative_slope=0.3, combine=combine,
    )  # fmt: skip
    a = F.gelu(F.conv3d(x[:, :, ::2], ws, bs, (1, 2, 1), (0, 1, 2)))
    b = F.gelu(F.conv3d(x[..., ::2, :], wt, bt, (2, 1, 1), (1, 0, 0)))
    expected = F.leaky_relu(a + b if combine == "add" else torch.cat((a, b), 1), 0.3)
    torch.testing.assert_close(y, expected, **F64)


def test_unbatched() -> None:
    w = weights()
    x = torch.randn(3, 4, 6, 6)
    y = conv2plus1d(x, *w, padding=1)
    assert y.shape == (4, 4, 6, 6)
    torch.testing.assert_close(y, conv2plus1d(x[None], *w, padding=1)[0], rtol=0, atol=0)
    ws, wt = torch.randn(4, 3, 1, 3, 3), torch.randn(4, 3, 3, 1, 1)
    assert parallel_conv2plus1d(x, ws, wt, padding=1).shape == (4, 4, 6, 6)


@pytest.mark.parametrize("norm", [None, "batch", "frozen"])
def test_empty_batch_as_conv3d(norm: str | None) -> None:
    w = [t.requires_grad_() for t in weights()]
    x = torch.randn(0, 3, 4, 6, 6, requires_grad=True)
    stats = torch.zeros(5), torch.ones(5)
    bn = None if norm is None else BatchNorm(*stats, training=norm == "batch")
    middle = () if norm is None else (nn.BatchNorm3d(5).train(norm == "batch"),)
    try:
        expected = sequential(weights(), *middle, nn.ReLU())(x.double())
    except ValueError:
        with pytest.raises(ValueError, match="more than 1 value"):
            conv2plus1d(x, *w, norm=bn)
        return
    y = conv2plus1d(x, *w, norm=bn)
    assert y.shape == expected.shape == (0, 4, 2, 4, 4)
    grads = torch.autograd.grad(y.sum(), (x, *w), create_graph=True)
    assert [g.shape for g in grads] == [t.shape for t in (x, *w)]
    assert all(not g.any() for g in grads)
    # Double backward of nothing: zeros, not an error.
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), w, allow_unused=True)
    assert all(g is None or not g.any() for g in second)


def test_kernel_larger_than_the_unpadded_input() -> None:
    w = weights(kernel=(5, 7, 7), dtype=torch.float64)
    x = torch.randn(1, 3, 1, 2, 3, dtype=torch.float64)
    y = conv2plus1d(x, *w, padding=(2, 3, 3))
    torch.testing.assert_close(y, sequential(w, nn.ReLU(), padding=(2, 3, 3))(x), **F64)


@pytest.mark.parametrize("layout", fuzz.LAYOUTS)
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [8, 1])
def test_memory_format_of_the_output(layout: str, weight_layout: str, channels: int) -> None:
    """That of two nn.Conv3d where PyTorch keeps formats (cuDNN; oneDNN with spatial kernels)."""
    ws, wt, bs, bt = weights(c=channels, m=8, k=8)
    ws, wt = (fuzz.lay_out(t, weight_layout) for t in (ws, wt))
    x = fuzz.lay_out(torch.randn(4, channels, 8, 16, 16), layout)
    second = fuzz.lay_out(torch.randn(8, 8, 1, 3, 3), weight_layout)  # for oneDNN to take it
    expected = F.conv3d(F.conv3d(x, ws, bs, padding=(0, 1, 1)), second, padding=(0, 1, 1))
    y = conv2plus1d(x, ws, wt, bs, bt, padding=1)
    assert y.stride() == expected.stride()
    assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("activation", fuzz.ACTIVATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_propagate_as_in_pytorch(backend: str, activation: str, value: float) -> None:
    w = weights(dtype=torch.float64)
    x = torch.randn(1, 3, 5, 6, 6, dtype=torch.float64)
    x[0, 1, 2, 3, 3] = value
    z = fuzz.act(activation, F.conv3d(x, w[0], w[2], padding=(0, 1, 1)), 0.2)
    expected = F.conv3d(z, w[1], w[3], padding=(1, 0, 0))
    with fastst.use_backend(backend):
        y = conv2plus1d(x, *w, padding=1, activation=activation, negative_slope=0.2)
    assert expected.isnan().any()
    torch.testing.assert_close(y, expected, **F64, equal_nan=True)


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
def test_views_that_are_negated_when_read(backend: str) -> None:
    """Their memory holds −x and −dy."""
    w = [t.requires_grad_() for t in weights(c=8, m=8, k=8)]
    x, dy = (torch.randn(1, 8, 4, 6, 6, dtype=torch.complex64).conj().imag for _ in range(2))
    assert x.is_neg() and dy.is_neg()
    results = []
    for source, seed in ((x, dy), (x.resolve_neg(), dy.resolve_neg())):
        source = source.detach().requires_grad_()
        try:
            with fastst.use_backend(backend):
                y = conv2plus1d(source, *w, padding=1)
        except fastst.BackendError:  # not built here
            return
        results.append((y, *torch.autograd.grad(y, (source, *w), seed)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["aten", "reference"])
@pytest.mark.parametrize("activation", fuzz.ACTIVATIONS)
def test_gradient_exactly_at_the_kinks(backend: str, activation: str) -> None:
    """u takes the values −3, 0 and 3: which side's derivative counts there is PyTorch's choice."""
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64).view(1, 1, 1, 1, 5)
    one = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(fuzz.act(activation, x, 0.2).sum(), x)
    with fastst.use_backend(backend):
        y = conv2plus1d(x, one, one, activation=activation, negative_slope=0.2)
        (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, expected, **F64)


def test_no_gradient_of_the_output() -> None:
    """What follows says that it has none: as in PyTorch, there is nothing to be done then."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor, other: Tensor) -> Tensor:
            return y.sum() + other

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Any:
            return None, dy

    w = [t.requires_grad_() for t in weights()]
    other = torch.zeros((), requires_grad=True)
    Stop.apply(conv2plus1d(torch.randn(1, 3, 4, 6, 6), *w), other).backward()
    assert [t.grad for t in (*w, other)] == [None, None, None, None, 1]


@pytest.mark.parametrize("backend", ["cpu", "aten", "reference"])
def test_default_dtype_and_device_are_for_others(backend: str) -> None:
    w = [t.requires_grad_() for t in weights(c=8, m=9, k=8)]
    affine = torch.rand(9, requires_grad=True), torch.rand(9, requires_grad=True)
    x = torch.randn(2, 8, 4, 6, 6, requires_grad=True)

    def step() -> list[Tensor]:
        y = conv2plus1d(x, *w, padding=1, norm=BatchNorm(None, None, *affine, training=True))
        return [y, *torch.autograd.grad(y, (x, *w, *affine), y.detach())]

    try:
        with fastst.use_backend(backend):
            expected = step()
            torch.set_default_dtype(torch.bfloat16)
            with torch.device("meta"):
                results = step()
    except fastst.BackendError:  # not built here
        return
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


def test_a_profiler_sees_the_ops() -> None:
    w = [t.requires_grad_() for t in weights()]
    x = torch.randn(1, 3, 4, 6, 6)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        with torch.no_grad():
            conv2plus1d(x, *w)
        conv2plus1d(x, *w).sum().backward()
    names = {e.name for e in found.events() or ()}
    ends = ("", "_train", "_backward")
    assert names >= {f"fastst::conv2plus1d{end}" for end in ends}


# ---- batch norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics(dtype: torch.dtype, affine: bool) -> None:
    w = weights(dtype=dtype)
    module = nn.BatchNorm3d(5, eps=1e-2, momentum=0.2, affine=affine, dtype=dtype)
    mean, var = torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)
    for _ in range(3):
        x = torch.randn(2, 3, 3, 4, 5, dtype=dtype)
        module(F.conv3d(x, w[0], w[2]))
        conv2plus1d(x, *w, norm=BatchNorm(mean, var, module.weight, module.bias, True, 0.2, 1e-2))
    torch.testing.assert_close(mean, module.running_mean)
    torch.testing.assert_close(var, module.running_var)  # of the unbiased variance
    # Backward of an earlier call, which has saved them, would refuse others.
    assert mean._version == var._version == 0


@pytest.mark.parametrize("channels", [1, 8])
def test_statistics_do_not_cancel(channels: int) -> None:
    """Mean 1000 times the deviation: sums of squares of raw float32 values would lose it all."""
    x = torch.randn(4, channels, 8, 16, 16) + 1000
    one = torch.ones(channels, 1, 1, 1, 1)
    mean, var = torch.zeros(channels), torch.ones(channels)
    norm = BatchNorm(mean, var, training=True, momentum=1.0)
    y = conv2plus1d(x, one, one, groups=channels, activation=None, norm=norm)
    true = x.double()
    axes = (0, 2, 3, 4)
    expected = F.batch_norm(true, None, None, training=True)
    peer = F.batch_norm(x.to(memory_format=torch.channels_last_3d), None, None, training=True)
    ulps = 12 * torch.finfo(torch.float32).eps * 1000
    assert (y - expected).abs().max() <= 2 * (peer - expected).abs().max() + ulps
    torch.testing.assert_close(mean.double(), true.mean(axes), rtol=1e-5, atol=0)
    torch.testing.assert_close(var.double(), true.var(axes), rtol=1e-4, atol=0)


def test_batch_norm_of_few_values_in_float64() -> None:
    """Where gradients cancel to almost nothing, which random cases leave out."""
    for batch, size in itertools.product((1, 2), ((1, 1, 2), (1, 2, 2), (2, 1, 1))):
        config = fuzz.Config(
            batch=batch, size=size, norm="batch", activation="silu", dtype=torch.float64
        )
        fuzz.check(config, "aten")


# ---- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float64])
def test_autocast_as_the_modules(dtype: Any, training: bool, x_dtype: Any) -> None:
    w = [t.requires_grad_() for t in weights(c=8, m=8, k=8, dtype=x_dtype)]
    bn = nn.BatchNorm3d(8, dtype=x_dtype).train(training)
    x = torch.randn(2, 8, 4, 8, 8, dtype=x_dtype, requires_grad=True)
    inputs = (x, *w, bn.weight, bn.bias)
    norm = BatchNorm(bn.running_mean.clone(), bn.running_var.clone(), bn.weight, bn.bias, training)
    with torch.autocast("cpu", dtype):
        y = conv2plus1d(x, *w, padding=1, norm=norm)
        z = F.relu(bn(F.conv3d(x, w[0], w[2], padding=(0, 1, 1))))
        expected = F.conv3d(z, w[1], w[3], padding=(1, 0, 0))
    assert y.dtype == expected.dtype
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, inputs, dy)
    peers = torch.autograd.grad(expected, inputs, dy)
    for i, (got, peer) in enumerate(zip((y, *grads), (expected, *peers), strict=True)):
        assert got.dtype == peer.dtype
        if training and i == 4:
            continue  # a bias before batch norm has the gradient 0, of which rounding is left
        bound = 16 * torch.finfo(y.dtype).eps * peer.abs().max().item()
        assert (got.double() - peer.double()).abs().max().item() <= bound
    torch.testing.assert_close(norm.running_mean, bn.running_mean, rtol=0.02, atol=0.02)


def test_what_autocast_allows_is_not_remembered_outside() -> None:
    """Arguments of several dtypes fit under autocast only, however often they did so before."""
    ws, wt, *biases = weights()
    x = torch.randn(1, 3, 4, 6, 6, dtype=torch.bfloat16)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            conv2plus1d(x, ws, wt, *biases)
        with pytest.raises(TypeError, match=r"spatial_weight must have the dtype of x"):
            conv2plus1d(x, ws, wt, *biases)


def test_a_call_is_checked_once_whatever_the_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cumulative average has another one in each call."""
    checked = []
    real = checks._geometry
    monkeypatch.setattr(checks, "_geometry", lambda *a: checked.append(a) or real(*a))
    w, x = weights(c=3, m=7, k=2), torch.randn(2, 3, 4, 6, 6)
    for n in range(3):
        norm = BatchNorm(torch.zeros(7), torch.ones(7), training=True, momentum=1 / (n + 1))
        conv2plus1d(x, *w, padding=1, norm=norm)
    assert len(checked) == 1


def test_autocast_reaches_no_inner_operator() -> None:
    """float64 stays float64 through the op, as it does through nn.Conv3d."""
    w = weights(dtype=torch.float64)
    x = torch.randn(1, 3, 4, 6, 6, dtype=torch.float64)
    plain = conv2plus1d(x, *w)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(conv2plus1d(x, *w), plain, rtol=0, atol=0)
