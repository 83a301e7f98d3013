# mypy: ignore-errors
# Its tuples of sums grow while Triton unrolls, which mypy cannot follow.
"""Depthwise and thinly grouped convolutions, on ordinary cores: memory decides there.

Tiles are ``BLOCK_P`` positions × ``BLOCK_C`` output channels. Weights come packed as (taps ·
channels of x per group, output channels), tap-major.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate, columns, positions, tap_offsets
from .tap_conv import finish, store, tile_positions


@triton.jit
def direct_sum(
    acc,  # (BLOCK_P, BLOCK_C)
    x_ptr, x_strides, x_size, w_ptr,
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
        offsets, inside = tap_offsets(at, taps, x_size, x_strides, ALIGN, TAPS)
        ok = inside & row_ok & n_ok[None, :]
        for j in range(per_group):
            c = n // out_per_group * per_group + j
            z = tl.load(
                x_ptr + offsets + c.to(tl.int64)[None, :] * x_strides[1], mask=ok, other=0.0
            )
            z = z.to(acc.dtype)
            if scale_ptr is not None:
                z = z * tl.load(scale_ptr + c, mask=n_ok, other=0.0)[None, :]
                z = z + tl.load(shift_ptr + c, mask=n_ok, other=0.0)[None, :]
            z = activate(z, ACTIVATION, SLOPE)
            if scale_ptr is not None:  # act(shift) is not 0; act(0) is, for all of them
                z = tl.where(ok, z, 0.0)
            w = tl.load(w_ptr + (tap * per_group + j) * out_channels + n, mask=n_ok, other=0.0)
            acc += z * w.to(acc.dtype)[None, :]
    return acc


@triton.jit(do_not_specialize=["x_size", "y_size", "count"])
def direct_conv(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W); size (T, H, W)
    per_group, out_per_group,
    w_ptr,
    in_scale_ptr, in_shift_ptr,  # (C,) prologue, or None
    out_scale_ptr, out_shift_ptr,  # (K,) epilogue, or None
    partial_ptr,  # (tiles of positions, 2, K), or None
    residual_ptr, residual_strides,  # like y, or None; may be y itself
    y_ptr, y_strides, y_size, out_channels,  # (N, K, T', H', W')
    count,  # N·T'·H'·W'
    TAPS: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr,
    RUN: tl.constexpr, WIDE: tl.constexpr,
    IN_ACTIVATION: tl.constexpr, INNER: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
    EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """One pass with the prologue and epilogue of ``tap_conv``."""
    out_channels = out_channels // Y_ALIGN * Y_ALIGN  # the same number: a mask of whole vectors
    tiles_n = (out_channels + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile_p = pid // tiles_n
    start, p = tile_positions(tile_p, BLOCK_P, WIDE)
    row_ok = p < count
    position = positions(p, y_size, RUN)
    n = pid % tiles_n * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = direct_sum(
        tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE), x_ptr, x_strides, x_size, w_ptr, n,
        n < out_channels, out_channels, per_group, out_per_group, in_scale_ptr, in_shift_ptr,
        columns(position), row_ok[:, None], TAPS, X_ALIGN, IN_ACTIVATION, SLOPE, UNROLL,
    )  # fmt: skip
    if partial_ptr is not None:
        partial_ptr += tile_p.to(tl.int64) * 2 * out_channels
    finish(
        acc, n, 0, out_channels, out_channels, out_channels, out_scale_ptr, out_shift_ptr,
        partial_ptr, residual_ptr, residual_strides, y_ptr, y_strides, position, row_ok,
        tl.minimum(count - start, BLOCK_P), INNER, ACTIVATION, SLOPE, Y_ALIGN, EMULATE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["x_size", "frames", "y_size", "count"])
def depthwise_pair(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W); size (T, H, W)
    spatial_ptr, temporal_ptr,  # packed weights of the two passes
    channels,
    scale_ptr, shift_ptr,  # (C,) of the norm with the spatial bias folded in, or None, or the bias
    bias_ptr,  # (C,) temporal, or None
    y_ptr, y_strides, y_size,  # (N, C, T', H', W')
    frames,  # after the spatial pass
    count,  # N·H'·W'
    SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr,
    RUN: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
    EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Spatial-first depthwise pair: x is read once, y written once, nothing between them stored.

    A program walks over time at its positions. Mid frame t adds to the ``SPAN`` output frames
    (at stride 1) that can see it; the oldest is then complete, and is stored where the stride
    keeps it.
    """
    KT: tl.constexpr = TEMPORAL.kernel[0]
    STRIDE: tl.constexpr = TEMPORAL.stride[0]
    STEP: tl.constexpr = TEMPORAL.dilation[0]
    SPAN: tl.constexpr = STEP * (KT - 1) + 1
    channels = channels // Y_ALIGN * Y_ALIGN  # the same number: a mask of whole vectors
    tiles_n = (channels + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    _, p = tile_positions(pid // tiles_n, BLOCK_P, WIDE)
    row_ok = p < count
    sample, _, row, column = positions(p, (1, y_size[1], y_size[2]), RUN)
    n = pid % tiles_n * BLOCK_C + tl.arange(0, BLOCK_C)
    n_ok = n < channels

    zero = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE)
    sums = ()
    for _ in tl.static_range(SPAN):
        sums = sums + (zero,)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n, mask=n_ok, other=0.0).to(ACCUMULATE)[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + n, mask=n_ok, other=0.0).to(ACCUMULATE)[None, :]
    for step in range((y_size[0] - 1) * STRIDE + SPAN - TEMPORAL.before[0]):
        t = tl.to_tensor(step)
        z = direct_sum(
            zero, x_ptr, x_strides, x_size, spatial_ptr, n, n_ok, channels, 1, 1, None, None,
            (sample[:, None], t, row[:, None], column[:, None]), row_ok[:, None] & (t < frames),
            SPATIAL, X_ALIGN, "none", SLOPE, UNROLL,
        )  # fmt: skip
        if scale_ptr is not None:
            z = z * scale
        if shift_ptr is not None:
            z = z + shift
        z = tl.where(t < frames, activate(z, ACTIVATION, SLOPE), 0.0)  # temporal padding is of z
        moved = ()
        for age in tl.static_range(SPAN):
            total = sums[age]
            if (SPAN - 1 - age) % STEP == 0:
                tap = (SPAN - 1 - age) // STEP
                w = tl.load(temporal_ptr + tap * channels + n, mask=n_ok, other=0.0)
                total += z * w.to(ACCUMULATE)[None, :]
            moved = moved + (total,)
        i = t + TEMPORAL.before[0] - (SPAN - 1)
        y = moved[0]
        if bias_ptr is not None:
            y += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(ACCUMULATE)[None, :]
        done = (i >= 0) & (i % STRIDE == 0)
        store(
            y, n, n_ok, y_ptr, y_strides, (sample, i // STRIDE, row, column), row_ok & done,
            Y_ALIGN, EMULATE,
        )  # fmt: skip
        sums = ()
        for age in tl.static_range(1, SPAN):
            sums = sums + (moved[age],)
        sums = sums + (zero,)
