"""What a promise reads is what it was, or somebody is told."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastst
from tests.support.blocks import Block, compute_pair


def test_written_where_gradients_would_have_to_go() -> None:
    conv = nn.Sequential(nn.Conv3d(4, 6, (1, 3, 3)), nn.Conv3d(6, 4, (3, 1, 1)))
    fastst.convert(conv)
    u = conv[0](torch.randn(1, 4, 3, 6, 6))
    conv[0].weight.data.mul_(2)
    with pytest.raises(RuntimeError, match="fastst: weight of 0 changed after the call"):
        u.sum()


@pytest.mark.parametrize("pack", [torch.clone, lambda t: t], ids=["copies", "as they are"])
@pytest.mark.parametrize("name", ["s.bias", "n.weight", "n.bias", "s.weight", "t.bias"])
def test_written_before_backward_under_hooks_that_save(name: str, pack: Any) -> None:
    """PyTorch checks no versions of what hooks save; backward of a pair reads more of it."""
    torch.manual_seed(0)
    plain = Block(compute_pair).double()
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    grads = []
    for m in (plain, converted):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = m(torch.ones(2, 4, 5, 6, 6, dtype=torch.float64).cumsum(3).cos())
        with torch.no_grad():
            m.get_parameter(name).mul_(2)
        read = name not in ("s.bias", "t.bias")  # no gradient depends on these
        if m is converted and pack is not torch.clone and read:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.square().sum().backward()
            return
        y.square().sum().backward()
        grads.append([p.grad for p in m.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_chains_hold_no_cycles(training: bool) -> None:
    """What they read would stay until somebody collects it."""
    block = Block(compute_pair).train(training)
    fastst.convert(block)

    def reads() -> weakref.ref[Tensor]:
        x = torch.randn(1, 4, 5, 6, 6)
        block(x).sum().backward()
        block.s(x) + 1
        return weakref.ref(x)

    gc.disable()
    try:
        assert reads()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("part", [slice(1), slice(2), slice(3), slice(4)])
@pytest.mark.parametrize("served", [False, True])
def test_what_has_been_read_holds_no_inputs(part: slice, served: bool) -> None:
    """Without gradients an output needs nothing of what it was made of."""
    model: Any = nn.Sequential(
        nn.Conv3d(4, 6, (1, 3, 3)), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 4, (3, 1, 1)),
    ).eval()  # fmt: skip
    wanted = model[part]
    if served:
        model = fastst.optimize_for_inference(model)
    fastst.convert(model)

    with torch.no_grad():
        x = torch.randn(1, 4, 5, 6, 6)
        expected, seen = wanted(x), weakref.ref(x)
        y = model[part](x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        del x
        assert seen() is None
        y.mul_(2)
        torch.testing.assert_close(y, 2 * expected, rtol=1e-4, atol=1e-5)


def test_a_value_without_inputs_that_is_written_under_its_chain() -> None:
    """What a norm has read of an output stays, though that can be computed no more."""
    plain = nn.Sequential(
        nn.Conv3d(4, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Conv3d(8, 4, 3, padding=1)
    ).eval()  # fmt: skip
    lone = copy.deepcopy(plain)
    fastst.convert(lone)
    found = []
    with torch.no_grad():
        for m in (plain, lone):
            y = m[0](torch.ones(1, 4, 5, 6, 6).cumsum(3).cos())
            y.sum()
            z = torch.relu(m[1](y))
            y.mul_(2)
            found.append((m[2](z), y + 0))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
