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
THIN = 4  # channels of a group up to which products run on ordinary cores


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
    rest_m: int  # and, once, so many more
    block_n: int  # all output channels of a group
    block_k: int
    flat: bool
    num_warps: int
    num_stages: int

    def mid_width(self, mid_channels: int) -> int:
        """Mid channels that are computed for so many of a group."""
        return round_up(max(0, mid_channels - self.rest_m), self.block_m) + self.rest_m


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
        key=lambda k: (round_up(reduction, k) * (1 + 8 / k), k),
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


def scattered(found: list[TapConfig]) -> list[TapConfig]:
    """Those for an x of which no two elements that a tile reads are neighbours.

    Each of them has an address of its own: with 128 × 64 of them, 112 to 248 bytes were spilled.
    """
    return list(dict.fromkeys(replace(c, block_k=min(c.block_k, 32)) for c in found))


def pair_fits(out_channels: int, sums: int, dtype: torch.dtype, tensor_cores: bool) -> bool:
    """Whether the sums of ``pair_conv`` stay in registers.

    Args:
        out_channels: of one group; all of them are in one tile.
        sums: taps of the second pass along the walk, each with a sum of its own.
        dtype: of x.
        tensor_cores: whether products run on them.
    """
    # 64 rows × 384 columns of float32 are 96 registers of each of 256 threads, beside 16 of the mid
    # chunk and the operand of the second product: up to 250 in all. TF32 operands are twice as wide
    # and, without tensor cores, all of both products is in registers: 192 columns, of float64 half
    # of that. With 5 sums of 64 columns what moves from sum to sum spilled on 8.0 and 10.0.
    most = (
        384 if tensor_cores and dtype.itemsize == 2 and sums <= 3 else 768 // max(4, dtype.itemsize)
    )
    return sums * max(16, _power(out_channels)) <= most


def pair_conv(
    channels: int,
    mid_channels: int,
    out_channels: int,
    taps: int,
    dtype: torch.dtype,
    tensor_cores: bool,
    capability: Capability,
) -> PairConfig:
    """Configuration of ``pair_conv``.

    Args:
        channels, mid_channels, out_channels: of one group.
        taps: of the first pass.
        dtype: of x.
        tensor_cores: whether products run on them.
        capability: of the GPU.
    """
    flat = channels < _LEAST_K and taps > 1
    wide = dtype.itemsize > 2
    # Before Hopper the products take all operands from registers: smaller tiles of them. So do the
    # addresses of (tap, channel) as one index, one for each element of a tile.
    hopper = capability[0] >= 9
    widest = (64 if hopper else 32) if tensor_cores and not (wide and flat) else 16
    # Padded mid channels cost products; each chunk reads x again, here counted as 8 of them.
    _, block_m, rest_m = min(
        (width + 8 * (-(-(width - rest) // block) + (rest > 0)), block, rest)
        for block in (16, 32, 64)
        for rest in ((0, 16, 32) if widest == 64 else (0,))  # a second chunk spilled before Hopper
        if block <= widest and rest < block and rest < mid_channels
        for width in [round_up(mid_channels - rest, block) + rest]
    )
    block_n = max(16, _power(out_channels))
    reduction = channels * taps if flat else channels
    thin = reduction <= 16 or (flat and (wide or not hopper)) or not tensor_cores
    # 64 rows × 64 columns × 3 sums are 48 registers of each of 256 threads, beside 16 of the mid
    # chunk; with 128 threads the sums alone took 96, and their operands spilled.
    block_p, warps = (64 if tensor_cores else 32), 8
    if not tensor_cores and block_n <= 32:
        block_p, warps = 16, 4  # 256 threads were held to 128 registers each, and spilled
    # Addresses in flight for a third stage spilled: of TF32 by (tap, channel), and beside
    # few columns, where the compiler gives a thread 64 or 128 registers.
    few = (wide and flat) or block_n <= (16 if tensor_cores else 32)
    stages = 2 if few and (capability[0] != 9 or not tensor_cores) else 3
    return PairConfig(block_p, block_m, rest_m, block_n, 16 if thin else 32, flat, warps, stages)


def pieces(programs: int, outputs: int, taps: int, capability: Capability) -> int:
    """Programs that share the walk of a single-kernel pair along ``outputs`` positions.

    Enough for two programs on each multiprocessor; but each computes ``taps − 1`` mid positions of
    its neighbour, too, which must not be more than half of its own.
    """
    wanted = -(-2 * processors(capability) // max(1, programs))
    return max(1, min(wanted, outputs // max(1, 2 * (taps - 1))))


def least_time(flops: float, moved: float, dtype: torch.dtype, tensor_cores: bool) -> float:
    """The roofline's time of a kernel, as the bytes that memory could have moved meanwhile.

    FLOPs per byte are those of an H200: 788 TFLOP/s in 16 bits, half of it in TF32, 67 without
    tensor cores, to 4.3 TB/s. An A100 and a B200 are within 1.6 of it.
    """
    rate = 16.0
    if tensor_cores and dtype.itemsize < 8:
        rate = 180.0 if dtype.itemsize == 2 else 90.0
    return max(flops / rate, moved)


def thin(channels: int, groups: int) -> bool:
    """Whether a grouped convolution runs on ordinary cores.

    Tensor cores multiply at least 16 channels with 16: below 4 of a group at most a quarter of
    what they read, and a sixteenth of what they do, would count.
    """
    return groups > 1 and channels <= THIN


def direct(
    positions: int,
    out_channels: int,
    taps: int,
    channels_last: bool,
    capability: Capability,
    sums: int = 1,
) -> StreamConfig:
    """Configuration of ``direct_conv`` and ``direct_pair``.

    Args:
        positions: of the output; those that a program does not walk over.
        out_channels: of all groups.
        taps: kernel positions of the pass that reads x.
        channels_last: whether the channels of x, not its columns, are neighbours in memory.
        capability: of the GPU.
        sums: in registers of each thread: taps of the second pass along the walk of a pair.
    """
    # 8 elements of 16 bits are one load of 16 bytes; 64 channels are whole 128-byte lines.
    block_c = min(64, _power(out_channels)) if channels_last else 1
    # 1,024 outputs are 8 of each of 128 threads: with 16, the sums of 3 frames beside the loads in
    # flight filled all 255 registers; with 8, those of 5 frames spilled on 8.0.
    tile = 1024 if sums < 5 else 512
    block_p = min(tile // block_c, max(16, _power(positions)))
    while block_p > 16 and positions * out_channels < block_p * block_c * 2 * processors(
        capability
    ):
        block_p //= 2
    return StreamConfig(block_p, block_c, min(taps, 9), 4)


def direct_fits(sums: int) -> bool:
    """Whether the sums of ``direct_pair`` stay in registers: 11 of 4 each are 44."""
    return sums <= 11


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
    block_c = min(64, _power(channels)) if channels_last else 1
    block_p = min(2048 // block_c, max(16, _power(positions)))
    while block_p > 32 and positions * channels < block_p * block_c * 2 * processors(capability):
        block_p //= 2
    return StreamConfig(block_p, block_c, 1, 8)


def _power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, n - 1).bit_length()


def pack(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile of ``pack``: 8 of 1,024 elements for a thread, as 16 spilled."""
    columns = min(64, _power(width))
    return 1024 // columns, columns


def combine(channels: int) -> tuple[int, int, int]:
    """(partials per step, channels per program, partials per split) of the statistics kernels.

    One step loads 64 × 16 values with 4 warps, 8 of each thread; 1,024 partials a program keep the
    fixed order short (a float32 pass of 2^31 positions is 2^24 partials).
    """
    return 64, 16 if channels > 16 else 8, 1024


def input_gradient(*sizes: Any, reads_two: bool, masks: bool, classes: int) -> list[TapConfig]:
    """Configurations of an input gradient worth measuring; sizes as for ``candidates``.

    Args:
        reads_two: whether it forms what it reads from two tensors.
        masks: whether it reads u to multiply by the gradient of an activation.
        classes: residue classes of positions.
    """
    found: list[TapConfig] = []
    # u beside sums of 192 columns spilled.
    tiles = [c for c in candidates(*sizes) if not masks or c.columns <= 160]
    for config in tiles:
        p, k, warps = config.block_p, config.block_k, config.num_warps
        # Two operands of 128 × 64 were 64 values of each of 128 threads, and spilled.
        if reads_two and p * k > 32 * 32 * warps:
            warps = 8
        # So did u beside 72 sums of a thread, and the addresses of a class beside more than 48.
        if masks and p * config.columns > (64 if classes == 1 else 48) * 32 * warps:
            p, warps = min(p, 64), 8
        # With 16 columns the compiler gives a thread 128 registers, which held 64 rows.
        if reads_two and config.columns == 16:
            p = min(p, 64)
        # What is loaded twice fills shared memory twice.
        stages = max(2, config.num_stages - 1) if reads_two else config.num_stages
        config = replace(config, block_p=p, num_warps=warps, num_stages=stages)
        if config not in found:
            found.append(config)
    return found


def parallel_input_gradient(*sizes: Any, classes: int) -> TapConfig:
    """Configuration of the input gradient of both branches; arguments as for ``input_gradient``.

    The addresses of two convolutions are alive at once, as in ``parallel_conv``; with those of a
    class, 128 rows took all 255 registers.
    """
    found = input_gradient(*sizes, reads_two=False, masks=False, classes=classes)[0]
    return replace(found, block_p=min(found.block_p, 128 if classes == 1 else 64), num_warps=8)


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
                # (tap, channel) as one index has an address for every element: 64 of them at most.
                if flat and (sum(block) if swap else height) > 64:
                    continue
                # 128 × 128 sums and both operands on their way through registers: no room for more.
                if sum(block) <= widest and height * sum(block) <= 128 * 128:
                    padded = round_up(rows, height) * round_up(columns, sum(block))
                    # Each block of rows reads all columns again, and the other way round.
                    reads = 1 + 32 / height + 32 / sum(block)
                    costs[swap, height, block] = padded * reads
    found: list[WeightConfig] = []
    for swap, height, (block_n, rest_n) in sorted(costs, key=lambda c: costs[c])[:4]:
        # An address for every element: 64 × 64 of them spilled in 4 warps, and so did an activation
        # of 128 rows of an operand.
        warps = 8 if height * (block_n + rest_n) >= 64 * 128 or flat or height == 128 else 4
        depths = (block_p, max(16, block_p // 2))
        # mma.sync takes its operands from registers, where 64 positions of both spilled.
        for depth in depths[::-1] if capability[0] == 8 and dtype.itemsize == 2 else depths:
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
