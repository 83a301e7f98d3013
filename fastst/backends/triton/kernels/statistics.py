"""Batch statistics from per-tile partials, and the per-channel affine map of a norm.

Partials are (tiles, 2, channels): mean and M2 = Σ(v − mean)² of up to ``rows`` values each, the
last tile of what is left. They are combined by Chan's formula in a fixed order: deterministic, and
without the cancellation of sums of squares.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate, narrow, to_tf32


@triton.jit
def combine(
    partial_ptr, channel, channel_ok, channels, first, last, rows, total,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """(mean, M2) of partials first..last − 1, for ``channel`` (BLOCK_C,)."""
    n_all = tl.zeros((BLOCK_C,), ACCUMULATE)
    mean = tl.zeros((BLOCK_C,), ACCUMULATE)
    m2 = tl.zeros((BLOCK_C,), ACCUMULATE)
    for start in range(first, last, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        ok = (tile < last)[:, None] & channel_ok[None, :]
        at = partial_ptr + tile.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        means = tl.load(at, mask=ok, other=0.0)
        m2s = tl.load(at + channels, mask=ok, other=0.0)
        left = total - tile.to(tl.int64) * rows
        n = tl.where(tile < last, tl.minimum(left, rows), 0).to(ACCUMULATE)[:, None]
        n_block = tl.sum(n, 0)
        mean_block = tl.sum(n * means, 0) / n_block
        away = means - mean_block[None, :]
        m2_block = tl.sum(m2s + n * away * away, 0)
        step = mean_block - mean
        n_new = n_all + n_block
        mean += step * (n_block / n_new)
        m2 += m2_block + step * step * (n_all * (n_block / n_new))
        n_all = n_new
    return mean, m2


@triton.jit(do_not_specialize=["tiles", "total"])
def combine_partials(
    partial_ptr, tiles, rows, total, channels, out_ptr, per_split,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Partials of ``per_split`` tiles each into one: (splits, 2, channels)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_ok = channel < channels
    split = tl.program_id(1)
    first = split * per_split
    last = tl.minimum(first + per_split, tiles)
    mean, m2 = combine(
        partial_ptr, channel, channel_ok, channels, first, last, rows, total,
        BLOCK_T, BLOCK_C, ACCUMULATE,
    )  # fmt: skip
    at = out_ptr + split.to(tl.int64) * 2 * channels + channel
    tl.store(at, mean, mask=channel_ok)
    tl.store(at + channels, m2, mask=channel_ok)


@triton.jit(do_not_specialize=["tiles", "total"])
def finish_norm(
    partial_ptr, tiles, rows, total,  # partial_ptr None: mean and var are given
    mean_ptr, var_ptr,  # (channels,), written or read; for each set of positions
    gamma_ptr, beta_ptr, bias_ptr,  # (channels,) each, or None
    scale_ptr, shift_ptr,  # (padded,), written, zeros beyond channels; or None
    channels, padded, EPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """scale = γ/sqrt(var + ε) and shift = β − scale·(mean − bias), of given or batch statistics.

    ``bias`` is one that the convolution before has not added.
    """
    blocks = (padded + BLOCK_C - 1) // BLOCK_C
    channel = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = channel < channels
    each = (tl.program_id(0) // blocks).to(tl.int64)
    mean_ptr += each * channels
    var_ptr += each * channels
    if partial_ptr is not None:
        partial_ptr += each * tiles * 2 * channels
        mean, m2 = combine(
            partial_ptr, channel, ok, channels, 0, tiles, rows, total, BLOCK_T, BLOCK_C, ACCUMULATE
        )
        var = m2 / total.to(ACCUMULATE)
        tl.store(mean_ptr + channel, mean, mask=ok)
        tl.store(var_ptr + channel, var, mask=ok)
    else:
        mean = tl.load(mean_ptr + channel, mask=ok, other=0.0).to(ACCUMULATE)
        var = tl.load(var_ptr + channel, mask=ok, other=1.0).to(ACCUMULATE)
    if scale_ptr is not None:
        scale = 1 / tl.sqrt(var + EPS)
        if gamma_ptr is not None:
            scale *= tl.load(gamma_ptr + channel, mask=ok, other=0.0).to(ACCUMULATE)
        if bias_ptr is not None:
            mean -= tl.load(bias_ptr + channel, mask=ok, other=0.0).to(ACCUMULATE)
        shift = -scale * mean
        if beta_ptr is not None:
            shift += tl.load(beta_ptr + channel, mask=ok, other=0.0).to(ACCUMULATE)
        inside = channel < padded
        tl.store(scale_ptr + channel, tl.where(ok, scale, 0.0), mask=inside)
        tl.store(shift_ptr + channel, tl.where(ok, shift, 0.0), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def affine(
    v_ptr, other_ptr, out_ptr, rows, channels,  # (rows, channels) each; other or None; out may be v
    scale_ptr, p_ptr, shift_ptr,  # (channels,), or None
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ROUND: tl.constexpr,  # to TF32
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """out = act(scale·v + p·other + shift): what the dense passes read, once for all taps."""
    tiles_c = (channels + BLOCK_C - 1) // BLOCK_C
    row = tl.program_id(0) // tiles_c * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    c_ok = c < channels
    at = row.to(tl.int64)[:, None] * channels + c[None, :]
    ok = (row < rows)[:, None] & c_ok[None, :]
    v = tl.load(v_ptr + at, mask=ok, other=0.0).to(ACCUMULATE)
    if scale_ptr is not None:
        v = v * tl.load(scale_ptr + c, mask=c_ok, other=0.0)[None, :]
    if other_ptr is not None:
        other = tl.load(other_ptr + at, mask=ok, other=0.0).to(ACCUMULATE)
        v = v + other * tl.load(p_ptr + c, mask=c_ok, other=0.0)[None, :]
    if shift_ptr is not None:
        v = v + tl.load(shift_ptr + c, mask=c_ok, other=0.0)[None, :]
    v = narrow(activate(v, ACTIVATION, SLOPE), out_ptr.dtype.element_ty, EMULATE)
    if ROUND:
        v = to_tf32(v)
    tl.store(out_ptr + at, v, mask=ok)


@triton.jit(do_not_specialize=["rows"])
def sum_rows(
    partial_ptr, rows, columns, out_ptr, per_split,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Sums over ``per_split`` rows each of (rows, columns): (splits, columns), in a fixed order."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = column < columns
    split = tl.program_id(1)
    last = tl.minimum((split + 1) * per_split, rows)
    total = tl.zeros((BLOCK_T, BLOCK_C), ACCUMULATE)
    for start in range(split * per_split, last, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        at = partial_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(at, mask=(row < last)[:, None] & column_ok[None, :], other=0.0)
    total = narrow(tl.sum(total, 0), out_ptr.dtype.element_ty, EMULATE)
    tl.store(out_ptr + split.to(tl.int64) * columns + column, total, mask=column_ok)


@triton.jit(do_not_specialize=["total"])
def norm_gradient(
    sum_ptr,  # (2, channels): Σdv and Σdv·(u − mean)
    pooled_ptr,  # the same over all ranks, per value of this one; or sum_ptr; None: a frozen norm
    mean_ptr, var_ptr, s_ptr, total,  # of the norm, and values per channel
    dgamma_ptr, dbias_ptr,  # (channels,), of γ and of the bias before the norm
    p_ptr, r_ptr,  # (padded,), or None
    channels, padded, EPS: tl.constexpr, BLOCK_C: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """du = s·dv + p·u + r of batch statistics, and the gradients of γ and of the bias.

    The bias before a norm of its own batch has none, which the mean takes away again.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = channel < channels
    inside = channel < padded
    var = tl.load(var_ptr + channel, mask=ok, other=1.0).to(ACCUMULATE)
    mean = tl.load(mean_ptr + channel, mask=ok, other=0.0).to(ACCUMULATE)
    s = tl.load(s_ptr + channel, mask=ok, other=0.0)
    beta = tl.load(sum_ptr + channel, mask=ok, other=0.0)
    away = tl.load(sum_ptr + channels + channel, mask=ok, other=0.0)
    tl.store(dgamma_ptr + channel, away / tl.sqrt(var + EPS), mask=ok)
    if pooled_ptr is not None:
        pooled = tl.load(pooled_ptr + channel, mask=ok, other=0.0)
        pooled_away = tl.load(pooled_ptr + channels + channel, mask=ok, other=0.0)
        p = -s * pooled_away / ((var + EPS) * total.to(ACCUMULATE))
        r = -s * pooled / total.to(ACCUMULATE) - p * mean
        tl.store(p_ptr + channel, tl.where(ok, p, 0.0), mask=inside)
        tl.store(r_ptr + channel, tl.where(ok, r, 0.0), mask=inside)
        beta = beta - pooled
    tl.store(dbias_ptr + channel, s * beta, mask=ok)
