"""Tap convolution: implicit GEMM over a list of taps, with prologue and epilogue.

    y[p, n] = epilogue( Σ_tap Σ_c prologue(x[p·stride + tap, c]) · w[tap, c, n] )

Spatial passes have kh·kw taps, temporal ones kt; taps out of range are skipped, not multiplied.
Weights come packed as (groups, reduction, width), where reduction is tap-major and padded to whole
``BLOCK_K`` with zeros, width = output channels of a group padded to whole tiles with zeros. A tile
is ``BLOCK_N`` channels plus, where that fits the channel count better, ``REST_N`` more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate, columns, narrow, operand, positions, product, row_offsets, tap_offsets


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
def tap_of(index, rows, lanes, subset, TAPS: tl.constexpr):
    """(kt, kh, kw) of the index-th tap, and its place among all."""
    KH: tl.constexpr = TAPS.kernel[1]
    KW: tl.constexpr = TAPS.kernel[2]
    kt, kh, kw = index // (rows * lanes), index // lanes % rows, index % lanes
    if subset is None:
        place = index
    else:
        kt = subset[0] + kt * TAPS.step[0]
        kh = subset[1] + kh * TAPS.step[1]
        kw = subset[2] + kw * TAPS.step[2]
        place = (kt * KH + kh) * KW + kw
    return (kt, kh, kw), place


@triton.jit
def accumulate(
    acc, rest,  # (BLOCK_P, BLOCK_N) and, with REST_N, (BLOCK_P, REST_N)
    x_ptr, x_strides, x_size,  # x_ptr at the first channel of the group
    channels,  # of the group
    w_ptr, width,  # w_ptr at the group's first row and the tile's first column
    scale_ptr, shift_ptr, other_ptr, rate_ptr,  # ``operand``, at the group's first channel, or None
    position, row_ok,
    subset,  # first tap and number of taps, each along t, h, w; or None for all
    TAPS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """acc and rest plus the convolution at the tile's positions.

    FLAT is 0, or the channel count where that is too thin to fill BLOCK_K: the reduction then runs
    over (tap, channel) as one index. ALIGN divides the strides and the channels.
    """
    if subset is None:
        count = TAPS.kernel[0] * TAPS.kernel[1] * TAPS.kernel[2]
        rows, lanes = TAPS.kernel[1], TAPS.kernel[2]
    else:
        count = subset[3] * subset[4] * subset[5]
        rows, lanes = tl.maximum(subset[4], 1), tl.maximum(subset[5], 1)
    at = columns(position)
    k = tl.arange(0, BLOCK_K)
    w_tile = w_ptr + k.to(tl.int64)[:, None] * width + tl.arange(0, BLOCK_N)[None, :]
    if REST_N > 0:
        w_rest = w_ptr + k.to(tl.int64)[:, None] * width + BLOCK_N + tl.arange(0, REST_N)[None, :]
    if FLAT > 0:
        chunks = 1
        steps = (count * FLAT + BLOCK_K - 1) // BLOCK_K
    else:
        channels = channels // ALIGN * ALIGN  # the same number, and a mask of whole vectors
        chunks = (channels + BLOCK_K - 1) // BLOCK_K
        steps = count * chunks
    for step in range(steps):
        if FLAT > 0:
            index = (step * BLOCK_K + k)[None, :]
            tap, place = tap_of(index // FLAT, rows, lanes, subset, TAPS)
            c = index % FLAT
            c_ok = index < count * FLAT
        else:
            tap, place = tap_of(step // chunks, rows, lanes, subset, TAPS)
            c = ((step % chunks) * BLOCK_K + k)[None, :]
            c_ok = c < channels
        offsets, inside = tap_offsets(at, tap, x_size, x_strides, ALIGN, TAPS)
        offsets = offsets + c.to(tl.int64) * x_strides[1]
        a = operand(
            x_ptr, offsets, inside & row_ok[:, None] & c_ok, c, c_ok, scale_ptr, shift_ptr,
            other_ptr, rate_ptr, ACTIVATION, SLOPE, EMULATE, acc.dtype,
        )  # fmt: skip
        if subset is None:
            moved = tl.cast(step, tl.int64) * BLOCK_K * width
            w_ok = None
        elif FLAT > 0:  # rows of taps that are not neighbours; beyond the last may be anything
            moved = tl.trans(place * FLAT + c - k[None, :]).to(tl.int64) * width
            w_ok = tl.trans(c_ok)
        else:
            moved = (place * chunks + step % chunks).to(tl.int64) * BLOCK_K * width
            w_ok = None
        acc = product(a, tl.load(w_tile + moved, mask=w_ok), acc, PRECISION, EMULATE)
        if REST_N > 0:
            rest = product(a, tl.load(w_rest + moved, mask=w_ok), rest, PRECISION, EMULATE)
    return acc, rest


@triton.jit
def biased(acc, bias_ptr, channel, channels):
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
    offsets = row_offsets(position, y_strides, Y_ALIGN)[:, None]
    offsets = offsets + channel.to(tl.int64)[None, :] * y_strides[1]
    v = narrow(v, y_ptr.dtype.element_ty, EMULATE)
    tl.store(y_ptr + offsets, v, mask=row_ok[:, None] & channel_ok[None, :])


@triton.jit
def finish(
    acc, n,  # (BLOCK_P, columns) and (columns,): channel within the group
    group, channels, all_channels, stored,  # of a group; of all; how many of n are written
    scale_ptr, shift_ptr,  # (all_channels,), or None
    partial_ptr,  # (2, all_channels) of this tile, or None
    residual_ptr, residual_strides,  # like y, or None
    y_ptr, y_strides,  # None: only the statistics are wanted
    position, row_ok, rows,  # rows: how many of the tile's positions exist
    INNER: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, Y_ALIGN: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """y = ACTIVATION(INNER(acc·scale + shift) + residual), and (mean, M2) per channel before it."""
    n_ok = n < channels
    # Y_ALIGN divides both numbers: multiplied by it, the mask is seen to be one of whole vectors.
    stored = stored // Y_ALIGN * Y_ALIGN
    channel = group * channels // Y_ALIGN * Y_ALIGN + n
    if scale_ptr is not None:
        acc = acc * tl.load(scale_ptr + channel, mask=n_ok, other=0.0).to(acc.dtype)[None, :]
    if shift_ptr is not None:
        acc = acc + tl.load(shift_ptr + channel, mask=n_ok, other=0.0).to(acc.dtype)[None, :]
    if partial_ptr is not None:
        ok = row_ok[:, None] & n_ok[None, :]
        mean = tl.sum(tl.where(ok, acc, 0.0), 0) / rows.to(acc.dtype)
        away = tl.where(ok, acc - mean[None, :], 0.0)
        tl.store(partial_ptr + channel, mean, mask=n_ok)
        tl.store(partial_ptr + all_channels + channel, tl.sum(away * away, 0), mask=n_ok)
    acc = tl.where(n_ok[None, :], activate(acc, INNER, SLOPE), 0.0)  # also where 0·inf is no number
    if residual_ptr is not None:
        offsets = row_offsets(position, residual_strides, Y_ALIGN)[:, None]
        offsets = offsets + channel.to(tl.int64)[None, :] * residual_strides[1]
        ok = row_ok[:, None] & n_ok[None, :]
        acc += tl.load(residual_ptr + offsets, mask=ok, other=0.0).to(acc.dtype)
    acc = activate(acc, ACTIVATION, SLOPE)
    if y_ptr is not None:
        store(acc, channel, n < stored, y_ptr, y_strides, position, row_ok, Y_ALIGN, EMULATE)


@triton.jit
def tile_positions(tile, BLOCK_P: tl.constexpr, WIDE: tl.constexpr):
    """First position of a tile, and all of them."""
    start = tile * BLOCK_P
    if WIDE:
        start = tile.to(tl.int64) * BLOCK_P
    return start, start + tl.arange(0, BLOCK_P)


# Sizes of a video change from call to call; a kernel of its own for sizes 1 or 16 gains nothing.
@triton.jit(do_not_specialize=["x_size", "y_size", "count"])
def tap_conv(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W); size (T, H, W)
    channels, groups,  # channels of a group
    w_ptr, width,  # (groups, reduction, width)
    in_scale_ptr, in_shift_ptr,  # (C,) prologue, or None
    out_scale_ptr, out_shift_ptr,  # (K,) epilogue, or None
    partial_ptr,  # (tiles of positions, 2, K), or None
    residual_ptr, residual_strides,  # like y, or None; may be y itself
    y_ptr, y_strides, y_size,  # (N, K, T', H', W')
    y_channels, y_stored,  # of a group; of it stored: more than it has are zeros
    count,  # N·T'·H'·W'
    TAPS: tl.constexpr, FLAT: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr,
    RUN: tl.constexpr, WIDE: tl.constexpr,
    IN_ACTIVATION: tl.constexpr, INNER: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One pass. Programs of one tile of positions are neighbours, so that they share it in L2."""
    tiles_n = width // (BLOCK_N + REST_N)
    pid = tl.program_id(0)
    tile_p = pid // (tiles_n * groups)
    group = pid // tiles_n % groups
    first = pid % tiles_n * (BLOCK_N + REST_N)
    start, p = tile_positions(tile_p, BLOCK_P, WIDE)
    row_ok = p < count
    position = positions(p, y_size, RUN)

    acc = tl.zeros((BLOCK_P, BLOCK_N), ACCUMULATE)
    rest = tl.zeros((BLOCK_P, REST_N if REST_N > 0 else 16), ACCUMULATE)
    in_channel = group * channels
    if in_scale_ptr is not None:
        in_scale_ptr += in_channel
        in_shift_ptr += in_channel
    reduction = reduction_rows(channels, TAPS, FLAT, BLOCK_K)
    acc, rest = accumulate(
        acc, rest, x_ptr + in_channel.to(tl.int64) * x_strides[1], x_strides, x_size, channels,
        w_ptr + group.to(tl.int64) * reduction * width + first, width, in_scale_ptr, in_shift_ptr,
        None, None, position, row_ok, None, TAPS, FLAT, X_ALIGN, IN_ACTIVATION, SLOPE, BLOCK_N,
        REST_N, BLOCK_K,
        PRECISION, EMULATE,
    )  # fmt: skip

    all_channels = groups * y_channels
    rows = tl.minimum(count - start, BLOCK_P)
    if partial_ptr is not None:
        partial_ptr += tile_p.to(tl.int64) * 2 * all_channels
    n = first + tl.arange(0, BLOCK_N)
    finish(
        acc, n, group, y_channels, all_channels, y_stored, out_scale_ptr, out_shift_ptr,
        partial_ptr, residual_ptr, residual_strides, y_ptr, y_strides, position, row_ok, rows,
        INNER, ACTIVATION, SLOPE, Y_ALIGN, EMULATE,
    )  # fmt: skip
    if REST_N > 0:
        n = first + BLOCK_N + tl.arange(0, REST_N)
        finish(
            rest, n, group, y_channels, all_channels, y_stored, out_scale_ptr, out_shift_ptr,
            partial_ptr, residual_ptr, residual_strides, y_ptr, y_strides, position, row_ok, rows,
            INNER, ACTIVATION, SLOPE, Y_ALIGN, EMULATE,
        )  # fmt: skip
