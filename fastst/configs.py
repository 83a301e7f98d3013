"""Tile configurations: pure functions from the sizes of a problem and an architecture.

Nothing here needs a GPU. A tile is ``block_p`` positions × (``block_n`` + ``rest_n``) output
channels × ``block_k`` of the reduction; Triton's shapes are powers of two, and the second column
block lets 144 channels run as 128 + 16 instead of 256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

Capability = tuple[int, int]

# Below this there are no bfloat16 tensor cores and no asynchronous copies to shared memory.
LEAST_CAPABILITY: Capability = (8, 0)
# Column tiles as (block_n, rest_n). Above 192 columns × 128 rows of float32 the accumulators alone
# take more than 96 of the 255 registers of a thread, and operands spill.
_COLUMNS = (
    (16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32),
    (128, 0), (128, 16), (128, 32), (128, 64),
)  # fmt: skip
_LEAST_K = 16  # of tl.dot


@dataclass(frozen=True)
class TapConfig:
    """Tiles and launch parameters of ``tap_conv`` and ``parallel_conv``."""

    block_p: int
    block_n: int
    rest_n: int
    block_k: int
    flat: bool  # the reduction runs over (tap, channel) as one index
    num_warps: int
    num_stages: int

    @property
    def columns(self) -> int:
        return self.block_n + self.rest_n


@dataclass(frozen=True)
class PairConfig:
    """Tiles and launch parameters of ``pair_conv``."""

    block_p: int
    block_m: int  # mid channels at a time
    block_n: int  # all output channels
    block_k: int
    flat: bool
    num_warps: int
    num_stages: int

    def pass_config(self, columns: int, block_k: int, flat: bool) -> TapConfig:
        """How the weights of one of its passes are packed."""
        return TapConfig(self.block_p, columns, 0, block_k, flat, self.num_warps, self.num_stages)


@dataclass(frozen=True)
class WeightConfig:
    """Tiles and launch parameters of ``weight_gradient``."""

    block_p: int  # positions at a time
    block_r: int
    block_n: int
    rest_n: int
    flat: bool  # (tap, channel) is one index
    swap: bool  # rows are output channels
    num_warps: int
    num_stages: int

    @property
    def columns(self) -> int:
        return self.block_n + self.rest_n


@dataclass(frozen=True)
class StreamConfig:
    """Tiles of the element-wise kernels: positions × channels, no products of matrices."""

    block_p: int
    block_c: int
    unroll: int  # taps of the innermost loop whose loads are in flight together
    num_warps: int


Config = TapConfig | PairConfig | WeightConfig | StreamConfig


def launch_options(config: Config) -> dict[str, int]:
    """What Triton itself takes of a configuration."""
    options = {"num_warps": config.num_warps}
    if not isinstance(config, StreamConfig):
        options["num_stages"] = config.num_stages
    return options


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def shared_memory_limit(capability: Capability) -> int:
    """Bytes of shared memory that one block may use (CUDA programming guide, table of limits)."""
    if capability in ((8, 6), (8, 9)) or capability[0] == 12:
        return 99 << 10
    if capability[0] == 8:
        return 163 << 10
    return 227 << 10


def processors(capability: Capability) -> int:
    """Multiprocessors to keep busy: about what the data-centre part of the architecture has."""
    return 108 if capability[0] == 8 else 132


def shared_memory(config: TapConfig, itemsize: int) -> int:
    """Bytes that the pipelined operand tiles take."""
    return config.num_stages * config.block_k * (config.block_p + config.columns) * itemsize


def tap_conv(
    positions: int,
    channels: int,
    out_channels: int,
    groups: int,
    taps: int,
    dtype: torch.dtype,
    tensor_cores: bool,
    capability: Capability,
) -> TapConfig:
    """Configuration of one pass, or of both branches of the parallel op.

    Args:
        positions: N·T'·H'·W' of the output.
        channels, out_channels: of one group.
        groups: of the convolution.
        taps: kernel positions.
        dtype: of x and of the weights.
        tensor_cores: whether products may run on tensor cores (float32 only where TF32 is allowed).
        capability: of the GPU.
    """
    return candidates(
        positions, channels, out_channels, groups, taps, dtype, tensor_cores, capability
    )[0]


def parallel_conv(*sizes: Any) -> TapConfig:
    """Configuration of both branches in one launch; arguments as for ``tap_conv``, groups 1.

    Two sums, or the addresses of two convolutions, are alive at once: 4 warps run out of registers.
    """
    return replace(tap_conv(*sizes), num_warps=8)


def candidates(
    positions: int,
    channels: int,
    out_channels: int,
    groups: int,
    taps: int,
    dtype: torch.dtype,
    tensor_cores: bool,
    capability: Capability,
    limit: int = 12,
) -> list[TapConfig]:
    """Configurations worth measuring, best guess first; at most ``limit``. Arguments as above."""
    itemsize = dtype.itemsize
    flat = channels < _LEAST_K and taps > 1
    reduction = channels * taps if flat else channels
    # Without tensor cores every product is an FMA on registers: small tiles, or operands spill.
    widest, most_k, rows = (192, 64, (128, 64)) if tensor_cores else (64, 16, (64, 32))
    if itemsize == 4 and tensor_cores:
        widest, most_k = 128, 32  # operands are twice as wide
    if itemsize == 8:
        widest, most_k, rows = 32, 16, (32, 32)
    # Padded columns cost products; each column tile reads x again, here counted as 32 columns.
    columns = sorted(
        (c for c in _COLUMNS if sum(c) <= max(widest, 16)),
        key=lambda c: (round_up(out_channels, sum(c)) * (1 + 32 / sum(c)), -sum(c)),
    )
    # Padded reduction costs products; each step costs a barrier, here counted as 8 of it.
    depths = sorted(
        (k for k in (16, 32, 64) if k <= most_k),
        key=lambda k: (round_up(reduction, k) * (1 + 8 / k), -k),
    )
    if capability[0] == 8 and itemsize == 2:
        depths = [min(d, 32) for d in depths[:1]] + depths  # mma.sync: more stages, thinner
    found: list[TapConfig] = []
    for block_n, rest_n in columns[:2]:
        programs = groups * math.ceil(out_channels / (block_n + rest_n))
        tall = math.ceil(positions / rows[0]) * programs >= processors(capability)
        for block_p in rows if tall else rows[::-1]:
            for block_k in depths[:2]:
                # 128 × 96 accumulators over 4 warps are 96 registers of each thread, beside
                # operands that take as many again: 8 warps from there, sooner for wide types.
                tile = block_p * (block_n + rest_n)
                many = tile * itemsize >= 128 * 96 * 2 or (tile >= 64 * 64 and not tensor_cores)
                if capability[0] >= 10 and block_p == 128 and not flat:
                    many = True  # 4 warps at 128 rows of tensor memory were held to 128 registers
                warps = 8 if many else 4
                config = TapConfig(block_p, block_n, rest_n, block_k, flat, warps, 4)
                while shared_memory(config, itemsize) > shared_memory_limit(capability) // 2:
                    # Half of it, so that two blocks fit on a multiprocessor.
                    if config.num_stages == 2:
                        break
                    config = replace(config, num_stages=config.num_stages - 1)
                for stages in (config.num_stages, max(2, config.num_stages - 1)):
                    candidate = replace(config, num_stages=stages)
                    if candidate not in found:
                        found.append(candidate)
    return found[:limit]


def pair_fits(mid_channels: int, out_channels: int, span: int) -> bool:
    """Whether ``pair_conv`` is worth it: thin layers, where moving u costs more than computing it.

    ``span`` output frames of all output channels are in registers at once.
    """
    return mid_channels <= 64 and out_channels <= 64 and span <= 3


def pair_conv(
    channels: int, mid_channels: int, out_channels: int, taps: int, capability: Capability
) -> PairConfig:
    """Configuration of ``pair_conv``; arguments of the spatial pass, and the output channels."""
    flat = channels < _LEAST_K and taps > 1
    # Before Hopper the products take all operands from registers: smaller tiles of them.
    hopper = capability[0] >= 9
    block_m = max(16, min(64 if hopper else 32, _power(mid_channels)))
    block_n = max(16, _power(out_channels))
    reduction = channels * taps if flat else channels
    block_k = 16 if reduction <= 16 or (flat and not hopper) else 32
    # 64 rows × 64 columns × 3 frames are 48 registers of each of 256 threads, beside 16 of the mid
    # chunk; with 128 threads the sums alone took 96, and their operands spilled.
    return PairConfig(64, block_m, block_n, block_k, flat, 8, 3)


def thin(channels: int, groups: int) -> bool:
    """Whether a grouped convolution runs on ordinary cores.

    Tensor cores multiply at least 16 channels with 16: below 4 of a group at most a quarter of
    what they read, and a sixteenth of what they do, would count.
    """
    return groups > 1 and channels <= 4


def direct(
    positions: int, out_channels: int, taps: int, channels_last: bool, capability: Capability
) -> StreamConfig:
    """Configuration of ``direct_conv`` and ``depthwise_pair``.

    Args:
        positions: of the output; those that a program does not walk over.
        out_channels: of all groups.
        taps: kernel positions of the pass that reads x.
        channels_last: whether the channels of x, not its columns, are neighbours in memory.
        capability: of the GPU.
    """
    # 8 elements of 16 bits are one load of 16 bytes; 64 channels are whole 128-byte lines.
    block_c = min(64, _power(out_channels)) if channels_last else 1
    # 1,024 outputs are 8 of each of 128 threads: with 16, the sums of 3 frames beside the loads in
    # flight filled all 255 registers.
    block_p = min(1024 // block_c, max(16, _power(positions)))
    while block_p > 16 and positions * out_channels < block_p * block_c * 2 * processors(
        capability
    ):
        block_p //= 2
    return StreamConfig(block_p, block_c, min(taps, 9), 4)


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, n - 1).bit_length()


def combine(channels: int) -> tuple[int, int, int]:
    """(partials per step, channels per program, partials per split) of the statistics kernels.

    One step loads 64 × 16 values with 4 warps, 8 of each thread; 1,024 partials a program keep the
    fixed order short (a float32 pass of 2^31 positions is 2^24 partials).
    """
    return 64, 16 if channels > 16 else 8, 1024


def input_gradient(*sizes: Any, fused: bool) -> list[TapConfig]:
    """Configurations of an input gradient worth measuring; arguments as for ``candidates``.

    Args:
        fused: whether it reads two tensors, or multiplies by the gradient of an activation.
    """
    found = candidates(*sizes)
    if not fused:
        return found
    # Twice the loads of the positions are in flight: fewer stages, and the threads to hold them.
    return [replace(c, num_stages=max(2, c.num_stages - 1)) for c in found]


def weight_gradient(
    positions: int,
    channels: int,
    out_channels: int,
    groups: int,
    taps: int,
    dtype: torch.dtype,
    tensor_cores: bool,
    capability: Capability,
    limit: int = 12,
) -> list[WeightConfig]:
    """Configurations of a weight gradient, best guess first; arguments as for ``candidates``."""
    flat = channels < _LEAST_K and taps > 1
    tapped = channels * taps if flat else channels
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
            for block in _COLUMNS:
                # 128 × 128 sums and both operands on their way through registers: no room for more.
                if sum(block) <= widest and height * sum(block) <= 128 * 128:
                    padded = round_up(rows, height) * round_up(columns, sum(block))
                    # Each block of rows reads all columns again, and the other way round.
                    reads = 1 + 32 / height + 32 / sum(block)
                    costs[swap, height, block] = padded * reads
    found: list[WeightConfig] = []
    for swap, height, (block_n, rest_n) in sorted(costs, key=lambda c: costs[c])[:4]:
        warps = 8 if height * (block_n + rest_n) >= 64 * 128 else 4
        for depth in (block_p, max(16, block_p // 2)):
            stages = 3
            tile = depth * (2 * height + 2 * (block_n + rest_n)) * dtype.itemsize
            while stages > 2 and stages * tile > shared_memory_limit(capability) // 2:
                stages -= 1
            config = WeightConfig(
                depth, height, block_n, rest_n, flat, swap, warps, stages
            )  # fmt: skip
            if config not in found:
                found.append(config)
    return found[:limit]


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


def positions_per_split(
    config: WeightConfig, positions: int, blocks: int, capability: Capability
) -> int:
    """Positions that one program of a weight gradient adds up: whole steps of it.

    Two programs for every multiprocessor, but no partial of fewer than 8 steps, which would cost
    more to write and to add than to compute.
    """
    splits = math.ceil(2 * processors(capability) / blocks)
    steps = math.ceil(positions / config.block_p)
    return max(8, math.ceil(steps / splits)) * config.block_p


def sums(positions: int, channels: int) -> tuple[int, int, int]:
    """(block_p, block_c, positions per program) of the sums per channel."""
    block_c = min(64, max(8, _power(channels)))
    return 1024 // block_c, block_c, 64 * (1024 // block_c)


# ---- Hopper (csrc/hopper_*.cu)

# Multiprocessors read about 32 bytes per clock each out of L2 when all of them do; that, not device
# memory, is what feeds a tile, because every tap reads x again. A lead, to be measured.
_L2_BYTES = 32
# Clocks that a tile costs besides its products: filling the pipeline, and writing 64 rows.
_TILE_CLOCKS, _ROW_CLOCKS = 1000, 8
# (columns, warpgroups, blocks of 64 rows each): the spatial kernel's instances. wgmma takes any
# multiple of 8 columns, so these fit 144, 288, 576 and 1,152 mid channels (144, 192), 230, 460 and
# 921 (232), and powers of two (64, 128) with at most 1% to spare. 2 × 144 × 64 sums are 144 of a
# thread's 232 registers; 1 × 232 are 116. 256 columns spilled.
SPATIAL_TILES = ((64, 2, 2), (96, 2, 2), (128, 2, 2), (144, 2, 2), (192, 2, 1), (232, 2, 1))
# (columns, output frames) of the temporal kernel's instances: 128 registers of sums, or 64. More
# frames read u fewer times: 6 for 4, 4 for 2, 3 for 1.
TEMPORAL_TILES = ((64, 4), (128, 2), (128, 1))
_TEMPORAL_ROWS = 128
_TEMPORAL_TAPS = 3
_BARRIERS = 1024  # bytes that keep what follows aligned to the swizzle's period
_SWIZZLE_ROW = 128  # bytes: 64 channels of 16 bits


@dataclass(frozen=True)
class HopperTile:
    """Tile and launch parameters of a Hopper pass."""

    columns: int  # output channels of a tile
    groups: int  # warpgroups that multiply
    blocks: int  # of 64 × columns sums of each
    box: tuple[int, int, int]  # spatial: frames, rows, columns; temporal: clips, frames, pixels
    share: int  # vertical taps that one box of x serves
    stages: int  # boxes of x in shared memory
    grid: int  # blocks, which walk over the tiles

    def column_tiles(self, channels: int) -> int:
        return math.ceil(channels / self.columns)


def hopper_spatial(
    frames: int,
    size: tuple[int, int],
    channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: int,
    processors: int,
) -> HopperTile:
    """Tile of the spatial pass.

    Args:
        frames: of all clips.
        size: (H', W') of the output.
        channels, out_channels: of x and of u.
        kernel, stride: (height, width).
        dilation: vertical.
        processors: multiprocessors, each of which runs one block.
    """
    taps, chunks = math.prod(kernel), math.ceil(channels / 64)
    best: tuple[float, int, HopperTile] | None = None  # fewer tiles where they cost the same
    for columns, groups, blocks in SPATIAL_TILES:
        rows = 64 * groups * blocks
        column_tiles = math.ceil(out_channels / columns)
        for box in _boxes(rows, (frames, *size), stride):
            # A vertical tap is a shift by whole rows of the box, which keeps the 1,024-byte period
            # of the swizzle only where a row is a multiple of 8 positions.
            whole = math.prod(box) == rows and box[1] * box[2] % 64 == 0 and box[2] % 8 == 0
            shared = whole and stride == (1, 1) and dilation == 1 and box[1] + kernel[0] - 1 <= 256
            for share in {1, kernel[0] if shared else 1}:
                box_rows = box[0] * (box[1] + share - 1) * box[2]
                stage = round_up(max(rows, box_rows) * _SWIZZLE_ROW, 1024)
                stage += share * columns * _SWIZZLE_ROW
                stages = min((shared_memory_limit((9, 0)) - _BARRIERS) // stage, 16)
                if stages < 2:
                    continue  # the copies of one are hidden behind the products of the other
                tiles = column_tiles * math.prod(
                    math.ceil(n / b) for n, b in zip((frames, *size), box, strict=True)
                )
                # A wgmma of 64 rows and 16 channels takes half a clock per column.
                products = taps * chunks * 4 * (rows // 64) * columns / 2
                copies = taps * chunks / share * stage / _L2_BYTES
                clocks = max(products, copies) + _TILE_CLOCKS + _ROW_CLOCKS * rows
                cost = math.ceil(tiles / processors) * clocks
                if best is None or (cost, tiles) < best[:2]:
                    grid = min(tiles, processors)
                    tile = HopperTile(columns, groups, blocks, box, share, stages, grid)
                    best = cost, tiles, tile
    assert best is not None
    return best[2]


def _boxes(
    rows: int, size: tuple[int, int, int], stride: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """(frames, rows, columns) of tiles of at most ``rows`` positions, the fullest for each width.

    Several frames fill a tile where a plane does not: 28², 14² and 7² are no multiples of 128.
    """
    frames, height, width = size
    found = []
    # A box of the copy engine spans at most 256 elements of each dimension of x.
    for w in range(1, min(width, rows, 256 // stride[1]) + 1):
        options = []
        for h in range(1, min(height, rows // w, 256 // stride[0]) + 1):
            f = min(frames, rows // (w * h), 256)
            tiles = math.ceil(frames / f) * math.ceil(height / h) * math.ceil(width / w)
            # Of equally many tiles the squarest: neighbouring taps then read the same lines.
            options.append((tiles, abs(w - h), (f, h, w)))
        found.append(min(options)[2])
        if w % 8 == 0:  # also those that one box can serve for several taps
            found += [
                (rows // (w * h), h, w)
                for h in range(1, min(height + 7, rows // w) + 1)
                if w * h % 64 == 0 and rows % (w * h) == 0
            ]
    return found


def hopper_temporal(
    clips: int,
    pixels: int,
    out_frames: int,
    channels: int,
    out_channels: int,
    stride: int,
    processors: int,
) -> HopperTile:
    """Tile of the temporal pass.

    Args:
        clips, pixels, out_frames: of the output; pixels are H·W.
        channels, out_channels: of u and of y.
        stride: temporal.
        processors: multiprocessors.
    """
    chunks = math.ceil(channels / 64)
    best: tuple[float, int, HopperTile] | None = None  # fewer tiles where they cost the same
    for columns, frames in TEMPORAL_TILES:
        if (columns, stride) == (64, 2):
            continue  # not built: layers of stride 2 have 128 output channels and more
        weights = 2 * _TEMPORAL_TAPS * columns * _SWIZZLE_ROW
        stage = _TEMPORAL_ROWS * _SWIZZLE_ROW
        stages = min((shared_memory_limit((9, 0)) - _BARRIERS - weights) // stage, 16)
        read = (frames - 1) * stride + _TEMPORAL_TAPS
        products = chunks * _TEMPORAL_TAPS * frames * 4 * 2 * columns / 2
        copies = chunks * (read * stage + weights // 2) / _L2_BYTES
        clocks = max(products, copies) + _TILE_CLOCKS + _ROW_CLOCKS * _TEMPORAL_ROWS * frames
        for p in range(1, min(pixels, _TEMPORAL_ROWS) + 1):
            n = min(clips, _TEMPORAL_ROWS // p)
            tiles = math.ceil(out_channels / columns) * math.ceil(out_frames / frames)
            tiles *= math.ceil(pixels / p) * math.ceil(clips / n)
            cost = math.ceil(tiles / processors) * clocks
            if best is None or (cost, tiles) < best[:2]:
                grid = min(tiles, processors)
                tile = HopperTile(columns, 2, frames, (n, frames, p), 1, stages, grid)
                best = cost, tiles, tile
    assert best is not None
    return best[2]
