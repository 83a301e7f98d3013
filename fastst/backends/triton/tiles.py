"""Tile configurations: pure functions from the sizes of a problem and an architecture.

Here those of the forward kernels and what all share; ``gradient_tiles`` has the others.

Nothing here needs a GPU. A tile is ``block_p`` positions × (``block_n`` + ``rest_n``) output
channels × ``block_k`` of the reduction; Triton's shapes are powers of two, and the second column
block lets 144 channels run as 128 + 16 instead of 256.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

from ...machine import gpu
from ...machine.gpu import Capability, round_up

# Below this there are no bfloat16 tensor cores and no asynchronous copies to shared memory.
LEAST_CAPABILITY: Capability = (8, 0)
# Column tiles as (block_n, rest_n). Above 192 columns × 128 rows of float32 the accumulators alone
# take more than 96 of the 255 registers of a thread, and operands spill.
COLUMNS = (
    (16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 32),
    (128, 0), (128, 16), (128, 32), (128, 64),
)  # fmt: skip
LEAST_K = 16  # of tl.dot
THIN = 4  # channels of a group up to which products run on ordinary cores


@dataclass(frozen=True)
class Sizes:
    """What the tiles of a convolution, or of one of its gradients, depend on."""

    positions: int  # N·T'·H'·W' of what is written
    channels: int  # of a group, of what is read
    out_channels: int  # of a group, of what is written
    groups: int
    taps: int  # kernel positions
    dtype: torch.dtype  # of x and of the weights
    tensor_cores: bool  # whether products run on them: float32 only where TF32 is allowed
    capability: Capability
    processors: int = 132  # multiprocessors of the GPU

    @property
    def flat(self) -> bool:
        """Whether (tap, channel) is one index: channels alone are too few for a product."""
        return self.channels < LEAST_K and self.taps > 1


@dataclass(frozen=True)
class MatrixConfig:
    """What kernels that multiply matrices share: columns of a tile and launch parameters."""

    block_p: int
    block_n: int
    rest_n: int
    flat: bool  # (tap, channel) is one index
    num_warps: int
    num_stages: int

    @property
    def columns(self) -> int:
        return self.block_n + self.rest_n


@dataclass(frozen=True)
class TapConfig(MatrixConfig):
    """Tiles and launch parameters of ``tap_conv``, ``parallel_conv`` and input gradients."""

    block_k: int


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
class StreamConfig:
    """Tiles of the element-wise kernels: positions × channels, no products of matrices."""

    block_p: int
    block_c: int
    unroll: int  # taps of the innermost loop whose loads are in flight together
    num_warps: int


Config = MatrixConfig | PairConfig | StreamConfig


def launch_options(config: Config) -> dict[str, int]:
    """What Triton itself takes of a configuration."""
    options = {"num_warps": config.num_warps}
    if not isinstance(config, StreamConfig):
        options["num_stages"] = config.num_stages
    return options


def through_registers(capability: Capability) -> bool:
    """Whether matrix products take their operands from registers (mma.sync), not shared memory.

    GeForce parts of Blackwell (12.x) do, other than its data-centre parts (10.x).
    """
    return capability[0] not in (9, 10, 11)


def shared_memory(config: TapConfig, itemsize: int, capability: Capability) -> int:
    """Bytes that the pipelined operand tiles take.

    Through registers the tile of a step is gone before that of the last stage is asked for.
    """
    buffers = config.num_stages - through_registers(capability)
    return buffers * config.block_k * (config.block_p + config.columns) * itemsize


def stages(config: TapConfig, itemsize: int, capability: Capability) -> int:
    """As many as let two blocks share a multiprocessor; three for one where that leaves fewer."""
    if capability[0] == 0:
        return 2  # AMD's compiler keeps what is in flight in registers
    limit = gpu.shared_memory_limit(capability)
    for part, most, least in ((limit // 2, 4, 3), (limit, 3, 2)):
        for n in range(most, least - 1, -1):
            staged = replace(config, num_stages=n)
            if shared_memory(staged, itemsize, capability) <= part:
                return n
    return 2


def tap_conv(sizes: Sizes) -> TapConfig:
    """Configuration of one pass."""
    return candidates(sizes)[0]


def parallel_conv(sizes: Sizes, mixed: bool = False) -> TapConfig:
    """Configuration of both branches in one launch; ``taps`` of both.

    Two sums, or the addresses of two convolutions, are alive at once: 4 warps run out of registers.

    Args:
        sizes: of the parts of the channels, as of groups.
        mixed: whether one of the branches runs on ordinary cores.
    """
    return two_branches(tap_conv(sizes), mixed)


def two_branches(config: TapConfig, mixed: bool) -> TapConfig:
    if not mixed:
        return replace(config, num_warps=8)
    # What ordinary cores read has an address for each element: 64 × 64 are 16 of each thread.
    return replace(
        config, block_p=min(config.block_p, 64), block_n=min(config.block_n, 64), rest_n=0,
        num_warps=8,
    )  # fmt: skip


@functools.lru_cache(4096)
def candidates(sizes: Sizes, limit: int = 12) -> tuple[TapConfig, ...]:
    """Configurations worth measuring, best guess first; at most ``limit``."""
    itemsize, tensor_cores, capability = sizes.dtype.itemsize, sizes.tensor_cores, sizes.capability
    flat, out_channels = sizes.flat, sizes.out_channels
    reduction = sizes.channels * sizes.taps if flat else sizes.channels
    # Without tensor cores every product is an FMA on registers: small tiles, or operands spill.
    widest, most_k, rows = (192, 64, (128, 64)) if tensor_cores else (64, 16, (64, 32))
    if itemsize == 4 and tensor_cores:
        widest, most_k = 128, 32  # operands are twice as wide
    if itemsize == 8:
        widest, most_k, rows = 32, 16, (32, 32)
    # Padded columns cost products; each column tile reads x again, here counted as 32 columns.
    columns = sorted(
        (c for c in COLUMNS if sum(c) <= max(widest, 16)),
        key=lambda c: (round_up(out_channels, sum(c)) * (1 + 32 / sum(c)), -sum(c)),
    )
    # Padded reduction costs products; each step costs a barrier and addresses, here counted as 8 of
    # it for 64 columns: what a step multiplies by fewer is over sooner.
    step = 8 * max(1, 64 // columns[0][0])
    depths = sorted(
        (k for k in (16, 32, 64) if k <= most_k),
        key=lambda k: (round_up(reduction, k) * (1 + step / k), k),
    )
    if through_registers(capability) and itemsize == 2:
        depths = [min(d, 32) for d in depths[:1]] + depths  # more stages, thinner
    found: list[TapConfig] = []
    for block_n, rest_n in columns[:2]:
        programs = sizes.groups * math.ceil(out_channels / (block_n + rest_n))
        tall = math.ceil(sizes.positions / rows[0]) * programs >= sizes.processors
        for block_p in rows if tall else rows[::-1]:
            for block_k in depths[:2]:
                # 128 × 96 accumulators over 4 warps are 96 registers of each thread, beside
                # operands that take as many again: 8 warps from there, sooner for wide types.
                tile = block_p * (block_n + rest_n)
                many = tile * itemsize >= 128 * 96 * 2 or (tile >= 64 * 64 and not tensor_cores)
                if capability[0] in (10, 11) and block_p == 128 and not flat:
                    many = True  # 4 warps at 128 rows of tensor memory were held to 128 registers
                warps = 8 if many else 4
                config = TapConfig(block_p, block_n, rest_n, flat, warps, 4, block_k)
                most = stages(config, itemsize, capability)
                for n in (most, max(2, most - 1)):
                    candidate = replace(config, num_stages=n)
                    if candidate not in found:
                        found.append(candidate)
    return tuple(found[:limit])


def pair_fits(out_channels: int, sums: int, dtype: torch.dtype, tensor_cores: bool) -> bool:
    """Whether the sums of ``pair_conv`` stay in registers.

    Args:
        out_channels: of one group; all of them are in one tile.
        sums: taps of the second pass along the axis, each with a sum of its own.
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
    return sums * max(16, power(out_channels)) <= most


@functools.lru_cache(4096)
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
    flat = channels < LEAST_K and taps > 1
    wide = dtype.itemsize > 2
    # Before Hopper the products take all operands from registers: smaller tiles of them. So do the
    # addresses of (tap, channel) as one index, one for each element of a tile.
    hopper = not through_registers(capability)
    widest = (64 if hopper else 32) if tensor_cores and not (wide and flat) else 16
    # Padded mid channels cost products; each chunk reads x again, here counted as 8 of them.
    _, block_m, rest_m = min(
        (width + 8 * (-(-(width - rest) // block) + (rest > 0)), block, rest)
        for block in (16, 32, 64)
        for rest in ((0, 16, 32) if widest == 64 else (0,))  # a second chunk spilled before Hopper
        if block <= widest and rest < block and rest < mid_channels
        for width in [round_up(mid_channels - rest, block) + rest]
    )
    block_n = max(16, power(out_channels))
    reduction = channels * taps if flat else channels
    thin = reduction <= 16 or (flat and (wide or not hopper)) or not tensor_cores
    # 64 rows × 64 columns × 3 sums are 48 registers of each of 256 threads, beside 16 of the mid
    # chunk; with 128 threads the sums alone took 96, and their operands spilled.
    block_p, warps = (64 if tensor_cores else 32), 8
    if not tensor_cores and block_n <= 32:
        # 256 threads were held to 128 registers each, 128 of 16 rows on 9.x to 96, and spilled.
        warps = 4
    elif tensor_cores and max(block_m, rest_m, block_n) == 16 and not flat:
        warps = 4  # of 16 × 16 weights 256 threads have one each, and read it by itself
    # Addresses in flight for a third stage spilled: of TF32 by (tap, channel), and beside
    # few columns, where the compiler gives a thread 64 or 128 registers.
    few = (wide and flat) or block_n <= (16 if tensor_cores else 32)
    deep = 2 if few and (capability[0] != 9 or not tensor_cores) else 3
    return PairConfig(block_p, block_m, rest_m, block_n, 16 if thin else 32, flat, warps, deep)


# Instructions that a scheduler issues in a kernel's loop for each cycle that the tensor cores need,
# as compiled for 9.0 (``make static``): a loop takes so many times what its products take.


def tap_slots(out_channels: int) -> float:
    """Of ``tap_conv``, by the channels of one group that it writes."""
    return 1.8 if out_channels > 16 else 6.5


def pair_slots(config: PairConfig) -> float:
    """Of ``pair_conv``: its mid channels go from one product to the other through registers."""
    if config.block_m == 16:
        return 13.0
    return 5.4 if config.flat else 3.1


def pieces(programs: int, outputs: int, taps: int, capability: Capability) -> int:
    """Programs that share the axis of a single-kernel pair along ``outputs`` positions.

    Enough for two programs on each multiprocessor; but each computes ``taps − 1`` mid positions of
    its neighbour, too, which must not be more than half of its own.
    """
    wanted = -(-2 * gpu.processors(capability) // max(1, programs))
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


def is_thin(channels: int, groups: int) -> bool:
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
        sums: in registers of each thread: taps of the second pass along the axis of a pair.
    """
    # 8 elements of 16 bits are one load of 16 bytes; 64 channels are whole 128-byte lines.
    block_c = min(64, power(out_channels)) if channels_last else 1
    # 1,024 outputs are 8 of each of 128 threads: with 16, the sums of 3 frames beside the loads in
    # flight filled all 255 registers; with 8, those of 5 frames spilled on 8.0.
    tile = 1024 if sums < 5 else 512
    block_p = min(tile // block_c, max(16, power(positions)))
    while block_p > 16 and positions * out_channels < block_p * block_c * 2 * gpu.processors(
        capability
    ):
        block_p //= 2
    return StreamConfig(block_p, block_c, min(taps, 9), 4)


def direct_fits(sums: int) -> bool:
    """Whether the sums of ``direct_pair`` stay in registers: 11 of 4 each are 44."""
    return sums <= 11


def power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(0, n - 1).bit_length()


def affine(channels: int) -> tuple[int, int]:
    """(rows, channels) of a tile of ``affine``: two loads of 16 bytes for each of 128 threads."""
    columns = min(64, power(channels))
    return 2048 // columns, columns


def norm(channels: int, whole: bool = False) -> tuple[int, int]:
    """(positions, channels) of a tile of a norm's kernels; ``whole``: it has all channels."""
    columns = power(channels) if whole else min(64, power(channels))
    return max(1, 2048 // columns), columns


def parts_of_set(length: int, block_p: int, programs: int, processors: int) -> tuple[int, int]:
    """In how many parts statistics of a set of positions are taken, and positions of a part.

    Args:
        length: positions of the set.
        block_p: positions of a step.
        programs: of all sets, if each had one part.
        processors: multiprocessors of the GPU.
    """
    # Four programs for each multiprocessor, of at least 8 steps; few enough for one to combine.
    parts = max(1, min(4 * processors // max(1, programs), length // (8 * block_p), 1024))
    per_part = round_up(max(1, -(-length // parts)), block_p)
    return max(1, -(-length // per_part)), per_part


def combine(channels: int) -> tuple[int, int, int]:
    """(partials per step, channels per program, partials per split) of the statistics kernels.

    One step loads 64 × 16 values with 4 warps, 8 of each thread; 1,024 partials a program keep the
    fixed order short (a float32 pass of 2^31 positions is 2^24 partials).
    """
    return 64, 16 if channels > 16 else 8, 1024
