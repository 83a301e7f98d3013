"""From tensors and passes to the arguments of kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...problem.spec import Pass
from . import launch, tiles


def sizes(
    positions: int,
    channels: int,
    out_channels: int,
    groups: int,
    taps: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tiles.Sizes:
    """What configurations depend on; see ``configs.Sizes``."""
    return tiles.Sizes(
        positions, channels, out_channels, groups, taps, dtype, uses_tensor_cores(dtype),
        launch.capability(device), launch.processors(device),
    )  # fmt: skip


def tiling(config: tiles.TapConfig | tiles.StreamConfig) -> dict[str, int]:
    """Tiles as the dense kernels take them, where need be without products of matrices."""
    if isinstance(config, tiles.StreamConfig):
        blocks = {"BLOCK_P": config.block_p, "BLOCK_N": config.block_c, "REST_N": 0, "BLOCK_K": 16}
    else:
        blocks = {
            "BLOCK_P": config.block_p, "BLOCK_N": config.block_n, "REST_N": config.rest_n,
            "BLOCK_K": config.block_k,
        }  # fmt: skip
    return {**blocks, "TURNED": turned()}


def turned() -> bool:
    """Whether packed weights have the reduction side by side in memory, not the columns.

    A lane of AMD's products takes neighbours of the reduction: of columns side by side it would
    read two bytes at a time from shared memory.
    """
    return launch.capability(launch.device())[0] == 0


def is_wide(count: int) -> bool:
    """Whether coordinates of that many positions must be int64."""
    return count >= (1 << 31) - 4096  # the last tile reaches beyond them


@functools.lru_cache(4096)
def taps(p: Pass) -> Any:
    """Geometry of a pass as the kernels take it."""
    from .kernels.common import Taps

    modes = padding_modes(p)
    apart = modes == ("zeros",) * 3 and max(p.kernel) < 32
    return Taps(p.kernel, p.stride, p.dilation, p.padding[::2], modes, apart=apart, move=p.dilation)


def padding_modes(p: Pass) -> tuple[str, str, str]:
    """Modes of t, h, w; "zeros" where nothing is padded."""
    t, h, w = (
        mode if any(p.padding[2 * i : 2 * i + 2]) else "zeros" for i, mode in enumerate(p.modes)
    )
    return t, h, w


@functools.lru_cache(4096)
def transposed_taps(p: Pass, classes: Sequence[int] = (1, 1, 1)) -> Any:
    """Geometry of the input gradient of a pass, of positions in so many residue classes."""
    steps = tuple(s // math.gcd(s, d) for s, d in zip(p.stride, p.dilation, strict=True))
    move = tuple(-n * d // s for n, d, s in zip(steps, p.dilation, p.stride, strict=True))
    return taps(p)._replace(
        transposed=True, step=steps, images=images(p), move=move,
        apart=taps(p).apart and tuple(classes) == p.stride,
    )  # fmt: skip


def images(p: Pass) -> tuple[int, ...]:
    """How many padded indices hold a copy of an index, along each axis: see ``common.image``."""
    copies = {"zeros": 1, "reflect": 3, "circular": 3}
    return tuple(
        copies.get(mode, 1 + before + after)
        for mode, before, after in zip(
            padding_modes(p), p.padding[::2], p.padding[1::2], strict=True
        )
    )


def operand(t: Tensor, channels: int) -> tuple[tuple[Any, ...], int]:
    """(pointer, strides, (T, H, W)) of a video with that many channels in use, and its ALIGN."""
    align = alignment(t, channels)
    return (t, strides(t, align), hide(*t.shape[2:])), align


def sources(x: Tensor, past: Tensor | None, channels: int) -> tuple[tuple[Any, ...], int]:
    """The operands x, of the size of both, and past, which are Nones where there is none."""
    align = alignment(x, channels)
    t, *plane = x.shape[2:]
    before: tuple[Any, ...] = (None, None, None)
    if past is not None:
        align = math.gcd(align, alignment(past, channels))
        t += past.shape[2]
        before = past, strides(past, align), hide(*past.shape[2:])
    return (x, strides(x, align), hide(t, *plane), *before), align


def channels_last(t: Tensor) -> Tensor:
    """The same values with channels as neighbours, copied where they are not.

    A tile of a product is many positions × 64 channels. Read from contiguous video it takes loads
    of 2 bytes by way of registers, in every tap again; a copy reads and writes the video once.
    """
    return t if t.stride(1) == 1 else t.contiguous(memory_format=torch.channels_last_3d)


def results(
    y: Tensor, residual: Tensor | None, channels: int, store: bool = True
) -> tuple[tuple[Any, ...], int]:
    """(residual and its strides, or None; y as an operand), and the ALIGN of both."""
    align = alignment(y, channels)
    added: tuple[Any, ...] = (None, None)
    if residual is not None:
        align = math.gcd(align, alignment(residual, channels))
        added = (residual, strides(residual, align))
    return (*added, y if store else None, strides(y, align)), align


def alignment(t: Tensor, channels: int) -> int:
    """Largest divisor up to 8 of row offsets and channel count, where channels are contiguous."""
    if t.stride(1) != 1:
        return 1
    used = (s for i, (s, n) in enumerate(zip(t.stride(), t.shape, strict=True)) if n > 1 and i != 1)
    return math.gcd(8, channels, *used)


def hide(*numbers: int) -> tuple[int, ...]:
    """Numbers that a kernel is not compiled anew for, which takes back this 2n + 3.

    Triton knows those of a tuple that are 1 or multiples of 16, whatever is not to be specialised.
    Sizes of a video change from call to call, and a kernel of its own gains nothing from them.
    """
    return tuple(2 * n + 3 for n in numbers)


def strides(t: Tensor, align: int) -> tuple[int, ...]:
    """Strides as the kernels take them: of positions in units of ``align``, and hidden."""
    n, c, *thw = t.stride()
    n, *thw = hide(n // align, *(s // align for s in thw))
    return (n, c, *thw)


@functools.lru_cache(4096)
def grid(size: tuple[int, ...], run: int) -> tuple[int, ...]:
    """(T, H, W) and what positions are divided by, for ``common.positions``; hidden."""
    t, h, w = size
    return hide(t, h, w, *divisor(w // run), *divisor(h), *divisor(t))


def divisor(d: int) -> tuple[int, int]:
    """(m, s): n // d = n·m >> (31 + s) for every 0 ≤ n < 2^31."""
    s = (d - 1).bit_length()
    return -(-(1 << (31 + s)) // d), s


def run_length(x: Tensor, y: Tensor) -> int:
    """Positions that are neighbours in memory for certain, where w is the contiguous axis."""
    contiguous = any(t.stride(4) == 1 != t.stride(1) for t in (x, y))
    return math.gcd(16, y.shape[4]) if contiguous else 1


def is_dense(*tensors: Tensor | None) -> bool:
    """Whether positions of all these lie one after another, at the distance of columns."""
    for t in tensors:
        if t is not None:
            apart = t.stride(4)
            for axis in (4, 3, 2, 0):
                if t.shape[axis] > 1 and t.stride(axis) != apart:
                    return False
                apart *= t.shape[axis]
    return True


def uses_tensor_cores(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2 or (dtype == torch.float32 and launch.allows_tf32())


def arithmetic(dtype: torch.dtype, dot: bool = True) -> dict[str, Any]:
    """How products and sums are formed; ``dot``: of matrices."""
    kinds: dict[str, Any] = {
        "EMULATE": launch.is_interpreted() and dtype == torch.bfloat16,
        "ACCUMULATE": dot_type(dtype),
    }
    if dot:
        tf32 = dtype == torch.float32 and launch.allows_tf32()
        kinds["PRECISION"] = "tf32" if tf32 else "ieee"
    return kinds


def rounds(dtype: torch.dtype) -> bool:
    """Whether what products will read is rounded to TF32 as it is written.

    The interpreter multiplies in float32.
    """
    return dtype == torch.float32 and launch.allows_tf32() and not launch.is_interpreted()


def dot_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
