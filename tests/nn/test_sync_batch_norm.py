"""Batch norms over several ranks, by themselves and in pairs, as one process on all samples."""

from __future__ import annotations

import copy
import unittest.mock
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastst
from fastst.problem import slicing
from fastst.rewrite import shard_time
from tests.support import interpreter
from tests.support.ranks import DTYPE, TIGHT, Ranks


def sync_norm(rank: int, kind: type[nn.Module], shape: tuple[int, ...], cumulative: bool) -> None:
    """Unequal shares: the first rank has one sample, the second the rest."""
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(shape, dtype=DTYPE)
    dy = torch.randn_like(x)
    norm = kind(shape[1], momentum=None if cumulative else 0.3).to(DTYPE)
    nn.init.normal_(norm.weight)
    synced = shard_time.sync_batch_norm(copy.deepcopy(norm))
    mine = slice(0, 1) if rank == 0 else slice(1, None)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(y := norm(x), x, dy, retain_graph=True)
    y.backward(dy)
    local = x.detach()[mine].clone().requires_grad_()
    version = synced.running_mean._version
    got = synced(local)
    assert synced.running_mean._version == version  # as PyTorch's kernels leave it
    got.backward(dy[mine])
    torch.testing.assert_close(got, y[mine], **TIGHT)
    torch.testing.assert_close(local.grad, dx[mine], **TIGHT)
    for name, p in norm.named_parameters():
        grad = dict(synced.named_parameters())[name].grad.clone()
        dist.all_reduce(grad)
        torch.testing.assert_close(grad, p.grad, **TIGHT)
    for name, b in norm.named_buffers():
        torch.testing.assert_close(dict(synced.named_buffers())[name], b, **TIGHT)
    torch.testing.assert_close(synced.eval()(local), norm.eval()(x)[mine], **TIGHT)


@pytest.mark.parametrize("cumulative", [False, True])
@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.BatchNorm3d, (3, 4, 2, 3, 2)), (nn.BatchNorm1d, (5, 4))]
)
def test_sync_batch_norm(ranks: Ranks, kind: Any, shape: tuple[int, ...], cumulative: bool) -> None:
    ranks.run(sync_norm, kind, shape, cumulative)


def one_value(rank: int, n: int, model: Any, x: Any) -> None:
    """A rank alone, and ranks of which the first has ``n`` samples and the others the rest."""
    groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
    for group, mine in ((groups[rank], x), (None, x[:n] if rank == 0 else x[n:])):
        synced = shard_time.sync_batch_norm(copy.deepcopy(model), group)
        before = copy.deepcopy(synced.state_dict())
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            synced(mine)
        for name, b in synced.state_dict().items():
            if group is None:  # PyTorch's own counts the batch that it refuses
                torch.testing.assert_close(b, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 0])
@pytest.mark.parametrize(
    "model", [nn.BatchNorm3d(4), fastst.Conv2Plus1d(4, 4, 1, norm="batch")], ids=["norm", "pair"]
)
def test_one_value_in_all_ranks_is_refused(ranks: Ranks, model: nn.Module, n: int) -> None:
    ranks.run(one_value, n, model, torch.randn(1, 4, 1, 1, 1))


PAIRS: dict[str, dict[str, Any]] = {
    "usual": {},
    "recompute, temporal first": dict(recompute=True, order="temporal-first"),
    "cumulative": dict(norm=lambda c: nn.BatchNorm3d(c, momentum=None)),
    "no running statistics": dict(norm=lambda c: nn.BatchNorm3d(c, track_running_stats=False)),
    "no affine": dict(norm=lambda c: nn.BatchNorm3d(c, affine=False)),
    "frozen": {},
}


def synced_pair(rank: int, name: str, backend: str, groups: int) -> None:
    """A pair on unequal shares against the same pair, with a plain norm, on all samples."""
    if backend == "triton":
        interpreter.prepare_child()
    torch.manual_seed(5)
    settings = dict(PAIRS[name])
    norm = settings.pop("norm", nn.BatchNorm3d)(4)
    whole = fastst.Conv2Plus1d(
        4, 4, 3, (1, 2, 1), 1, mid_channels=4, groups=groups, norm=norm, activation="silu",
        **settings,
    ).to(DTYPE)  # fmt: skip
    for p in whole.norm.parameters():
        nn.init.normal_(p)
    pair = shard_time.sync_batch_norm(copy.deepcopy(whole))
    if name == "frozen":
        whole.norm.eval()
        pair.norm.eval()
    x = 2 + torch.randn(3, 4, 3, 5, 4, dtype=DTYPE)
    mine = slice(0, 1) if rank == 0 else slice(1, None)
    local = x[mine].clone().requires_grad_()
    x.requires_grad_()
    y = whole(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    # What recomputes is cut into parts, of which the first rank has one and the second two.
    cut = unittest.mock.patch.object(slicing, "_LEAST_BYTES", 0)
    with cut, fastst.use_backend(backend), fastst.dispatch.recording() as calls:
        got = pair(local)
        got.backward(dy[mine])
    assert {call.chosen for call in calls} == {backend}
    sweeps = 2 * 2 if rank and "recompute" in name and backend != "reference" else 0
    assert len(calls) == 2 + sweeps
    torch.testing.assert_close(got, y[mine], **TIGHT)
    torch.testing.assert_close(local.grad, x.grad[mine], **TIGHT)
    for n, p in whole.named_parameters():
        grad = dict(pair.named_parameters())[n].grad
        dist.all_reduce(grad)
        torch.testing.assert_close(grad, p.grad, **TIGHT, msg=lambda m, n=n: f"{n}: {m}")
    with torch.no_grad(), fastst.use_backend(backend):
        torch.testing.assert_close(pair(local), whole(x)[mine], **TIGHT)
    for n, b in whole.named_buffers():
        torch.testing.assert_close(dict(pair.named_buffers())[n], b, **TIGHT)


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((n, b) for n in PAIRS for b in ("aten", "reference")),
     ("usual", "triton"), ("recompute, temporal first", "triton")],
)  # fmt: skip
def test_synced_pairs_equal_one_process(ranks: Ranks, name: str, backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    ranks.run(synced_pair, name, backend, 1)


def synced_gradients(rank: int, n: int, order: int) -> None:
    """Output, gradients, and their gradients, with ``n`` samples on the first rank."""
    torch.manual_seed(6)
    whole = fastst.Conv2Plus1d(2, 2, 3, padding=1, norm="batch", activation="silu").to(DTYPE)
    pair = shard_time.sync_batch_norm(copy.deepcopy(whole))
    x = torch.randn(3, 2, 3, 4, 4, dtype=DTYPE)
    mine = slice(0, n) if rank == 0 else slice(n, None)
    local = x[mine].clone().requires_grad_()
    x.requires_grad_()
    results = []
    for layer, clip in ((whole, x), (pair, local)):
        y = layer(clip)
        results.append([y])
        for _ in range(order):
            (y,) = torch.autograd.grad((y**2).sum(), clip, create_graph=order > 1)
            results[-1].append(y)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected[mine], **TIGHT)
    torch.testing.assert_close(pair.norm.running_var, whole.norm.running_var, **TIGHT)


@pytest.mark.parametrize(("n", "order"), [(0, 1), (1, 2)])
def test_synced_pairs_to_second_order_and_without_samples(ranks: Ranks, n: int, order: int) -> None:
    ranks.run(synced_gradients, n, order)
