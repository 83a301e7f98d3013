"""What is held between forward and backward, in bytes of unique storages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastst


def held(call: Callable[[], Tensor], *own: Tensor) -> int:
    """Bytes that autograd keeps for backward, parameters not counted."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)  # alive, so that no address is used twice
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    for t in own:
        storages.pop(t.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return sum(storages.values())


def pair(**settings: Any) -> tuple[fastst.Conv2Plus1d, Tensor]:
    layer = fastst.Conv2Plus1d(64, 64, 3, padding=1, bias=False, **settings)
    assert layer.mid_channels == 144
    return layer, torch.randn(1, 64, 4, 14, 14, requires_grad=True)


def eager(layer: Any) -> nn.Sequential:
    return nn.Sequential(
        layer.spatial, layer.norm or nn.Identity(), layer.activation, layer.temporal
    )


def share(layer: Any, x: Tensor) -> float:
    parameters = list(layer.parameters())
    ours = held(lambda: layer(x), *parameters)
    peer = held(lambda: eager(layer)(x), *parameters)
    assert peer >= 4 * (64 + 2 * 144) * x[0, 0].numel()  # x, u and z: else the measure is wrong
    return ours / peer


@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_keeps_x_and_u(channels_last: bool) -> None:
    layer, x = pair(norm="batch")
    if channels_last:
        x = x.detach().to(memory_format=torch.channels_last_3d).requires_grad_()
    assert share(layer, x) <= 0.60


def test_recompute_keeps_only_x() -> None:
    assert share(*pair(norm="batch", recompute=True)) <= 0.20
    layer, x = pair(norm=None, recompute=True)
    assert held(lambda: layer(x), *layer.parameters()) == x.numel() * 4


def test_frozen_norm_keeps_no_more() -> None:
    layer, x = pair(norm="batch")
    assert share(layer.eval(), x) <= 0.60


def test_parallel_keeps_only_x() -> None:
    layer = fastst.ParallelConv2Plus1d(32, 32, 3, padding=1, branch_activation="relu")
    x = torch.randn(1, 32, 4, 14, 14, requires_grad=True)
    parameters = list(layer.parameters())
    assert held(lambda: layer(x), *parameters) == x.numel() * 4


def test_nothing_is_kept_that_nobody_needs() -> None:
    layer, x = pair(norm="batch")
    layer.requires_grad_(False)
    with torch.no_grad():
        y = layer(x)
    assert y.grad_fn is None


def test_the_measure_sees_a_tensor_that_is_kept() -> None:
    """Plant: saving z as well would break the limit."""
    layer, x = pair(norm="batch")
    z = torch.randn(1, 144, 4, 14, 14, requires_grad=True)
    extra = held(lambda: z.exp())
    assert extra == z.numel() * 4
    parameters = list(layer.parameters())
    peer = held(lambda: eager(layer)(x), *parameters)
    assert (held(lambda: layer(x), *parameters) + extra) / peer > 0.60


def test_backward_releases_what_was_kept() -> None:
    layer, x = pair(norm="batch")
    y = layer(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
