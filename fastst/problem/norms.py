"""Norms of what a convolution reads: over which values they take their statistics, and gradients.

For all of them, channel by channel::

    v = (x − mean)·r·γ + β,      r = 1/√(var + eps)

where mean and var belong to a set of values of x: a channel ("batch", "frozen"), the channels of a
group in a clip or a frame ("group"), the channels of one position ("layer", "rms", "l2"). "rms" and
"l2" leave the mean out, and their var is the mean of squares; "l2" is
``F.normalize(x, dim=1, eps=eps)·√C``, so r = 1/max(√var, eps/√C).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("none", "batch", "frozen", "group", "layer", "rms", "l2")
_BY_CHANNEL = ("batch", "frozen")
_BY_POSITION = ("layer", "rms", "l2")
_CENTRED = ("batch", "frozen", "group", "layer")


class Norm(NamedTuple):
    """A norm by statistics of each clip, frame or position: no batch norm.

    Attributes:
        kind: "group" (``nn.GroupNorm``), "instance" (``nn.InstanceNorm3d``), "layer"
            (``F.layer_norm`` over the channels of each position), "rms" (``F.rms_norm`` likewise)
            or "l2" (``F.normalize`` likewise, times √C).
        weight: (C,) γ, or None for ones.
        bias: (C,) β, or None for zeros.
        groups: of "group".
        per_frame: "group" and "instance" see each frame by itself, not the whole clip.
        eps: added to the variance or the mean square; of "l2" the least norm.
    """

    kind: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    groups: int = 1
    per_frame: bool = False
    eps: float = 1e-5


def frame_by_frame(norm: Norm) -> bool:
    """Whether v of a frame depends on no other frame."""
    return norm.kind not in ("batch", "group", "instance") or norm.per_frame


def size_of_statistics(norm: Norm, x: Sequence[int]) -> tuple[int, ...]:
    """Shape of mean and variance for x of a shape: (C,), (N, G, 1 or T), or (N, T, H, W)."""
    n, c, t, h, w = x
    if norm.kind in _BY_CHANNEL:
        return (c,)
    if norm.kind == "group":
        return n, norm.groups, t if norm.per_frame else 1
    return n, t, h, w


class Sets(NamedTuple):
    """Positions that share the statistics of a norm that is none by position."""

    number: int
    length: int  # positions of each
    frames: int  # sets of a clip


def sets_of(norm: Norm, x: Sequence[int]) -> Sets:
    """Of x of a shape; of a norm by position one, of all."""
    n, _, t, h, w = x
    if norm.kind != "group":
        return Sets(1, n * t * h * w, 1)
    return Sets(n * t, h * w, t) if norm.per_frame else Sets(n, t * h * w, 1)


def part_of_statistics(
    norm: Norm, statistic: Tensor | None, clips: slice, frames: slice
) -> Tensor | None:
    """Mean or variance as they are for some clips and frames of x."""
    if statistic is None or norm.kind in _BY_CHANNEL:
        return statistic
    if norm.kind == "group":
        return statistic[clips, :, frames] if norm.per_frame else statistic[clips]
    return statistic[clips, frames]


def is_centred(kind: str) -> bool:
    return kind in _CENTRED


def by_position(kind: str) -> bool:
    """Whether each position has statistics of its own."""
    return kind in _BY_POSITION


def _groups_and_axes(norm: Norm, channels: int) -> tuple[int, tuple[int, ...]]:
    """Groups of channels, and the axes of (N, G, C/G, T, H, W) over which statistics go."""
    if norm.kind in _BY_CHANNEL:
        return channels, (0, 2, 3, 4, 5)
    if norm.kind == "group":
        return norm.groups, (2, 4, 5) if norm.per_frame else (2, 3, 4, 5)
    return 1, (2,)


def _broadcast(norm: Norm, statistic: Tensor, x: Tensor) -> Tensor:
    """A mean or variance as it broadcasts against (N, G, C/G, T, H, W)."""
    if norm.kind in _BY_CHANNEL:
        return statistic.view(1, -1, 1, 1, 1, 1)
    if norm.kind == "group":
        n, g, t = statistic.shape
        return statistic.view(n, g, 1, t, 1, 1)
    n, t, h, w = statistic.shape
    return statistic.view(n, 1, 1, t, h, w)


def _per_channel(norm: Norm, vector: Tensor, groups: int) -> Tensor:
    """γ or β as it broadcasts against (N, G, C/G, T, H, W)."""
    return vector.view(1, groups, -1, 1, 1, 1)


def rstd(norm: Norm, var: Tensor, channels: int) -> Tensor:
    """r of a variance."""
    if norm.kind == "l2":
        return var.sqrt().clamp_min(norm.eps / math.sqrt(channels)).reciprocal()
    return (var + norm.eps).rsqrt()


def of_channels(norm: Norm, statistic: Tensor, channels: int) -> Tensor:
    """A statistic of groups, (N, G, T), as one of channels, (N, T, C); others as they are."""
    if norm.kind != "group":
        return statistic
    return statistic.repeat_interleave(channels // norm.groups, 1).transpose(1, 2)


def of_sets(norm: Norm, mean: Tensor, var: Tensor, x: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The statistics of a norm of x from those of the channels of its sets, (sets, C)."""
    if norm.kind == "group":
        # Of as many values each: those of the channels of a group together.
        sets = sets_of(norm, x)
        of_groups = (sets.number, norm.groups, x[1] // norm.groups)
        among, mean = torch.var_mean(mean.view(of_groups), 2, correction=0)
        var = var.view(of_groups).mean(2).add_(among)
        mean, var = (
            s.view(-1, sets.frames, norm.groups).transpose(1, 2).contiguous() for s in (mean, var)
        )
    shape = size_of_statistics(norm, x)
    return mean.view(shape), var.view(shape)


def tables(
    norm: Norm, channels: int, mean: Tensor | None, var: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """What kernels compute v by, from statistics: v = (x̂ − mean)·scale + β of each channel.

    Returns:
        (5, C) of mean, scale, β and zeros, or such a table for each clip, (N, 1, 5, C), or frame,
        (N, T, 5, C); and (2, N, T, H, W), mean and factor of each position, for
        x̂ = (x − mean)·factor, or None where x̂ is x.
    """
    zero = torch.zeros(channels, dtype=dtype, device=var.device)
    gamma = zero + 1 if norm.weight is None else norm.weight.to(dtype)
    beta = zero if norm.bias is None else norm.bias.to(dtype)
    r = rstd(norm, var.to(dtype), channels)
    if by_position(norm.kind):
        table = torch.stack((zero, gamma, beta, zero, zero))
        return table, torch.stack((torch.zeros_like(r) if mean is None else mean.to(dtype), r))
    assert mean is not None
    mean, r = (of_channels(norm, s, channels) for s in (mean.to(dtype), r))
    rows = torch.broadcast_tensors(mean, r * gamma, beta, zero, zero)
    return torch.stack(rows, -2), None


def apply_table(y: Tensor, table: Tensor) -> Tensor:
    """(y − mean)·scale + β of each channel, by such a table of all clips; in strides like y's."""
    mean, scale, beta, *_ = table
    v = F.batch_norm(y, mean, torch.ones_like(mean), scale, beta, eps=0.0)
    return v if v.stride() == y.stride() else torch.empty_like(y).copy_(v)


def moments(norm: Norm, x: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """Mean, unless it is left out, and biased variance of x, in a dtype and the shape above."""
    groups, axes = _groups_and_axes(norm, x.shape[1])
    values = x.unflatten(1, (groups, -1))
    shape = size_of_statistics(norm, x.shape)
    if is_centred(norm.kind):
        var, mean = torch.var_mean(values.to(dtype), axes, correction=0)
        return mean.view(shape), var.view(shape)
    length = torch.linalg.vector_norm(values, 2, axes, dtype=dtype)
    return None, length.square().div_(x.shape[1]).view(shape)


def apply(norm: Norm, x: Tensor, mean: Tensor | None, var: Tensor, dtype: torch.dtype) -> Tensor:
    """v of x by given statistics, in the dtype in which it is computed."""
    groups, _ = _groups_and_axes(norm, x.shape[1])
    values = x.unflatten(1, (groups, -1)).to(dtype)
    r = _broadcast(norm, rstd(norm, var.to(dtype), x.shape[1]), x)
    if norm.kind in (*_BY_CHANNEL, "group") and norm.weight is not None:
        r = r * _per_channel(norm, norm.weight.to(dtype), groups)
    v = values * r if mean is None else (values - _broadcast(norm, mean.to(dtype), x)).mul_(r)
    if norm.kind not in (*_BY_CHANNEL, "group") and norm.weight is not None:
        v.mul_(_per_channel(norm, norm.weight.to(dtype), groups))
    if norm.bias is not None:
        v.add_(_per_channel(norm, norm.bias.to(dtype), groups))
    return v.flatten(1, 2)


def gradient(
    norm: Norm,
    dv: Tensor,
    x: Tensor,
    mean: Tensor | None,
    var: Tensor,
    needs: Sequence[bool],
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, γ and β where needed, in a dtype; statistics count as functions of x, but
    those of "frozen"."""
    groups, axes = _groups_and_axes(norm, x.shape[1])
    r = _broadcast(norm, rstd(norm, var.to(dtype), x.shape[1]), x)
    values, g = (a.unflatten(1, (groups, -1)).to(dtype) for a in (x, dv))
    away = (values if mean is None else values - _broadcast(norm, mean.to(dtype), x)) * r
    dgamma = (g * away).sum((0, 3, 4, 5)).flatten() if needs[1] else None
    dbeta = g.sum((0, 3, 4, 5)).flatten() if needs[2] else None
    if not needs[0]:
        return None, dgamma, dbeta
    if norm.weight is not None:
        g = g * _per_channel(norm, norm.weight.to(dtype), groups)
    if norm.kind != "frozen":
        projected = (g * away).mean(axes, keepdim=True)
        if norm.kind == "l2":  # where the norm is held at its least it is a constant
            least = norm.eps / math.sqrt(x.shape[1])
            projected = projected * (_broadcast(norm, var.to(dtype), x).sqrt() >= least)
        centre = g.mean(axes, keepdim=True) if is_centred(norm.kind) else 0
        g = g - away.mul_(projected) - centre
    return (g * r).flatten(1, 2), dgamma, dbeta
