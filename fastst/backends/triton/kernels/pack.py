"""Weights in the order in which the kernels read them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["w_strides", "depth", "rows", "width"])
def pack(
    w_ptr, w_strides,  # (K, C/g, kt, kh, kw)
    out_ptr, rows, width,  # (g, rows, width), written
    channels, out_channels, depth,  # of a group; rows of a tap
    KERNEL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[g, tap·depth + c, n] = w[g·out_channels + n, c, tap], and zeros beyond all of them."""
    tiles_r, tiles_n = (rows + BLOCK_R - 1) // BLOCK_R, (width + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    n = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    r = pid // tiles_n % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    group = (pid // tiles_n // tiles_r).to(tl.int64)
    tap, c = r // depth, r % depth
    kt = tap // (KERNEL[1] * KERNEL[2])
    kh, kw = tap // KERNEL[2] % KERNEL[1], tap % KERNEL[2]
    at = (group * out_channels + n) * w_strides[0] + c.to(tl.int64) * w_strides[1]
    at += kt.to(tl.int64) * w_strides[2] + kh.to(tl.int64) * w_strides[3]
    at += kw.to(tl.int64) * w_strides[4]
    ok = (kt < KERNEL[0]) & (c < channels) & (n < out_channels)
    w = tl.load(w_ptr + at, mask=ok, other=0.0)
    out_ptr += (group * rows + r) * width + n
    tl.store(out_ptr, w, mask=(r < rows) & (n < width))
