"""Device functions that the kernels share: activations, positions, padding by index, products.

Tiles are ``BLOCK_P`` positions × ``BLOCK_N`` output channels × ``BLOCK_K`` of the reduction. A
tensor of video shape comes as a pointer and its five element strides in the order n, c, t, h, w,
all but that of c divided by ``ALIGN``: a factor that the compiler sees makes accesses wide.
Offsets are int64, coordinates int32 unless there are 2^31 positions or more (``WIDE``).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_GELU_RATE = tl.constexpr(-1.5957691216057308)  # −2·sqrt(2/π)


class Taps(NamedTuple):
    """Geometry of one convolution, known at compile time; triples in the order t, h, w."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    dilation: tuple[int, int, int]
    before: tuple[int, int, int]  # padding in front; behind, the output size says it all
    mode: str  # padding mode


@triton.jit
def activate(v, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """act(v); comparisons are written so that NaN passes through."""
    if ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACTIVATION == "silu":
        v = v / (1 + tl.exp(-v))
    elif ACTIVATION == "gelu":
        v = 0.5 * v * (1 + tl.erf(v * _SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        # 0.5·(1 + tanh(y)) = sigmoid(2y), without the cancellation at y → −∞
        v = v / (1 + tl.exp((v + 0.044715 * v * v * v) * _GELU_RATE))
    elif ACTIVATION == "leaky_relu":
        v = tl.where(v < 0, SLOPE * v, v)
    elif ACTIVATION == "hardswish":
        gate = v + 3
        gate = tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate))
        v = v * gate / 6
    else:
        tl.static_assert(ACTIVATION == "none")
    return v


@triton.jit
def positions(p, size, RUN: tl.constexpr):
    """(n, t, h, w) of flat positions p in a grid of ``size`` (T, H, W).

    RUN divides W and the start of every tile. Split off, it shows the compiler runs of neighbours
    along w, so that loads and stores of contiguous video are coalesced.
    """
    runs = size[2] // RUN
    q = p // RUN
    w = q % runs * RUN + p % RUN
    rows = q // runs
    h = rows % size[1]
    frames = rows // size[1]
    return frames // size[0], frames % size[0], h, w


@triton.jit
def source(i, size, MODE: tl.constexpr):
    """The index that a padded index reads, and whether it reads at all."""
    if MODE == "replicate":
        i = tl.minimum(tl.maximum(i, 0), size - 1)
    elif MODE == "circular":
        i = tl.where(i < 0, i + size, i)
        i = tl.where(i < size, i, i - size)
    elif MODE == "reflect":
        i = tl.where(i < 0, -i, i)
        i = tl.where(i < size, i, 2 * (size - 1) - i)
    else:
        tl.static_assert(MODE == "zeros")
    return i, (i >= 0) & (i < size)


@triton.jit
def tap_offsets(position, tap, size, strides, ALIGN: tl.constexpr, TAPS: tl.constexpr):
    """int64 offsets that a tap of output positions reads, and which of them exist.

    ``position`` is (n, t, h, w) and ``tap`` (kt, kh, kw), of shapes that broadcast. Axes along
    which the kernel has one tap keep the shape of ``position``.
    """
    n, t, h, w = position
    if TAPS.kernel[0] == 1:
        t, ok_t = source(t * TAPS.stride[0] - TAPS.before[0], size[0], TAPS.mode)
    else:
        t = t * TAPS.stride[0] + (tap[0] * TAPS.dilation[0] - TAPS.before[0])
        t, ok_t = source(t, size[0], TAPS.mode)
    if TAPS.kernel[1] == 1:
        h, ok_h = source(h * TAPS.stride[1] - TAPS.before[1], size[1], TAPS.mode)
    else:
        h = h * TAPS.stride[1] + (tap[1] * TAPS.dilation[1] - TAPS.before[1])
        h, ok_h = source(h, size[1], TAPS.mode)
    if TAPS.kernel[2] == 1:
        w, ok_w = source(w * TAPS.stride[2] - TAPS.before[2], size[2], TAPS.mode)
    else:
        w = w * TAPS.stride[2] + (tap[2] * TAPS.dilation[2] - TAPS.before[2])
        w, ok_w = source(w, size[2], TAPS.mode)
    return row_offsets((n, t, h, w), strides, ALIGN), ok_t & ok_h & ok_w


@triton.jit
def row_offsets(position, strides, ALIGN: tl.constexpr):
    """int64 offsets of positions (n, t, h, w), channel 0."""
    n, t, h, w = position
    offsets = n.to(tl.int64) * strides[0] + t.to(tl.int64) * strides[2]
    return (offsets + h.to(tl.int64) * strides[3] + w.to(tl.int64) * strides[4]) * ALIGN


@triton.jit
def columns(position):
    """(n, t, h, w) of (BLOCK_P,) each as (BLOCK_P, 1)."""
    return position[0][:, None], position[1][:, None], position[2][:, None], position[3][:, None]


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """acc + a·b. EMULATE: the interpreter's own product of bfloat16 is wrong."""
    if EMULATE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def narrow(v, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """v in ``dtype``, to nearest even. EMULATE: the interpreter truncates to bfloat16."""
    if EMULATE:
        bits = v.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v.to(dtype)
