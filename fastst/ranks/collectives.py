"""What ranks tell each other: frames, statistics of batch norms and sums, with their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ..problem.spec import pad_index


class Window(NamedTuple):
    """What a sliding operation reads along time."""

    kernel: int
    stride: int
    dilation: int
    before: int  # frames of padding
    after: int
    mode: str
    fill: float = 0.0  # of mode "zeros"


@lru_cache(maxsize=1024)
def _needs(window: Window, frames: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """For every rank, the index in the whole clip of each frame it reads; −1 where it is padding.

    Args:
        frames: of each rank.
    """
    total = frames * ranks
    reach = window.dilation * (window.kernel - 1) + 1
    outputs = (total + window.before + window.after - reach) // window.stride + 1
    if frames % window.stride or outputs * window.stride != total:
        raise ValueError(
            f"a time-sharded module requires shares that its stride divides and an output of "
            f"T / stride frames, got {frames} frames on each of {ranks} ranks, kernel "
            f"{window.kernel}, stride {window.stride}, dilation {window.dilation}, padding "
            f"{window.before} + {window.after}, which gives {outputs} frames"
        )
    if window.mode == "zeros":
        padded = range(-window.before, total + window.after)
        source = [i if 0 <= i < total else -1 for i in padded]
    else:
        cpu = torch.device("cpu")
        source = pad_index(window.mode, total, window.before, window.after, cpu).tolist()
    length = frames - window.stride + reach
    return tuple(tuple(source[r * frames :][:length]) for r in range(ranks))


def read(x: Tensor, window: Window, group: Any) -> Tensor:
    """The frames that this rank's windows read, padding included.

    Args:
        x: this rank's frames, (N, C, T, H, W).
    """
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    needs = _needs(window, x.shape[2], ranks)
    x = _Fetch.apply(x, needs, group)
    wanted = needs[me]
    if window.mode == "zeros":
        before = next((i for i, n in enumerate(wanted) if n >= 0), len(wanted))
        after = len(wanted) - before - x.shape[2]
        return F.pad(x, (0, 0, 0, 0, before, after), value=window.fill) if before or after else x
    at = {n: i for i, n in enumerate(sorted(set(wanted)))}
    if list(wanted) == list(at):
        return x
    return x.index_select(2, torch.tensor([at[n] for n in wanted], device=x.device))


class _Fetch(torch.autograd.Function):
    """Each frame that this rank reads, once, in the order of the clip; gradients go back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, needs: tuple[tuple[int, ...], ...], group: Any) -> Tensor:
        frames, me = x.shape[2], dist.get_rank(group)
        ctx.needs, ctx.group, ctx.frames = needs, group, frames
        ctx.channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
        # parts[q]: what this rank reads of rank q; gifts[r]: what rank r reads of this one.
        parts = [_owned(needs[me], q, frames) for q in ranks_of(group)]
        gifts = [_owned(wanted, me, frames) for wanted in needs]
        sent = [_select(x, gift).contiguous() if r != me else None for r, gift in enumerate(gifts)]
        received = [
            x.new_empty(*x.shape[:2], len(part), *x.shape[3:]) if q != me else None
            for q, part in enumerate(parts)
        ]
        _swap(sent, received, group)
        pieces = [_select(x, parts[me]) if r is None else r for r in received]
        pieces = [p for p in pieces if p.shape[2]]
        y = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
        return y.contiguous(memory_format=_format(ctx.channels_last))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        needs, group, frames = ctx.needs, ctx.group, ctx.frames
        me = dist.get_rank(group)
        parts = [_owned(needs[me], q, frames) for q in ranks_of(group)]
        gifts = [_owned(wanted, me, frames) for wanted in needs]
        pieces = dy.split([len(p) for p in parts], 2)
        sent = [p.contiguous() if q != me else None for q, p in enumerate(pieces)]
        received = [
            dy.new_empty(*dy.shape[:2], len(gift), *dy.shape[3:]) if r != me else None
            for r, gift in enumerate(gifts)
        ]
        _swap(sent, received, group)
        shape = (*dy.shape[:2], frames, *dy.shape[3:])
        dx = torch.empty(
            shape, dtype=dy.dtype, device=dy.device, memory_format=_format(ctx.channels_last)
        ).zero_()
        received[me] = pieces[me]
        for gift, grad in zip(gifts, received, strict=True):
            if gift and grad is not None:
                dx.index_add_(2, torch.tensor(gift, device=dy.device), grad)
        return dx, None, None


class Sum(torch.autograd.Function):
    """Sum over ranks; the gradient is the sum of the ranks' gradients, to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        y = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(y, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return Sum.apply(dy, ctx.group), None


def _swap(sent: list[Tensor | None], received: list[Tensor | None], group: Any) -> None:
    """Send to and receive from every rank at once; nothing passes where there is nothing."""
    ops = []
    for peer, (gift, part) in enumerate(zip(sent, received, strict=True)):
        if gift is not None and gift.numel():
            ops.append(dist.P2POp(dist.isend, gift, group=group, group_peer=peer))
        if part is not None and part.numel():
            ops.append(dist.P2POp(dist.irecv, part, group=group, group_peer=peer))
    for work in dist.batch_isend_irecv(ops) if ops else ():
        work.wait()


def _owned(wanted: Sequence[int], rank: int, frames: int) -> list[int]:
    """Frames of ``wanted`` that a rank holds, each once, counted from its first one."""
    first = rank * frames
    return sorted({n - first for n in wanted if first <= n < first + frames})


def _select(x: Tensor, frames: list[int]) -> Tensor:
    """These frames of x, in ascending order; a view where they are neighbours."""
    if not frames:
        return x[:, :, :0]
    if frames[-1] - frames[0] + 1 == len(frames):
        return x[:, :, frames[0] : frames[-1] + 1]
    return x.index_select(2, torch.tensor(frames, device=x.device))


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def _channel(v: Tensor, x: Tensor) -> Tensor:
    """(C,) to the rank of x."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def ranks_of(group: Any) -> range:
    """The ranks of a process group, counted within it."""
    return range(dist.get_world_size(group))


def group_name(norm: nn.Module) -> str:
    """Name of the process group over which a norm takes its statistics; "" if over its own batch.

    The name is plain data that an op can be told; ``resolve`` gives the group back.
    """
    if not isinstance(norm, nn.SyncBatchNorm | SyncBatchNorm) or not norm.training:
        return ""
    if not dist.is_available() or not dist.is_initialized():
        return ""
    group: Any = norm.process_group or dist.group.WORLD
    return str(group.group_name) if dist.get_world_size(group) > 1 else ""


def resolve(name: Any) -> Any:
    """The process group of a name."""
    return dist.distributed_c10d._resolve_process_group(name)


def pool_statistics(
    mean: Tensor, var: Tensor, count: int, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values, (), of all ranks together.

    Args:
        mean, var: (C,) of this rank's values, the variance biased.
        count: how many values this rank has of each channel; ranks may have different numbers.
        group: a process group.
    """
    local = torch.cat((mean, var, mean.new_full((1,), count)))
    parts = [torch.empty_like(local) for _ in ranks_of(group)]
    dist.all_gather(parts, local, group=group)
    # Of a rank without values the mean is 0/0.
    table = torch.stack([torch.where(part[-1] > 0, part, 0) for part in parts])
    counts = table[:, -1:]
    means, variances = table[:, :-1].tensor_split(2, 1)  # (ranks, C) each
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / total
    return mean, var, total


def pool_means(sums: Tensor, count: int, group: Any) -> Tensor:
    """Means over the values of all ranks, of the shape of ``sums``.

    Args:
        sums: of this rank's values, any shape.
        count: how many values they are of.
    """
    pooled = torch.cat((sums.flatten(), sums.new_full((1,), count)))
    dist.all_reduce(pooled, group=group)
    return (pooled[:-1] / pooled[-1]).view(sums.shape)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, biased variance, number of values) of a batch norm over all ranks of a group.

    Of differentiable operators, to any order. ``SyncedNorm`` is the same to the first order, and
    exchanges what the op does.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    dims = [0, *range(2, x.dim())]
    total = wide.new_full((), x.numel() // x.shape[1])
    dist.all_reduce(total, group=group)
    mean = Sum.apply(wide.sum(dims), group) / total
    away = wide - _channel(mean, x)
    var = Sum.apply((away * away).sum(dims), group) / total
    y = away * _channel((var + eps).rsqrt(), x)
    y = y if weight is None else y * _channel(weight, x)
    y = y if bias is None else y + _channel(bias, x)
    return y.to(x.dtype), mean.detach(), var.detach(), total


class SyncBatchNorm(_BatchNorm):
    """Batch norm with training statistics over all ranks of ``process_group`` together.

    ``nn.SyncBatchNorm`` for any device (PyTorch's own refuses the CPU). Ranks may hold different
    numbers of values. Outside of a process group, and in evaluation, it is a plain batch norm.
    """

    process_group: Any = None  # None: the whole world

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm requires (N, C, ...), got {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        self._check_input_dim(x)
        group = self.process_group or dist.group.WORLD
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        y, mean, var, n = SyncedNorm.apply(x, self.weight, self.bias, self.eps, group)
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                unbiased = var * (n / (n - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return y


def sync_batch_norm(model: nn.Module, group: Any = None) -> nn.Module:
    """Let every batch norm of a model take its training statistics over all ranks, in place.

    As ``nn.SyncBatchNorm.convert_sync_batchnorm``, but on the CPU too, and modules and parameters
    stay the same objects. On a GPU the class is PyTorch's, which has kernels of its own there.

    Args:
        group: process group; None for the whole world.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            on_gpu = module.weight is not None and module.weight.is_cuda
            kind = nn.SyncBatchNorm if on_gpu else SyncBatchNorm
            object.__setattr__(module, "__class__", kind)
            module.process_group = group
    return model


class SyncedNorm(torch.autograd.Function):
    """(y, mean, biased variance, values per channel) of a batch norm over all ranks of a group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> Any:
        wide = x if x.dtype == torch.float64 else x.float()
        dims = [0, *range(2, x.dim())]
        mean = wide.mean(dims)
        var = (wide - _channel(mean, x)).square_().mean(dims)
        mean, var, n = pool_statistics(mean, var, x.numel() // x.shape[1], group)
        rstd = (var + eps).rsqrt()
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        y = torch.addcmul(_channel(shift, x), wide, _channel(scale, x)).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.group, ctx.bias = group, bias is not None
        ctx.mark_non_differentiable(mean, var, n)
        return y, mean, var, n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        dims = [0, *range(2, x.dim())]
        wide = dy.to(mean.dtype)
        normalised = (x.to(mean.dtype) - _channel(mean, x)) * _channel(rstd, x)
        dbias = wide.sum(dims)
        dweight = (wide * normalised).sum(dims)
        means = pool_means(torch.stack((dbias, dweight)), x.numel() // x.shape[1], ctx.group)
        scale = rstd if weight is None else rstd * weight
        dx = wide - _channel(means[0], x) - normalised * _channel(means[1], x)
        dx = (dx * _channel(scale, x)).to(x.dtype)
        grads = (dx, dweight if weight is not None else None, dbias if ctx.bias else None)
        return *grads, None, None
