"""Weight gradient: a matrix product over positions, split, with a sum of fixed order after it.

    dw[tap, c, n] = Σ_p x[p·stride + tap, c] · dy[p, n]

A program has one block of rows, one of columns (``BLOCK_N`` and, where that fits the channel count
better, ``REST_N`` more) and one part of the positions, of which it takes ``BLOCK_P`` at a time: a
box along n, t, h and w, whose sides are powers of two. Where a lane lies in its box it knows before
the loop; in the loop only the box moves.
Rows are (tap, c) and columns n or, with SWAP, the other way round. Partials are (splits, groups,
taps, C, K) or, with SWAP, (splits, groups, K, taps, C), of channels of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    columns,
    four_of,
    grid_of,
    is_below,
    narrow,
    positions,
    product,
    read_du,
    reveal,
    row_offsets,
    size_of,
    strides_of,
    tap_offsets,
    tap_start,
)
from .tap_conv import tile_positions


@triton.jit
def lanes(box, BLOCK_P: tl.constexpr):
    """(n, t, h, w) of the positions of a box, each (BLOCK_P, 1); its sides are 2**box."""
    i = tl.arange(0, BLOCK_P)[:, None]
    w = i & ((1 << box[3]) - 1)
    i = i >> box[3]
    h = i & ((1 << box[2]) - 1)
    i = i >> box[2]
    return i >> box[1], i & ((1 << box[1]) - 1), h, w


@triton.jit
def add_origin(lane, origin):
    return lane[0] + origin[0], lane[1] + origin[1], lane[2] + origin[2], lane[3] + origin[3]


@triton.jit
def tap_rows(lane, x_ptr, x_strides, ALIGN: tl.constexpr, TAPS: tl.constexpr):
    """What the first tap reads at a box at the origin: indices along t, h, w, and pointers."""
    n, t, h, w = lane
    t, h, w = tap_start(t, 0, 0, TAPS), tap_start(h, 0, 1, TAPS), tap_start(w, 0, 2, TAPS)
    return (t, h, w), x_ptr + row_offsets((n, t, h, w), x_strides, ALIGN)


@triton.jit
def read_taps(
    index, rows, start, lane, origin, row_ok, x_ptr, x_strides, x_size, channels,
    TAPS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(BLOCK_P, X) of x at a tap of the box at ``origin``; rows and start as of ``tap_rows``.

    ``index`` is (tap, its channels (X,)) or, with FLAT, the number of channels, (X,) over both.
    """
    KH: tl.constexpr = TAPS.kernel[1]
    KW: tl.constexpr = TAPS.kernel[2]
    if FLAT > 0:
        tap, c = (index // FLAT)[None, :], (index % FLAT)[None, :]
        c_ok = (index < TAPS.kernel[0] * KH * KW * FLAT)[None, :]
    else:
        tap, c = index[0], index[1][None, :]
        c_ok = c < (channels + ALIGN - 1) // ALIGN * ALIGN  # a mask of whole vectors
    kt, kh, kw = tap // (KH * KW), tap // KW % KH, tap % KW
    if TAPS.apart:
        n0, t0, h0, w0 = origin
        t0 = t0 * TAPS.stride[0] + kt * TAPS.move[0]
        h0 = h0 * TAPS.stride[1] + kh * TAPS.move[1]
        w0 = w0 * TAPS.stride[2] + kw * TAPS.move[2]
        ok = row_ok
        if TAPS.kernel[0] > 1 or TAPS.before[0] > 0:
            ok = ok & is_below(start[0] + t0, x_size[0])
        if KH > 1 or TAPS.before[1] > 0:
            ok = ok & is_below(start[1] + h0, x_size[1])
        if KW > 1 or TAPS.before[2] > 0:
            ok = ok & is_below(start[2] + w0, x_size[2])
        moved = row_offsets((n0, t0, h0, w0), x_strides, ALIGN)
        read = rows + (moved + c.to(tl.int64) * x_strides[1])
    else:
        at = add_origin(lane, origin)
        offsets, inside = tap_offsets(at, (kt, kh, kw), x_size, x_strides, ALIGN, TAPS)
        ok = inside & row_ok
        read = x_ptr + offsets + c.to(tl.int64) * x_strides[1]
    return tl.load(read, mask=ok & c_ok, other=0.0)


@triton.jit
def read_rows(n, rows, origin, row_ok, dy_strides, channels, ALIGN: tl.constexpr):
    """(BLOCK_P, X) of dy, for channels n (X,)."""
    n = n[None, :]
    ok = row_ok & (n < (channels + ALIGN - 1) // ALIGN * ALIGN)
    moved = row_offsets(origin, dy_strides, ALIGN) + n.to(tl.int64) * dy_strides[1]
    return tl.load(rows + moved, mask=ok, other=0.0)


@triton.jit
def tap_block(block, first, channels, TAPS: tl.constexpr, FLAT: tl.constexpr, SIZE: tl.constexpr,
              STEP: tl.constexpr):  # fmt: skip
    """The index that ``read_taps`` takes, and the place in (tap, channel) order, of one block.

    Blocks advance by STEP ≥ SIZE channels, from ``first`` on.
    """
    lane = first + tl.arange(0, SIZE)
    if FLAT > 0:
        index = block * STEP + lane
        place = index
        ok = index < TAPS.kernel[0] * TAPS.kernel[1] * TAPS.kernel[2] * FLAT
    else:
        blocks = (channels + STEP - 1) // STEP
        tap, c = block // blocks, block % blocks * STEP + lane
        index = (tap, c)
        place = tap * channels + c
        ok = c < channels
    return index, place, ok


@triton.jit
def block_of(block, first, channels, TAPPED: tl.constexpr, TAPS: tl.constexpr, FLAT: tl.constexpr,
             SIZE: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """``tap_block`` or, without TAPPED, the same over channels alone."""
    if TAPPED:
        index, place, ok = tap_block(block, first, channels, TAPS, FLAT, SIZE, STEP)
    else:
        index = block * STEP + first + tl.arange(0, SIZE)
        place, ok = index, index < channels
    return index, place, ok


@triton.jit
def next_box(box, boxes):
    """The box after one, along w first; all as (n, t, h, w), but ``boxes`` as ``weight_tile``."""
    n, t, h, w = box
    w += 1
    h += (w == boxes[2]).to(tl.int32)
    w = tl.where(w == boxes[2], 0, w)
    t += (h == boxes[1]).to(tl.int32)
    h = tl.where(h == boxes[1], 0, h)
    n += (t == boxes[0]).to(tl.int32)
    return n, tl.where(t == boxes[0], 0, t), h, w


@triton.jit
def weight_tile(
    index, split,  # of a block of rows and columns of a group; of a part of the boxes
    x_ptr, x_strides, x_size, channels, dy_ptr, dy_strides, dy_size, dy_channels,
    partial_ptr, groups, rows, widths, batch, box, boxes, per_split,
    TAPS: tl.constexpr, FLAT: tl.constexpr, SWAP: tl.constexpr, X_ALIGN: tl.constexpr,
    Y_ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    REST_N: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One block of partial sums; arguments as of ``weight_gradient``."""
    STEP: tl.constexpr = BLOCK_N + REST_N
    COUNT: tl.constexpr = TAPS.kernel[0] * TAPS.kernel[1] * TAPS.kernel[2]
    width = index % widths
    row = index // widths % rows
    group = index // (widths * rows)
    # The ALIGNs divide what a group starts with, if there are several: pointers stay aligned.
    x_ptr += (group * channels // X_ALIGN * X_ALIGN).to(tl.int64) * x_strides[1]
    dy_ptr += (group * dy_channels // Y_ALIGN * Y_ALIGN).to(tl.int64) * dy_strides[1]

    # Either the rows or the columns are (tap, c).
    r_channels = dy_channels if SWAP else channels
    n_channels = channels if SWAP else dy_channels
    r, r_place, r_ok = block_of(row, 0, r_channels, not SWAP, TAPS, FLAT, BLOCK_R, BLOCK_R)
    n, n_place, n_ok = block_of(width, 0, n_channels, SWAP, TAPS, FLAT, BLOCK_N, STEP)
    if REST_N > 0:
        m, m_place, m_ok = block_of(width, BLOCK_N, n_channels, SWAP, TAPS, FLAT, REST_N, STEP)
    length = COUNT * channels if SWAP else dy_channels

    lane = lanes(box, BLOCK_P)
    start, x_rows = tap_rows(lane, x_ptr, x_strides, X_ALIGN, TAPS)
    dy_rows = dy_ptr + row_offsets(lane, dy_strides, Y_ALIGN)
    first = split * per_split
    w, h = first % boxes[2], first // boxes[2]
    t = h // boxes[1]
    h, n_box = h - t * boxes[1], t // boxes[0]
    t -= n_box * boxes[0]
    acc = tl.zeros((BLOCK_R, BLOCK_N), ACCUMULATE)
    rest = tl.zeros((BLOCK_R, REST_N if REST_N > 0 else 16), ACCUMULATE)
    # See ``tap_conv.accumulate`` for the step that there is always; beyond the last box are zeros.
    steps = tl.minimum(per_split, boxes[0] * boxes[1] * boxes[2] * boxes[3] - first)
    for _ in range(tl.maximum(steps, 1)):
        origin = (n_box << box[0], t << box[1], h << box[2], w << box[3])
        row_ok = (lane[3] < dy_size[2] - origin[3]) & (lane[2] < dy_size[1] - origin[2])
        row_ok = row_ok & (lane[1] < dy_size[0] - origin[1]) & (lane[0] < batch - origin[0])
        if SWAP:
            a = read_rows(r, dy_rows, origin, row_ok, dy_strides, dy_channels, Y_ALIGN)
            b = read_taps(
                n, x_rows, start, lane, origin, row_ok, x_ptr, x_strides, x_size, channels,
                TAPS, FLAT, X_ALIGN,
            )  # fmt: skip
        else:
            a = read_taps(
                r, x_rows, start, lane, origin, row_ok, x_ptr, x_strides, x_size, channels,
                TAPS, FLAT, X_ALIGN,
            )  # fmt: skip
            b = read_rows(n, dy_rows, origin, row_ok, dy_strides, dy_channels, Y_ALIGN)
        a = tl.trans(a)
        acc = product(a, b, acc, PRECISION, EMULATE)
        if REST_N > 0:
            if SWAP:
                b = read_taps(
                    m, x_rows, start, lane, origin, row_ok, x_ptr, x_strides, x_size, channels,
                    TAPS, FLAT, X_ALIGN,
                )  # fmt: skip
            else:
                b = read_rows(m, dy_rows, origin, row_ok, dy_strides, dy_channels, Y_ALIGN)
            rest = product(a, b, rest, PRECISION, EMULATE)
        n_box, t, h, w = next_box((n_box, t, h, w), boxes)
    acc = acc + 0.0
    rest = rest + 0.0

    partial_ptr += (split * groups + group).to(tl.int64) * (COUNT * channels * dy_channels)
    to = partial_ptr + r_place.to(tl.int64)[:, None] * length
    tl.store(to + n_place[None, :], acc, mask=r_ok[:, None] & n_ok[None, :])
    if REST_N > 0:
        tl.store(to + m_place[None, :], rest, mask=r_ok[:, None] & m_ok[None, :])


@triton.jit(do_not_specialize=["batch", "per_split"])
def weight_gradient(
    x_ptr, x_strides, x_size, channels,  # (N, C, T, H, W); channels of a group
    dy_ptr, dy_strides, dy_size, dy_channels,  # (N, K, T', H', W'); channels of a group
    partial_ptr, groups, rows, widths,  # blocks of rows and of columns
    batch, box, boxes, per_split,  # N; log2 of a box, boxes along t, h, w, n; of a program
    TAPS: tl.constexpr, FLAT: tl.constexpr, SWAP: tl.constexpr, X_ALIGN: tl.constexpr,
    Y_ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    REST_N: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Partial sums. Programs of one part of the positions are neighbours: they share it in L2."""
    pid = tl.program_id(0)
    blocks = groups * rows * widths
    weight_tile(
        pid % blocks, pid // blocks, x_ptr, strides_of(x_strides), size_of(x_size), channels,
        dy_ptr, strides_of(dy_strides), size_of(dy_size), dy_channels, partial_ptr, groups, rows,
        widths, batch, four_of(box), four_of(boxes), per_split, TAPS, FLAT, SWAP, X_ALIGN, Y_ALIGN,
        BLOCK_P, BLOCK_R, BLOCK_N, REST_N, PRECISION, EMULATE, ACCUMULATE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "count"])
def finish_weight(
    partial_ptr, splits, count,  # of ``weight_gradient``; count: of a split
    dw_ptr, sizes, limits, strides,  # of the axes of partials, slowest first: in dw, as 7 each
    BLOCK: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dw: the partials added up in order, in its own dtype and strides."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = index < count
    total = tl.zeros((BLOCK,), ACCUMULATE)
    for split in range(splits):
        at = partial_ptr + tl.cast(split, tl.int64) * count
        total += tl.load(at + index, mask=ok, other=0.0)
    at = tl.zeros((BLOCK,), tl.int64)
    for axis in tl.static_range(6, -1, -1):
        size = reveal(sizes[axis])
        place = index % size
        index = index // size
        ok = ok & (place < reveal(limits[axis]))
        at += place.to(tl.int64) * reveal(strides[axis])
    tl.store(dw_ptr + at, narrow(total, dw_ptr.dtype.element_ty, EMULATE), mask=ok)


@triton.jit(do_not_specialize=["count"])
def channel_sums(
    dy_ptr, dy_strides, grid, channels,
    s_ptr, r_ptr, u_ptr, p_ptr,  # ``read_du``, (K,) and like dy; or None
    partial_ptr,  # (tiles of positions, K)
    count, per_tile,  # positions, and how many of them a program adds up
    ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Partial sums over positions of dy or of du: the gradient of a bias."""
    dy_strides = strides_of(dy_strides)
    grid = grid_of(grid)
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    n_row = n[None, :]
    n_ok = n_row < (channels + ALIGN - 1) // ALIGN * ALIGN
    total = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE)
    first, _ = tile_positions(tile, 1, WIDE)
    first = first * per_tile
    for step in range((tl.minimum(per_tile, count - first) + BLOCK_P - 1) // BLOCK_P):
        p = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        at = columns(positions(p, grid, RUN))
        offsets = row_offsets(at, dy_strides, ALIGN) + n_row.to(tl.int64) * dy_strides[1]
        total += read_du(
            dy_ptr, offsets, (p < count)[:, None] & n_ok, n_row, n_ok, s_ptr, r_ptr, u_ptr, p_ptr,
            EMULATE, ACCUMULATE,
        ).to(ACCUMULATE)  # fmt: skip
    at = partial_ptr + tile.to(tl.int64) * channels + n
    tl.store(at, tl.sum(total, 0), mask=n < channels)
