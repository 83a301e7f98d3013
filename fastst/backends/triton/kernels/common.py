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
_NORMAL = tl.constexpr(0.3989422804014327)  # 1/sqrt(2π)


class Taps(NamedTuple):
    """Geometry of one convolution, known at compile time; triples in the order t, h, w."""

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    dilation: tuple[int, int, int]
    before: tuple[int, int, int]  # padding in front; behind, the output size says it all
    modes: tuple[str, str, str]  # of padding
    # From the input to the outputs that read it:
    transposed: bool = False
    step: tuple[int, int, int] = (1, 1, 1)  # between the taps that read from one residue class
    images: tuple[int, int, int] = (1, 1, 1)  # padded indices that hold a copy of an index
    # Zeros around what is read, and less than 32 taps along each axis: what the taps of a position
    # read lies at the same distances for all positions, in indices along each axis.
    apart: bool = False
    move: tuple[int, int, int] = (1, 1, 1)


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
def activate_gradient(dz, v, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """dz·act'(v), at kinks and for NaN as PyTorch's own."""
    if ACTIVATION == "relu":
        dz = tl.where(v <= 0, 0.0, dz)
    elif ACTIVATION == "silu":
        gate = 1 / (1 + tl.exp(-v))
        dz = dz * (gate * (1 + v * (1 - gate)))
    elif ACTIVATION == "gelu":
        dz = dz * (0.5 * (1 + tl.erf(v * _SQRT_HALF)) + v * tl.exp(-0.5 * v * v) * _NORMAL)
    elif ACTIVATION == "gelu_tanh":
        gate = 1 / (1 + tl.exp((v + 0.044715 * v * v * v) * _GELU_RATE))
        rise = (1 + 3 * 0.044715 * v * v) * -_GELU_RATE
        dz = dz * (gate * (1 + v * (1 - gate) * rise))
    elif ACTIVATION == "leaky_relu":
        dz = tl.where(v > 0, dz, SLOPE * dz)
    elif ACTIVATION == "hardswish":
        dz = tl.where(v <= -3, 0.0, tl.where(v < 3, dz * (v / 3 + 0.5), dz))
    else:
        tl.static_assert(ACTIVATION == "none")
    return dz


@triton.jit
def reveal(hidden):
    """n as it was; hosts pass 2n + 3, which is nothing that Triton compiles a kernel anew for."""
    return (hidden - 3) >> 1


@triton.jit
def size_of(hidden):
    """(T, H, W) as they were."""
    return reveal(hidden[0]), reveal(hidden[1]), reveal(hidden[2])


@triton.jit
def four_of(hidden):
    return reveal(hidden[0]), reveal(hidden[1]), reveal(hidden[2]), reveal(hidden[3])


@triton.jit
def grid_of(hidden):
    """What ``positions`` takes."""
    return (
        reveal(hidden[0]), reveal(hidden[1]), reveal(hidden[2]),
        reveal(hidden[3]), reveal(hidden[4]), reveal(hidden[5]),
        reveal(hidden[6]), reveal(hidden[7]), reveal(hidden[8]),
    )  # fmt: skip


@triton.jit
def strides_of(hidden):
    """Strides, of which that of the channels is not hidden: 1 is worth a kernel of its own."""
    return reveal(hidden[0]), hidden[1], reveal(hidden[2]), reveal(hidden[3]), reveal(hidden[4])


@triton.jit
def quotient(n, magic, shift):
    """n // d of 0 ≤ n < 2^31, with d's multiplier and shift as of ``arguments.divisor``."""
    doubled = (n * 2).to(tl.uint32, bitcast=True)
    return (tl.umulhi(doubled, magic.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def positions(p, grid, RUN: tl.constexpr):
    """(n, t, h, w) of flat positions p in a ``grid``: (T, H, W) and their divisors.

    RUN divides W and the start of every tile. Split off, it shows the compiler runs of neighbours
    along w, so that loads and stores of contiguous video are coalesced.
    """
    q = p // RUN
    w = p % RUN
    if p.dtype == tl.int64:
        rows = q // (grid[2] // RUN)
        w = (q - rows * (grid[2] // RUN)).to(tl.int32) * RUN + w.to(tl.int32)
        frames = rows // grid[1]
        h = (rows - frames * grid[1]).to(tl.int32)
        n = frames // grid[0]
        t = (frames - n * grid[0]).to(tl.int32)
        n = n.to(tl.int32)
    else:  # the compiler's division by an integer that it does not know takes 20 instructions
        rows = quotient(q, grid[3], grid[4])
        frames = quotient(rows, grid[5], grid[6])
        n = quotient(frames, grid[7], grid[8])
        t = frames - n * grid[0]
        h = rows - frames * grid[1]
        w += (q - rows * (grid[2] // RUN)) * RUN
    return n, t, h, w


@triton.jit
def written_positions(p, grid, RUN: tl.constexpr, DENSE: tl.constexpr):
    """``positions``; of DENSE ones, which lie one after another, as if all were of one row."""
    if DENSE:
        position = (p * 0, p * 0, p * 0, p)
    else:
        position = positions(p, grid, RUN)
    return position


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
def image(i, m, size, BEFORE: tl.constexpr, MODE: tl.constexpr):
    """The m-th padded index that holds a copy of index i, and whether it is one.

    The first is i itself. Reflected and circular padding have one on either side, and the first
    and last of replicated padding as many as there is padding, here in front and then behind.
    Those that are outside of the padding are read by no tap.
    """
    if MODE == "zeros":
        at, ok = i, m == 0
    elif MODE == "replicate":
        front = (m > 0) & (m <= BEFORE)
        at = tl.where(m == 0, i, tl.where(front, -m, size - 1 + m - BEFORE))
        ok = (m == 0) | (i == tl.where(front, 0, size - 1))
    elif MODE == "circular":
        at, ok = i + tl.where(m == 0, 0, tl.where(m == 1, -size, size)), i >= 0
    else:
        tl.static_assert(MODE == "reflect")
        at = tl.where(m == 0, i, tl.where(m == 1, -i, 2 * (size - 1) - i))
        ok = (m == 0) | (i != tl.where(m == 1, 0, size - 1))
    return at, ok


@triton.jit
def image_positions(position, m, size, TAPS: tl.constexpr):
    """The m-th images of positions (n, t, h, w), and which are ones."""
    IMAGES: tl.constexpr = TAPS.images
    T_MODE: tl.constexpr = TAPS.modes[0]  # Triton 3.6 takes no string of a tuple as an argument
    H_MODE: tl.constexpr = TAPS.modes[1]
    W_MODE: tl.constexpr = TAPS.modes[2]
    n, t, h, w = position
    t, ok_t = image(t, m // (IMAGES[1] * IMAGES[2]), size[0], TAPS.before[0], T_MODE)
    h, ok_h = image(h, m // IMAGES[2] % IMAGES[1], size[1], TAPS.before[1], H_MODE)
    w, ok_w = image(w, m % IMAGES[2], size[2], TAPS.before[2], W_MODE)
    return (n, t, h, w), ok_t & ok_h & ok_w


@triton.jit
def tap_index(i, tap, size, AXIS: tl.constexpr, TAPS: tl.constexpr):
    """The index that a tap reads for output index i along one axis, and whether it reads at all.

    Transposed: the output index, if any, that reads the padded index i by this tap.
    """
    STRIDE: tl.constexpr = TAPS.stride[AXIS]
    if TAPS.kernel[AXIS] == 1:
        shift = -TAPS.before[AXIS]
    else:
        shift = tap * TAPS.dilation[AXIS] - TAPS.before[AXIS]
    if TAPS.transposed:
        i = i - shift
        ok = i >= 0
        if STRIDE > 1:
            ok = ok & (i % STRIDE == 0)
            i = i // STRIDE
        ok = ok & (i < size)
    else:
        MODE: tl.constexpr = TAPS.modes[AXIS]
        i, ok = source(i * STRIDE + shift, size, MODE)
    return i, ok


@triton.jit
def tap_start(i, first, AXIS: tl.constexpr, TAPS: tl.constexpr):
    """The index along one axis that the first of the taps reads for output index i.

    The next reads ``TAPS.move`` further. Only where taps are ``apart``.
    """
    if TAPS.transposed:
        start = i + TAPS.before[AXIS] - first * TAPS.dilation[AXIS]
        if TAPS.stride[AXIS] > 1:
            start = start // TAPS.stride[AXIS]  # comes out even in a residue class
    else:
        start = i * TAPS.stride[AXIS] - TAPS.before[AXIS]
    return start


@triton.jit
def is_below(i, size):
    """0 ≤ i < size, in one comparison."""
    return i.to(tl.uint32, bitcast=True) < size.to(tl.uint32)


@triton.jit
def tap_position(position, tap, size, TAPS: tl.constexpr):
    """The positions that a tap of output positions reads, and which of them exist.

    ``position`` is (n, t, h, w) and ``tap`` (kt, kh, kw), of shapes that broadcast. Axes along
    which the kernel has one tap keep the shape of ``position``.
    """
    n, t, h, w = position
    t, ok_t = tap_index(t, tap[0], size[0], 0, TAPS)
    h, ok_h = tap_index(h, tap[1], size[1], 1, TAPS)
    w, ok_w = tap_index(w, tap[2], size[2], 2, TAPS)
    return (n, t, h, w), ok_t & ok_h & ok_w


@triton.jit
def tap_offsets(position, tap, size, strides, ALIGN: tl.constexpr, TAPS: tl.constexpr):
    """int64 offsets of ``tap_position``, and which of them exist."""
    at, ok = tap_position(position, tap, size, TAPS)
    return row_offsets(at, strides, ALIGN), ok


@triton.jit
def row_offsets(position, strides, ALIGN: tl.constexpr):
    """int64 offsets of positions (n, t, h, w), channel 0."""
    n, t, h, w = position
    offsets = n.to(tl.int64) * strides[0] + t.to(tl.int64) * strides[2]
    return (offsets + h.to(tl.int64) * strides[3] + w.to(tl.int64) * strides[4]) * ALIGN


@triton.jit
def tile_offsets(position, channel, strides, ALIGN: tl.constexpr):
    """int64 offsets of channels (C,) of positions: their shape, and C."""
    rows = tl.expand_dims(row_offsets(position, strides, ALIGN), -1)
    return rows + channel.to(tl.int64) * strides[1]


@triton.jit
def columns(position):
    """(n, t, h, w) of (BLOCK_P,) each as (BLOCK_P, 1)."""
    return position[0][:, None], position[1][:, None], position[2][:, None], position[3][:, None]


@triton.jit
def read_du(
    dv_ptr, at, ok,  # elements of a tile, and which of them exist
    c, c_ok,  # their channels
    s_ptr, r_ptr,  # per channel, or None
    u_ptr, p_ptr,  # u with the strides of dv, and its factor; or None
    EMULATE: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """du = s·dv + p·u + r in the dtype of dv, 0 where nothing exists."""
    du = tl.load(dv_ptr + at, mask=ok, other=0.0)
    if s_ptr is not None:
        v = du.to(ACCUMULATE) * tl.load(s_ptr + c, mask=c_ok, other=0.0)
        if u_ptr is not None:
            u = tl.load(u_ptr + at, mask=ok, other=0.0).to(ACCUMULATE)
            v = v + u * tl.load(p_ptr + c, mask=c_ok, other=0.0)
        if r_ptr is not None:
            v = v + tl.load(r_ptr + c, mask=c_ok, other=0.0)
            v = tl.where(ok, v, 0.0)
        du = narrow(v, du.dtype, EMULATE)
    return du


# Columns from which on a thread has the same of 16 rows in every sixteenth. Triton 3.6 shares the
# first of three dimensions among warps.
_MANY = tl.constexpr(1 << 30 if triton.__version__.startswith("3.6.") else 64)


@triton.jit
def tile_rows(BLOCK_P: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a tile as (BLOCK_P/16, 16), for sums over the first dimension without an exchange.

    Of few columns they are (BLOCK_P,).
    """
    if COLUMNS < _MANY:
        row = tl.arange(0, BLOCK_P)
    else:
        row = tl.arange(0, BLOCK_P // 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    return row


@triton.jit
def regroup(acc):
    """(BLOCK_P, columns) with rows as of ``tile_rows``."""
    if acc.shape[1] >= _MANY:
        acc = tl.reshape(acc, (acc.shape[0] // 16, 16, acc.shape[1]))
    return acc


@triton.jit
def halves(x):
    """The upper and the lower half of (R, C, 2)."""
    both = tl.reshape(x, (2, x.shape[0] // 2, x.shape[1], 2))
    return tl.split(tl.permute(both, (1, 2, 3, 0)))


@triton.jit
def column_sums(x, z):
    """(C,) sums over the rows of two of (P, C) or of (P/16, 16, C).

    Warps exchange what is left of both by halves: up to Triton 3.7, its own reduction would ask a
    bank of shared memory for the columns of 16 threads at once.
    """
    x, z = tl.sum(x, 0), tl.sum(z, 0)
    if len(x.shape) == 2:
        both = tl.join(x, z)
        for _ in tl.static_range(4):
            a, b = halves(both)
            both = a + b
        x, z = tl.split(tl.reshape(both, (x.shape[1], 2)))
    return x, z


@triton.jit
def merge(both, rows, R: tl.constexpr):
    """(R, C, 2) of mean and M2 from twice as many, of a tile's rows r, r + 2R, …: Chan's formula.

    They go through shared memory together.
    """
    left = rows + (R - 1) - tl.arange(0, R)[:, None]
    n, more = ((left + R) // (2 * R)).to(both.dtype), (left // (2 * R)).to(both.dtype)
    upper, lower = halves(both)
    mean, m2 = tl.split(upper)
    other, other_m2 = tl.split(lower)
    step = other - mean
    share = more / tl.maximum(n + more, 1.0)
    return tl.join(mean + step * share, m2 + other_m2 + step * step * (n * share))


@triton.jit
def column_moments(x, row_ok, rows):
    """(mean, M2), each (C,), of the first ``rows`` rows of (P, C) or of (P/16, 16, C)."""
    ok = tl.expand_dims(row_ok, -1)
    n = rows
    if len(x.shape) == 3:
        n = tl.maximum((rows + 15 - tl.arange(0, 16)[:, None]) // 16, 1)
    mean = tl.sum(tl.where(ok, x, 0.0), 0) / n.to(x.dtype)
    away = tl.where(ok, x - mean, 0.0)
    m2 = tl.sum(away * away, 0)
    if len(x.shape) == 3:
        both = tl.join(mean, m2)
        for _ in tl.static_range(4):
            both = merge(both, rows, both.shape[0] // 2)
        mean, m2 = tl.split(tl.reshape(both, (x.shape[2], 2)))
    return mean, m2


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


@triton.jit
def to_tf32(v):
    """float32 as TF32, to nearest; tensor cores would cut off what they do not hold."""
    bits = (v.to(tl.int32, bitcast=True) + 0x1000) & -8192
    return tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
