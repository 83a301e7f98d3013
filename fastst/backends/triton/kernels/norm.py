"""The norm and the activation of what a convolution reads: statistics, values and gradients.

    v = x̂·γ + β,  x̂ = (x − mean)·r,  z = act(v)

Mean and r belong to a set of positions and a group of channels (POSITION is False: they are
(sets / frames, groups, frames), where sets are clips or, with ``frames``, frames) or to a position
and all channels (POSITION: they are (positions,)). A program has positions of one set.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    activate,
    activate_gradient,
    columns,
    grid_of,
    narrow,
    positions,
    row_offsets,
    strides_of,
    to_tf32,
)


@triton.jit
def set_part(
    part, parts, length, per_part, channels, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The set of a program, its first position and the last of its part; and its channels."""
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    c = part % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    part = part // blocks
    each = part // parts
    if WIDE:
        each = each.to(tl.int64)
    begin = each * length
    first = begin + part % parts * per_part
    return each, first, tl.minimum(first + per_part, begin + length), c


@triton.jit
def video_tile(ptr, strides, position, ok, c, ALIGN: tl.constexpr):
    """(BLOCK_P, BLOCK_C) of a video at positions, 0 where nothing exists."""
    offsets = row_offsets(columns(position), strides, ALIGN)
    return tl.load(ptr + offsets + c.to(tl.int64)[None, :] * strides[1], mask=ok, other=0.0)


@triton.jit
def statistic(
    ptr, each, p, p_ok, c, c_ok, groups, per_group, frames, POSITION: tl.constexpr,
):  # fmt: skip
    """A mean or a variance for a tile, as it broadcasts against it."""
    if POSITION:
        value = tl.load(ptr + p, mask=p_ok, other=0.0)[:, None]
    else:
        at = (each // frames * groups + c // per_group) * frames + each % frames
        value = tl.load(ptr + at, mask=c_ok, other=0.0)[None, :]
    return value


@triton.jit
def factor(var, EPS: tl.constexpr, LEAST: tl.constexpr):
    """r of a variance; with LEAST, of the root of a mean square that is at least so large."""
    if LEAST > 0:
        root = tl.sqrt(var)
        r = 1 / tl.where(root < LEAST, tl.full(root.shape, LEAST, root.dtype), root)
    else:
        r = 1 / tl.sqrt(var + EPS)
    return r


@triton.jit
def per_channel(ptr, c, c_ok, missing: tl.constexpr, ACCUMULATE: tl.constexpr):
    """γ or β of channels, or what stands for one that there is not."""
    value = tl.full(c.shape, missing, ACCUMULATE)
    if ptr is not None:
        value = tl.load(ptr + c, mask=c_ok, other=0.0).to(ACCUMULATE)
    return value[None, :]


@triton.jit
def apply_norm(
    x, mean_ptr, var_ptr, each, p, p_ok, c, c_ok, groups, per_group, frames,
    EPS: tl.constexpr, LEAST: tl.constexpr, POSITION: tl.constexpr,
):  # fmt: skip
    """x̂ of a tile, and r; x itself and 1 where there is no norm."""
    r = tl.full((1, 1), 1.0, x.dtype)
    if mean_ptr is not None:
        mean = statistic(mean_ptr, each, p, p_ok, c, c_ok, groups, per_group, frames, POSITION)
        x = x - mean.to(x.dtype)
    if var_ptr is not None:
        var = statistic(var_ptr, each, p, p_ok, c, c_ok, groups, per_group, frames, POSITION)
        r = factor(var.to(x.dtype), EPS, LEAST)
        x = x * r
    return x, r


@triton.jit(do_not_specialize=["length", "parts", "per_part"])
def channel_moments(
    x_ptr, x_strides, grid, channels,  # (N, C, T, H, W)
    partial_ptr,  # (sets, parts, 2, C): mean and M2 = Σ(x − mean)²
    length, parts, per_part,  # positions of a set; its parts, and their positions
    ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Partials of the statistics of each channel. A lane has a mean of its own until the end."""
    x_strides, grid = strides_of(x_strides), grid_of(grid)
    channels = channels // ALIGN * ALIGN  # the same number, and a mask of whole vectors
    each, first, last, c = set_part(
        tl.program_id(0), parts, length, per_part, channels, WIDE, BLOCK_C
    )
    c_ok = c < channels
    seen = tl.zeros((BLOCK_P,), ACCUMULATE)
    mean = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE)
    for step in range((last - first + BLOCK_P - 1) // BLOCK_P):
        p = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        row_ok = p < last
        ok = row_ok[:, None] & c_ok[None, :]
        x = video_tile(x_ptr, x_strides, positions(p, grid, RUN), ok, c, ALIGN).to(ACCUMULATE)
        seen += row_ok.to(ACCUMULATE)
        away = tl.where(row_ok[:, None], x - mean, 0.0)
        mean += away * (1 / tl.maximum(seen, 1.0))[:, None]
        m2 += away * tl.where(row_ok[:, None], x - mean, 0.0)
    seen = seen[:, None]
    whole = tl.sum(seen * mean, 0) / tl.sum(seen, 0)
    away = mean - whole[None, :]
    m2 = tl.sum(m2 + seen * away * away, 0)
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    at = partial_ptr + (tl.program_id(0) // blocks).to(tl.int64) * 2 * channels + c
    tl.store(at, whole, mask=c_ok)
    tl.store(at + channels, m2, mask=c_ok)


@triton.jit(do_not_specialize=["frames", "length", "parts"])
def normalise(
    x_ptr, x_strides, grid, channels,  # (N, C, T, H, W)
    mean_ptr, var_ptr, gamma_ptr, beta_ptr,  # of the norm; each may be None
    groups, per_group, frames,  # of statistics
    z_ptr, z_strides, stored,  # like x; more channels than x has are zeros
    length, parts,  # positions of a set, and its tiles
    TAKE: tl.constexpr,  # write the statistics of positions, of which a tile has all channels
    CENTRED: tl.constexpr, EPS: tl.constexpr, LEAST: tl.constexpr, POSITION: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ROUND: tl.constexpr,  # to TF32
    X_ALIGN: tl.constexpr, Z_ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """z, which a dense convolution reads in all of its taps."""
    x_strides, z_strides = strides_of(x_strides), strides_of(z_strides)
    each, first, last, c = set_part(tl.program_id(0), parts, length, BLOCK_P, stored, WIDE, BLOCK_C)
    channels = channels // X_ALIGN * X_ALIGN  # the same number, and a mask of whole vectors
    c_ok = c < channels
    p = first + tl.arange(0, BLOCK_P)
    row_ok = p < last
    ok = row_ok[:, None] & c_ok[None, :]
    position = positions(p, grid_of(grid), RUN)
    x = video_tile(x_ptr, x_strides, position, ok, c, X_ALIGN).to(ACCUMULATE)
    if TAKE:
        if CENTRED:
            mean = tl.sum(x, 1) / channels
            tl.store(mean_ptr + p, mean, mask=row_ok)
            x = tl.where(ok, x - mean[:, None], 0.0)
        var = tl.sum(x * x, 1) / channels
        tl.store(var_ptr + p, var, mask=row_ok)
        x = x * factor(var, EPS, LEAST)[:, None]
    else:
        x, _ = apply_norm(
            x, mean_ptr, var_ptr, each, p, row_ok, c, c_ok, groups, per_group, frames, EPS, LEAST,
            POSITION,
        )  # fmt: skip
    v = x * per_channel(gamma_ptr, c, c_ok, 1.0, ACCUMULATE)
    v += per_channel(beta_ptr, c, c_ok, 0.0, ACCUMULATE)
    z = narrow(tl.where(ok, activate(v, ACTIVATION, SLOPE), 0.0), z_ptr.dtype.element_ty, EMULATE)
    if ROUND:
        z = to_tf32(z)
    stored = stored // Z_ALIGN * Z_ALIGN
    at = row_offsets(columns(position), z_strides, Z_ALIGN)
    at += c.to(tl.int64)[None, :] * z_strides[1]
    tl.store(z_ptr + at, z, mask=row_ok[:, None] & (c < stored)[None, :])


@triton.jit
def read_dv(
    dz_ptr, dz_strides, x_hat, position, ok, c, c_ok, gamma_ptr, beta_ptr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dv = dz·act'(v) of a tile, and γ."""
    dz = video_tile(dz_ptr, dz_strides, position, ok, c, ALIGN).to(x_hat.dtype)
    gamma = per_channel(gamma_ptr, c, c_ok, 1.0, x_hat.dtype)
    v = x_hat * gamma + per_channel(beta_ptr, c, c_ok, 0.0, x_hat.dtype)
    return tl.where(ok, activate_gradient(dz, v, ACTIVATION, SLOPE), 0.0), gamma


@triton.jit(do_not_specialize=["frames", "length", "parts", "per_part"])
def norm_sums(
    x_ptr, x_strides, grid, channels,  # (N, C, T, H, W)
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, groups, per_group, frames,  # as of ``normalise``
    dz_ptr, dz_strides,  # like x
    partial_ptr,  # (sets, parts, 2, C)
    length, parts, per_part,  # positions of a set; its parts, and their positions
    EPS: tl.constexpr, LEAST: tl.constexpr, POSITION: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    X_ALIGN: tl.constexpr, Z_ALIGN: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Partial sums Σdv and Σdv·x̂ of each channel of a set."""
    x_strides, dz_strides, grid = strides_of(x_strides), strides_of(dz_strides), grid_of(grid)
    channels = channels // X_ALIGN * X_ALIGN  # the same number, and a mask of whole vectors
    each, first, last, c = set_part(
        tl.program_id(0), parts, length, per_part, channels, WIDE, BLOCK_C
    )
    c_ok = c < channels
    total = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE)
    along = tl.zeros((BLOCK_P, BLOCK_C), ACCUMULATE)
    for step in range((last - first + BLOCK_P - 1) // BLOCK_P):
        p = first + step * BLOCK_P + tl.arange(0, BLOCK_P)
        row_ok = p < last
        ok = row_ok[:, None] & c_ok[None, :]
        position = positions(p, grid, RUN)
        x = video_tile(x_ptr, x_strides, position, ok, c, X_ALIGN).to(ACCUMULATE)
        x, _ = apply_norm(
            x, mean_ptr, var_ptr, each, p, row_ok, c, c_ok, groups, per_group, frames, EPS, LEAST,
            POSITION,
        )  # fmt: skip
        dv, _ = read_dv(
            dz_ptr, dz_strides, x, position, ok, c, c_ok, gamma_ptr, beta_ptr, ACTIVATION, SLOPE,
            Z_ALIGN,
        )  # fmt: skip
        total += dv
        along += tl.where(ok, dv * x, 0.0)
    blocks = (channels + BLOCK_C - 1) // BLOCK_C
    at = partial_ptr + (tl.program_id(0) // blocks).to(tl.int64) * 2 * channels + c
    tl.store(at, tl.sum(total, 0), mask=c_ok)
    tl.store(at + channels, tl.sum(along, 0), mask=c_ok)


@triton.jit(do_not_specialize=["frames", "length", "parts"])
def normalise_gradient(
    x_ptr, x_strides, grid, channels,  # (N, C, T, H, W)
    mean_ptr, var_ptr, gamma_ptr, beta_ptr, groups, per_group, frames,  # as of ``normalise``
    dz_ptr, dz_strides,  # like x
    centre_ptr, slope_ptr,  # means of γ·dv and of γ·dv·x̂, like mean; or None
    dx_ptr, dx_strides,  # may be dz
    length, parts,  # positions of a set, and its tiles
    CENTRED: tl.constexpr, EPS: tl.constexpr, LEAST: tl.constexpr, POSITION: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    X_ALIGN: tl.constexpr, Z_ALIGN: tl.constexpr, DX_ALIGN: tl.constexpr,
    RUN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """dx = r·(γ·dv − mean of γ·dv − x̂·mean of γ·dv·x̂), means over what shares its statistics."""
    x_strides, dz_strides = strides_of(x_strides), strides_of(dz_strides)
    dx_strides = strides_of(dx_strides)
    channels = channels // X_ALIGN * X_ALIGN  # the same number, and a mask of whole vectors
    each, first, last, c = set_part(
        tl.program_id(0), parts, length, BLOCK_P, channels, WIDE, BLOCK_C
    )
    c_ok = c < channels
    p = first + tl.arange(0, BLOCK_P)
    row_ok = p < last
    ok = row_ok[:, None] & c_ok[None, :]
    position = positions(p, grid_of(grid), RUN)
    x = video_tile(x_ptr, x_strides, position, ok, c, X_ALIGN).to(ACCUMULATE)
    x, r = apply_norm(
        x, mean_ptr, var_ptr, each, p, row_ok, c, c_ok, groups, per_group, frames, EPS, LEAST,
        POSITION,
    )  # fmt: skip
    dv, gamma = read_dv(
        dz_ptr, dz_strides, x, position, ok, c, c_ok, gamma_ptr, beta_ptr, ACTIVATION, SLOPE,
        Z_ALIGN,
    )  # fmt: skip
    g = dv * gamma
    if POSITION:  # a tile has all channels
        slope = tl.sum(tl.where(ok, g * x, 0.0), 1) / channels
        if LEAST > 0:  # where it is held, r is a constant
            var = tl.load(var_ptr + p, mask=row_ok, other=0.0)
            slope = tl.where(tl.sqrt(var) < LEAST, 0.0, slope)
        if CENTRED:
            centre = tl.sum(g, 1) / channels
            g -= centre[:, None]
        g -= x * slope[:, None]
    elif slope_ptr is not None:
        g -= statistic(centre_ptr, each, p, row_ok, c, c_ok, groups, per_group, frames, False)
        slope = statistic(slope_ptr, each, p, row_ok, c, c_ok, groups, per_group, frames, False)
        g -= x * slope
    at = row_offsets(columns(position), dx_strides, DX_ALIGN)
    at += c.to(tl.int64)[None, :] * dx_strides[1]
    tl.store(dx_ptr + at, narrow(g * r, dx_ptr.dtype.element_ty, EMULATE), mask=ok)
