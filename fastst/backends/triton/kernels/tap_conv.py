"""Tap convolution: implicit GEMM over a list of taps, with prologue and epilogue.

    y[p, n] = epilogue( Σ_tap Σ_c prologue(x[p·stride + tap, c]) · w[tap, c, n] )

Spatial passes have kh·kw taps, temporal ones kt; taps out of range are skipped, not multiplied.
Weights come packed as (groups, reduction, width), where reduction is tap-major and padded to whole
``BLOCK_K`` with zeros, width = output channels of a group padded to whole tiles with zeros. Side by
side in memory are columns or, ``TURNED``, rows. A tile is ``BLOCK_N`` channels plus, where that
fits the channel count better, ``REST_N`` more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    activate,
    column_moments,
    columns,
    grid_of,
    is_below,
    narrow,
    positions,
    product,
    regroup,
    reveal,
    row_offsets,
    size_of,
    strides_of,
    tap_position,
    tap_start,
    tile_offsets,
    tile_rows,
    written_positions,
)


@triton.jit
def reduction_rows(channels, TAPS: tl.constexpr, FLAT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows of a group's packed weights."""
    COUNT: tl.constexpr = TAPS.kernel[0] * TAPS.kernel[1] * TAPS.kernel[2]
    if FLAT > 0:
        rows = (COUNT * FLAT + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    else:
        rows = COUNT * ((channels + BLOCK_K - 1) // BLOCK_K * BLOCK_K)
    return rows


@triton.jit
def weight_start(w_ptr, group, first, rows, width, TURNED: tl.constexpr):
    """Packed weights of a group from a column on."""
    w_ptr += group.to(tl.int64) * rows * width
    if TURNED:
        w_ptr += tl.cast(first, tl.int64) * rows
    else:
        w_ptr += first
    return w_ptr


@triton.jit
def weight_offsets(k, n, rows, width, TURNED: tl.constexpr):
    """int64 offsets of rows k and columns n of packed weights."""
    if TURNED:
        offsets = k[:, None] + n.to(tl.int64)[None, :] * rows
    else:
        offsets = k.to(tl.int64)[:, None] * width + n[None, :]
    return offsets


@triton.jit
def tap_of(index, subset, TAPS: tl.constexpr):
    """(kt, kh, kw) of a tap of all or of a subset by its index along each axis, and its place."""
    kt, kh, kw = index
    if subset is not None:
        kt = subset[0] + kt * TAPS.step[0]
        kh = subset[1] + kh * TAPS.step[1]
        kw = subset[2] + kw * TAPS.step[2]
    return (kt, kh, kw), (kt * TAPS.kernel[1] + kh) * TAPS.kernel[2] + kw


@triton.jit
def advance(i, count, carry, MOST: tl.constexpr):
    """An index below ``count``, one further if there is a carry; and whether it begins again."""
    if MOST > 1:
        i += carry.to(tl.int32)
        carry = i == count
        i = tl.where(carry, 0, i)
    return i, carry


@triton.jit
def taps_within(start, size, count, AXIS: tl.constexpr, TAPS: tl.constexpr):
    """A bit for each tap along an axis: whether it reads something, from ``start`` on."""
    COUNT: tl.constexpr = TAPS.kernel[AXIS]
    MOVE: tl.constexpr = TAPS.move[AXIS]
    bits = tl.zeros_like(start)
    for k in tl.static_range(COUNT):
        inside = is_below(start + k * MOVE, size)
        if count is not None:
            inside = inside & (k < count)
        bits |= inside.to(tl.int32) << k
    return bits


@triton.jit
def combine_taps(within_t, within_h, within_w, rows, lanes, TAPS: tl.constexpr):
    """A bit for each tap, of those along each axis."""
    KT: tl.constexpr = TAPS.kernel[0]
    KH: tl.constexpr = TAPS.kernel[1]
    bits = tl.zeros_like(within_w)
    for kt in tl.static_range(KT):
        for kh in tl.static_range(KH):
            inside = (within_t >> kt) & (within_h >> kh) & 1
            bits |= tl.where(inside != 0, within_w, 0) << ((kt * rows + kh) * lanes)
    return bits


@triton.jit
def past_source(past_ptr, past_strides, past_size, channel):
    """What ``sources`` takes of the frames before x, from a channel on; or None, if there are none.

    Made and returned here alone: Triton 3.6 gives no None back that it was given.
    """
    past = None
    if past_ptr is not None:
        strides = strides_of(past_strides)
        past = (past_ptr + channel.to(tl.int64) * strides[1], strides, reveal(past_size[0]))
    return past


@triton.jit
def row_pointers(position, x_ptr, x_strides, past, ALIGN: tl.constexpr):
    """Pointers to positions in x, channel 0, and in the past; frames are counted over both.

    Without a past the second are the first: no tuple that is returned holds None.
    """
    n, t, h, w = position
    if past is None:
        x_rows = x_ptr + row_offsets((n, t, h, w), x_strides, ALIGN)
        past_rows = x_rows
    else:
        x_rows = x_ptr + row_offsets((n, t - past[2], h, w), x_strides, ALIGN)
        past_rows = past[0] + row_offsets((n, t, h, w), past[1], ALIGN)
    return x_rows, past_rows


@triton.jit
def tap_offset(c, taps, strides, ALIGN: tl.constexpr, TAPS: tl.constexpr):
    """int64 offset of a tap's channels from the first tap; only where taps are ``apart``."""
    moved = c.to(tl.int64) * strides[1]
    if TAPS.kernel[0] > 1:
        moved += (taps[0] * (TAPS.move[0] * ALIGN)).to(tl.int64) * strides[2]
    if TAPS.kernel[1] > 1:
        moved += (taps[1] * (TAPS.move[1] * ALIGN)).to(tl.int64) * strides[3]
    if TAPS.kernel[2] > 1:
        moved += (taps[2] * (TAPS.move[2] * ALIGN)).to(tl.int64) * strides[4]
    return moved


@triton.jit
def taps_inside(first, row_ok, x_size, counts, rows, lanes, TAPS: tl.constexpr):
    """Which taps read something, of positions whose first tap is at (t, h, w): for ``is_inside``.

    A bit for each tap, if there are few enough, else for each along an axis.
    """
    within_t = tl.where(row_ok[:, None], taps_within(first[0], x_size[0], counts[0], 0, TAPS), 0)
    within_h = taps_within(first[1], x_size[1], counts[1], 1, TAPS)
    within_w = taps_within(first[2], x_size[2], counts[2], 2, TAPS)
    if TAPS.kernel[0] * TAPS.kernel[1] * TAPS.kernel[2] <= 32:
        within = combine_taps(within_t, within_h, within_w, rows, lanes, TAPS)
    else:
        within = (within_t, within_h, within_w)
    return within


@triton.jit
def is_inside(within, index, along, TAPS: tl.constexpr):
    """Whether a tap reads something: by its number and by its index along each axis."""
    if TAPS.kernel[0] * TAPS.kernel[1] * TAPS.kernel[2] <= 32:
        inside = within >> index
    else:
        inside = (within[0] >> along[0]) & (within[1] >> along[1]) & (within[2] >> along[2])
    return (inside & 1) != 0


@triton.jit
def accumulate(
    acc, rest,  # (BLOCK_P, BLOCK_N) and, with REST_N, (BLOCK_P, REST_N)
    x_ptr, x_strides, x_size,  # x_ptr at the first channel of the group
    past,  # ``past_source``: x_size counts its frames, too; or None
    channels,  # of the group
    w_ptr, width,  # w_ptr at the group's first row and the tile's first column
    position, row_ok,
    subset,  # first tap and number of taps, each along t, h, w; or None for all
    TAPS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """acc and rest plus the convolution at the tile's positions.

    FLAT is 0, or the channel count where that is too thin to fill BLOCK_K: the reduction then runs
    over (tap, channel) as one index. ALIGN divides the strides and the channels.
    """
    KERNEL: tl.constexpr = TAPS.kernel
    COUNT: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    count, rows, lanes = COUNT, KERNEL[1], KERNEL[2]
    first_t, first_h, first_w, taps_t, taps_h, taps_w = 0, 0, 0, None, None, None
    if subset is not None:
        first_t, first_h, first_w, taps_t, taps_h, taps_w = subset
        count = taps_t * taps_h * taps_w
        rows, lanes = tl.maximum(taps_h, 1), tl.maximum(taps_w, 1)
    at = columns(position)
    k = tl.arange(0, BLOCK_K)
    reduction = reduction_rows(channels, TAPS, FLAT, BLOCK_K)
    pitch = 1 if TURNED else width  # from a row of weights to the next
    w_tile = w_ptr + weight_offsets(k, tl.arange(0, BLOCK_N), reduction, width, TURNED)
    if REST_N > 0:
        n = BLOCK_N + tl.arange(0, REST_N)
        w_rest = w_ptr + weight_offsets(k, n, reduction, width, TURNED)
    if FLAT > 0:
        chunks = 1
        steps = (count * FLAT + BLOCK_K - 1) // BLOCK_K
    else:
        channels = channels // ALIGN * ALIGN  # the same number, and a mask of whole vectors
        chunks = (channels + BLOCK_K - 1) // BLOCK_K
        steps = count * chunks
    if TAPS.apart:
        n, t, h, w = at
        t = tap_start(t, first_t, 0, TAPS)
        h = tap_start(h, first_h, 1, TAPS)
        w = tap_start(w, first_w, 2, TAPS)
        x_rows, past_rows = row_pointers((n, t, h, w), x_ptr, x_strides, past, ALIGN)
        counts = (taps_t, taps_h, taps_w)
        within = taps_inside((t, h, w), row_ok, x_size, counts, rows, lanes, TAPS)
    # The taps that are done, and the channels of the next that are; that tap along each axis. They
    # are counted: to divide by what the compiler does not know takes it 25 instructions.
    chunk = tl.cast(0, tl.int32)
    if FLAT > 0:  # of each of the rows that a step reads: a loop keeps the shapes of its variables
        index = tl.zeros((1, BLOCK_K), tl.int32)
    else:
        index = tl.cast(0, tl.int32)
    i_t, i_h, i_w = index, index, index
    # A loop that may have no step makes ptxas wait for every product of Hopper's: there is one.
    for step in range(tl.maximum(steps, 1)):
        if FLAT > 0:
            flat = (step * BLOCK_K + k)[None, :]
            index, c = flat // FLAT, flat % FLAT
            c_ok = flat < count * FLAT
            i_t, i_h, i_w = index // (rows * lanes), index // lanes % rows, index % lanes
        else:
            c = (chunk + k)[None, :]
        if TAPS.apart:
            read = x_rows + tap_offset(c, (i_t, i_h, i_w), x_strides, ALIGN, TAPS)
            if past is not None:
                old = past_rows + tap_offset(c, (i_t, i_h, i_w), past[1], ALIGN, TAPS)
                read = tl.where(t + i_t * TAPS.move[0] < past[2], old, read)
            ok = is_inside(within, index, (i_t, i_h, i_w), TAPS)
        else:
            tap, _ = tap_of((i_t, i_h, i_w), subset, TAPS)
            tapped, inside = tap_position(at, tap, x_size, TAPS)
            tap_rows, past_rows = row_pointers(tapped, x_ptr, x_strides, past, ALIGN)
            read = tap_rows + c.to(tl.int64) * x_strides[1]
            if past is not None:
                old = past_rows + c.to(tl.int64) * past[1][1]
                read = tl.where(tapped[1] < past[2], old, read)
            ok = inside & row_ok[:, None]
        if FLAT > 0:
            ok = ok & c_ok
        else:
            ok = ok & (c < channels)
        a = tl.load(read, mask=ok, other=0.0)
        if subset is None:
            moved = tl.cast(step, tl.int64) * BLOCK_K * pitch
            w_ok = None
        else:  # rows of taps that are not neighbours
            _, place = tap_of((i_t, i_h, i_w), subset, TAPS)
            if FLAT > 0:
                moved = tl.trans(place * FLAT + c - k[None, :]).to(tl.int64) * pitch
                w_ok = tl.trans(c_ok)
            else:
                moved = (place * (chunks * BLOCK_K) + chunk).to(tl.int64) * pitch
                w_ok = tl.zeros((BLOCK_K, 1), tl.int32) + step < steps
        acc = product(a, load_rows(w_tile + moved, w_ok), acc, PRECISION, EMULATE)
        if REST_N > 0:
            rest = product(a, load_rows(w_rest + moved, w_ok), rest, PRECISION, EMULATE)
        if FLAT == 0:
            whole = chunk + BLOCK_K >= channels
            chunk = tl.where(whole, 0, chunk + BLOCK_K)
            index += whole.to(tl.int32)
            i_w, whole = advance(i_w, lanes, whole, KERNEL[2])
            i_h, whole = advance(i_h, rows, whole, KERNEL[1])
            i_t += whole.to(tl.int32)
    return acc, rest


@triton.jit
def read_once(acc):
    """Sums of products that what follows reads in several places: ptxas else makes each wait."""
    return acc + 0.0


@triton.jit
def load_rows(w, ok):
    """A tile of weights, of which some rows may be none."""
    if ok is None:
        tile = tl.load(w)
    else:
        tile = tl.load(w, mask=ok, other=0.0)
    return tile


@triton.jit
def add_bias(acc, bias_ptr, channel, channels):
    """acc plus a bias per channel, which may be None."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0)
        acc = acc + bias.to(acc.dtype)[None, :]
    return acc


@triton.jit
def store(
    v, channel, channel_ok, y_ptr, y_strides, position, row_ok,
    Y_ALIGN: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A tile of y, narrowed to its dtype."""
    offsets = tile_offsets(position, channel, y_strides, Y_ALIGN)
    v = narrow(v, y_ptr.dtype.element_ty, EMULATE)
    tl.store(y_ptr + offsets, v, mask=tl.expand_dims(row_ok, -1) & channel_ok)


@triton.jit
def as_stored(acc, ptr, offsets):
    """acc, but in the layout in which it will be written.

    The compiler keeps the layout of products, in which sums over rows are dear, through all
    arithmetic up to the store, unless a load comes in: this one is of nothing, and ends there.
    """
    never = (offsets < 0) & (offsets >= 0)
    return tl.where(never, tl.load(ptr + offsets, mask=never, other=0.0).to(acc.dtype), acc)


@triton.jit
def finish(
    acc, n,  # (rows, columns) and (columns,): channel within the group
    group, channels, all_channels,  # of a group; of all
    stored,  # how many of n are written: those beyond channels are zeros; None: as many
    scale_ptr, shift_ptr,  # (all_channels,), or None
    partial_ptr,  # (2, all_channels) of this tile, or None
    residual_ptr, residual_strides,  # like y, or None
    y_ptr, y_strides,  # None: only the statistics are wanted
    position, row_ok, rows,  # rows: how many of the tile's positions exist
    INNER: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, Y_ALIGN: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """y = ACTIVATION(INNER(acc·scale + shift) + residual), and (mean, M2) per channel before it.

    Rows have one dimension, or two: ``tile_rows``.
    """
    n_ok = n < channels
    # Y_ALIGN divides both numbers: multiplied by it, the mask is seen to be one of whole vectors.
    there = n < (channels if stored is None else stored) // Y_ALIGN * Y_ALIGN
    channel = group * channels // Y_ALIGN * Y_ALIGN + n
    if partial_ptr is not None and len(acc.shape) == 3:
        offsets = tile_offsets(position, channel, y_strides, Y_ALIGN)
        acc = as_stored(acc, partial_ptr if y_ptr is None else y_ptr, offsets)
    if scale_ptr is not None:
        acc = acc * tl.load(scale_ptr + channel, mask=n_ok, other=0.0).to(acc.dtype)
    if shift_ptr is not None:
        acc = acc + tl.load(shift_ptr + channel, mask=n_ok, other=0.0).to(acc.dtype)
    if partial_ptr is not None:
        mean, m2 = column_moments(acc, row_ok, rows)
        tl.store(partial_ptr + channel, mean, mask=n_ok)
        tl.store(partial_ptr + all_channels + channel, m2, mask=n_ok)
    acc = activate(acc, INNER, SLOPE)
    if residual_ptr is not None:
        offsets = tile_offsets(position, channel, residual_strides, Y_ALIGN)
        ok = tl.expand_dims(row_ok, -1) & n_ok
        acc += tl.load(residual_ptr + offsets, mask=ok, other=0.0).to(acc.dtype)
    acc = activate(acc, ACTIVATION, SLOPE)
    if stored is not None:
        acc = tl.where(n_ok, acc, 0.0)  # also where 0·inf is no number
    if y_ptr is not None:
        store(acc, channel, there, y_ptr, y_strides, position, row_ok, Y_ALIGN, EMULATE)


@triton.jit
def tile_positions(tile, BLOCK_P: tl.constexpr, WIDE: tl.constexpr):
    """First position of a tile, and all of them."""
    start = tile * BLOCK_P
    if WIDE:
        start = tile.to(tl.int64) * BLOCK_P
    return start, start + tl.arange(0, BLOCK_P)


@triton.jit(do_not_specialize=["count"])
def tap_conv(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W); size (T, H, W), with the frames before
    past_ptr, past_strides, past_size,  # frames before x, or None
    channels, groups,  # channels of a group
    w_ptr, width, tiles_n,  # (groups, reduction, width), of so many tiles
    out_scale_ptr, out_shift_ptr,  # (K,) epilogue, or None
    partial_ptr,  # (tiles of positions, 2, K), or None
    residual_ptr, residual_strides,  # like y, or None; may be y itself
    y_ptr, y_strides, grid,  # (N, K, T', H', W')
    y_channels, y_stored,  # of a group; ``finish``
    count,  # N·T'·H'·W'
    TAPS: tl.constexpr, FLAT: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr,
    RUN: tl.constexpr, WIDE: tl.constexpr, WHOLE: tl.constexpr,  # no tile is cut
    DENSE: tl.constexpr,  # of y and residual: ``written_positions``
    INNER: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One pass. Programs of one tile of positions are neighbours, so that they share it in L2."""
    x_strides, x_size = strides_of(x_strides), size_of(x_size)
    y_strides = strides_of(y_strides)
    if residual_ptr is not None:
        residual_strides = strides_of(residual_strides)
    pid = tl.program_id(0)
    tile_p = pid // (tiles_n * groups)
    group = pid // tiles_n % groups
    first = pid % tiles_n * (BLOCK_N + REST_N)
    start, p = tile_positions(tile_p, BLOCK_P, WIDE)
    rows = tl.minimum(count - start, BLOCK_P)
    if WHOLE:
        rows = BLOCK_P
    row_ok = tl.arange(0, BLOCK_P) < rows
    grid = grid_of(grid)
    position = positions(p, grid, RUN)

    in_channel = group * channels
    reduction = reduction_rows(channels, TAPS, FLAT, BLOCK_K)
    acc, rest = accumulate(
        tl.zeros((BLOCK_P, BLOCK_N), ACCUMULATE),
        tl.zeros((BLOCK_P, REST_N if REST_N > 0 else 16), ACCUMULATE),
        x_ptr + in_channel.to(tl.int64) * x_strides[1], x_strides, x_size,
        past_source(past_ptr, past_strides, past_size, in_channel), channels,
        weight_start(w_ptr, group, first, reduction, width, TURNED), width, position, row_ok, None,
        TAPS, FLAT, X_ALIGN, BLOCK_N, REST_N, BLOCK_K, TURNED, PRECISION, EMULATE,
    )  # fmt: skip
    acc, rest = read_once(acc), read_once(rest)

    all_channels = groups * y_channels
    if partial_ptr is not None:
        partial_ptr += tile_p.to(tl.int64) * 2 * all_channels
    row = tile_rows(BLOCK_P, BLOCK_N)
    finish(
        regroup(acc), first + tl.arange(0, BLOCK_N), group, y_channels, all_channels, y_stored,
        out_scale_ptr, out_shift_ptr, partial_ptr, residual_ptr, residual_strides, y_ptr, y_strides,
        written_positions(start + row, grid, RUN, DENSE), row < rows, rows,
        INNER, ACTIVATION, SLOPE, Y_ALIGN, EMULATE,
    )  # fmt: skip
    if REST_N > 0:
        row = tile_rows(BLOCK_P, REST_N)
        finish(
            regroup(rest), first + BLOCK_N + tl.arange(0, REST_N), group, y_channels, all_channels,
            y_stored, out_scale_ptr, out_shift_ptr, partial_ptr, residual_ptr, residual_strides,
            y_ptr, y_strides, written_positions(start + row, grid, RUN, DENSE), row < rows, rows,
            INNER, ACTIVATION, SLOPE, Y_ALIGN, EMULATE,
        )  # fmt: skip
