"""The parallel layer on the native CPU kernels: one pass over x, and its gradients."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

import fastst
from fastst.backends import cpu
from fastst.backends.cpu import library
from fastst.functional import parallel_conv2plus1d
from tests.support import fuzz
from tests.support.fuzz import Limits

pytestmark = pytest.mark.skipif(
    isinstance(cpu.load(), str) and os.environ.get("FASTST_BUILD_CPU") != "1",
    reason=f"the backend {cpu.load()}",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def limits(**fixed: Any) -> Limits:
    usual = dict(
        op="parallel_conv2plus1d", norm="none", residual=False, outer_activation="none",
        outer_norm=False,
    )  # fmt: skip
    return Limits(dtypes=DTYPES, fixed=usual | fixed)


def test_forward() -> None:
    fuzz.fuzz("cpu", 60, limits(), first=fuzz.SEED + 1000, backward=False, least=1.0)


@pytest.mark.parametrize("combine", ["add", "cat"])
def test_forward_and_backward(combine: str) -> None:
    some = Limits(
        dtypes=DTYPES, fixed=limits(combine=combine, padding_mode=("zeros", "zeros")).fixed,
        accept=lambda c: combine == "cat" or c.mid == c.out,
    )  # fmt: skip
    fuzz.fuzz("cpu", 30, some, first=fuzz.SEED + 2000, least=1.0)


def test_weight_gradients_add_short_sums() -> None:
    """Where 384 products were one sum, its rounding was beyond the rule."""
    some = Limits(dtypes=DTYPES, fixed=limits(combine="cat", padding_mode=("zeros", "zeros")).fixed)
    fuzz.fuzz("cpu", 1, some, first=15015, least=1.0)


@pytest.mark.parametrize("threads", [1, 2])
def test_weights_that_outweigh_positions(threads: int) -> None:
    """Then blocks of weights go through all tiles: those of the second branch after the first's."""
    wide = limits(channels=64, mid=600, out=600, size=(2, 3, 3), batch=1, groups=(1, 1))
    several = Limits(work=10**8, dtypes=(torch.float32,), fixed=wide.fixed)
    torch.set_num_threads(threads)
    try:
        fuzz.fuzz("cpu", 4, several, backward=False, least=1.0)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("sums", ["direct", "winograd"])
def test_overflow_of_winograd_adds_nothing_twice(
    sums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of x is the sum of two convolutions, the second of them added in its place."""
    monkeypatch.setattr(library.Launcher, "sums", sums)
    torch.manual_seed(1)
    x = torch.randn(1, 16, 6, 10, 10, requires_grad=True)
    weights = torch.randn(16, 16, 1, 3, 3), torch.randn(16, 16, 3, 1, 1)
    dy = torch.randn(1, 16, 6, 10, 10)
    dy[0, 3, 2, 5, 5] = 1e37
    found = []
    for backend in ("cpu", "reference"):
        with fastst.use_backend(backend):
            y = parallel_conv2plus1d(x, *weights, padding=1)
            found.append(torch.autograd.grad(y, x, dy)[0])
    scale = found[1].abs().max()
    assert (found[0] - found[1]).abs().max() <= 1e-5 * scale
    small = found[1].abs() < 1e3
    torch.testing.assert_close(found[0][small], found[1][small], rtol=1e-4, atol=1e-4)


def test_auto_takes_it() -> None:
    layer = fastst.ParallelConv2Plus1d(8, 16, 3, padding=1)
    assert fastst.explain(layer, torch.randn(1, 8, 3, 5, 5)).backend == "cpu"
