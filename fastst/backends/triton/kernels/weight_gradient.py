"""Weight gradient: a matrix product over positions, split, with a sum of fixed order after it.

    dw[tap, c, n] = Σ_p prologue(x[p·stride + tap, c]) · prologue(dy[p, n])

A program has one block of rows, one of columns (``BLOCK_N`` and, where that fits the channel count
better, ``REST_N`` more) and one part of the positions, of which it takes ``BLOCK_P`` at a time.
Rows are (tap, c) and columns n or, with SWAP, the other way round. Partials are (splits, groups,
taps, C, K) or, with SWAP, (splits, groups, K, taps, C), of channels of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import columns, narrow, operand, positions, product, row_offsets, tap_offsets
from .tap_conv import tile_positions


@triton.jit
def read_taps(
    index, x_ptr, x_strides, x_size, channels, scale_ptr, shift_ptr, at, row_ok,
    TAPS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """(BLOCK_P, channels) of prologue(x) at a tap, given (tap, its channels (X,)).

    With FLAT, the number of channels, ``index`` (X,) runs over (tap, channel).
    """
    KH: tl.constexpr = TAPS.kernel[1]
    KW: tl.constexpr = TAPS.kernel[2]
    if FLAT > 0:
        tap, c = (index // FLAT)[None, :], (index % FLAT)[None, :]
        c_ok = (index < TAPS.kernel[0] * KH * KW * FLAT)[None, :]
    else:
        tap, c = index[0], index[1][None, :]
        c_ok = c < (channels + ALIGN - 1) // ALIGN * ALIGN  # a mask of whole vectors
    taps = tap // (KH * KW), tap // KW % KH, tap % KW
    offsets, inside = tap_offsets(at, taps, x_size, x_strides, ALIGN, TAPS)
    return operand(
        x_ptr, offsets + c.to(tl.int64) * x_strides[1], inside & row_ok & c_ok, c, c_ok,
        scale_ptr, shift_ptr, None, None, ACTIVATION, SLOPE, EMULATE, ACCUMULATE,
    )  # fmt: skip


@triton.jit
def read_rows(
    n, dy_ptr, dy_strides, channels, scale_ptr, shift_ptr, other_ptr, rate_ptr, at, row_ok,
    ALIGN: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """(BLOCK_P, X) of prologue(dy), for channels n (X,)."""
    n = n[None, :]
    n_ok = n < (channels + ALIGN - 1) // ALIGN * ALIGN
    offsets = row_offsets(at, dy_strides, ALIGN) + n.to(tl.int64) * dy_strides[1]
    return operand(
        dy_ptr, offsets, row_ok & n_ok, n, n_ok, scale_ptr, shift_ptr, other_ptr, rate_ptr,
        "none", 0.0, EMULATE, ACCUMULATE,
    )  # fmt: skip


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
def weight_tile(
    index, split,  # of a block of rows and columns of a group; of a part of the positions
    x_ptr, x_strides, x_size, channels, x_scale_ptr, x_shift_ptr,
    dy_ptr, dy_strides, dy_size, dy_channels, scale_ptr, shift_ptr, other_ptr, rate_ptr,
    partial_ptr, groups, rows, widths, count, per_split,
    TAPS: tl.constexpr, FLAT: tl.constexpr, SWAP: tl.constexpr, X_ALIGN: tl.constexpr,
    Y_ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One block of partial sums; arguments as of ``weight_gradient``."""
    STEP: tl.constexpr = BLOCK_N + REST_N
    COUNT: tl.constexpr = TAPS.kernel[0] * TAPS.kernel[1] * TAPS.kernel[2]
    width = index % widths
    row = index // widths % rows
    group = index // (widths * rows)
    in_channel, out_channel = group * channels, group * dy_channels
    x_ptr += in_channel.to(tl.int64) * x_strides[1]
    dy_ptr += out_channel.to(tl.int64) * dy_strides[1]
    if x_scale_ptr is not None:
        x_scale_ptr += in_channel
        x_shift_ptr += in_channel
    if scale_ptr is not None:
        scale_ptr += out_channel
    if shift_ptr is not None:
        shift_ptr += out_channel
    if rate_ptr is not None:
        rate_ptr += out_channel
        other_ptr += out_channel.to(tl.int64) * dy_strides[1]

    if SWAP:
        r = row * BLOCK_R + tl.arange(0, BLOCK_R)
        r_place, r_ok = r, r < dy_channels
        n, n_place, n_ok = tap_block(width, 0, channels, TAPS, FLAT, BLOCK_N, STEP)
        if REST_N > 0:
            m, m_place, m_ok = tap_block(width, BLOCK_N, channels, TAPS, FLAT, REST_N, STEP)
        length = COUNT * channels
    else:
        r, r_place, r_ok = tap_block(row, 0, channels, TAPS, FLAT, BLOCK_R, BLOCK_R)
        n = width * STEP + tl.arange(0, BLOCK_N)
        n_place, n_ok = n, n < dy_channels
        if REST_N > 0:
            m = width * STEP + BLOCK_N + tl.arange(0, REST_N)
            m_place, m_ok = m, m < dy_channels
        length = dy_channels

    acc = tl.zeros((BLOCK_R, BLOCK_N), ACCUMULATE)
    rest = tl.zeros((BLOCK_R, REST_N if REST_N > 0 else 16), ACCUMULATE)
    start, _ = tile_positions(split, 1, WIDE)
    start = start * per_split
    for step in range((tl.minimum(per_split, count - start) + BLOCK_P - 1) // BLOCK_P):
        p = start + step * BLOCK_P + tl.arange(0, BLOCK_P)
        row_ok = (p < count)[:, None]
        at = columns(positions(p, dy_size, RUN))
        if SWAP:
            a = read_rows(
                r, dy_ptr, dy_strides, dy_channels, scale_ptr, shift_ptr, other_ptr, rate_ptr, at,
                row_ok, Y_ALIGN, EMULATE, ACCUMULATE,
            )  # fmt: skip
            b = read_taps(
                n, x_ptr, x_strides, x_size, channels, x_scale_ptr, x_shift_ptr, at, row_ok,
                TAPS, FLAT, X_ALIGN, ACTIVATION, SLOPE, EMULATE, ACCUMULATE,
            )  # fmt: skip
        else:
            a = read_taps(
                r, x_ptr, x_strides, x_size, channels, x_scale_ptr, x_shift_ptr, at, row_ok,
                TAPS, FLAT, X_ALIGN, ACTIVATION, SLOPE, EMULATE, ACCUMULATE,
            )  # fmt: skip
            b = read_rows(
                n, dy_ptr, dy_strides, dy_channels, scale_ptr, shift_ptr, other_ptr, rate_ptr, at,
                row_ok, Y_ALIGN, EMULATE, ACCUMULATE,
            )  # fmt: skip
        a = tl.trans(a)
        acc = product(a, b, acc, PRECISION, EMULATE)
        if REST_N > 0:
            if SWAP:
                b = read_taps(
                    m, x_ptr, x_strides, x_size, channels, x_scale_ptr, x_shift_ptr, at, row_ok,
                    TAPS, FLAT, X_ALIGN, ACTIVATION, SLOPE, EMULATE, ACCUMULATE,
                )  # fmt: skip
            else:
                b = read_rows(
                    m, dy_ptr, dy_strides, dy_channels, scale_ptr, shift_ptr, other_ptr, rate_ptr,
                    at, row_ok, Y_ALIGN, EMULATE, ACCUMULATE,
                )  # fmt: skip
            rest = product(a, b, rest, PRECISION, EMULATE)

    partial_ptr += (split * groups + group).to(tl.int64) * (COUNT * channels * dy_channels)
    to = partial_ptr + r_place.to(tl.int64)[:, None] * length
    tl.store(to + n_place[None, :], acc, mask=r_ok[:, None] & n_ok[None, :])
    if REST_N > 0:
        tl.store(to + m_place[None, :], rest, mask=r_ok[:, None] & m_ok[None, :])


@triton.jit(do_not_specialize=["x_size", "dy_size", "count", "per_split"])
def weight_gradient(
    x_ptr, x_strides, x_size, channels,  # (N, C, T, H, W); channels of a group
    x_scale_ptr, x_shift_ptr,  # ``operand``, (C,) or None
    dy_ptr, dy_strides, dy_size, dy_channels,  # (N, K, T', H', W'); channels of a group
    scale_ptr, shift_ptr, other_ptr, rate_ptr,  # ``operand``, (K,) and like dy; or None
    partial_ptr, groups, rows, widths,  # blocks of rows and of columns
    count, per_split,  # N·T'·H'·W', and whole BLOCK_P of them
    TAPS: tl.constexpr, FLAT: tl.constexpr, SWAP: tl.constexpr, X_ALIGN: tl.constexpr,
    Y_ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Partial sums. Programs of one part of the positions are neighbours: they share it in L2."""
    pid = tl.program_id(0)
    blocks = groups * rows * widths
    weight_tile(
        pid % blocks, pid // blocks, x_ptr, x_strides, x_size, channels, x_scale_ptr, x_shift_ptr,
        dy_ptr, dy_strides, dy_size, dy_channels, scale_ptr, shift_ptr, other_ptr, rate_ptr,
        partial_ptr, groups, rows, widths, count, per_split, TAPS, FLAT, SWAP, X_ALIGN, Y_ALIGN,
        RUN, WIDE, ACTIVATION, SLOPE, BLOCK_P, BLOCK_R, BLOCK_N, REST_N, PRECISION, EMULATE,
        ACCUMULATE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "count"])
def finish_weight(
    partial_ptr, splits, count,  # of ``weight_gradient``; count: of weights
    dw_ptr, dw_strides, channels, out_channels,  # (K, C/g, kt, kh, kw); both of a group
    KERNEL: tl.constexpr, SWAP: tl.constexpr, BLOCK: tl.constexpr, EMULATE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dw: the partials added up in order, in its own dtype and strides."""
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = index < count
    total = tl.zeros((BLOCK,), ACCUMULATE)
    for split in range(splits):
        at = partial_ptr + tl.cast(split, tl.int64) * count
        total += tl.load(at + index, mask=ok, other=0.0)
    if SWAP:
        c = index % channels
        tap = index // channels % TAPS
        k = index // (channels * TAPS)
    else:
        c = index // out_channels % channels
        tap = index // (out_channels * channels) % TAPS
        k = index // (out_channels * channels * TAPS) * out_channels + index % out_channels
    kt, kh, kw = tap // (KERNEL[1] * KERNEL[2]), tap // KERNEL[2] % KERNEL[1], tap % KERNEL[2]
    at = k.to(tl.int64) * dw_strides[0] + c.to(tl.int64) * dw_strides[1]
    at = at + kt * dw_strides[2] + kh * dw_strides[3] + kw * dw_strides[4]
    tl.store(dw_ptr + at, narrow(total, dw_ptr.dtype.element_ty, EMULATE), mask=ok)


@triton.jit(do_not_specialize=["dy_size", "count"])
def channel_sums(
    dy_ptr, dy_strides, dy_size, channels,
    scale_ptr, shift_ptr, other_ptr, rate_ptr,  # ``operand``, (K,) and like dy; or None
    partial_ptr,  # (tiles of positions, K)
    count, per_tile,  # positions, and how many of them a program adds up
    ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Partial sums over positions of prologue(dy): the gradient of a bias."""
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE)
    first, _ = tile_positions(tile, 1, WIDE)
    first = first * per_tile
    for step in range((tl.minimum(per_tile, count - first) + BLOCK_P - 1) // BLOCK_P):
        p = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        total += read_rows(
            n, dy_ptr, dy_strides, channels, scale_ptr, shift_ptr, other_ptr, rate_ptr,
            columns(positions(p, dy_size, RUN)), (p < count)[:, None], ALIGN, EMULATE, ACCUMULATE,
        ).to(ACCUMULATE)  # fmt: skip
    at = partial_ptr + tile.to(tl.int64) * channels + n
    tl.store(at, tl.sum(total, 0), mask=n < channels)
