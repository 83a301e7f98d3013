"""A window of rotating sums, which the single-kernel pairs move along the axis of the second pass.

A program keeps its positions in the plane across that axis: the time of a spatial-first pair, the
rows of a temporal-first one. At each step it has one mid frame (or row) of them, of one residue
class modulo the dilation, and adds it to the sums of all outputs that read it: as many as the
kernel has taps along the axis. The oldest sum is then complete.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import positions, source
from .tap_conv import tile_positions


@triton.jit
def window_start(
    tile, y_size, grid, count, pieces, SECOND: tl.constexpr, AXIS: tl.constexpr,
    BLOCK_P: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Positions with 0 along the axis, which of them exist; residue, first and end of its outputs.

    Step s is at index residue + s·dilation of the padded mid tensor, and completes the output that
    starts ``taps − 1`` steps before. Programs share an axis, along which ``grid`` is 1, in
    ``pieces`` of whole outputs.
    """
    DILATION: tl.constexpr = SECOND.dilation[AXIS]
    piece = tile % pieces
    residue = tile // pieces % DILATION
    _, p = tile_positions(tile // pieces // DILATION, BLOCK_P, WIDE)
    position = positions(p, grid, RUN)
    last = (y_size[AXIS] - 1) * SECOND.stride[AXIS]
    outputs = (last - residue + DILATION) // DILATION  # of this residue, at stride 1
    share = (outputs + pieces - 1) // pieces
    first = tl.minimum(piece * share, outputs)
    end = tl.minimum(first + share, outputs)
    return position, p < count, residue, first, end


@triton.jit
def window_steps(first, end, SECOND: tl.constexpr, AXIS: tl.constexpr):
    """The steps that complete outputs first..end − 1."""
    TAPS: tl.constexpr = SECOND.kernel[AXIS]
    begin = first
    if SECOND.modes[AXIS] == "zeros":  # nothing is there in front; the sums are zeros already
        SKIPPED: tl.constexpr = SECOND.before[AXIS] // SECOND.dilation[AXIS]
        begin = tl.maximum(first, SKIPPED if SKIPPED < TAPS else TAPS - 1)
    return begin, tl.where(end > first, end + TAPS - 1, begin)


@triton.jit
def window_source(index, mid_size, SECOND: tl.constexpr, AXIS: tl.constexpr):
    """Index in the mid tensor of padded index ``index`` along the axis, and whether it exists."""
    MODE: tl.constexpr = SECOND.modes[AXIS]
    return source(index - SECOND.before[AXIS], mid_size[AXIS], MODE)


@triton.jit
def mid_at(position, at, across, mid_size, SECOND: tl.constexpr, AXIS: tl.constexpr):
    """Positions in the mid tensor at ``at`` along the axis, seen through column tap ``across``.

    With them, which of them exist; ``at`` does.
    """
    n, t, h, w = position
    if AXIS == 0:
        t = tl.zeros_like(t) + at
        ok = w >= 0
    else:
        h = tl.zeros_like(h) + at
        column = w * SECOND.stride[2] + (across * SECOND.dilation[2] - SECOND.before[2])
        MODE: tl.constexpr = SECOND.modes[2]
        w, ok = source(column, mid_size[2], MODE)
    return (n, t, h, w), ok


@triton.jit
def output_at(position, index, SECOND: tl.constexpr, AXIS: tl.constexpr):
    """The output position at index ``index`` (at stride 1) along the axis; whether it is kept."""
    n, t, h, w = position
    STRIDE: tl.constexpr = SECOND.stride[AXIS]
    if AXIS == 0:
        t = tl.zeros_like(t) + index // STRIDE
    else:
        h = tl.zeros_like(h) + index // STRIDE
    return (n, t, h, w), index % STRIDE == 0
