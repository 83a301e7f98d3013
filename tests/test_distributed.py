"""Several processes must compute what one does: data parallel, sharded, and split along time."""

from __future__ import annotations

import copy
import unittest.mock
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastst
from fastst.problem import slicing
from fastst.ranks.collectives import Window, _needs
from fastst.rewrite import shard_time
from tests.support.ranks import SIZE, Ranks

DTYPE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    pool = Ranks()
    yield pool
    pool.close()


class Network(nn.Module):
    """A residual network with every kind of layer that reaches across time."""

    def __init__(self) -> None:
        super().__init__()
        pair = {"norm": "batch", "bias": False}
        self.stem = nn.Conv3d(3, 6, (3, 3, 3), (1, 2, 2), 1, bias=False)
        self.norm = nn.BatchNorm3d(6)
        self.pool = nn.MaxPool3d(3, (2, 1, 1), 1)
        self.body = fastst.Conv2Plus1d(6, 8, 3, 2, 1, **pair)
        self.shortcut = nn.Conv3d(6, 8, 1, 2, bias=False)
        self.cross = fastst.ParallelConv2Plus1d(8, 8, 3, 1, 1, branch_norm="batch", norm="batch")
        self.head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.stem(x)).relu())
        x = F.relu(self.body(x) + self.shortcut(x))
        return self.head(self.cross(x))


def batch(n: int = 4, frames: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, frames, 8, 7, generator=generator, dtype=DTYPE)
    return x, torch.randint(5, (n,), generator=generator)


def network() -> Network:
    torch.manual_seed(2)
    return Network().to(DTYPE)


def step(model: nn.Module, x: Tensor, target: Tensor) -> None:
    F.cross_entropy(model(x), target).backward()


def whole_run(x: Tensor, target: Tensor) -> Network:
    """One process on everything: gradients and running statistics to compare with."""
    model = network()
    step(model, x, target)
    return model


def assert_same_step(model: nn.Module, whole: nn.Module) -> None:
    got, want = dict(model.named_parameters()), dict(whole.named_parameters())
    assert got.keys() == want.keys()
    for name, p in want.items():
        grad = got[name].grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(grad, p.grad, **TIGHT, msg=lambda m, n=name: f"{n}: {m}")
    for name, b in whole.named_buffers():
        got_b = dict(model.named_buffers())[name]
        torch.testing.assert_close(got_b, b, **TIGHT, msg=lambda m, n=name: f"{n}: {m}")


def share(t: Tensor, rank: int) -> Tensor:
    return t.chunk(SIZE)[rank]


# ---- data parallel


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


@pytest.mark.parametrize("convert", [False, True])
def test_ddp_gradients_and_statistics_equal_one_process(ranks: Ranks, convert: bool) -> None:
    ranks.run(ddp, convert)


def test_fsdp_gradients_and_statistics_equal_one_process(ranks: Ranks) -> None:
    ranks.run(fsdp)


def test_the_comparison_sees_norms_that_are_not_synchronised(ranks: Ranks) -> None:
    ranks.run(without_synchronised_norms)


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
    got = synced(local)
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


# ---- split along time


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
    assert getattr(sharded, "causal", None) == getattr(layer, "causal", None)


@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_sharded_layer(ranks: Ranks, name: str) -> None:
    ranks.run(sharded_layer, name)


def traffic(rank: int) -> tuple[int, int]:
    """Elements sent forward and backward by a convolution of three taps."""
    mesh = init_device_mesh("cpu", (SIZE,))
    model = shard_time.shard_time(nn.Sequential(nn.Conv3d(2, 3, 3, padding=1)), mesh)
    sent, original = [], dist.batch_isend_irecv

    def counting(ops: list[dist.P2POp]) -> Any:
        sent.append(sum(op.tensor.numel() for op in ops if op.op is dist.isend))
        return original(ops)

    dist.batch_isend_irecv = counting
    try:
        x = torch.randn(2, 2, 6, 5, 4, requires_grad=True)
        model(x).sum().backward()
    finally:
        dist.batch_isend_irecv = original
    return tuple(sent)


def test_only_the_frames_that_are_needed_travel(ranks: Ranks) -> None:
    frame = 2 * 2 * 5 * 4
    assert ranks.run(traffic) == [(frame, frame), (frame, frame)]


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect", "circular"])
def test_plan_reads_what_the_padded_whole_clip_has(kernel: int, stride: int, mode: str) -> None:
    """Four ranks: the frames of all of them, laid end to end, are those of the whole clip."""
    window = Window(kernel, stride, 1, kernel // 2, kernel // 2, mode)
    frames, count = 4, 4
    clip = torch.arange(1.0, frames * count + 1).view(1, 1, -1)
    mode = "constant" if mode == "zeros" else mode
    padded = F.pad(clip, (kernel // 2,) * 2, mode=mode).flatten()
    for r, needs in enumerate(_needs(window, frames, count)):
        wanted = padded[r * frames :][: frames - stride + kernel].tolist()
        assert [n + 1 if n >= 0 else 0 for n in needs] == wanted


# ---- what cannot be split


class MeanOverTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x - x.mean(2, keepdim=True)


def errors(rank: int) -> None:
    mesh = init_device_mesh("cpu", (SIZE,))
    refused = {
        "no class known": nn.GroupNorm(1, 2),
        "only 1 can be split": nn.AdaptiveAvgPool3d((2, 1, 1)),
        "LSTM": nn.LSTM(2, 2),
        "nearest": nn.Upsample(scale_factor=2, mode="trilinear"),
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
