"""Tiles of the spatial input gradient on Hopper (``csrc/cuda/hopper/spatial_gradient.cu``)."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

from ....machine.gpu import round_up, shared_memory_limit
from . import instances
from .tiles import (
    _L2_BYTES,
    _PORT_BYTES,
    _TILE_CLOCKS,
    CLUSTERS,
    HopperTile,
    clocks_in_cluster,
    issue_slots,
)

_GROUPS = 2  # warpgroups that multiply
_CELLS = 64 * _GROUPS  # of a tile
_FIRST = 5 * 1024  # bytes of barriers and the table of places
_MOST_ROWS = 1024  # of a box: what the table has
_MOST_REACH, _MOST_TAPS = 64, 49  # rows that the outputs of a cell read; columns of the kernel
_CHUNK = 32  # channels of a box: smaller ones leave room for more stages
_ROW = 2 * _CHUNK  # bytes
_SHARED_BYTES = 128  # that shared memory moves per clock
# Clocks in which three warps make 96 pieces of 16 bytes of du: 80 instructions, and loads.
_FORM_CLOCKS, _FORMERS = 130, 96
_LATENCY = 800  # clocks from asking for a box until it is there


@dataclass(frozen=True)
class GradientTile:
    """Tile and launch parameters of the spatial input gradient."""

    columns: int  # channels of dx
    blocks: int  # outputs of a cell
    box: tuple[int, int, int]  # cells: frames, rows, columns
    stages: int  # boxes of du in shared memory
    grid: int  # blocks, which walk over the tiles
    cluster: int = 1  # blocks, 1 or 2, that copy the weights to each other
    clocks: float = field(default=0, compare=False)  # that all tiles are expected to take


@dataclass(frozen=True)
class Axis:
    """One axis of the plane of the forward pass."""

    size: int  # of dx
    out: int  # of du
    kernel: int
    stride: int
    dilation: int
    before: int  # padding

    def reach(self, span: int) -> list[int]:
        """Where the taps of a cell of ``span`` outputs lead, from its first place in du on."""
        before = (self.kernel - 1) * self.dilation - self.before
        steps = (o + k * self.dilation - before for k in range(self.kernel) for o in range(span))
        return [s // self.stride for s in steps if s % self.stride == 0]

    def boxes(self, span: int, cells: int) -> tuple[int, int, float]:
        """Tiles, places of a box, and how many of these exist on the average."""
        reached, step = self.reach(span), span // self.stride
        least, halo = min(reached), (cells - 1) * step + max(reached) - min(reached) + 1
        starts = [t * cells * step + least for t in range(math.ceil(self.size / (cells * span)))]
        there = sum(max(0, min(s + halo, self.out) - max(s, 0)) for s in starts)
        return len(starts), halo, there / len(starts)


@functools.cache  # thousands of candidates: milliseconds
def spatial_gradient(
    frames: int, h: Axis, w: Axis, channels: int, out_channels: int, sources: int, processors: int
) -> GradientTile | None:
    """Tile of the input gradient of a spatial pass; None where no box with its halo fits.

    Args:
        frames: of all clips.
        h, w: of the plane.
        channels, out_channels: of du and of dx.
        sources: tensors that du is made of: 1 or 2.
        processors: multiprocessors, each of which runs one block.
    """
    # Fewer tiles where they cost the same, and of equally many those that read the least.
    best: tuple[tuple[float, int, int], GradientTile] | None = None
    chunks, steps = math.ceil(channels / _CHUNK), math.ceil(channels / 16)
    for columns, blocks in instances.SPATIAL_GRADIENT:
        span = blocks // w.stride, w.stride
        if w.kernel > _MOST_TAPS or blocks % (h.stride * w.stride):
            continue
        reached = h.reach(span[0])
        reach, products = len(set(reached)), w.kernel * len(reached)
        column, taps = h.kernel * columns * _ROW, h.kernel * w.kernel
        for box in _boxes(frames, math.ceil(h.size / span[0]), math.ceil(w.size / span[1])):
            (tiles_h, halo_h, there_h) = h.boxes(span[0], box[1])
            (tiles_w, halo_w, there_w) = w.boxes(span[1], box[2])
            rows = box[0] * halo_h * halo_w
            if rows > _MOST_ROWS or max(halo_h, halo_w) > 256 or reach > _MOST_REACH:
                continue
            stage = sources * round_up(rows * _ROW, 1024)
            left = shared_memory_limit((9, 0)) - _FIRST
            # The weights of a column of the kernel, and one to come.
            stages = next((n for n in (4, 3, 2) if left - n * stage >= 2 * column), 0)
            if not stages:
                continue
            # Two warpgroups multiply 64 cells each: half a clock per column for 16 channels.
            multiplied = products * steps * columns
            places = box[0] * there_h * there_w
            own, common = sources * places * channels * 2, chunks * taps * columns * _ROW
            # Of the last chunk only the channels that products read are made, and read as A.
            whole, half = divmod(steps, 2)
            formed = whole * math.ceil(rows * 4 / _FORMERS) + half * math.ceil(rows * 2 / _FORMERS)
            made = formed * _FORM_CLOCKS if sources > 1 else 0
            # Boxes come in; du is made of both and written; A is read once for each row of du that
            # a column of the kernel reads, and B for each product.
            moved = chunks * _ROW * (rows * sources + taps * columns)
            moved += steps * 32 * (rows * (3 if sources > 1 else 0) + w.kernel * reach * _CELLS)
            moved += products * steps * columns * 64
            for cluster in CLUSTERS:  # of blocks with neighbouring boxes of frames
                copied = max((own + common / cluster) / _L2_BYTES, (own + common) / _PORT_BYTES)
                clocks = max(multiplied, copied, made, moved / _SHARED_BYTES)
                if stages == 2:  # a box is copied and made while one other is multiplied
                    clocks = max(clocks, copied + made + _LATENCY * chunks)
                clocks += _TILE_CLOCKS + issue_slots(columns, _GROUPS, blocks, False)
                tiles = math.ceil(out_channels / columns) * tiles_h * tiles_w
                tiles *= math.ceil(frames / (box[0] * cluster))
                walks = min(tiles, processors // cluster)
                if not walks:
                    continue
                clocks *= math.ceil(tiles / walks)
                order = clocks_in_cluster(clocks, own, common, cluster), tiles, rows
                if best is None or order < best[0]:
                    grid = walks * cluster
                    best = order, GradientTile(columns, blocks, box, stages, grid, cluster, clocks)
    return None if best is None else best[1]


def _boxes(frames: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    """(frames, rows, columns) of boxes of at most as many cells as a tile has."""
    return [
        (min(frames, _CELLS // (w * h)), h, w)
        for w in range(1, min(columns, _CELLS) + 1)
        for h in range(1, min(rows, _CELLS // w) + 1)
    ]


def trials() -> list[tuple[GradientTile, HopperTile, tuple[int, int]]]:
    """Tiles of both input gradients, and the temporal and spatial stride: every instance comes up.

    Boxes are for small problems.
    """
    found = []
    for i, (columns, frames, stride) in enumerate(instances.TEMPORAL_GRADIENT):
        n, blocks = instances.SPATIAL_GRADIENT[i % len(instances.SPATIAL_GRADIENT)]
        spatial = GradientTile(n, blocks, (2, 2, 5), 2 + i % 2, 2, CLUSTERS[i // 2 % 2])
        temporal = HopperTile(columns, 2, frames, (1, frames, 30), 1, 2, 2, CLUSTERS[i % 2])
        found.append((spatial, temporal, (stride, 2 if blocks == 4 else 1)))
    return found
