# mypy: ignore-errors
# Its tuples of sums grow while Triton unrolls, which mypy cannot follow.
"""The pair in one kernel by matrix products, with the mid tensor in registers only."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate, grid_of, narrow, product, size_of, strides_of
from .rolling_window import mid_at, output_at, window_source, window_start, window_steps
from .tap_conv import accumulate, add_bias, finish, read_once, reduction_rows


@triton.jit
def add_mid_channels(
    sums,  # of the outputs that read a mid position, oldest first; (BLOCK_P, BLOCK_N) each
    x_ptr, x_strides, x_size, channels,  # at the first channel of the group
    first_ptr, mid_width, second_ptr,  # packed weights of the group
    scale_ptr, shift_ptr, m, mid_channels,  # of the group; m: first mid channel of the chunk
    position, ok, across,  # in the mid tensor; which exist; column tap
    FIRST: tl.constexpr, SECOND: tl.constexpr, AXIS: tl.constexpr, FLAT: tl.constexpr,
    ALIGN: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """sums plus what BLOCK_M mid channels at a position contribute to each."""
    TAPS: tl.constexpr = SECOND.kernel[AXIS]
    ACROSS: tl.constexpr = SECOND.kernel[2]
    BLOCK_P: tl.constexpr = sums[0].shape[0]
    BLOCK_N: tl.constexpr = sums[0].shape[1]
    z, none = accumulate(
        tl.zeros((BLOCK_P, BLOCK_M), sums[0].dtype), tl.zeros((BLOCK_P, 16), sums[0].dtype),
        x_ptr, x_strides, x_size, None, channels, first_ptr + m, mid_width, position, ok, None,
        FIRST, FLAT, ALIGN, BLOCK_M, 0, BLOCK_K, False, PRECISION, EMULATE,
    )  # fmt: skip
    z = read_once(z)
    m += tl.arange(0, BLOCK_M)
    m_ok = m < mid_channels
    if scale_ptr is not None:
        z = z * tl.load(scale_ptr + m, mask=m_ok, other=0.0).to(z.dtype)[None, :]
    z = activate(add_bias(z, shift_ptr, m, mid_channels), ACTIVATION, SLOPE)
    # Padding of the second pass is of z, with zeros: skipped, not normalised.
    z = tl.where(ok[:, None] & m_ok[None, :], z, 0.0)
    z = narrow(z, x_ptr.dtype.element_ty, EMULATE)
    n = tl.arange(0, BLOCK_N)
    moved = ()
    for age in tl.static_range(TAPS):
        rows = ((TAPS - 1 - age) * ACROSS + across) * mid_width + m
        w = tl.load(second_ptr + rows[:, None] * BLOCK_N + n[None, :])
        moved = moved + (product(z, w, sums[age], PRECISION, EMULATE),)
    return moved


@triton.jit(do_not_specialize=["count", "pieces"])
def pair_conv(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W); size (T, H, W)
    channels, mid_channels, out_channels, groups,  # of a group
    first_ptr, mid_width,  # packed as for tap_conv; mid_width: whole chunks of mid channels
    second_ptr,  # packed likewise: (groups, taps · mid_width, BLOCK_N)
    scale_ptr, shift_ptr,  # (M,) of the norm with the first bias folded in, or None, or the bias
    bias_ptr,  # (K,) of the second pass, or None
    residual_ptr, residual_strides,  # like y, or None
    y_ptr, y_strides, y_size,  # (N, K, T', H', W')
    mid_size, grid,  # grid: of y, 1 along the axis
    count, pieces,  # positions of y across the axis, and programs that share the axis
    FIRST: tl.constexpr, SECOND: tl.constexpr, AXIS: tl.constexpr, FLAT: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTER: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, REST_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Both passes of a pair of thin layers or groups: x is read once, y written once.

    Of each mid frame (or row), BLOCK_M channels at a time are computed, normalised, and multiplied
    into the outputs that read them; the last REST_M of them apart, for an exact fit.
    """
    x_strides, x_size, mid_size = strides_of(x_strides), size_of(x_size), size_of(mid_size)
    y_strides, y_size = strides_of(y_strides), size_of(y_size)
    if residual_ptr is not None:
        residual_strides = strides_of(residual_strides)
    TAPS: tl.constexpr = SECOND.kernel[AXIS]
    ACROSS: tl.constexpr = SECOND.kernel[2]
    pid = tl.program_id(0)
    group = pid % groups
    position, row_ok, residue, first, end = window_start(
        pid // groups, y_size, grid_of(grid), count, pieces, SECOND, AXIS, BLOCK_P, RUN, WIDE
    )
    x_ptr += (group * channels).to(tl.int64) * x_strides[1]
    reduction = reduction_rows(channels, FIRST, FLAT, BLOCK_K)
    first_ptr += group.to(tl.int64) * reduction * mid_width
    ROWS: tl.constexpr = SECOND.kernel[0] * SECOND.kernel[1] * SECOND.kernel[2]
    second_ptr += group.to(tl.int64) * ROWS * mid_width * BLOCK_N
    if scale_ptr is not None:
        scale_ptr += group * mid_channels
    if shift_ptr is not None:
        shift_ptr += group * mid_channels

    zero = tl.zeros((BLOCK_P, BLOCK_N), ACCUMULATE)
    sums = ()
    for _ in tl.static_range(TAPS):
        sums = sums + (zero,)
    begin, stop = window_steps(first, end, SECOND, AXIS)
    for step in range(begin, stop):
        index = residue + tl.cast(step, tl.int32) * SECOND.dilation[AXIS]
        row, there = window_source(index, mid_size, SECOND, AXIS)
        whole = (mid_width - REST_M) // BLOCK_M
        for turn in range(whole * ACROSS if there else 0):
            at, ok = mid_at(position, row, turn // whole, mid_size, SECOND, AXIS)
            sums = add_mid_channels(
                sums, x_ptr, x_strides, x_size, channels, first_ptr, mid_width, second_ptr,
                scale_ptr, shift_ptr, turn % whole * BLOCK_M, mid_channels, at, ok & row_ok,
                turn // whole, FIRST, SECOND, AXIS, FLAT, X_ALIGN, ACTIVATION, SLOPE,
                BLOCK_M, BLOCK_K, PRECISION, EMULATE,
            )  # fmt: skip
        if REST_M > 0:
            for across in range(ACROSS if there else 0):
                at, ok = mid_at(position, row, across, mid_size, SECOND, AXIS)
                sums = add_mid_channels(
                    sums, x_ptr, x_strides, x_size, channels, first_ptr, mid_width, second_ptr,
                    scale_ptr, shift_ptr, whole * BLOCK_M, mid_channels, at, ok & row_ok,
                    across, FIRST, SECOND, AXIS, FLAT, X_ALIGN, ACTIVATION, SLOPE,
                    REST_M, BLOCK_K, PRECISION, EMULATE,
                )  # fmt: skip
        output = step - (TAPS - 1)
        at, kept = output_at(position, residue + output * SECOND.dilation[AXIS], SECOND, AXIS)
        finish(
            sums[0], tl.arange(0, BLOCK_N), group, out_channels, 0, None, None, bias_ptr,
            None, residual_ptr, residual_strides, y_ptr, y_strides, at,
            row_ok & kept & (output >= first), BLOCK_P, "none", OUTER, SLOPE, Y_ALIGN, EMULATE,
        )  # fmt: skip
        shifted = ()
        for age in tl.static_range(1, TAPS):
            shifted = shifted + (sums[age],)
        sums = shifted + (zero,)
