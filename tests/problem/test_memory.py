"""Reading a tensor moves no memory: neither a kernel's reading nor PyTorch's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastst
from fastst.problem import memory

_start: Any = torch._C._data_address  # type: ignore[attr-defined]


@pytest.mark.parametrize("address", [memory.read_address, memory._from_storage])
def test_an_address_is_that_of_the_first_element(address: Any) -> None:
    x = torch.randn(4, 5, dtype=torch.bfloat16)
    for t in (x, x[1:], x.t()[2:, 1:]):
        assert address(t) == t.data_ptr()
    clone = torch._lazy_clone(x)
    assert address(x) == address(clone)
    assert torch._C._is_cow_tensor(x)


LAYERS: dict[str, Any] = {
    "pair": lambda: fastst.Conv2Plus1d(6, 4, 3, padding=1, norm="batch"),
    "temporal first": lambda: fastst.Conv2Plus1d(6, 4, 3, padding=1, order="temporal-first"),
    "depthwise": lambda: fastst.Conv2Plus1d(6, 6, 3, mid_channels=6, padding=1, groups=6),
    "parallel": lambda: fastst.ParallelConv2Plus1d(6, 4, 3, padding=1),
    "whole": lambda: fastst.Conv3d(6, 4, 3, padding=1, input_norm=nn.BatchNorm3d(6)),
    "converted": lambda: converted(),
    "served": lambda: fastst.optimize_for_inference(converted()),
}


def converted() -> nn.Module:
    model = nn.Sequential(
        nn.Conv3d(6, 8, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(8), nn.ReLU(),
        nn.Conv3d(8, 4, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(4), nn.ReLU(),
    )  # fmt: skip
    fastst.convert(model)
    return model


def read_by(module: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What a call reads and does not write."""
    yield "x", x
    yield from module.named_parameters()
    if not module.training:
        yield from module.named_buffers()


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["inference", "frozen", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_reading_moves_no_memory(
    name: str, dtype: torch.dtype, mode: str, channels_last: bool, backend: str
) -> None:
    torch.manual_seed(0)
    layer = copy.deepcopy(LAYERS[name]()).to(dtype).train(mode == "training")
    x = torch.randn(2, 6, 4, 6, 6, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        layer = layer.to(memory_format=torch.channels_last_3d)
    x.requires_grad_(mode != "inference")
    read = dict(read_by(layer, x))
    clones = {n: torch._lazy_clone(t.detach()) for n, t in read.items()}
    before = {n: _start(t) for n, t in read.items()}
    with fastst.use_backend(backend), torch.set_grad_enabled(mode != "inference"):
        y = layer(x)
        if y.requires_grad:
            y.float().square().sum().backward()
        y.sum().item()
    assert {n: _start(t) for n, t in read.items()} == before
    for n, t in read.items():
        assert _start(clones[n]) == before[n], n
        assert torch.equal(clones[n], t), n


def test_what_is_written_by_address_has_memory_of_its_own_first() -> None:
    """A clone of running statistics stays what it was."""
    layer = fastst.Conv2Plus1d(4, 4, 3, padding=1, norm="batch")
    mean = next(b for n, b in layer.named_buffers() if n.endswith("running_mean"))
    clone = torch._lazy_clone(mean)
    layer(torch.randn(2, 4, 3, 6, 6) + 3)
    assert mean.any()
    assert not clone.any()
