"""The parallel op: both branches in one launch, forward and backward.

Where the branches have no activation of their own they are one convolution over a cross of taps:
one sum of both, and a gradient that is dy for both.

The channels of what is written are cut into ``parts``, each within one group of either branch: as
many as the least common multiple of their groups. A branch of thin groups (``DIRECT``) runs on
ordinary cores, for any channels, and cuts nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    activate,
    activate_gradient,
    columns,
    four_of,
    grid_of,
    positions,
    size_of,
    strides_of,
)
from .depthwise import direct_sum
from .depthwise_backward import direct_tile, gather_direct, read_tile
from .input_gradient import class_tile, finish_gradient, gather
from .tap_conv import (
    accumulate,
    add_bias,
    read_once,
    reduction_rows,
    store,
    tile_positions,
    weight_start,
)
from .weight_gradient import weight_tile


@triton.jit
def part_tile(pid, tiles_n, parts, COLUMNS: tl.constexpr):
    """A program's tile of positions, its part of the channels and its first column in that."""
    return pid // (tiles_n * parts), pid // tiles_n % parts, pid % tiles_n * COLUMNS


@triton.jit
def group_of(part, per_group, per_part, first):
    """The group of a branch that a part lies in, and the column of the group that ``first`` is."""
    shared = per_group // per_part
    return part // shared, part % shared * per_part + first


@triton.jit
def branch(
    acc, rest,  # (BLOCK_P, BLOCK_N) and, with REST_N, (BLOCK_P, REST_N)
    x_ptr, x_strides, x_size, channels, per_group,  # of a group of x and of y
    w_ptr, width, bias_ptr,  # packed as for ``tap_conv`` or, DIRECT, for ``direct_conv``
    part, parts, per_part, first, position, row_ok,
    TAPS: tl.constexpr, FLAT: tl.constexpr, DIRECT: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """acc and rest plus one of the convolutions, with its bias."""
    out_channels = parts * per_part
    n = part * per_part + first + tl.arange(0, BLOCK_N)
    n_rest = part * per_part + first + BLOCK_N + tl.arange(0, REST_N if REST_N > 0 else 16)
    if DIRECT:
        at, ok = columns(position), row_ok[:, None]
        acc = direct_sum(
            acc, x_ptr, x_strides, x_size, None, w_ptr, n, n < out_channels, out_channels, channels,
            per_group, None, None, at, ok, TAPS, ALIGN, "none", 0.0, UNROLL,
        )  # fmt: skip
        if REST_N > 0:
            rest = direct_sum(
                rest, x_ptr, x_strides, x_size, None, w_ptr, n_rest, n_rest < out_channels,
                out_channels, channels, per_group, None, None, at, ok, TAPS, ALIGN, "none", 0.0,
                UNROLL,
            )  # fmt: skip
    else:
        group, column = group_of(part, per_group, per_part, first)
        rows = reduction_rows(channels, TAPS, FLAT, BLOCK_K)
        x_ptr += (group * (channels // ALIGN * ALIGN)).to(tl.int64) * x_strides[1]
        w_ptr = weight_start(w_ptr, group, column, rows, width, TURNED)
        acc, rest = accumulate(
            acc, rest, x_ptr, x_strides, x_size, None, channels, w_ptr, width, position, row_ok,
            None, TAPS, FLAT, ALIGN, BLOCK_N, REST_N, BLOCK_K, TURNED, PRECISION, EMULATE,
        )  # fmt: skip
        acc, rest = read_once(acc), read_once(rest)
    return add_bias(acc, bias_ptr, n, out_channels), add_bias(rest, bias_ptr, n_rest, out_channels)


@triton.jit
def finish_branches(
    a, b, column,  # what leaves the branches: (BLOCK_P, columns), and columns of the part
    part, parts, per_part, dy_ptr, dy_strides, y_ptr, db_ptr, y_strides, partial_ptr, position,
    row_ok,
    BRANCH: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DY_ALIGN: tl.constexpr,
    Y_ALIGN: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """y or, where there is dy, the gradients of a and b, and their sums over the tile.

    Without BRANCH, b is the sum of both.
    """
    n, n_ok = part * per_part + column, column < per_part
    v = activate(b, BRANCH, SLOPE)
    if BRANCH != "none":
        v += activate(a, BRANCH, SLOPE)
    if dy_ptr is None:
        v = activate(v, ACTIVATION, SLOPE)
        store(v, n, n_ok, y_ptr, y_strides, position, row_ok, Y_ALIGN, EMULATE)
    else:
        ok = row_ok[:, None] & n_ok[None, :]
        dv = read_tile(dy_ptr, dy_strides, position, ok, n, DY_ALIGN, a.dtype)
        dv = activate_gradient(dv, v, ACTIVATION, SLOPE)
        da = tl.where(ok, activate_gradient(dv, a, BRANCH, SLOPE), 0.0)
        store(da, n, n_ok, y_ptr, y_strides, position, row_ok, Y_ALIGN, EMULATE)
        if partial_ptr is not None:
            tl.store(partial_ptr + n, tl.sum(da, 0), mask=n_ok)
        if db_ptr is not None:
            db = tl.where(ok, activate_gradient(dv, b, BRANCH, SLOPE), 0.0)
            store(db, n, n_ok, db_ptr, y_strides, position, row_ok, Y_ALIGN, EMULATE)
            if partial_ptr is not None:
                tl.store(partial_ptr + parts * per_part + n, tl.sum(db, 0), mask=n_ok)


@triton.jit(do_not_specialize=["tiles_n", "count"])
def parallel_conv(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W); size (T, H, W)
    channels, per_group, widths,  # of both branches: channels of a group of x and of y; columns
    spatial_ptr, temporal_ptr,  # as of ``branch``; temporal_ptr None: only one branch
    spatial_bias_ptr, temporal_bias_ptr,  # (K,), or None
    tiles_n, parts, per_part,  # tiles of a part; parts · per_part = K
    dy_ptr, dy_strides,  # (N, K, T', H', W'), or None: y is wanted
    y_ptr, db_ptr, y_strides, grid,  # y, or da and, with the same strides, db or None
    partial_ptr,  # (tiles of positions, 1 or, with db, 2, K) sums of da and db, or None
    count,  # N·T'·H'·W'
    SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr, SPATIAL_FLAT: tl.constexpr,
    TEMPORAL_FLAT: tl.constexpr, DIRECT: tl.constexpr,  # of both branches
    X_ALIGN: tl.constexpr, DY_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, RUN: tl.constexpr,
    WIDE: tl.constexpr, BRANCH: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """ACTIVATION(BRANCH(spatial) + BRANCH(temporal)), or the gradients of both convolutions.

    For the gradients the convolutions are computed again, and not written.
    """
    x_strides, x_size, y_strides = strides_of(x_strides), size_of(x_size), strides_of(y_strides)
    if dy_ptr is not None:
        dy_strides = strides_of(dy_strides)
    # Y_ALIGN divides it: multiplied by that, masks are seen to be those of whole vectors.
    per_part = per_part // Y_ALIGN * Y_ALIGN
    tile, part, first = part_tile(tl.program_id(0), tiles_n, parts, BLOCK_N + REST_N)
    _, p = tile_positions(tile, BLOCK_P, WIDE)
    row_ok = p < count
    position = positions(p, grid_of(grid), RUN)
    acc = tl.zeros((BLOCK_P, BLOCK_N), ACCUMULATE)
    rest = tl.zeros((BLOCK_P, REST_N if REST_N > 0 else 16), ACCUMULATE)
    a, a_rest = branch(
        acc, rest, x_ptr, x_strides, x_size, channels[0], per_group[0], spatial_ptr, widths[0],
        spatial_bias_ptr, part, parts, per_part, first, position, row_ok, SPATIAL, SPATIAL_FLAT,
        DIRECT[0], X_ALIGN, BLOCK_N, REST_N, BLOCK_K, UNROLL, TURNED, PRECISION, EMULATE,
    )  # fmt: skip
    if BRANCH == "none":
        acc, rest = a, a_rest
    if temporal_ptr is not None:
        acc, rest = branch(
            acc, rest, x_ptr, x_strides, x_size, channels[1], per_group[1], temporal_ptr, widths[1],
            temporal_bias_ptr, part, parts, per_part, first, position, row_ok, TEMPORAL,
            TEMPORAL_FLAT, DIRECT[1], X_ALIGN, BLOCK_N, REST_N, BLOCK_K, UNROLL, TURNED, PRECISION,
            EMULATE,
        )  # fmt: skip
    if partial_ptr is not None:
        sums = 1 if db_ptr is None else 2
        partial_ptr += tile.to(tl.int64) * sums * parts * per_part
    finish_branches(
        a, acc, first + tl.arange(0, BLOCK_N), part, parts, per_part, dy_ptr, dy_strides, y_ptr,
        db_ptr, y_strides, partial_ptr, position, row_ok, BRANCH, ACTIVATION, SLOPE, DY_ALIGN,
        Y_ALIGN, EMULATE,
    )  # fmt: skip
    if REST_N > 0:
        finish_branches(
            a_rest, rest, first + BLOCK_N + tl.arange(0, REST_N), part, parts, per_part, dy_ptr,
            dy_strides, y_ptr, db_ptr, y_strides, partial_ptr, position, row_ok, BRANCH,
            ACTIVATION, SLOPE, DY_ALIGN, Y_ALIGN, EMULATE,
        )  # fmt: skip


@triton.jit
def gather_branch(
    acc, rest, dy_ptr, dy_strides, dy_size, channels, per_group,  # of a group of dy and of dx
    w_ptr, width,  # packed as for ``input_gradient`` or, DIRECT, for ``direct_gradients``
    part, parts, per_part, first, position, row_ok, residue, size,
    TAPS: tl.constexpr, CLASSES: tl.constexpr, FLAT: tl.constexpr, DIRECT: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr,
    BLOCK_K: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """acc and rest plus what one of the convolutions gives to the positions it has read."""
    if DIRECT:
        all_channels = parts * per_part
        c = part * per_part + first + tl.arange(0, BLOCK_N)
        acc = gather_direct(
            acc, acc, per_group, channels, all_channels, dy_ptr, dy_strides, dy_size, None, None,
            None, None, w_ptr, None, 0, position, row_ok, c, c < all_channels, size, TAPS, ALIGN,
            BLOCK_P, BLOCK_N, EMULATE, acc.dtype,
        )  # fmt: skip
        if REST_N > 0:
            c = part * per_part + first + BLOCK_N + tl.arange(0, REST_N)
            rest = gather_direct(
                rest, rest, per_group, channels, all_channels, dy_ptr, dy_strides, dy_size, None,
                None, None, None, w_ptr, None, 0, position, row_ok, c, c < all_channels, size,
                TAPS, ALIGN, BLOCK_P, REST_N, EMULATE, acc.dtype,
            )  # fmt: skip
    else:
        group, column = group_of(part, per_group, per_part, first)
        acc, rest = gather(
            acc, rest, dy_ptr, dy_strides, dy_size, channels, group, w_ptr, width, column,
            position, row_ok, residue, size, TAPS, CLASSES, FLAT, ALIGN, BLOCK_N, REST_N, BLOCK_K,
            TURNED, PRECISION, EMULATE,
        )  # fmt: skip
        acc, rest = read_once(acc), read_once(rest)
    return acc, rest


@triton.jit(do_not_specialize=["tiles_n", "count"])
def parallel_input_gradient(
    da_ptr, da_strides, db_ptr, db_strides, dy_size,  # of both branches, of one size
    channels, per_group, widths,  # of both branches: channels of a group of dy, dx; columns
    spatial_ptr, temporal_ptr,  # as of ``gather_branch``
    tiles_n, parts, per_part,  # tiles of a part; parts · per_part = C
    dx_ptr, dx_strides, dx_size,  # (N, C, T, H, W)
    grid, count,  # as of ``input_gradient``
    SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr, CLASSES: tl.constexpr,
    SPATIAL_FLAT: tl.constexpr, TEMPORAL_FLAT: tl.constexpr, DIRECT: tl.constexpr,
    Y_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dx of both branches, as one sum."""
    da_strides, db_strides = strides_of(da_strides), strides_of(db_strides)
    dx_strides, dx_size, dy_size = strides_of(dx_strides), size_of(dx_size), size_of(dy_size)
    tile, part, first = part_tile(tl.program_id(0), tiles_n, parts, BLOCK_N + REST_N)
    position, row_ok, residue = class_tile(
        tile, tl.arange(0, BLOCK_P), grid_of(grid), dx_size, count, CLASSES, RUN, BLOCK_P, WIDE,
        False, False,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_P, BLOCK_N), ACCUMULATE)
    rest = tl.zeros((BLOCK_P, REST_N if REST_N > 0 else 16), ACCUMULATE)
    acc, rest = gather_branch(
        acc, rest, da_ptr, da_strides, dy_size, channels[0], per_group[0], spatial_ptr, widths[0],
        part, parts, per_part, first, position, row_ok, residue, dx_size, SPATIAL, CLASSES,
        SPATIAL_FLAT, DIRECT[0], Y_ALIGN, BLOCK_P, BLOCK_N, REST_N, BLOCK_K, TURNED, PRECISION,
        EMULATE,
    )  # fmt: skip
    acc, rest = gather_branch(
        acc, rest, db_ptr, db_strides, dy_size, channels[1], per_group[1], temporal_ptr, widths[1],
        part, parts, per_part, first, position, row_ok, residue, dx_size, TEMPORAL, CLASSES,
        TEMPORAL_FLAT, DIRECT[1], Y_ALIGN, BLOCK_P, BLOCK_N, REST_N, BLOCK_K, TURNED, PRECISION,
        EMULATE,
    )  # fmt: skip
    all_channels = parts * per_part
    finish_gradient(
        acc, first + tl.arange(0, BLOCK_N), part, per_part, all_channels, None, None, None,
        None, None, None, dx_ptr, dx_strides, position, row_ok, False, "none", 0.0, X_ALIGN,
        EMULATE,
    )  # fmt: skip
    if REST_N > 0:
        finish_gradient(
            rest, first + BLOCK_N + tl.arange(0, REST_N), part, per_part, all_channels, None,
            None, None, None, None, None, dx_ptr, dx_strides, position, row_ok, False, "none", 0.0,
            X_ALIGN, EMULATE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "per_split"])
def parallel_weight_gradient(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W)
    da_ptr, da_strides, db_ptr, db_strides, dy_size,  # of both branches, of one size
    spatial_ptr, temporal_ptr,  # partials, of the branches as the pairs below
    channels, dy_channels, groups, rows, widths,  # as of ``weight_gradient``
    batch, box, boxes, per_split,
    SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr, SPATIAL_FLAT: tl.constexpr,
    TEMPORAL_FLAT: tl.constexpr, SWAP: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Partial sums of both weights. Programs of one part of the positions share it in L2."""
    x_strides, x_size, dy_size = strides_of(x_strides), size_of(x_size), size_of(dy_size)
    box, boxes = four_of(box), four_of(boxes)
    spatial = groups[0] * rows[0] * widths[0]
    blocks = spatial + groups[1] * rows[1] * widths[1]
    index, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if index < spatial:
        weight_tile(
            index, split, x_ptr, x_strides, x_size, channels[0], da_ptr, strides_of(da_strides),
            dy_size, dy_channels[0], spatial_ptr, groups[0], rows[0], widths[0], batch, box, boxes,
            per_split, SPATIAL, SPATIAL_FLAT, SWAP, X_ALIGN, Y_ALIGN, BLOCK_P, BLOCK_R, BLOCK_N,
            REST_N, PRECISION, EMULATE, ACCUMULATE,
        )  # fmt: skip
    else:
        weight_tile(
            index - spatial, split, x_ptr, x_strides, x_size, channels[1], db_ptr,
            strides_of(db_strides), dy_size, dy_channels[1], temporal_ptr, groups[1], rows[1],
            widths[1], batch, box, boxes, per_split, TEMPORAL, TEMPORAL_FLAT, SWAP, X_ALIGN,
            Y_ALIGN, BLOCK_P, BLOCK_R, BLOCK_N, REST_N, PRECISION, EMULATE, ACCUMULATE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def parallel_direct_gradients(
    x_ptr, x_strides, x_size, grid, channels,  # (N, C, T, H, W)
    per_group, out_per_group,  # channels of a group of x and of dy, each of both branches
    da_ptr, da_strides, db_ptr, db_strides, dy_size,  # of both branches, of one size
    spatial_ptr, temporal_ptr,  # (taps, out_per_group, C)
    dx_ptr, dx_strides,  # (N, C, T, H, W), or None
    dws_ptr, dwt_ptr,  # (tiles, taps, out_per_group, C), or None
    count,  # N·T·H·W
    SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr, RUN: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dx of both branches and the tile's parts of both weight gradients."""
    x_strides, x_size, dy_size = strides_of(x_strides), size_of(x_size), size_of(dy_size)
    da_strides, db_strides = strides_of(da_strides), strides_of(db_strides)
    if dx_ptr is not None:
        dx_strides = strides_of(dx_strides)
    tile, position, row_ok, c = direct_tile(channels, grid, count, RUN, WIDE, BLOCK_P, BLOCK_C)
    c_ok = c < channels
    acc = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE)
    x = acc
    if dws_ptr is not None or dwt_ptr is not None:
        ok = row_ok[:, None] & c_ok[None, :]
        x = read_tile(x_ptr, x_strides, position, ok, c, X_ALIGN, ACCUMULATE)
    acc = gather_direct(
        acc, x, per_group[0], out_per_group[0], channels, da_ptr, da_strides, dy_size, None, None,
        None, None, spatial_ptr, dws_ptr, tile, position, row_ok, c, c_ok, x_size, SPATIAL,
        Y_ALIGN, BLOCK_P, BLOCK_C, EMULATE, ACCUMULATE,
    )  # fmt: skip
    acc = gather_direct(
        acc, x, per_group[1], out_per_group[1], channels, db_ptr, db_strides, dy_size, None, None,
        None, None, temporal_ptr, dwt_ptr, tile, position, row_ok, c, c_ok, x_size, TEMPORAL,
        Y_ALIGN, BLOCK_P, BLOCK_C, EMULATE, ACCUMULATE,
    )  # fmt: skip
    if dx_ptr is not None:
        store(acc, c, c_ok, dx_ptr, dx_strides, position, row_ok, DX_ALIGN, EMULATE)
