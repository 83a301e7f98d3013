"""Bug classes that kernels like these have had elsewhere, as far as a CPU can show them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastst
from fastst.functional import BatchNorm, conv2plus1d
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import fuzz
from tests.support.fuzz import Config

BACKENDS = ("aten", "reference")


def weights(
    c: int = 2, m: int = 3, k: int = 2, dtype: Any = torch.float32
) -> tuple[Tensor, Tensor]:
    return torch.randn(m, c, 1, 3, 3, dtype=dtype), torch.randn(k, m, 3, 1, 1, dtype=dtype)


# ---- 64 bits


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", range(5))
def test_strides_beyond_2_31(backend: str, axis: int) -> None:
    """Few elements, far apart: a 32-bit offset would read elsewhere."""
    size = [2, 2, 3, 4, 4]
    try:
        storage = torch.empty(2**31 + 2**20, dtype=torch.float16)  # pages are only reserved
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    stride = [96, 48, 16, 4, 1]
    far = (2**31 + 2**10) // (size[axis] - 1)
    stride[axis] = far
    x = storage.as_strided(size, stride)
    x.copy_(torch.randn(size))
    assert sum((n - 1) * s for n, s in zip(size, stride, strict=True)) > 2**31
    ws, wt = weights(dtype=torch.float16)
    with fastst.use_backend(backend):
        torch.testing.assert_close(
            conv2plus1d(x, ws, wt, padding=1),
            conv2plus1d(x.contiguous(), ws, wt, padding=1),
            rtol=0, atol=0,
        )  # fmt: skip


def test_sizes_and_work_beyond_2_31_are_python_integers() -> None:
    """Shapes of calls too large to run here, on the meta device."""
    x = torch.empty(4, 64, 64, 512, 512, device="meta")  # 2^32 elements
    ws, wt = (
        torch.empty(64, 64, 1, 3, 3, device="meta"),
        torch.empty(64, 64, 3, 1, 1, device="meta"),
    )
    y = conv2plus1d(x, ws, wt, padding=1)
    assert y.shape == x.shape and y.numel() == 2**32 and y.stride(0) == 2**30
    problem = Problem.of(PairTensors(x, ws, wt), PairSpec(padding=(1,) * 6))
    assert problem.flops() == 2 * 4 * 64 * 512 * 512 * 64 * 64 * (9 + 3)
    assert math.prod(problem.mid_shape) == 2**32


@pytest.mark.slow
def test_more_than_65535_channels_and_frames() -> None:
    """Grid limits of GPUs in y and z; sizes that are cheap when depthwise."""
    channels = 2**16 + 3
    x = torch.randn(1, channels, 2, 2, 2)
    ws, wt = torch.randn(channels, 1, 1, 1, 1), torch.randn(channels, 1, 2, 1, 1)
    y = conv2plus1d(x, ws, wt, groups=channels)
    expected = (F.relu(x * ws[None, :, 0]) * wt[None, :, 0, :]).sum(2, keepdim=True)
    torch.testing.assert_close(y, expected)
    frames = torch.randn(2**16 + 3, 1, 1, 2, 2)
    ws, wt = weights(1)
    y = conv2plus1d(frames, ws, wt, padding=1)
    torch.testing.assert_close(y[-2:], conv2plus1d(frames[-2:], ws, wt, padding=1))


# ---- tile edges, layouts, unwritten memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block", [8, 16, 32, 64])
def test_one_under_at_and_over_a_block(block: int, dtype: torch.dtype) -> None:
    for n in (block - 1, block, block + 1):
        for config in (
            Config(channels=n, mid=5, out=4, size=(2, 3, 3), dtype=dtype),
            Config(channels=3, mid=n, out=4, size=(2, 3, 3), norm="batch", dtype=dtype),
            Config(channels=3, mid=4, out=n, size=(2, 3, 3), norm="frozen", dtype=dtype),
            Config(channels=2, mid=3, out=2, size=(2, 2, n), dtype=dtype, x_layout="offset"),
            Config(channels=2, mid=3, out=2, size=(n, 2, 2), dtype=dtype, x_layout="sliced"),
        ):
            assert fuzz.check(config, "auto") is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_around_the_tensors_stays(backend: str) -> None:
    """Guard bands of NaN about x, weights and the gradient: not read, not written."""
    config = Config(x_layout="sliced", weight_layout="sliced", grad_layout="sliced", norm="batch")
    tensors, dy = fuzz.make(config)
    whole = {n: t._base if t._base is not None else t for n, t in tensors.items()}
    before = {n: t.clone() for n, t in whole.items() if t is not None}
    assert fuzz.check(config, backend) is None
    with fastst.use_backend(backend):
        out = fuzz.results(fuzz.call, config, tensors, dy)
    assert not any(t.isnan().any() for t in out.values())
    for n, t in before.items():
        torch.testing.assert_close(whole[n], t, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninitialised_memory_of_pytorch_itself(backend: str) -> None:
    """Under deterministic algorithms PyTorch fills what its own operators allocate with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        for seed in range(30):
            assert fuzz.check(fuzz.random_config(seed, fuzz.SMALL), backend) is None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_the_same_every_time(backend: str) -> None:
    for seed in range(10):
        config = fuzz.random_config(seed, fuzz.SMALL)
        tensors, dy = fuzz.make(config)
        with fastst.use_backend(backend):
            first, *others = (fuzz.results(fuzz.call, config, tensors, dy) for _ in range(3))
        for other in others:
            assert all(torch.equal(first[n], other[n]) for n in first), config


def test_output_is_new_memory() -> None:
    """Also where the convolutions do nothing: no output may be a view of an input."""
    one = torch.ones(1, 1, 1, 1, 1)
    x = torch.randn(2, 1, 3, 4, 4)
    y = conv2plus1d(x, one, one, activation=None)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    torch.testing.assert_close(y, x)
    y.zero_()
    assert x.any()


def test_gradient_is_no_view_of_the_one_that_came() -> None:
    one = torch.ones(1, 1, 1, 1, 1)
    x = torch.randn(2, 1, 3, 4, 4, requires_grad=True)
    dy = torch.randn(2, 1, 3, 4, 4)
    kept = dy.clone()
    for activation in ("none", "relu", "silu"):
        (dx,) = torch.autograd.grad(conv2plus1d(x, one, one, activation=activation), x, dy)
        assert dx.untyped_storage().data_ptr() != dy.untyped_storage().data_ptr()
        dx.zero_()
        assert torch.equal(dy, kept), activation


def test_expanded_gradient_with_channels_last_input() -> None:
    config = Config(x_layout="channels_last", grad_layout="expanded", norm="batch")
    for dtype in fuzz.DTYPES:
        assert fuzz.check(replace(config, dtype=dtype), "auto") is None


# ---- numbers


@pytest.mark.parametrize("backend", BACKENDS)
def test_relu_of_nan_is_nan(backend: str) -> None:
    """And its gradient is PyTorch's; maximum(NaN, 0) in a kernel may give 0."""
    one = torch.ones(1, 1, 1, 1, 1)
    x = torch.tensor([math.nan, -1.0, 2.0]).view(1, 1, 1, 1, 3).requires_grad_()
    (expected,) = torch.autograd.grad(F.relu(x).sum(), x)
    with fastst.use_backend(backend):
        y = conv2plus1d(x, one, one)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().flatten().tolist() == [True, False, False]
    torch.testing.assert_close(dx, expected, equal_nan=True)


def test_nan_in_one_sample_stays_there() -> None:
    ws, wt = weights()
    x = torch.randn(3, 2, 4, 5, 5)
    clean = conv2plus1d(x, ws, wt, padding=1)
    x[1] = math.nan
    y = conv2plus1d(x, ws, wt, padding=1)
    torch.testing.assert_close(y[[0, 2]], clean[[0, 2]], rtol=0, atol=0)
    assert y[1].isnan().all()


def test_zero_variance() -> None:
    """A constant channel: eps alone divides."""
    x = torch.full((2, 2, 3, 4, 4), 5.0)
    ws, wt = torch.ones(3, 2, 1, 1, 1), torch.ones(2, 3, 1, 1, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        t = x.to(dtype).requires_grad_()
        norm = BatchNorm(None, None, training=True)
        y = conv2plus1d(t, ws.to(dtype), wt.to(dtype), norm=norm)
        (dx,) = torch.autograd.grad(y.sum(), t)
        assert not y.any() and dx.isfinite().all()


def test_float16_does_not_overflow_inside() -> None:
    """Sums of 4096 terms of 16 exceed float16 only where u itself is stored; statistics do not."""
    x = torch.full((1, 64, 8, 16, 16), 16.0, dtype=torch.float16)
    x[..., ::2] = -16
    ws = torch.full((4, 64, 1, 1, 1), 1.0, dtype=torch.float16)
    wt = torch.full((4, 4, 1, 1, 1), 1.0, dtype=torch.float16)
    mean, var = torch.zeros(4), torch.ones(4)
    norm = BatchNorm(mean, var, training=True, momentum=1.0)
    y = conv2plus1d(x, ws, wt, activation=None, norm=norm)
    assert y.isfinite().all()
    torch.testing.assert_close(var, torch.full((4,), 1024.0**2 * 2048 / 2047))  # > 65504
    torch.testing.assert_close(mean, torch.zeros(4))


def test_vendor_library_bugs_do_not_show() -> None:
    """bfloat16 convolutions of oneDNN that are wrong with one tap and dilation, or few columns."""
    temporal_first = Config(order="temporal-first", activation="silu", dtype=torch.bfloat16)
    for changes in (
        dict(
            channels=1, mid=16, out=31, size=(8, 7, 8), kernel=(2, 1, 1), stride=(1, 3, 1),
            dilation=(2, 3, 1),
        ),
        dict(
            channels=31, mid=17, out=2, size=(5, 9, 8), kernel=(2, 1, 3), padding="same",
            dilation=(2, 1, 1),
        ),
        dict(
            channels=24, mid=8, out=17, size=(4, 12, 2), kernel=(2, 2, 3), stride=(1, 3, 3),
            padding=(0, 0, 1),
        ),
        dict(
            channels=10, mid=2, out=2, size=(7, 5, 13), kernel=(3, 1, 2), padding=(1, 0, 0),
            groups=(2, 2),
        ),
        dict(
            channels=1, mid=8, out=1, size=(2, 9, 7), kernel=(2, 2, 4), stride=(1, 1, 2),
            padding=(0, 0, 1), dtype=torch.float16, order="spatial-first",
        ),
    ):  # fmt: skip
        assert fuzz.check(replace(temporal_first, batch=3, **changes), "auto") is None
