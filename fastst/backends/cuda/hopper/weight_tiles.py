"""Tiles of Hopper's weight gradients (``csrc/cuda/hopper/weight_gradient.cu``): pure functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ....machine.gpu import round_up, shared_memory_limit
from .instances import WEIGHT_GRADIENT as TILES
from .tiles import _L2_BYTES, _TILE_CLOCKS

GROUPS = 3  # warpgroups that multiply
_FIRST = 5 * 1024  # bytes of barriers and tables
_POSITIONS = 256  # of a tile: what the tables have
_SPAN = 32  # columns that are copied at once, and a row of the swizzle
# Products that end within a span are laid out as the PTX ISA says, but no published kernel has any:
# they are taken where they are expected to gain this much.
_CUT_GAIN = 1.02
_STAGE_CLOCKS = 200  # that waiting for a tile and giving it back cost
_SHARED_BYTES = 128  # that shared memory moves per clock
_MEMORY_BYTES = 16  # of device memory per clock and multiprocessor, all of them busy


@dataclass(frozen=True)
class WeightTile:
    """Tile and launch parameters of a weight gradient on Hopper."""

    columns: int  # mid channels of a block
    units: int  # of 64 × columns sums, each of one tap, that a warpgroup has
    blocks: int  # of 64 channels of the other tensor
    box: tuple[int, int, int]  # positions: (columns, rows, frames) or (pixels, frames, clips)
    stages: int
    splits: int  # parts of the positions
    clocks: float = field(default=0, compare=False)  # that it is expected to take


@dataclass(frozen=True)
class Reach:
    """How taps lead from positions of mid to those of the other tensor.

    Axes as in a box. Of axis 1, positions of each of ``residues`` residues have boxes of their own.
    """

    scale: tuple[int, int] = (1, 1)  # steps of the other tensor for one of mid
    halo: tuple[int, int] = (0, 0)  # how much further than the first the last tap leads
    residues: int = 1

    def box(self, box: tuple[int, int, int]) -> tuple[int, int, int]:
        """Of the other tensor."""
        w, h = ((b - 1) * s + 1 + r for b, s, r in zip(box, self.scale, self.halo, strict=False))
        return w, h, box[2]


@functools.cache
def weight_gradient(
    size: tuple[int, int, int],
    reach: Reach,
    taps: int,
    rows: int,
    columns: int,
    sources: int,
    narrow: bool,
    processors: int,
    instances: Sequence[tuple[int, int]] = TILES,
) -> WeightTile | None:
    """Tile of a weight gradient; None where taps lie too far apart for the shared memory.

    Args:
        size: of mid, along the axes of a box.
        taps, rows, columns: of dW; rows are channels of the other tensor, columns mid channels.
        sources: tensors that mid is made of: 1 or 2; 0 if nothing is made.
        narrow: a row of a box of the other tensor has 8 channels and not 64.
        processors: multiprocessors, each of which runs one block.
        instances: of the kernel, among which it chooses.
    """
    best: tuple[float, int, WeightTile] | None = None
    for n, units in instances:
        spans = math.ceil(n / _SPAN) * max(1, sources)
        for blocks in range(1, GROUPS * units + 1):
            if 64 * (blocks - 1) >= rows or (reach.residues > 1 and blocks % units):
                continue
            tap_block = GROUPS * units // blocks
            outputs = math.ceil(columns / n) * math.ceil(rows / (64 * blocks))
            outputs *= math.ceil(taps / tap_block)
            for box in _boxes(size, reach):
                positions = round_up(math.prod(box), 32 if units == 1 else 16)
                a = blocks * round_up(math.prod(reach.box(box)) * (16 if narrow else 128), 1024)
                stage = round_up(a + spans * positions * 2 * _SPAN, 1024)
                stages = min((shared_memory_limit((9, 0)) - _FIRST) // stage, 16)
                # One is multiplied, one copied, and one made where mid is not stored.
                if stages < (3 if sources else 2):
                    continue
                tiles = reach.residues * math.prod(
                    math.ceil(s / b)
                    for s, b in zip(
                        (size[0], math.ceil(size[1] / reach.residues), size[2]), box, strict=True
                    )
                )
                # Of 16 positions: a product takes n / 2 clocks, and reads B and its rows of A.
                # What makes B reads its sources and writes it.
                # Of the taps, one residue of the positions meets one in ``residues``.
                steps = positions // 16 * GROUPS * units / reach.residues
                products, read = steps * n / 2, steps * (64 + n) * 32
                made = (sources + 1 if sources else 0) * positions * n * 2
                clocks = _STAGE_CLOCKS + max(
                    products, (read + made + stage) / _SHARED_BYTES, stage / _L2_BYTES
                )
                for waves in range(1, 5):
                    splits = min(tiles, max(1, waves * processors // outputs))
                    passes = math.ceil(outputs * splits / processors)
                    cost = passes * (math.ceil(tiles / splits) * clocks + _TILE_CLOCKS)
                    # Partial sums are written and, but for one, read again.
                    partials = (4 if splits == 1 else 8) * splits
                    cost += partials * taps * rows * columns / (_MEMORY_BYTES * processors)
                    order = cost * (_CUT_GAIN if n % _SPAN else 1), splits
                    if best is None or order < best[:2]:
                        tile = WeightTile(n, units, blocks, box, stages, splits, cost)
                        best = *order, tile
    return None if best is None else best[2]


def _boxes(size: tuple[int, int, int], reach: Reach) -> list[tuple[int, int, int]]:
    """Boxes that cut each axis into equal parts, of at most as many positions as a tile has.

    The copy engine's boxes span at most 256 elements of each axis.
    """
    width, height, depth = size[0], math.ceil(size[1] / reach.residues), size[2]
    found = []
    for w in _parts(width):
        for h in _parts(height):
            if max(reach.box((w, h, 1))) > 256 or w * h > _POSITIONS:
                continue
            most = min(depth, _POSITIONS // (w * h))
            found += [(w, h, d) for d in {1, 2, 4, 8, 16, most} if d <= most]
    return found


def _parts(size: int) -> list[int]:
    """Sizes of parts that are at most ``_POSITIONS``, whole sixteens among them."""
    most = min(size, _POSITIONS)
    equal = {math.ceil(size / n) for n in range(1, size + 1)}
    return sorted(p for p in equal | {16, 32, 64, 128} if p <= most)
