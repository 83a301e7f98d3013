"""What ``conv3d`` on PyTorch's operators writes, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastst
from fastst.backends import aten
from fastst.backends.aten import convolution
from fastst.functional import Norm, conv3d


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def largest(patch: pytest.MonkeyPatch, *args: Any, **settings: Any) -> tuple[int, torch.Tensor]:
    """Bytes of the largest tensor that the call makes, and y."""
    seen = Largest()

    def watched(*args: Any) -> Any:
        with seen:
            return convolution.conv3d(*args)

    patch.setattr(aten.BACKEND, "conv3d", watched)
    with fastst.use_backend("aten"), torch.no_grad():
        y = conv3d(*args, **settings)
    return seen.bytes, y


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
