"""Input gradient: the tap convolution the other way round, with mirrored taps.

    dx[p, c] = Σ_tap Σ_n dy[(p − tap)/stride, n] · w[tap, n, c]

where the division comes out even. For a stride s, positions of dx fall into s residue classes per
axis, and each is read by its own taps only: a program has one class, so no product is in vain.
Padding other than zeros makes positions of dx be read as several padded indices, their images;
those that no position of a tile has cost nothing.

Weights come packed as for ``tap_conv``, with input and output channels exchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    activate_gradient,
    column_sums,
    grid_of,
    image_positions,
    regroup,
    size_of,
    strides_of,
    tile_offsets,
    tile_rows,
    written_positions,
)
from .tap_conv import accumulate, read_once, reduction_rows, store, tile_positions, weight_start


@triton.jit
def class_tile(
    tile, row, grid, size, count,
    CLASSES: tl.constexpr, RUN: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Positions of rows of a tile of one residue class, which of them exist, and the residues."""
    tiles = (count + BLOCK_P - 1) // BLOCK_P
    start, _ = tile_positions(tile % tiles, BLOCK_P, WIDE)
    p = start + row
    row_ok = p < count
    if WHOLE:
        row_ok = row < BLOCK_P
    sample, t, h, w = written_positions(p, grid, RUN, DENSE)
    index = tile // tiles
    residue = (
        index // (CLASSES[1] * CLASSES[2]), index // CLASSES[2] % CLASSES[1], index % CLASSES[2],
    )  # fmt: skip
    if CLASSES[0] * CLASSES[1] * CLASSES[2] > 1:
        t = t * CLASSES[0] + residue[0]
        h = h * CLASSES[1] + residue[1]
        w = w * CLASSES[2] + residue[2]
        row_ok = row_ok & (t < size[0]) & (h < size[1]) & (w < size[2])
    return (sample, t, h, w), row_ok, residue


@triton.jit
def class_taps(residue, AXIS: tl.constexpr, TAPS: tl.constexpr):
    """First of the taps that read a residue class along one axis, and how many do.

    Tap k reads the residue (k·dilation − before) mod stride, and so do those STEP further.
    """
    STEP: tl.constexpr = TAPS.step[AXIS]
    first, taps = residue * 0, residue * 0
    for k in tl.static_range(STEP):
        reads = (residue + TAPS.before[AXIS] - k * TAPS.dilation[AXIS]) % TAPS.stride[AXIS] == 0
        first = tl.where(reads, k, first)
        taps = tl.where(reads, (TAPS.kernel[AXIS] - k + STEP - 1) // STEP, taps)
    return first, tl.maximum(taps, 0)


@triton.jit
def gather(
    acc, rest,  # (BLOCK_P, BLOCK_N) and, with REST_N, (BLOCK_P, REST_N)
    dy_ptr, dy_strides, dy_size, channels, group,  # channels of a group of dy
    w_ptr, width, first,  # (groups, reduction, width), and the tile's first column
    position, row_ok, residue, size,  # positions of dx, and its (T, H, W)
    TAPS: tl.constexpr, CLASSES: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr, TURNED: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """acc and rest plus what the outputs of a convolution give to the positions they have read."""
    subset = None
    if CLASSES[0] * CLASSES[1] * CLASSES[2] > 1:
        tap_t, taps_t = class_taps(residue[0], 0, TAPS)
        tap_h, taps_h = class_taps(residue[1], 1, TAPS)
        tap_w, taps_w = class_taps(residue[2], 2, TAPS)
        subset = (tap_t, tap_h, tap_w, taps_t, taps_h, taps_w)
    dy_ptr += (group * channels).to(tl.int64) * dy_strides[1]
    reduction = reduction_rows(channels, TAPS, FLAT, BLOCK_K)
    w_ptr = weight_start(w_ptr, group, first, reduction, width, TURNED)
    if TAPS.images[0] * TAPS.images[1] * TAPS.images[2] == 1:
        acc, rest = accumulate(
            acc, rest, dy_ptr, dy_strides, dy_size, None, channels, w_ptr, width, position, row_ok,
            subset, TAPS, FLAT, ALIGN, BLOCK_N, REST_N, BLOCK_K, TURNED, PRECISION, EMULATE,
        )  # fmt: skip
    else:
        for m in range(TAPS.images[0] * TAPS.images[1] * TAPS.images[2]):
            at, ok = image_positions(position, m, size, TAPS)
            ok = ok & row_ok
            if tl.max(ok.to(tl.int32), 0) > 0:
                acc, rest = accumulate(
                    acc, rest, dy_ptr, dy_strides, dy_size, None, channels, w_ptr, width, at, ok,
                    None, TAPS, FLAT, ALIGN, BLOCK_N, REST_N, BLOCK_K, TURNED, PRECISION, EMULATE,
                )  # fmt: skip
                acc, rest = read_once(acc), read_once(rest)
    return acc, rest


@triton.jit
def finish_gradient(
    acc, n,  # dz: (rows, columns), and channels within the group
    group, channels, all_channels, stored,  # as of ``tap_conv.finish``
    u_ptr, scale_ptr, shift_ptr,  # u with the strides of dv, or None; of the norm, or None
    mean_ptr,  # (all_channels,), or None
    partial_ptr,  # (2, all_channels) of this tile, or None
    dv_ptr, dv_strides, position, row_ok,
    SCALED: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ALIGN: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """dv = dz·act'(scale·u + shift), and its sums Σdv and Σdv·(u − mean) over the tile.

    SCALED: scale·dv is stored, the gradient of u where scale and shift are no function of u.
    """
    n_ok = n < channels
    # ALIGN divides both numbers: multiplied by it, the mask is seen to be one of whole vectors.
    there = n < (channels if stored is None else stored) // ALIGN * ALIGN
    channel = group * channels // ALIGN * ALIGN + n
    if partial_ptr is not None:
        acc = read_once(acc)
    if u_ptr is not None:
        offsets = tile_offsets(position, channel, dv_strides, ALIGN)
        ok = tl.expand_dims(row_ok, -1) & there
        u = tl.load(u_ptr + offsets, mask=ok, other=0.0).to(acc.dtype)
        v = u
        if scale_ptr is not None:
            v = v * tl.load(scale_ptr + channel, mask=n_ok, other=0.0)
            v = v + tl.load(shift_ptr + channel, mask=n_ok, other=0.0)
        acc = activate_gradient(acc, v, ACTIVATION, SLOPE)
    if stored is not None:
        acc = tl.where(n_ok, acc, 0.0)
    if partial_ptr is not None:
        acc = tl.where(tl.expand_dims(row_ok, -1), acc, 0.0)
        away = acc
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + channel, mask=n_ok, other=0.0).to(acc.dtype)
            away = acc * (u - mean)
        dv, dv_away = column_sums(acc, away)
        tl.store(partial_ptr + channel, dv, mask=n_ok)
        if mean_ptr is not None:
            tl.store(partial_ptr + all_channels + channel, dv_away, mask=n_ok)
    if SCALED:
        acc = acc * tl.load(scale_ptr + channel, mask=n_ok, other=0.0)
    store(acc, channel, there, dv_ptr, dv_strides, position, row_ok, ALIGN, EMULATE)


@triton.jit(do_not_specialize=["count"])
def input_gradient(
    dy_ptr, dy_strides, dy_size,  # (N, K, T', H', W'); size (T', H', W')
    channels, groups,  # channels of a group of dy
    w_ptr, width, tiles_n,  # (groups, reduction, width), of so many tiles
    dx_ptr, dx_strides, dx_size,  # (N, C, T, H, W)
    dx_channels, dx_stored,  # of a group; ``tap_conv.finish``
    u_ptr, scale_ptr, shift_ptr, mean_ptr, partial_ptr,  # ``finish_gradient``; or None
    grid, count,  # (T, H, W) of one residue class, and its positions: N·T·H·W
    TAPS: tl.constexpr, FLAT: tl.constexpr, CLASSES: tl.constexpr,  # classes along each axis
    Y_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, DENSE: tl.constexpr,  # as of ``tap_conv``
    SCALED: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dx, or dv with its sums. Programs of one tile of positions are neighbours."""
    dy_strides, dy_size = strides_of(dy_strides), size_of(dy_size)
    dx_strides, dx_size = strides_of(dx_strides), size_of(dx_size)
    grid = grid_of(grid)
    pid = tl.program_id(0)
    tile = pid // (tiles_n * groups)
    group = pid // tiles_n % groups
    first = pid % tiles_n * (BLOCK_N + REST_N)
    position, row_ok, residue = class_tile(
        tile, tl.arange(0, BLOCK_P), grid, dx_size, count, CLASSES, RUN, BLOCK_P, WIDE, WHOLE,
        False,
    )  # fmt: skip
    acc, rest = gather(
        tl.zeros((BLOCK_P, BLOCK_N), ACCUMULATE),
        tl.zeros((BLOCK_P, REST_N if REST_N > 0 else 16), ACCUMULATE),
        dy_ptr, dy_strides, dy_size, channels, group, w_ptr, width, first, position, row_ok,
        residue, dx_size, TAPS, CLASSES, FLAT, Y_ALIGN, BLOCK_N, REST_N, BLOCK_K, TURNED,
        PRECISION, EMULATE,
    )  # fmt: skip

    all_channels = groups * dx_channels
    if partial_ptr is not None:
        partial_ptr += tile.to(tl.int64) * 2 * all_channels
    position, row_ok, _ = class_tile(
        tile, tile_rows(BLOCK_P, BLOCK_N), grid, dx_size, count, CLASSES, RUN, BLOCK_P, WIDE,
        WHOLE, DENSE,
    )  # fmt: skip
    finish_gradient(
        regroup(acc), first + tl.arange(0, BLOCK_N), group, dx_channels, all_channels, dx_stored,
        u_ptr, scale_ptr, shift_ptr, mean_ptr, partial_ptr, dx_ptr, dx_strides, position, row_ok,
        SCALED, ACTIVATION, SLOPE, X_ALIGN, EMULATE,
    )  # fmt: skip
    if REST_N > 0:
        position, row_ok, _ = class_tile(
            tile, tile_rows(BLOCK_P, REST_N), grid, dx_size, count, CLASSES, RUN, BLOCK_P, WIDE,
            WHOLE, DENSE,
        )  # fmt: skip
        finish_gradient(
            regroup(rest), first + BLOCK_N + tl.arange(0, REST_N), group, dx_channels, all_channels,
            dx_stored, u_ptr, scale_ptr, shift_ptr, mean_ptr, partial_ptr, dx_ptr, dx_strides,
            position, row_ok, SCALED, ACTIVATION, SLOPE, X_ALIGN, EMULATE,
        )  # fmt: skip
