"""From tensors and passes to the arguments of kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...machine import gpu
from ...problem.spec import Pass
from . import launch, tiles


def pack(
    weight: Tensor, groups: int, channels: int, config: tiles.TapConfig, width: int | None = None
) -> Tensor:
    """(K, C/g, kt, kh, kw) as (groups, reduction, width): see ``kernels.tap_conv``.

    ``width`` is that of whole tiles unless it is given.
    """
    width = width or gpu.round_up(weight.shape[0] // groups, config.columns)
    depth = channels if config.flat else gpu.round_up(channels, config.block_k)
    rows = gpu.round_up(depth * math.prod(weight.shape[2:]), config.block_k)
    return packed(weight, groups, depth, rows, width)


def pack_direct(weight: Tensor) -> Tensor:
    """(K, C/g, kt, kh, kw) as (taps · C/g, K)."""
    rows = math.prod(weight.shape[1:])
    return packed(weight, 1, weight.shape[1], rows, weight.shape[0])[0]


def packed(weight: Tensor, groups: int, depth: int, rows: int, width: int) -> Tensor:
    """(K, C/g, kt, kh, kw), any strides, as (groups, rows, width) with ``depth`` rows of each tap.

    In one launch on every call: what was changed through ``weight.data`` leaves no trace by which
    a cache could know, and a captured graph must see it, too.
    """
    out = weight.new_empty(groups, rows, width)
    k, channels = weight.shape[0] // groups, weight.shape[1]
    block_r, block_n = tiles.pack(width)
    launch.run(
        launch.kernels().pack.pack, (-(-rows // block_r) * -(-width // block_n) * groups,), None,
        weight, weight.stride(), out, rows, width, channels, k, depth,
        KERNEL=tuple(weight.shape[2:]), BLOCK_R=block_r, BLOCK_N=block_n,
    )  # fmt: skip
    return out


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
        launch.capability(device),
    )  # fmt: skip


def tiling(config: tiles.TapConfig | tiles.StreamConfig) -> dict[str, int]:
    """Tiles as the dense kernels take them, where need be without products of matrices."""
    if isinstance(config, tiles.StreamConfig):
        return {"BLOCK_P": config.block_p, "BLOCK_N": config.block_c, "REST_N": 0, "BLOCK_K": 16}
    return {
        "BLOCK_P": config.block_p, "BLOCK_N": config.block_n, "REST_N": config.rest_n,
        "BLOCK_K": config.block_k,
    }  # fmt: skip


def wide(count: int) -> bool:
    """Whether coordinates of that many positions must be int64."""
    return count >= 1 << 31


def taps(p: Pass) -> Any:
    """Geometry of a pass as the kernels take it."""
    from .kernels.common import Taps

    return Taps(p.kernel, p.stride, p.dilation, p.padding[::2], p.padding_mode)


def transposed_taps(p: Pass) -> Any:
    """Geometry of the input gradient of a pass."""
    steps = (s // math.gcd(s, d) for s, d in zip(p.stride, p.dilation, strict=True))
    return taps(p)._replace(
        mode="transposed", step=tuple(steps), images=images(p), padding=p.padding_mode
    )


def images(p: Pass) -> tuple[int, ...]:
    """How many padded indices hold a copy of an index, along each axis: see ``common.image``."""
    sides = zip(p.padding[::2], p.padding[1::2], strict=True)
    if p.padding_mode == "replicate":
        return tuple(1 + before + after for before, after in sides)
    padded = 1 if p.padding_mode == "zeros" else 3
    return tuple(padded if any(side) else 1 for side in sides)


def operand(t: Tensor, channels: int) -> tuple[tuple[Any, ...], int]:
    """(pointer, strides, (T, H, W)) of a video with that many channels in use, and its ALIGN."""
    align = alignment(t, channels)
    return (t, strides(t, align), tuple(t.shape[2:])), align


def results(
    y: Tensor, residual: Tensor | None, channels: int, store: bool = True
) -> tuple[tuple[Any, ...], int]:
    """(residual and its strides, or None; y as an operand), and the ALIGN of both."""
    align = alignment(y, channels)
    added: tuple[Any, ...] = (None, None)
    if residual is not None:
        align = math.gcd(align, alignment(residual, channels))
        added = (residual, strides(residual, align))
    return (*added, y if store else None, strides(y, align), tuple(y.shape[2:])), align


def alignment(t: Tensor, channels: int) -> int:
    """Largest divisor up to 8 of row offsets and channel count, where channels are contiguous."""
    if t.stride(1) != 1:
        return 1
    used = (s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 and s != 1)
    return math.gcd(8, channels, *used)


def strides(t: Tensor, align: int) -> tuple[int, ...]:
    """Strides as the kernels take them: of positions in units of ``align``."""
    n, c, *thw = t.stride()
    return (n // align, c, *(s // align for s in thw))


def layout(x: Tensor, y: Tensor, count: int) -> dict[str, Any]:
    """What the kernels must know at compile time about ``count`` positions of y, read from x."""
    return {"RUN": run_length(x, y), "WIDE": wide(count)}


def run_length(x: Tensor, y: Tensor) -> int:
    """Positions that are neighbours in memory for certain, where w is the contiguous axis."""
    contiguous = any(t.stride(4) == 1 != t.stride(1) for t in (x, y))
    return math.gcd(16, y.shape[4]) if contiguous else 1


def uses_tensor_cores(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2 or (dtype == torch.float32 and launch.tf32_allowed())


def arithmetic(dtype: torch.dtype, dot: bool = True) -> dict[str, Any]:
    """How products and sums are formed; ``dot``: of matrices."""
    kinds: dict[str, Any] = {
        "EMULATE": launch.interpreted() and dtype == torch.bfloat16,
        "ACCUMULATE": dot_type(dtype),
    }
    if dot:
        tf32 = dtype == torch.float32 and launch.tf32_allowed()
        kinds["PRECISION"] = "tf32" if tf32 else "ieee"
    return kinds


def dot_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
