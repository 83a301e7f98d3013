"""Frames that ranks exchange: those that are needed, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fastst.rewrite import shard_time
from fastst.rewrite.frames import Window, _needs
from tests.support.ranks import (
    SIZE,
    Ranks,
)


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
