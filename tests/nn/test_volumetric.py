"""Volumes as clips: anisotropic kernels, strides, padding and sizes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastst

# Kernel, stride, padding, dilation of (D, H, W), and padding modes in the plane and along depth.
GEOMETRIES = {
    "in the plane only": ((1, 3, 3), (1, 2, 2), (0, 1, 1), 1, "zeros"),
    "wide plane": ((3, 7, 5), (1, 2, 1), (1, 3, 2), 1, "zeros"),
    "deep": ((5, 1, 3), (2, 1, 1), (2, 0, 1), 1, "zeros"),
    "dilated plane": ((3, 3, 3), (1, 1, 1), (1, 2, 3), (1, 2, 3), "zeros"),
    "slices repeated": ((3, 5, 5), (1, 1, 1), (1, 2, 2), 1, ("zeros", "replicate")),
}


@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_anisotropic_layers(name: str, order: str) -> None:
    kernel, stride, padding, dilation, mode = GEOMETRIES[name]
    torch.manual_seed(0)
    layer = fastst.Conv2Plus1d(
        2, 3, kernel, stride, padding, dilation, padding_mode=mode, norm="batch", order=order,
        activation="leaky_relu", dtype=torch.float64,
    )  # fmt: skip
    convs = (layer.spatial, layer.temporal)
    first, second = convs if order == "spatial-first" else convs[::-1]
    separate = nn.Sequential(first, layer.norm, layer.activation, second)
    x = torch.randn(2, 2, 8, 15, 12, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), separate(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    dy = torch.randn_like(y)
    tensors = (x, *layer.parameters())
    got = torch.autograd.grad(y, tensors, dy)
    for a, b in zip(got, torch.autograd.grad(expected, tensors, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3)])
def test_scan_of_full_size(kernel: tuple[int, int, int]) -> None:
    """32 slices of 256×256 pixels."""
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in kernel)
    layer = fastst.Conv2Plus1d(1, 4, kernel, (1, 2, 2), padding, norm="batch").eval()
    x = torch.randn(1, 1, 32, 256, 256)
    with torch.no_grad():
        separate = nn.Sequential(layer.spatial, layer.norm, layer.activation, layer.temporal)
        y, expected = layer(x), separate(x)
        assert y.shape == (1, 4, 32, 128, 128)
        truth = separate.double()(x.double())
    error, theirs = ((t - truth).abs().max() for t in (y, expected))
    assert error <= 2 * theirs + 4 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_parallel_layer_on_a_volume() -> None:
    torch.manual_seed(0)
    layer = fastst.ParallelConv2Plus1d(
        2, 4, (3, 5, 3), (1, 2, 2), (1, 2, 1), combine="cat", dtype=torch.float64
    )
    x = torch.randn(1, 2, 6, 11, 9, dtype=torch.float64)
    expected = torch.cat((layer.spatial(x), layer.temporal(x)), 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)
