"""Weights in the order in which the kernels read them."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import reveal, to_tf32


@triton.jit
def pack_tile(
    tile, w_ptr, w_sizes, w_strides, out_ptr, layout, ROUND: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of one weight; arguments as of ``pack``."""
    rows, width = reveal(layout[0]), reveal(layout[1])
    depth, parts, lanes = reveal(layout[2]), reveal(layout[3]), reveal(layout[4])
    tiles_r, tiles_n = (rows + BLOCK_R - 1) // BLOCK_R, (width + BLOCK_N - 1) // BLOCK_N
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    r = tile // tiles_n % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    group = tile // tiles_n // tiles_r
    tap, c = r // depth, r % depth
    kh, kw = reveal(w_sizes[6]), reveal(w_sizes[7])
    index = (
        group, n // lanes, n % lanes, c // parts, c % parts, tap // (kh * kw), tap // kw % kh,
        tap % kw,
    )  # fmt: skip
    at = tl.zeros((BLOCK_R, BLOCK_N), tl.int64)
    ok = (r < rows) & (n < width)
    for i in tl.static_range(8):
        at += tl.cast(index[i], tl.int64) * reveal(w_strides[i])
        ok = ok & (index[i] < reveal(w_sizes[i]))
    w = tl.load(w_ptr + at, mask=ok, other=0.0)
    if ROUND:
        w = to_tf32(w)
    if TURNED:
        out_ptr += (group.to(tl.int64) * width + n) * rows + r
    else:
        out_ptr += (group.to(tl.int64) * rows + r) * width + n
    tl.store(out_ptr, w, mask=(r < rows) & (n < width))


@triton.jit(do_not_specialize=["tiles"])
def pack(
    w_ptr, w_sizes, w_strides,  # (g, n, n', c, c', kt, kh, kw), of any strides
    out_ptr, layout, tiles,  # (g, rows, width), written; its layout, and how many tiles it has
    next_ptr, next_sizes, next_strides, next_out_ptr, next_layout,  # another weight, or None
    ROUND: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[g, tap·depth + c·parts + c', n·lanes + n'] = w[g, n, n', c, c', tap], else zeros.

    ``layout``: rows, width, depth, parts and lanes. ROUND: to TF32. TURNED: rows are neighbours.
    """
    tile = tl.program_id(0)
    if tile < tiles:
        pack_tile(tile, w_ptr, w_sizes, w_strides, out_ptr, layout, ROUND, TURNED, BLOCK_R, BLOCK_N)
    elif next_ptr is not None:
        pack_tile(
            tile - tiles, next_ptr, next_sizes, next_strides, next_out_ptr, next_layout, ROUND,
            TURNED, BLOCK_R, BLOCK_N,
        )  # fmt: skip
