"""Data parallel and sharded training compute what one process does."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastst
from fastst.rewrite import shard_time
from tests.support.ranks import (
    SIZE,
    Ranks,
    assert_same_step,
    batch,
    network,
    step,
    whole_run,
)


def share(t: Tensor, rank: int) -> Tensor:
    return t.chunk(SIZE)[rank]


def ddp(rank: int, convert: bool) -> None:
    x, target = batch()
    model = shard_time.sync_batch_norm(network())
    if convert:
        fastst.convert(model)
    wrapped = DistributedDataParallel(model)
    with fastst.dispatch.recording() as calls:
        step(wrapped, share(x, rank), share(target, rank))
    assert ("conv2plus1d", "forward", "aten") in {(c.what, c.phase, c.chosen) for c in calls}
    assert_same_step(model, whole_run(x, target))


def fsdp(rank: int) -> None:
    x, target = batch()
    model = shard_time.sync_batch_norm(network())
    mesh = init_device_mesh("cpu", (SIZE,))
    for block in (model.body, model.cross, model.head, model):
        fully_shard(block, mesh=mesh)
    step(model, share(x, rank), share(target, rank))
    local = model.body.temporal.weight.to_local()
    assert local.numel() < model.body.temporal.weight.numel()
    assert_same_step(model, whole_run(x, target))


def without_synchronised_norms(rank: int) -> None:
    x, target = batch()
    model = network()
    step(DistributedDataParallel(model), share(x, rank), share(target, rank))
    with pytest.raises(AssertionError):
        assert_same_step(model, whole_run(x, target))


@pytest.mark.slow
@pytest.mark.parametrize("convert", [False, True])
def test_ddp_gradients_and_statistics_equal_one_process(ranks: Ranks, convert: bool) -> None:
    ranks.run(ddp, convert)


@pytest.mark.slow
def test_fsdp_gradients_and_statistics_equal_one_process(ranks: Ranks) -> None:
    ranks.run(fsdp)


def test_the_comparison_sees_norms_that_are_not_synchronised(ranks: Ranks) -> None:
    ranks.run(without_synchronised_norms)
