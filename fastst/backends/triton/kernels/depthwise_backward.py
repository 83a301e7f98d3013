"""Gradients of a depthwise or thinly grouped convolution: of its input and of its weight at once.

Both need the same elements of dy at a position of x: those of the outputs that a tap lets read it.

    dx[p, c]     = Σ_tap Σ_r dy[(p − tap)/stride, n] · w[tap, r, c]
    dw[tap, r, c] = Σ_p  x[p, c] · dy[(p − tap)/stride, n]        n = group of c · R + r

so x and dy are read once and dx is written, where two kernels would read dy twice. Tiles are
``BLOCK_P`` positions of x × ``BLOCK_C`` of its channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    activate,
    grid_of,
    image_positions,
    positions,
    read_du,
    row_offsets,
    size_of,
    strides_of,
    tap_offsets,
)
from .input_gradient import finish_gradient
from .tap_conv import tile_positions


@triton.jit
def direct_tile(
    channels, grid, count, RUN: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's tile of positions, those and which of them exist, and its channels."""
    tiles_c = (channels + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile = pid // tiles_c
    _, p = tile_positions(tile, BLOCK_P, WIDE)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    return tile, positions(p, grid_of(grid), RUN), p < count, c


@triton.jit
def gather_direct(
    acc, x,  # (BLOCK_P, BLOCK_C) each: of dx, and what the convolution has read
    per_group, out_per_group, channels,  # of a group of x and of dy; C
    dy_ptr, dy_strides, dy_size, s_ptr, r_ptr, u_ptr, p_ptr, w_ptr,
    dw_ptr, tile,  # dw_ptr None: no weight gradient
    position, row_ok, c, c_ok, size,  # positions and channels of x, and its (T, H, W)
    TAPS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """acc plus what the outputs give to the positions they have read, and the tile's part of dw."""
    KH: tl.constexpr = TAPS.kernel[1]
    KW: tl.constexpr = TAPS.kernel[2]
    TAP_COUNT: tl.constexpr = TAPS.kernel[0] * KH * KW
    IMAGES: tl.constexpr = TAPS.images[0] * TAPS.images[1] * TAPS.images[2]
    if dw_ptr is not None:
        dw_ptr += tile.to(tl.int64) * TAP_COUNT * out_per_group * channels + c
    for tap in range(TAP_COUNT):
        taps = (tap // (KH * KW), tap // KW % KH, tap % KW)
        for r in range(out_per_group):
            k = (c // per_group * out_per_group + r)[None, :]
            row = tap * out_per_group + r
            weight = tl.load(w_ptr + row * channels + c, mask=c_ok, other=0.0).to(ACCUMULATE)
            total = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE)
            for m in range(IMAGES):
                at, exists = image_positions(position, m, size, TAPS)
                offsets, inside = tap_offsets(at, taps, dy_size, dy_strides, ALIGN, TAPS)
                inside = inside & exists & row_ok
                some = True
                if IMAGES > 1:  # few tiles have more than the first, which all have
                    some = tl.max(inside.to(tl.int32), 0) > 0
                if some:
                    read = inside[:, None] & c_ok[None, :]
                    dy = read_du(
                        dy_ptr, offsets[:, None] + k.to(tl.int64) * dy_strides[1], read, k,
                        c_ok[None, :], s_ptr, r_ptr, u_ptr, p_ptr, EMULATE, ACCUMULATE,
                    ).to(ACCUMULATE)  # fmt: skip
                    # What is not read takes no part, whatever x and w are: 0·inf is no number.
                    acc += tl.where(read, dy * weight[None, :], 0.0)
                    if dw_ptr is not None:
                        total += tl.where(read, dy * x, 0.0)
            if dw_ptr is not None:
                tl.store(dw_ptr + row * channels, tl.sum(total, 0), mask=c_ok)
    return acc


@triton.jit
def read_tile(x_ptr, x_strides, position, ok, c, ALIGN: tl.constexpr, ACCUMULATE: tl.constexpr):
    """(BLOCK_P, BLOCK_C) of x at positions, 0 where nothing exists."""
    offsets = row_offsets(position, x_strides, ALIGN)[:, None]
    offsets = offsets + c.to(tl.int64)[None, :] * x_strides[1]
    return tl.load(x_ptr + offsets, mask=ok, other=0.0).to(ACCUMULATE)


@triton.jit(do_not_specialize=["count"])
def direct_gradients(
    x_ptr, x_strides, x_size, grid,  # (N, C, T, H, W); size (T, H, W)
    channels, stored,  # C; channels of dx that are written: zeros beyond C
    per_group, out_per_group,  # channels of a group of x and of dy
    scale_ptr, shift_ptr,  # (C,): the pass has read act(scale·x + shift); or None
    dy_ptr, dy_strides, dy_size,  # (N, K, T', H', W')
    s_ptr, r_ptr, dy_u_ptr, p_ptr,  # ``read_du``, (K,) and like dy; or None
    w_ptr,  # (taps, out_per_group, C)
    dx_ptr, dx_strides,  # (N, C, T, H, W), or None
    u_ptr, mean_ptr, partial_ptr,  # ``finish_gradient``: x where dx is multiplied by act', or None
    dw_ptr,  # (tiles, taps, out_per_group, C), or None
    count,  # N·T·H·W
    TAPS: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr,
    RUN: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dx, or dv with its sums, and the tile's part of dw."""
    x_strides, x_size = strides_of(x_strides), size_of(x_size)
    dy_strides, dy_size = strides_of(dy_strides), size_of(dy_size)
    if dx_ptr is not None:
        dx_strides = strides_of(dx_strides)
    tile, position, row_ok, c = direct_tile(stored, grid, count, RUN, WIDE, BLOCK_P, BLOCK_C)
    c_ok = c < channels
    acc = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE)
    x = acc
    if dw_ptr is not None:
        ok = row_ok[:, None] & c_ok[None, :]
        x = read_tile(x_ptr, x_strides, position, ok, c, X_ALIGN, ACCUMULATE)
        if scale_ptr is not None:
            x = x * tl.load(scale_ptr + c, mask=c_ok, other=0.0)[None, :]
            x = x + tl.load(shift_ptr + c, mask=c_ok, other=0.0)[None, :]
        x = activate(x, ACTIVATION, SLOPE)
    acc = gather_direct(
        acc, x, per_group, out_per_group, channels, dy_ptr, dy_strides, dy_size, s_ptr, r_ptr,
        dy_u_ptr, p_ptr, w_ptr, dw_ptr, tile, position, row_ok, c, c_ok, x_size,
        TAPS, Y_ALIGN, BLOCK_P, BLOCK_C, EMULATE, ACCUMULATE,
    )  # fmt: skip
    if dx_ptr is not None:
        if partial_ptr is not None:
            partial_ptr += tile.to(tl.int64) * 2 * channels
        finish_gradient(
            acc, c, 0, channels, channels, stored, u_ptr, scale_ptr, shift_ptr, mean_ptr,
            partial_ptr, dx_ptr, dx_strides, position, row_ok, False, ACTIVATION, SLOPE, DX_ALIGN,
            EMULATE,
        )  # fmt: skip
