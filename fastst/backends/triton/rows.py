"""Spatial convolutions of few channels, as ones of the columns of their kernel.

A stem of 3 channels has an address for every element that it reads, of 2 bytes. Copied once with
its zeros around it, and 4 channels for 3, a row of its kernel reads neighbours: 7 columns × 4
channels, 28 numbers in a row of memory. Seen as channels they make the convolution one of a
column of taps, and of vectors. The copy reads the video once and writes a little more.
"""

from __future__ import annotations

from torch import Tensor

from ...problem.spec import Pass
from . import arguments, tiles
from .packing import Weight


def of(p: Pass) -> Pass | None:
    """The pass over rows that does the same, where the channels are few and it can be one."""
    kt, kh, kw = p.kernel
    thin = p.groups == 1 and p.in_channels < tiles.LEAST_K
    zeros = arguments.padding_modes(p) == ("zeros",) * 3
    if not thin or kw == 1 or p.dilation[2] != 1 or not zeros:
        return None
    return p._replace(
        in_channels=kw * _depth(p.in_channels, kw), kernel=(kt, kh, 1), stride=(*p.stride[:2], 1),
        padding=(0,) * 6,
    )  # fmt: skip


def _depth(channels: int, columns: int) -> int:
    """Channels in memory: a power of two, and enough of them for a row to be ``LEAST_K`` numbers.

    Not a number more is read: what lies beside a row may be NaN, and would be times a weight of 0.
    """
    depth = tiles.power(channels)
    while columns * depth < tiles.LEAST_K:
        depth *= 2
    return depth


def video(p: Pass, rows: Pass, x: Tensor, past: Tensor | None = None) -> Tensor:
    """What ``rows`` reads of x, and of the frames before it: a view.

    Each element is in as many places as columns read it.
    """
    n, _, *size = x.shape
    frames = 0 if past is None else past.shape[2]
    size[0] += frames
    c = p.in_channels  # x may have padding channels
    depth = _depth(c, p.kernel[2])
    before, after = p.padding[::2], p.padding[1::2]
    t, h, w = (s + b + a for s, b, a in zip(size, before, after, strict=True))
    out = (w - p.kernel[2]) // p.stride[2] + 1
    copy = x.new_zeros(n, t, h, w, depth)
    i, j, k = (slice(b, b + s) for b, s in zip(before, size, strict=True))
    inside = copy[:, i, j, k, :c]
    inside[:, frames:] = x[:, :c].permute(0, 2, 3, 4, 1)
    if past is not None:
        inside[:, :frames] = past.permute(0, 2, 3, 4, 1)
    strides = copy.stride()
    return copy.as_strided(
        (n, rows.in_channels, t, h, out), (strides[0], 1, *strides[1:3], p.stride[2] * depth)
    )


def weight(w: Tensor) -> Weight:
    """(K, C, kt, kh, kw) as one of a column of taps: rows of (tap, kw, C)."""
    c = w.shape[1]
    view = w.permute(0, 4, 1, 2, 3)[None, :, None, ..., None]  # (1, K, 1, kw, C, kt, kh, 1)
    return Weight(view, parts=_depth(c, w.shape[-1]))
