"""Frames that ranks give each other, so that each has what its windows along time read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.ranks import ranks_of
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


def read_frames(x: Tensor, window: Window, group: Any) -> Tensor:
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
        parts = [_local_frames(needs[me], q, frames) for q in ranks_of(group)]
        gifts = [_local_frames(wanted, me, frames) for wanted in needs]
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
        parts = [_local_frames(needs[me], q, frames) for q in ranks_of(group)]
        gifts = [_local_frames(wanted, me, frames) for wanted in needs]
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


def _local_frames(wanted: Sequence[int], rank: int, frames: int) -> list[int]:
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
