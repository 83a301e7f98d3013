"""What ranks tell each other: sums and statistics over all of their values, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def ranks_of(group: Any) -> range:
    """The ranks of a process group, counted within it."""
    return range(dist.get_world_size(group))


def resolve(name: Any) -> Any:
    """The process group of a name."""
    return dist.distributed_c10d._resolve_process_group(name)


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


def pool_statistics(
    mean: Tensor, var: Tensor, count: int, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values, (), of all ranks together.

    Args:
        mean, var: (C,) of this rank's values, the variance biased.
        count: how many values this rank has of each channel; ranks may have different numbers.
        group: a process group.

    Raises:
        ValueError: all ranks together have one value, on every one of them.
    """
    local = torch.cat((mean, var, mean.new_full((1,), count)))
    parts = [torch.empty_like(local) for _ in ranks_of(group)]
    dist.all_gather(parts, local, group=group)
    # Of a rank without values the mean is 0/0.
    table = torch.stack([torch.where(part[-1] > 0, part, 0) for part in parts])
    counts = table[:, -1:]
    means, variances = table[:, :-1].tensor_split(2, 1)  # (ranks, C) each
    total = counts.sum()
    if count <= 1 and total == 1:  # total may be on a GPU: read where it can be 1 alone
        raise ValueError(
            "batch norm in training requires more than 1 value per channel, got 1 in "
            f"{len(parts)} ranks together"
        )
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


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor,
    n: int | Tensor, momentum: float,
) -> None:  # fmt: skip
    """Running statistics as ``torch.nn.functional.batch_norm`` leaves them, of n values.

    With its version counters as well, which PyTorch's kernels do not raise: backward of a call
    before this one has saved the same tensors, and reads no values of theirs.

    Args:
        mean, var: (C,) of the values, the variance biased.
    """
    counted = tuple(
        t for t in (running_mean, running_var)
        if t is not None and not (torch.compiler.is_compiling() or t.is_inference())
    )  # fmt: skip
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(counted):
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var * (n / (n - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)


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


def _channel(v: Tensor, x: Tensor) -> Tensor:
    """(C,) to the rank of x."""
    return v.view(1, -1, *[1] * (x.dim() - 2))
