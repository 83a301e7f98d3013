"""What ``conv3d`` on PyTorch's operators writes, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastst
from fastst.backends import aten
from fastst.backends.aten import convolution
from fastst.functional import Norm, conv3d
from tests.support.made import Made, watched


def largest(patch: pytest.MonkeyPatch, *args: Any, **settings: Any) -> tuple[int, torch.Tensor]:
    """Bytes of the largest tensor that the call makes, and y."""
    made = Made()
    patch.setattr(aten.BACKEND, "conv3d", watched(convolution.conv3d, made))
    with fastst.use_backend("aten"), torch.no_grad():
        y = conv3d(*args, **settings)
    return made.largest, y


@pytest.mark.parametrize(
    "settings",
    [
        dict(input_norm=Norm("group", groups=2), input_activation="silu", padding=1),
        dict(causal=True, padding=(0, 1, 1)),
        dict(padding=(2, 1, 1), padding_mode="replicate"),
        dict(input_norm=Norm("rms"), past=torch.randn(1, 8, 2, 6, 6), causal=True),
    ],
)
def test_no_tensor_as_large_as_x(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(1, 8, 40, 6, 6), torch.randn(2, 8, 3, 3, 3)
    size = x.untyped_storage().nbytes()
    whole, expected = largest(monkeypatch, x, w, **settings)
    assert whole >= size  # less than _CHUNK, and so at once
    monkeypatch.setattr(convolution, "_CHUNK", size // 6)
    chunked, y = largest(monkeypatch, x, w, **settings)
    assert chunked < size / 2
    torch.testing.assert_close(y, expected)


def test_what_pytorch_pads_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(1, 8, 40, 6, 6), torch.randn(2, 8, 3, 3, 3)
    assert largest(monkeypatch, x, w, padding=1)[0] < x.untyped_storage().nbytes()
