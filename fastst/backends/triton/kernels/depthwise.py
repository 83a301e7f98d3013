# mypy: ignore-errors
# Its tuples of sums grow while Triton unrolls, which mypy cannot follow.
"""Depthwise and thinly grouped convolutions, on ordinary cores: memory decides there.

Tiles are ``BLOCK_P`` positions × ``BLOCK_C`` output channels. Weights come packed as (taps ·
channels of x per group, output channels), tap-major.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate, columns, grid_of, positions, size_of, strides_of, tap_position
from .rolling_window import mid_at, output_at, window_source, window_start, window_steps
from .tap_conv import finish, past_source, row_pointers, tile_positions


@triton.jit
def direct_sum(
    acc,  # (BLOCK_P, BLOCK_C)
    x_ptr, x_strides, x_size,
    past,  # ``past_source``: of what the prologue makes of x; or None
    w_ptr,
    n, n_ok, out_channels,  # output channels of the tile, and how many there are
    per_group, out_per_group,  # channels of a group
    scale_ptr, shift_ptr,  # (C,) prologue, or None
    at, row_ok,  # position as columns
    TAPS: tl.constexpr, ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """acc plus the convolution at the tile's positions."""
    KH: tl.constexpr = TAPS.kernel[1]
    KW: tl.constexpr = TAPS.kernel[2]
    for tap in tl.range(0, TAPS.kernel[0] * KH * KW, loop_unroll_factor=UNROLL):
        taps = (tap // (KH * KW), tap // KW % KH, tap % KW)
        tapped, inside = tap_position(at, taps, x_size, TAPS)
        rows, past_rows = row_pointers(tapped, x_ptr, x_strides, past, ALIGN)
        ok = inside & row_ok & n_ok[None, :]
        for j in range(per_group):
            c = n // out_per_group * per_group + j
            read = rows + c.to(tl.int64)[None, :] * x_strides[1]
            if past is not None:
                old = past_rows + c.to(tl.int64)[None, :] * past[1][1]
                read = tl.where(tapped[1] < past[2], old, read)
            raw = tl.load(read, mask=ok, other=0.0).to(acc.dtype)
            z = raw
            if scale_ptr is not None:
                z = z * tl.load(scale_ptr + c, mask=n_ok, other=0.0)[None, :]
                z = z + tl.load(shift_ptr + c, mask=n_ok, other=0.0)[None, :]
            z = activate(z, ACTIVATION, SLOPE)
            if scale_ptr is not None:  # act(shift) is not 0; act(0) is, for all of them
                z = tl.where(ok, z, 0.0)
            if past is not None:
                z = tl.where(tapped[1] < past[2], raw, z)
            w = tl.load(w_ptr + (tap * per_group + j) * out_channels + n, mask=n_ok, other=0.0)
            acc += z * w.to(acc.dtype)[None, :]
    return acc


@triton.jit(do_not_specialize=["count"])
def direct_conv(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W); size (T, H, W), with the frames before
    past_ptr, past_strides, past_size,  # frames before x, or None
    per_group, out_per_group,
    w_ptr,
    in_scale_ptr, in_shift_ptr,  # (C,) prologue, or None
    out_scale_ptr, out_shift_ptr,  # (K,) epilogue, or None
    partial_ptr,  # (tiles of positions, 2, K), or None
    residual_ptr, residual_strides,  # like y, or None; may be y itself
    y_ptr, y_strides, grid, out_channels,  # (N, K, T', H', W')
    count,  # N·T'·H'·W'
    TAPS: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr,
    RUN: tl.constexpr, WIDE: tl.constexpr,
    IN_ACTIVATION: tl.constexpr, INNER: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
    EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One pass with the prologue and epilogue of ``tap_conv``."""
    x_strides, x_size, y_strides = strides_of(x_strides), size_of(x_size), strides_of(y_strides)
    if residual_ptr is not None:
        residual_strides = strides_of(residual_strides)
    out_channels = out_channels // Y_ALIGN * Y_ALIGN  # the same number: a mask of whole vectors
    tiles_n = (out_channels + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile_p = pid // tiles_n
    start, p = tile_positions(tile_p, BLOCK_P, WIDE)
    row_ok = p < count
    position = positions(p, grid_of(grid), RUN)
    n = pid % tiles_n * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = direct_sum(
        tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE), x_ptr, x_strides, x_size,
        past_source(past_ptr, past_strides, past_size, tl.cast(0, tl.int32)), w_ptr, n,
        n < out_channels, out_channels, per_group, out_per_group, in_scale_ptr, in_shift_ptr,
        columns(position), row_ok[:, None], TAPS, X_ALIGN, IN_ACTIVATION, SLOPE, UNROLL,
    )  # fmt: skip
    if partial_ptr is not None:
        partial_ptr += tile_p.to(tl.int64) * 2 * out_channels
    finish(
        acc, n, 0, out_channels, out_channels, None, out_scale_ptr, out_shift_ptr,
        partial_ptr, residual_ptr, residual_strides, y_ptr, y_strides, position, row_ok,
        tl.minimum(count - start, BLOCK_P), INNER, ACTIVATION, SLOPE, Y_ALIGN, EMULATE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "pieces"])
def direct_pair(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W); size (T, H, W)
    per_group, mid_out_per_group, mid_channels,  # of the first pass
    mid_per_group, out_per_group, out_channels,  # of the second pass
    first_ptr, second_ptr,  # packed weights of the two passes
    scale_ptr, shift_ptr,  # (M,) of the norm with the first bias folded in, or None, or the bias
    bias_ptr,  # (K,) of the second pass, or None
    residual_ptr, residual_strides,  # like y, or None
    y_ptr, y_strides, y_size,  # (N, K, T', H', W')
    mid_size, grid,  # grid: of y, 1 along the axis
    count, pieces,  # positions of y across the axis, and programs that share the axis
    FIRST: tl.constexpr, SECOND: tl.constexpr, AXIS: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTER: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
    EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Both passes of a depthwise or thinly grouped pair: x is read once, y written once.

    A program has some output channels and, of each mid frame (or row), the mid channels of theirs,
    one of each group at a time.
    """
    x_strides, x_size, mid_size = strides_of(x_strides), size_of(x_size), size_of(mid_size)
    y_strides, y_size = strides_of(y_strides), size_of(y_size)
    if residual_ptr is not None:
        residual_strides = strides_of(residual_strides)
    TAPS: tl.constexpr = SECOND.kernel[AXIS]
    ACROSS: tl.constexpr = SECOND.kernel[2]
    out_channels = out_channels // Y_ALIGN * Y_ALIGN  # the same number: a mask of whole vectors
    tiles_n = (out_channels + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    n = pid % tiles_n * BLOCK_C + tl.arange(0, BLOCK_C)
    n_ok = n < out_channels
    position, row_ok, residue, first, end = window_start(
        pid // tiles_n, y_size, grid_of(grid), count, pieces, SECOND, AXIS, BLOCK_P, RUN, WIDE
    )

    zero = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE)
    sums = ()
    for _ in tl.static_range(TAPS):
        sums = sums + (zero,)
    begin, stop = window_steps(first, end, SECOND, AXIS)
    for step in range(begin, stop):
        index = residue + tl.cast(step, tl.int32) * SECOND.dilation[AXIS]
        row, there = window_source(index, mid_size, SECOND, AXIS)
        for turn in range(mid_per_group * ACROSS if there else 0):
            across = turn % ACROSS
            lane = turn // ACROSS
            if mid_per_group == 1:
                lane = 0  # known to be: channels stay neighbours
            m = n // out_per_group * mid_per_group + lane
            at, ok = mid_at(position, row, across, mid_size, SECOND, AXIS)
            ok = (ok & row_ok)[:, None]
            z = direct_sum(
                zero, x_ptr, x_strides, x_size, None, first_ptr, m, n_ok, mid_channels, per_group,
                mid_out_per_group, None, None, columns(at), ok, FIRST, X_ALIGN, "none", SLOPE,
                UNROLL,
            )  # fmt: skip
            if scale_ptr is not None:
                z = z * tl.load(scale_ptr + m, mask=n_ok, other=0.0).to(ACCUMULATE)[None, :]
            if shift_ptr is not None:
                z = z + tl.load(shift_ptr + m, mask=n_ok, other=0.0).to(ACCUMULATE)[None, :]
            # Padding of the second pass is of z, with zeros: skipped, not normalised.
            z = tl.where(ok, activate(z, ACTIVATION, SLOPE), 0.0)
            moved = ()
            for age in tl.static_range(TAPS):
                tap = ((TAPS - 1 - age) * ACROSS + across) * mid_per_group + turn // ACROSS
                w = tl.load(second_ptr + tap * out_channels + n, mask=n_ok, other=0.0)
                moved = moved + (sums[age] + z * w.to(ACCUMULATE)[None, :],)
            sums = moved
        output = step - (TAPS - 1)
        at, kept = output_at(position, residue + output * SECOND.dilation[AXIS], SECOND, AXIS)
        finish(
            sums[0], n, 0, out_channels, 0, None, None, bias_ptr, None, residual_ptr,
            residual_strides, y_ptr, y_strides, at, row_ok & kept & (output >= first), BLOCK_P,
            "none", OUTER, SLOPE, Y_ALIGN, EMULATE,
        )  # fmt: skip
        shifted = ()
        for age in tl.static_range(1, TAPS):
            shifted = shifted + (sums[age],)
        sums = shifted + (zero,)
