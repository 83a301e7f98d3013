"""Tiles of the Hopper kernels (``csrc/cuda/hopper/*.cu``): pure functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ....machine.gpu import round_up, shared_memory_limit
from . import instances

# Multiprocessors read about 32 bytes per clock each out of L2 when all of them do; that, not device
# memory, is what feeds a tile, because every tap reads x again. A lead, to be measured.
_L2_BYTES = 32
# What the blocks of a cluster copy to each other leaves L2 once. Each still takes in all of it, for
# which a multiprocessor has a port of 64 bytes per clock: a lead as well.
_PORT_BYTES = 64
CLUSTERS = (1, 2)
# Blocks that wait for each other are taken where most of a stage is weights, of which L2 then hands
# out half; elsewhere only where they are expected to gain this much.
_CLUSTER_GAIN = 1.05
# Clocks that a tile costs besides its products and what is issued for it: filling the pipeline.
_TILE_CLOCKS = 1000
# Clocks for an instruction of a warp that has its scheduler to itself, as a warpgroup has while it
# writes and the other multiplies: what depends on an instruction waits for four.
_ALONE = 2
# Clocks in which a warp norms, activates and packs 16 channels: 70 instructions, and waits.
_PROLOGUE_CLOCKS = 140
GROUPS = 2  # warpgroups of a block that multiply
_TEMPORAL_ROWS = 128
_TEMPORAL_TAPS = 3
_LEAST_FRAMES = 6  # in shared memory: what a tile of 4 reads, or all that one of 2 does and more
_SPATIAL_FIRST = 2048  # bytes of barriers and the table of places
_BARRIERS = 1024  # bytes that keep what follows aligned to the swizzle's period
_SWIZZLE_ROW = 128  # bytes: 64 channels of 16 bits


STEM_GROUPS = 2  # warpgroups of a block of the stem, each with 8 × 8 places of its own
_STEM_SIDE = 8
# A piece of time computes u of two frames more than it has: not below this many.
_STEM_LEAST_FRAMES = 4


@dataclass(frozen=True)
class HopperTile:
    """Tile and launch parameters of a Hopper pass."""

    columns: int  # output channels of a tile
    groups: int  # warpgroups that share a tile; where it is 1, each of two has its own, by turns
    blocks: int  # of 64 × columns sums of each
    box: tuple[int, int, int]  # spatial: frames, rows, columns; temporal: clips, frames, pixels
    share: int  # vertical taps that one box of x serves
    stages: int  # boxes of x in shared memory
    grid: int  # blocks, which walk over the tiles
    cluster: int = 1  # blocks, 1 or 2, that copy the weights to each other
    clocks: float = field(default=0, compare=False)  # that all tiles are expected to take

    def whole(self, channels: int) -> int:
        """Columns of all tiles."""
        return round_up(channels, self.columns)


def issue_slots(columns: int, groups: int, blocks: int, counts: bool) -> float:
    """Of a scheduler, besides products, for a tile: fitted to the machine code (``make static``).

    Args:
        groups: warpgroups that share the tile.

    A warp of each warpgroup has columns / 2 values of each block, of which each takes 3.75
    instructions: scale and shift, activation, packing, exchanging, storing. Statistics take 3.5 a
    value, and 5 to halve the columns among the lanes.
    """
    values = columns // 2
    own = 280 + 50 * blocks + values * (0.5 + 3.75 * blocks)
    return groups * (own + counts * values * (5 + 3.5 * blocks))


def _clocks(products: float, own: float, common: float, cluster: int) -> float:
    """Of a tile's products, or of copying what is of its own and what is common to a cluster."""
    copies = max((own + common / cluster) / _L2_BYTES, (own + common) / _PORT_BYTES)
    return max(products, copies)


def _in_turns(tiles: int, clocks: float, products: float, slots: float) -> float:
    """Of a block's tiles, which two warpgroups have by turns, one writing as the other multiplies.

    Args:
        clocks: of a tile's products or copies, whichever take longer.
    """
    own = _TILE_CLOCKS + _ALONE * slots
    return tiles * max(clocks, (products + own) / GROUPS) + own


def clocks_in_cluster(clocks: float, own: float, common: float, cluster: int) -> float:
    """What blocks that wait for each other are compared by."""
    return clocks * _CLUSTER_GAIN if cluster > 1 and common <= own else clocks


@functools.cache  # thousands of candidates: milliseconds
def spatial(
    frames: int,
    size: tuple[int, int],
    channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: int,
    processors: int,
    counts: bool = False,
) -> HopperTile:
    """Tile of the spatial pass.

    Args:
        frames: of all clips.
        size: (H', W') of what is written.
        channels, out_channels: of what is read and of what is written.
        kernel, stride: (height, width).
        dilation: vertical.
        processors: multiprocessors, each of which runs one block.
        counts: whether it takes statistics.
    """
    taps, chunks = math.prod(kernel), math.ceil(channels / 64)
    share_all = stride == (1, 1) and dilation == 1
    # Fewer tiles where they cost the same, and of equally many those that read the least.
    best: tuple[tuple[float, int, int], HopperTile] | None = None
    for columns, groups, blocks in instances.SPATIAL:
        rows = 64 * groups * blocks
        column_tiles = math.ceil(out_channels / columns)
        for box in _boxes(rows, (frames, *size), stride):
            # A vertical tap is a shift by whole rows of the box, which keeps the 1,024-byte period
            # of the swizzle only where a row is a multiple of 8 positions.
            whole = math.prod(box) == rows and box[1] * box[2] % 64 == 0 and box[2] % 8 == 0
            shared = whole and share_all and box[1] + kernel[0] - 1 <= 256
            for share in {1, kernel[0] if shared else 1}:
                box_rows = box[0] * (box[1] + share - 1) * box[2]
                own = round_up(max(rows, box_rows) * _SWIZZLE_ROW, 1024)
                common = share * columns * _SWIZZLE_ROW
                stage = own + common
                stages = min((shared_memory_limit((9, 0)) - _SPATIAL_FIRST) // stage, 16)
                if stages < 2:
                    continue  # the copies of one are hidden behind the products of the other
                # A wgmma of 64 rows and 16 channels takes half a clock per column.
                products = taps * chunks * 4 * (rows // 64) * columns / 2
                steps = taps * chunks // share
                halo = [(b - 1) * s + k for b, s, k in zip(box[1:], stride, kernel, strict=True)]
                for cluster in CLUSTERS:
                    # Its blocks have neighbouring boxes of frames: the same taps meet them.
                    tiles = column_tiles * math.ceil(frames / (box[0] * cluster))
                    tiles *= math.prod(math.ceil(n / b) for n, b in zip(size, box[1:], strict=True))
                    walks = min(tiles, processors // cluster)
                    if not walks:
                        continue
                    slots = issue_slots(columns, groups, blocks, counts)
                    clocks = _clocks(products, steps * own, steps * common, cluster)
                    each = math.ceil(tiles / walks)
                    if groups < GROUPS:
                        clocks = _in_turns(each, clocks, products, slots)
                    else:
                        clocks = each * (clocks + _TILE_CLOCKS + slots)
                    cost = clocks_in_cluster(clocks, own, common, cluster)
                    order = cost, tiles, box[0] * math.prod(halo)
                    if best is None or order < best[0]:
                        shape = columns, groups, blocks, box, share, stages
                        best = order, HopperTile(*shape, walks * cluster, cluster, clocks)
    assert best is not None
    return best[1]


def _boxes(
    rows: int, size: tuple[int, int, int], stride: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """(frames, rows, columns) of tiles of at most ``rows`` positions, the fullest for each width.

    Several frames fill a tile where a plane does not: 28², 14² and 7² are no multiples of 128.
    """
    frames, height, width = size
    found = []
    # A box of the copy engine spans at most 256 elements of each dimension of x.
    for w in range(1, min(round_up(width, 8), rows, 256 // stride[1]) + 1):
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


@functools.cache  # thousands of candidates: milliseconds
def temporal(
    clips: int,
    pixels: int,
    out_frames: int,
    channels: int,
    out_channels: int,
    stride: int,
    processors: int,
    *,
    gradient: bool = False,
    prologue: bool = False,
) -> HopperTile:
    """Tile of the temporal pass, or of its input gradient.

    Args:
        clips, pixels, out_frames: of what is written; pixels are H·W.
        channels, out_channels: of what is read and of what is written.
        stride: temporal, of the forward pass.
        processors: multiprocessors.
        gradient: the input gradient.
        prologue: whether norm and activation are done as u is read.
    """
    chunks, steps = math.ceil(channels / 64), math.ceil(channels / 16)
    # Fewer tiles where they cost the same, and of equally many the longest runs of pixels.
    best: tuple[tuple[float, int, int], HopperTile] | None = None
    built = instances.TEMPORAL_GRADIENT if gradient else instances.TEMPORAL
    for columns, frames, step in built:
        if step != stride:
            continue
        weights = _TEMPORAL_TAPS * columns * _SWIZZLE_ROW  # of one chunk of 64 channels
        stage = _TEMPORAL_ROWS * _SWIZZLE_ROW
        left = shared_memory_limit((9, 0)) - _BARRIERS
        # The weights of all chunks stay for all tiles where frames keep enough stages beside them.
        stay = (left - chunks * weights) // stage >= _LEAST_FRAMES
        stages = min((left - (chunks if stay else 2) * weights) // stage, 16)
        read, products = (frames - 1) * stride + _TEMPORAL_TAPS, _TEMPORAL_TAPS * frames
        if gradient:  # every stride-th tap of a frame meets one
            read = (frames + _TEMPORAL_TAPS - 2) // stride + 1
            products //= stride
        products *= steps * columns  # half a clock per column for each of two warpgroups
        # Of its own products a warpgroup hides half behind what it normalises meanwhile.
        made = prologue * read * steps * _PROLOGUE_CLOCKS
        busy = max(products, made + products / GROUPS / 2)
        bytes_in = read * _TEMPORAL_ROWS * round_up(channels, 8) * 2
        common = 0 if stay else chunks * weights
        # The derivative costs about what statistics do.
        slots = issue_slots(columns, GROUPS, frames, gradient)
        for p in range(1, min(pixels, _TEMPORAL_ROWS) + 1):
            n = min(clips, _TEMPORAL_ROWS // p)
            boxes = math.ceil(out_frames / frames) * math.ceil(pixels / p) * math.ceil(clips / n)
            for cluster in CLUSTERS:
                tiles = math.ceil(out_channels / columns) * math.ceil(boxes / cluster)
                walks = min(tiles, processors // cluster)
                if not walks:
                    continue
                clocks = _clocks(busy, bytes_in, common, cluster) + _TILE_CLOCKS + slots
                clocks *= math.ceil(tiles / walks)
                order = clocks_in_cluster(clocks, bytes_in, common, cluster), tiles, n
                if best is None or order < best[0]:
                    shape = columns, GROUPS, frames, (n, frames, p), 1, stages
                    best = order, HopperTile(*shape, walks * cluster, cluster, clocks)
    assert best is not None
    return best[1]


def stem(clips: int, size: Sequence[int], processors: int) -> tuple[int, int]:
    """(grid, frames that a warpgroup makes at a time) of the stem.

    Args:
        clips, size: N and (T, H, W) of what is written.
        processors: multiprocessors.
    """
    frames, height, width = size
    units = clips * math.ceil(height / _STEM_SIDE) * math.ceil(width / _STEM_SIDE)
    # Time is cut where clips and places alone leave warpgroups without work.
    pieces = min(
        math.ceil(2 * STEM_GROUPS * processors / units), max(1, frames // _STEM_LEAST_FRAMES)
    )
    piece = math.ceil(frames / pieces)
    units *= math.ceil(frames / piece)
    return min(math.ceil(units / STEM_GROUPS), processors), piece


def trials() -> list[tuple[HopperTile, HopperTile, int]]:
    """Tiles of a spatial and of a temporal pass, and the temporal stride: every instance comes up.

    Boxes are for small problems. Each instance runs alone and in a cluster, a spatial one with a
    box for each tap and with one for all three taps of a column.
    """
    found = []
    spatial, temporal = instances.SPATIAL, instances.TEMPORAL
    for i in range(2 * max(len(spatial), len(temporal))):
        again, at = divmod(i, len(spatial))
        n, groups, blocks = spatial[at]
        share, box = (3, (groups * blocks, 8, 8)) if (at + again) % 2 else (1, (1, 5, 7))
        cluster = CLUSTERS[(at // 2 + again) % 2]
        # Turns come again where one block, or one cluster, has all tiles.
        grid = 2 if groups == GROUPS else cluster
        spatial_one = HopperTile(n, groups, blocks, box, share, 2, grid, cluster)
        columns, frames, stride = temporal[i % len(temporal)]
        box = 1, frames, 30
        temporal_one = HopperTile(columns, GROUPS, frames, box, 1, 2, 2, CLUSTERS[i % 2])
        found.append((spatial_one, temporal_one, stride))
    return found
