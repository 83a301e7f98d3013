"""Clips split along time over several ranks: the whole clip's numbers, or a refusal."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fastst
from fastst.rewrite import shard_time
from tests.support.ranks import (
    DTYPE,
    SIZE,
    TIGHT,
    Ranks,
    assert_same_step,
    batch,
    network,
    step,
)


def average_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= SIZE


def time_sharded(rank: int, convert: bool, channels_last: bool) -> None:
    x, target = batch()
    mesh = init_device_mesh("cpu", (SIZE,), mesh_dim_names=("time",))
    model = network()
    if convert:
        fastst.convert(model)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    shard_time.shard_time(model, mesh["time"], sample=x)
    before, whole = x.clone().requires_grad_(), network()
    step(whole, before, target)
    local = shard_time.split_time(x, mesh).clone().requires_grad_()
    step(model, local, target)
    average_gradients(model)
    assert_same_step(model, whole)
    # Every rank's loss is the whole one: the sum of both has twice its gradient.
    torch.testing.assert_close(local.grad, SIZE * shard_time.split_time(before.grad, mesh), **TIGHT)
    torch.testing.assert_close(
        model.eval()(shard_time.split_time(x, mesh)), whole.eval()(x), **TIGHT
    )
    shard_time.unshard_time(model)
    torch.testing.assert_close(model(x), whole(x), **TIGHT)
    assert type(model.stem) is nn.Conv3d
    assert type(model.norm) is nn.BatchNorm3d


@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
@pytest.mark.parametrize(("convert", "channels_last"), [(False, False), (True, True)])
def test_time_sharding_equals_the_whole_clip(
    ranks: Ranks, convert: bool, channels_last: bool
) -> None:
    ranks.run(time_sharded, convert, channels_last)


LAYERS = {
    "wide": lambda: nn.Conv3d(2, 3, (5, 1, 1), padding=(2, 0, 0)),
    "dilated past the neighbour": lambda: nn.Conv3d(
        2, 3, (3, 1, 1), padding=(7, 0, 0), dilation=(7, 1, 1)
    ),
    "strided shortcut": lambda: nn.Conv3d(2, 3, 1, 2),
    "even kernel, same": lambda: nn.Conv3d(2, 3, 4, padding="same"),
    "stride beyond the kernel": lambda: nn.Conv3d(2, 3, (3, 1, 1), (4, 1, 1), (1, 0, 0)),
    "replicate": lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"),
    "reflect": lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"),
    "grouped": lambda: nn.Conv3d(2, 4, 3, padding=1, groups=2),
    "batch norm": lambda: nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.BatchNorm3d(3)),
    "causal": lambda: fastst.Conv2Plus1d(2, 3, 3, padding=(0, 1, 1), causal=True),
    "causal, first frame repeated": lambda: fastst.Conv2Plus1d(
        2, 3, 3, (2, 1, 1), (0, 1, 1), causal=True, padding_mode=("zeros", "replicate")
    ),
    "temporal first": lambda: fastst.Conv2Plus1d(
        2, 3, 3, 2, 1, norm="batch", order="temporal-first"
    ),
    "parallel, causal": lambda: fastst.ParallelConv2Plus1d(
        2, 4, 3, 1, (0, 1, 1), combine="cat", causal=True
    ),
    "norm, activation, convolution": lambda: fastst.Conv3d(
        2,
        3,
        3,
        padding=((2, 0), 1, 1),
        input_norm=nn.BatchNorm3d(2),
        input_activation="silu",
        activation="relu",
    ),
    "norm, convolution, causal": lambda: fastst.Conv3d(
        2,
        3,
        3,
        (2, 1, 1),
        (0, 1, 1),
        padding_mode=("zeros", "replicate"),
        input_norm=nn.RMSNorm(2),
        causal=True,
    ),
    "max pool": lambda: nn.MaxPool3d(3, 2, 1),
    "max pool, rounding up": lambda: nn.MaxPool3d(3, 2, ceil_mode=True),
    "average pool": lambda: nn.AvgPool3d(3, (2, 1, 1), 1),
    "upsample": lambda: nn.Upsample(scale_factor=2),
}


def sharded_layer(rank: int, name: str) -> None:
    mesh = init_device_mesh("cpu", (SIZE,))
    torch.manual_seed(3)
    layer = LAYERS[name]().to(DTYPE)
    x = torch.randn(2, 2, 8, 5, 4, dtype=DTYPE, requires_grad=True)
    dy = torch.randn_like(y := layer(x))
    y.backward(dy)
    sharded = copy.deepcopy(layer)
    sharded.zero_grad()
    for m in sharded.modules():
        if isinstance(m, nn.BatchNorm3d):
            m.reset_running_stats()
    model = shard_time.shard_time(nn.Sequential(sharded), mesh)
    local = shard_time.split_time(x.detach(), mesh).clone().requires_grad_()
    got = model(local)
    got.backward(shard_time.split_time(dy, mesh))
    torch.testing.assert_close(got, shard_time.split_time(y, mesh), **TIGHT)
    torch.testing.assert_close(shard_time.gather_time(got, mesh), y.detach(), **TIGHT)
    torch.testing.assert_close(local.grad, shard_time.split_time(x.grad, mesh), **TIGHT)
    for p, q in zip(sharded.parameters(), layer.parameters(), strict=True):
        dist.all_reduce(p.grad)
        torch.testing.assert_close(p.grad, q.grad, **TIGHT)
    shard_time.unshard_time(model)
    torch.testing.assert_close(model(x), y, **TIGHT)
    assert type(sharded) is type(layer)
    for was, now in zip(layer.modules(), sharded.modules(), strict=True):
        assert vars(was).keys() == vars(now).keys()
    assert getattr(sharded, "causal", None) == getattr(layer, "causal", None)
    copy.deepcopy(model)


@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_sharded_layer(ranks: Ranks, name: str) -> None:
    ranks.run(sharded_layer, name)


# ---- what cannot be split


class MeanOverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x - x.mean(2, keepdim=True)


class NormAndConv(nn.Conv3d):
    def __init__(self) -> None:
        super().__init__(2, 2, 3, padding=1)
        self.norm = nn.BatchNorm3d(2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class WithPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.conv = nn.Parameter(torch.zeros(4, 1, 1)), nn.Conv3d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + self.positions)


def errors(rank: int) -> None:
    mesh = init_device_mesh("cpu", (SIZE,))
    refused = {
        "no class known": nn.GroupNorm(1, 2),
        "only 1 can be split": nn.AdaptiveAvgPool3d((2, 1, 1)),
        "LSTM": nn.LSTM(2, 2),
        "nearest": nn.Upsample(scale_factor=2, mode="trilinear"),
        "whole factor": nn.Upsample(scale_factor=(1.5, 1, 1)),
        r"1 \(NormAndConv\) is of no class known": NormAndConv(),
        r"1 \(ParametrizedConv3d\)": nn.utils.parametrizations.weight_norm(nn.Conv3d(2, 2, 3)),
        r"1 \(WithPositions\)": WithPositions(),
        "fewer frames at the ends": nn.AvgPool3d(3, padding=1, count_include_pad=False),
    }
    for message, module in refused.items():
        model = nn.Sequential(nn.Conv3d(2, 2, 3, padding=1), module)
        with pytest.raises(ValueError, match=message):
            shard_time.shard_time(model, mesh)
        assert type(model[0]) is nn.Conv3d  # nothing was changed
    sample = torch.randn(1, 2, 4, 3, 3)
    with pytest.raises(ValueError, match="no module shows it"):
        shard_time.shard_time(MeanOverTime(), mesh, sample=sample)
    with pytest.raises(ValueError, match="that 2 ranks divide, got 5"):
        shard_time.split_time(torch.randn(1, 2, 5, 3, 3), mesh)
    with pytest.raises(ValueError, match="one-dimensional"):
        shard_time.split_time(sample, init_device_mesh("cpu", (1, SIZE)))
    with pytest.raises(TypeError, match="DeviceMesh, got NoneType"):
        shard_time.shard_time(nn.Identity(), None)
    model = shard_time.shard_time(nn.Sequential(nn.Conv3d(2, 2, 3, 2, 1)), mesh)
    with pytest.raises(ValueError, match="shares that its stride divides"):
        model(torch.randn(1, 2, 3, 4, 4))
    with pytest.raises(ValueError, match="equal shares"):
        model(torch.randn(1, 2, 2 + 2 * rank, 4, 4))
    with pytest.raises(ValueError, match="is sharded already"):
        shard_time.shard_time(model, mesh)


def test_what_cannot_be_split_is_refused(ranks: Ranks) -> None:
    ranks.run(errors)
