"""The parallel op: both branches in one launch, forward and backward.

Where the branches have no activation of their own they are one convolution over a cross of taps:
one sum of both, and a gradient that is dy for both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate, activate_gradient, positions
from .depthwise_backward import gather_direct, read_tile
from .input_gradient import class_tile, finish_gradient, gather
from .tap_conv import accumulate, biased, store, tile_positions
from .weight_gradient import weight_tile


@triton.jit
def branches(
    x_ptr, x_strides, x_size, channels,
    spatial_ptr, temporal_ptr, width, first,  # both packed as for tap_conv, one group
    spatial_bias_ptr, temporal_bias_ptr, out_channels,
    position, row_ok,
    SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
    BRANCH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """The spatial branch, and the temporal one or, where there is no activation, their sum.

    Each as (BLOCK_P, BLOCK_N) and, with REST_N, (BLOCK_P, REST_N).
    """
    n = first + tl.arange(0, BLOCK_N)
    n_rest = first + BLOCK_N + tl.arange(0, REST_N if REST_N > 0 else 16)
    acc = tl.zeros((BLOCK_P, BLOCK_N), ACCUMULATE)
    rest = tl.zeros((BLOCK_P, REST_N if REST_N > 0 else 16), ACCUMULATE)
    acc, rest = accumulate(
        acc, rest, x_ptr, x_strides, x_size, channels, spatial_ptr + first, width, None, None,
        None, None, position, row_ok, None, SPATIAL, FLAT, ALIGN, "none", 0.0, BLOCK_N, REST_N,
        BLOCK_K, PRECISION, EMULATE,
    )  # fmt: skip
    acc = biased(acc, spatial_bias_ptr, n, out_channels)
    rest = biased(rest, spatial_bias_ptr, n_rest, out_channels)
    if BRANCH == "none":
        onto, onto_rest = acc, rest
    else:
        onto, onto_rest = tl.zeros_like(acc), tl.zeros_like(rest)
    onto, onto_rest = accumulate(
        onto, onto_rest, x_ptr, x_strides, x_size, channels, temporal_ptr + first, width, None,
        None, None, None, position, row_ok, None, TEMPORAL, FLAT, ALIGN, "none", 0.0, BLOCK_N,
        REST_N, BLOCK_K, PRECISION, EMULATE,
    )  # fmt: skip
    onto = biased(onto, temporal_bias_ptr, n, out_channels)
    onto_rest = biased(onto_rest, temporal_bias_ptr, n_rest, out_channels)
    return acc, rest, onto, onto_rest


@triton.jit
def combined(a, b, BRANCH: tl.constexpr, SLOPE: tl.constexpr):
    """What leaves both branches together, from ``branches``."""
    v = activate(b, BRANCH, SLOPE)
    if BRANCH != "none":
        v += activate(a, BRANCH, SLOPE)
    return v


@triton.jit(do_not_specialize=["x_size", "y_size", "count"])
def parallel_conv(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W); size (T, H, W)
    channels,
    spatial_ptr, temporal_ptr, width,  # both packed as for tap_conv, one group
    spatial_bias_ptr, temporal_bias_ptr,  # (K,), or None
    y_ptr, y_strides, y_size, y_channels,  # (N, K, T', H', W')
    count,  # N·T'·H'·W'
    SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr, FLAT: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    BRANCH: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """ACTIVATION(BRANCH(spatial) + BRANCH(temporal))."""
    tiles_n = width // (BLOCK_N + REST_N)
    pid = tl.program_id(0)
    _, p = tile_positions(pid // tiles_n, BLOCK_P, WIDE)
    row_ok = p < count
    position = positions(p, y_size, RUN)
    first = pid % tiles_n * (BLOCK_N + REST_N)
    acc, rest, onto, onto_rest = branches(
        x_ptr, x_strides, x_size, channels, spatial_ptr, temporal_ptr, width, first,
        spatial_bias_ptr, temporal_bias_ptr, y_channels, position, row_ok, SPATIAL, TEMPORAL, FLAT,
        X_ALIGN, BRANCH, BLOCK_P, BLOCK_N, REST_N, BLOCK_K, PRECISION, EMULATE, ACCUMULATE,
    )  # fmt: skip
    n = first + tl.arange(0, BLOCK_N)
    v = activate(combined(acc, onto, BRANCH, SLOPE), ACTIVATION, SLOPE)
    store(v, n, n < y_channels, y_ptr, y_strides, position, row_ok, Y_ALIGN, EMULATE)
    if REST_N > 0:
        n = first + BLOCK_N + tl.arange(0, REST_N)
        v = activate(combined(rest, onto_rest, BRANCH, SLOPE), ACTIVATION, SLOPE)
        store(v, n, n < y_channels, y_ptr, y_strides, position, row_ok, Y_ALIGN, EMULATE)


@triton.jit
def finish_branches(
    a, b, n, channels, dy_ptr, dy_strides, da_ptr, db_ptr, strides, position, row_ok,
    BRANCH: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, DY_ALIGN: tl.constexpr,
    ALIGN: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """da and, where it is another, db from dy."""
    ok = row_ok[:, None] & (n < channels)[None, :]
    dv = read_tile(dy_ptr, dy_strides, position, ok, n, DY_ALIGN, a.dtype)
    dv = activate_gradient(dv, combined(a, b, BRANCH, SLOPE), ACTIVATION, SLOPE)
    da = dv
    if BRANCH != "none":
        da = activate_gradient(dv, a, BRANCH, SLOPE)
        db = activate_gradient(dv, b, BRANCH, SLOPE)
        store(db, n, n < channels, db_ptr, strides, position, row_ok, ALIGN, EMULATE)
    store(da, n, n < channels, da_ptr, strides, position, row_ok, ALIGN, EMULATE)


@triton.jit(do_not_specialize=["x_size", "y_size", "count"])
def branch_gradients(
    x_ptr, x_strides, x_size, channels,  # as of ``parallel_conv``
    spatial_ptr, temporal_ptr, width, spatial_bias_ptr, temporal_bias_ptr,
    dy_ptr, dy_strides,  # (N, K, T', H', W')
    da_ptr, db_ptr,  # of the strides of da; db_ptr None: without BRANCH both are the same
    da_strides, y_size, y_channels, count,
    SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr, FLAT: tl.constexpr,
    X_ALIGN: tl.constexpr, DY_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, RUN: tl.constexpr,
    WIDE: tl.constexpr, BRANCH: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Gradients of what leaves the two convolutions, which are computed again and not written."""
    tiles_n = width // (BLOCK_N + REST_N)
    pid = tl.program_id(0)
    _, p = tile_positions(pid // tiles_n, BLOCK_P, WIDE)
    row_ok = p < count
    position = positions(p, y_size, RUN)
    first = pid % tiles_n * (BLOCK_N + REST_N)
    acc, rest, onto, onto_rest = branches(
        x_ptr, x_strides, x_size, channels, spatial_ptr, temporal_ptr, width, first,
        spatial_bias_ptr, temporal_bias_ptr, y_channels, position, row_ok, SPATIAL, TEMPORAL, FLAT,
        X_ALIGN, BRANCH, BLOCK_P, BLOCK_N, REST_N, BLOCK_K, PRECISION, EMULATE, ACCUMULATE,
    )  # fmt: skip
    finish_branches(
        acc, onto, first + tl.arange(0, BLOCK_N), y_channels, dy_ptr, dy_strides, da_ptr, db_ptr,
        da_strides, position, row_ok, BRANCH, ACTIVATION, SLOPE, DY_ALIGN, Y_ALIGN, EMULATE,
    )  # fmt: skip
    if REST_N > 0:
        finish_branches(
            rest, onto_rest, first + BLOCK_N + tl.arange(0, REST_N), y_channels, dy_ptr,
            dy_strides, da_ptr, db_ptr, da_strides, position, row_ok, BRANCH, ACTIVATION, SLOPE,
            DY_ALIGN, Y_ALIGN, EMULATE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["dy_size", "dx_size", "grid_size", "count"])
def parallel_input_gradient(
    da_ptr, da_strides, db_ptr, db_strides, dy_size,  # of both branches, of one size
    a_channels, b_channels, groups,  # channels of a group of them; both have as many groups
    spatial_ptr, temporal_ptr, width,  # packed as for ``input_gradient``
    dx_ptr, dx_strides, dx_size, dx_channels,  # (N, C, T, H, W); channels of a group
    grid_size, count,  # as of ``input_gradient``
    SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr, CLASSES: tl.constexpr,
    SPATIAL_FLAT: tl.constexpr, TEMPORAL_FLAT: tl.constexpr,
    Y_ALIGN: tl.constexpr, X_ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dx of both branches, as one sum."""
    tiles_n = width // (BLOCK_N + REST_N)
    pid = tl.program_id(0)
    group = pid // tiles_n % groups
    first = pid % tiles_n * (BLOCK_N + REST_N)
    position, row_ok, residue = class_tile(
        pid // (tiles_n * groups), grid_size, dx_size, count, CLASSES, RUN, BLOCK_P, WIDE
    )
    acc = tl.zeros((BLOCK_P, BLOCK_N), ACCUMULATE)
    rest = tl.zeros((BLOCK_P, REST_N if REST_N > 0 else 16), ACCUMULATE)
    acc, rest = gather(
        acc, rest, da_ptr, da_strides, dy_size, a_channels, group, spatial_ptr, width, first, None,
        None, None, None, position, row_ok, residue, dx_size, SPATIAL, CLASSES,
        SPATIAL_FLAT, Y_ALIGN, BLOCK_N, REST_N, BLOCK_K, PRECISION, EMULATE,
    )  # fmt: skip
    acc, rest = gather(
        acc, rest, db_ptr, db_strides, dy_size, b_channels, group, temporal_ptr, width, first, None,
        None, None, None, position, row_ok, residue, dx_size, TEMPORAL, CLASSES,
        TEMPORAL_FLAT, Y_ALIGN, BLOCK_N, REST_N, BLOCK_K, PRECISION, EMULATE,
    )  # fmt: skip
    all_channels = groups * dx_channels
    finish_gradient(
        acc, first + tl.arange(0, BLOCK_N), group, dx_channels, all_channels, dx_channels, None,
        None, None, None, None, dx_ptr, dx_strides, position, row_ok, "none", 0.0, X_ALIGN, EMULATE,
    )  # fmt: skip
    if REST_N > 0:
        finish_gradient(
            rest, first + BLOCK_N + tl.arange(0, REST_N), group, dx_channels, all_channels,
            dx_channels, None, None, None, None, None, dx_ptr, dx_strides, position, row_ok, "none",
            0.0, X_ALIGN, EMULATE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["x_size", "dy_size", "count", "per_split"])
def parallel_weight_gradient(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W)
    da_ptr, da_strides, db_ptr, db_strides, dy_size,  # of both branches, of one size
    spatial_ptr, temporal_ptr,  # partials, of the branches as the pairs below
    channels, dy_channels, groups, rows, widths,  # as of ``weight_gradient``
    count, per_split,
    SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr, SPATIAL_FLAT: tl.constexpr,
    TEMPORAL_FLAT: tl.constexpr, SWAP: tl.constexpr, X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr,
    RUN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Partial sums of both weights. Programs of one part of the positions share it in L2."""
    spatial = groups[0] * rows[0] * widths[0]
    blocks = spatial + groups[1] * rows[1] * widths[1]
    index, split = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if index < spatial:
        weight_tile(
            index, split, x_ptr, x_strides, x_size, channels[0], None, None,
            da_ptr, da_strides, dy_size, dy_channels[0], None, None, None, None,
            spatial_ptr, groups[0], rows[0], widths[0], count, per_split, SPATIAL,
            SPATIAL_FLAT, SWAP, X_ALIGN, Y_ALIGN, RUN, WIDE, "none", 0.0, BLOCK_P, BLOCK_R,
            BLOCK_N, REST_N, PRECISION, EMULATE, ACCUMULATE,
        )  # fmt: skip
    else:
        weight_tile(
            index - spatial, split, x_ptr, x_strides, x_size, channels[1], None, None,
            db_ptr, db_strides, dy_size, dy_channels[1], None, None, None, None,
            temporal_ptr, groups[1], rows[1], widths[1], count, per_split, TEMPORAL,
            TEMPORAL_FLAT, SWAP, X_ALIGN, Y_ALIGN, RUN, WIDE, "none", 0.0, BLOCK_P, BLOCK_R,
            BLOCK_N, REST_N, PRECISION, EMULATE, ACCUMULATE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["x_size", "dy_size", "count"])
def parallel_direct_gradients(
    x_ptr, x_strides, x_size, channels,  # (N, C, T, H, W)
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
    tiles_c = (channels + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    tile = pid // tiles_c
    _, p = tile_positions(tile, BLOCK_P, WIDE)
    row_ok = p < count
    position = positions(p, x_size, RUN)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
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
