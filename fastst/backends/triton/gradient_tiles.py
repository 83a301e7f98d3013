"""Tile configurations of the kernels that compute gradients; see ``tiles``."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from ...machine import gpu
from . import tiles as configs
from .tiles import Capability, MatrixConfig, Sizes, StreamConfig, TapConfig


@dataclass(frozen=True)
class WeightConfig(MatrixConfig):
    """Tiles and launch parameters of ``weight_gradient``; ``block_p`` positions at a time."""

    block_r: int
    swap: bool  # rows are output channels


@functools.lru_cache(4096)
def input_gradient(sizes: Sizes, masks: bool, classes: int) -> tuple[TapConfig, ...]:
    """Configurations of an input gradient worth measuring, best guess first.

    Args:
        sizes: of the gradient.
        masks: whether it reads u to multiply by the gradient of an activation.
        classes: residue classes of positions.
    """
    found: list[TapConfig] = []
    # u beside sums of 192 columns spilled.
    tiles = [c for c in configs.candidates(sizes) if not masks or c.columns <= 160]
    for config in tiles:
        p, warps = config.block_p, config.num_warps
        # So did u beside 72 sums of a thread, and the addresses of a class beside more than 48.
        if masks and p * config.columns > (64 if classes == 1 else 48) * 32 * warps:
            p, warps = min(p, 64), 8
        config = replace(config, block_p=p, num_warps=warps)
        if config not in found:
            found.append(config)
    return tuple(found)


def parallel_input_gradient(sizes: Sizes, classes: int, mixed: bool = False) -> TapConfig:
    """Configuration of the input gradient of both branches; see ``configs.parallel_conv``."""
    found = input_gradient(sizes, masks=False, classes=classes)[0]
    # With the addresses of a class, too, 128 rows took all 255 registers.
    rows = min(found.block_p, 128 if classes == 1 else 64)
    return configs.two_branches(replace(found, block_p=rows), mixed)


@functools.lru_cache(4096)
def weight_gradient(sizes: Sizes, limit: int = 12) -> tuple[WeightConfig, ...]:
    """Configurations of a weight gradient, best guess first; sizes of the convolution itself."""
    dtype, tensor_cores, capability = sizes.dtype, sizes.tensor_cores, sizes.capability
    flat, out_channels = sizes.flat, sizes.out_channels
    tapped = sizes.channels * sizes.taps if flat else sizes.channels
    # Tensor cores take rows by 64 from Hopper on; without them every product is on registers.
    heights, widest, block_p = ((64, 128), 192, 64) if tensor_cores else ((32, 16), 64, 16)
    if dtype.itemsize == 4 and tensor_cores:
        widest, block_p = 128, 32
    if dtype.itemsize == 8:
        heights, widest, block_p = (16, 32), 32, 16
    costs: dict[tuple[bool, int, tuple[int, int]], float] = {}
    for swap in (False, True):
        rows, columns = (out_channels, tapped) if swap else (tapped, out_channels)
        for height in heights:
            for block in configs.COLUMNS:
                # (tap, channel) as one index has an address for every element: 64 of them at most.
                if flat and (sum(block) if swap else height) > 64:
                    continue
                # 128 × 128 sums and both operands on their way through registers: no room for more.
                if sum(block) <= widest and height * sum(block) <= 128 * 128:
                    padded = gpu.round_up(rows, height) * gpu.round_up(columns, sum(block))
                    # Each block of rows reads all columns again, and the other way round.
                    reads = 1 + 32 / height + 32 / sum(block)
                    costs[swap, height, block] = padded * reads
    found: list[WeightConfig] = []
    for swap, height, (block_n, rest_n) in sorted(costs, key=lambda c: costs[c])[:4]:
        # An address for every element: 64 × 64 of them spilled in 4 warps. Sums beside operands in
        # registers did above 64 × 64, and sums alone above 128 × 96.
        most = 64 * 64 if configs.through_registers(capability) else 128 * 96
        warps = 8 if flat or height * (block_n + rest_n) > most else 4
        depths = (block_p, max(16, block_p // 2))
        # 64 positions of both operands in registers spilled beside 144 columns.
        thinner = configs.through_registers(capability) and dtype.itemsize == 2 and height < 128
        for depth in depths[::-1] if thinner else depths:
            stages = 3
            tile = depth * (height + block_n + rest_n) * dtype.itemsize
            while stages > 2 and stages * tile > gpu.shared_memory_limit(capability) // 2:
                stages -= 1
            config = WeightConfig(depth, block_n, rest_n, flat, warps, stages, height, swap)
            if config not in found:
                found.append(config)
    return tuple(found[:limit])


def weight_blocks(
    config: WeightConfig, channels: int, out_channels: int, taps: int
) -> tuple[int, int]:
    """Blocks of rows and of columns of a weight gradient; channels of a group."""
    across, along = (
        (config.columns, config.block_r) if config.swap else (config.block_r, config.columns)
    )
    tapped = (
        math.ceil(channels * taps / across) if config.flat else taps * math.ceil(channels / across)
    )
    plain = math.ceil(out_channels / along)
    return (plain, tapped) if config.swap else (tapped, plain)


@functools.lru_cache(4096)
def box(positions: int, size: tuple[int, ...]) -> tuple[int, ...]:
    """log2 of the sides (n, t, h, w) of a box of so many positions that pads least of a video."""
    power = positions.bit_length() - 1
    sides = (
        (n, t, h, power - n - t - h)
        for n in range(power + 1) for t in range(power + 1 - n) for h in range(power + 1 - n - t)
    )  # fmt: skip
    padded = lambda b: math.prod(-(-s >> k) << k for s, k in zip(size, b, strict=True))  # noqa: E731
    return min(sides, key=lambda b: (padded(b), b))  # of equals one of few samples and frames


def boxes_per_split(boxes: int, blocks: int, processors: int) -> int:
    """Boxes that one program of a weight gradient adds up.

    As many programs as two for every multiprocessor hold, rounded down: one more would run alone
    after all others. But no partial of fewer than 8 boxes, which would cost more to write and to
    add than to compute.
    """
    splits = max(1, 2 * processors // blocks)
    return max(8, math.ceil(boxes / splits))


def direct_gradients(
    positions: int, channels: int, channels_last: bool, capability: Capability
) -> StreamConfig:
    """Configuration of ``direct_gradients``.

    Args:
        positions: of x.
        channels: of x, of all groups.
        channels_last: whether the channels of dy, which is read once a tap, are neighbours.
        capability: of the GPU.
    """
    # Each tile writes the sums of each tap: 9 of them for 32 positions are a seventh of what a
    # tile reads and writes in 16 bits. 2,048 elements are 8 of each of 256 threads, of which x, dx
    # and the product live at once.
    block_c = min(64, configs.power(channels)) if channels_last else 1
    block_p = min(2048 // block_c, max(16, configs.power(positions)))
    while block_p > 32 and positions * channels < block_p * block_c * 2 * gpu.processors(
        capability
    ):
        block_p //= 2
    return StreamConfig(block_p, block_c, 1, 8)


def sums(positions: int, channels: int) -> tuple[int, int, int]:
    """(block_p, block_c, positions per program) of the sums per channel."""
    block_c = min(64, max(8, configs.power(channels)))
    return 1024 // block_c, block_c, 64 * (1024 // block_c)
