# mypy: ignore-errors
# Its tuples of sums grow while Triton unrolls, which mypy cannot follow.
"""The dense pair in one kernel, with the mid tensor in registers only."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate, narrow, positions, product
from .tap_conv import accumulate, biased, store, tile_positions


@triton.jit(do_not_specialize=["x_size", "frames", "y_size", "count"])
def pair_conv(
    x_ptr, x_strides, x_size,  # (N, C, T, H, W); size (T, H, W)
    channels, mid_channels, out_channels,
    spatial_ptr, mid_width,  # packed as for tap_conv; mid_width: whole BLOCK_M
    temporal_ptr,  # packed likewise: (kt · mid_width, BLOCK_N)
    scale_ptr, shift_ptr,  # (M,) of the norm with the spatial bias folded in, or None, or the bias
    bias_ptr,  # (K,) temporal, or None
    y_ptr, y_strides, y_size,  # (N, K, T', H', W')
    frames,  # after the spatial pass
    count,  # N·H'·W'
    SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr, FLAT: tl.constexpr,
    X_ALIGN: tl.constexpr, Y_ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Spatial-first pair of thin layers: x is read once, y written once, nothing stored between.

    A program walks over time at its pixels. Of each mid frame, BLOCK_M channels at a time are
    computed, normalised, and multiplied into the ``SPAN`` output frames (at stride 1) that see
    them; the oldest frame is then complete, and is stored where the stride keeps it.
    """
    STRIDE: tl.constexpr = TEMPORAL.stride[0]
    STEP: tl.constexpr = TEMPORAL.dilation[0]
    SPAN: tl.constexpr = STEP * (TEMPORAL.kernel[0] - 1) + 1
    out_channels = out_channels // Y_ALIGN * Y_ALIGN  # the same number: a mask of whole vectors
    _, p = tile_positions(tl.program_id(0), BLOCK_P, WIDE)
    row_ok = p < count
    sample, _, row, column = positions(p, (1, y_size[1], y_size[2]), RUN)
    n = tl.arange(0, BLOCK_N)

    zero = tl.zeros((BLOCK_P, BLOCK_N), ACCUMULATE)
    nothing = tl.zeros((BLOCK_P, BLOCK_M), ACCUMULATE)
    unused = tl.zeros((BLOCK_P, 16), ACCUMULATE)
    sums = ()
    for _ in tl.static_range(SPAN):
        sums = sums + (zero,)
    for step in range((y_size[0] - 1) * STRIDE + SPAN - TEMPORAL.before[0]):
        t = tl.to_tensor(step)
        frame = tl.zeros_like(row) + t
        chunks = mid_width // BLOCK_M if step < frames else 0  # temporal padding is of z
        for chunk in range(chunks):
            m = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
            m_ok = m < mid_channels
            z, none = accumulate(
                nothing, unused, x_ptr, x_strides, x_size, channels,
                spatial_ptr + chunk * BLOCK_M, mid_width, None, None,
                None, None, (sample, frame, row, column), row_ok, None, SPATIAL, FLAT, X_ALIGN,
                "none", SLOPE,
                BLOCK_M, 0, BLOCK_K, PRECISION, EMULATE,
            )  # fmt: skip
            if scale_ptr is not None:
                z = z * tl.load(scale_ptr + m, mask=m_ok, other=0.0).to(ACCUMULATE)[None, :]
            z = activate(biased(z, shift_ptr, m, mid_channels), ACTIVATION, SLOPE)
            z = narrow(tl.where(m_ok[None, :], z, 0.0), x_ptr.dtype.element_ty, EMULATE)
            moved = ()
            for age in tl.static_range(SPAN):
                total = sums[age]
                if (SPAN - 1 - age) % STEP == 0:
                    rows = (SPAN - 1 - age) // STEP * mid_width + m
                    w = tl.load(temporal_ptr + rows[:, None] * BLOCK_N + n[None, :])
                    total = product(z, w, total, PRECISION, EMULATE)
                moved = moved + (total,)
            sums = moved
        i = t + TEMPORAL.before[0] - (SPAN - 1)
        done = (i >= 0) & (i % STRIDE == 0)
        store(
            biased(sums[0], bias_ptr, n, out_channels), n, n < out_channels, y_ptr, y_strides,
            (sample, i // STRIDE, row, column), row_ok & done, Y_ALIGN, EMULATE,
        )  # fmt: skip
        shifted = ()
        for age in tl.static_range(1, SPAN):
            shifted = shifted + (sums[age],)
        sums = shifted + (zero,)
