"""Weight gradients on Hopper: one kernel for both passes, over positions of the mid tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ....machine.gpu import round_up
from ....problem.spec import PairProblem, Pass
from ..depthwise import channels_last
from ..library import Launcher
from .launches import ROW, Gradient, Mid, _processors, rows_of, space_frames_evenly
from .packing import Table
from .weight_tiles import TILES, Reach, WeightTile, weight_gradient

TAPS = 49  # most, of a kernel
NARROW = 8  # channels of x, and taps of a row of its kernel, that make the 64 rows of a product

Instances = Sequence[tuple[int, int]]  # of the kernel, among which a tile is chosen


def why_not(problem: PairProblem) -> str | None:
    """Why a problem that the forward kernels take has no weight gradients here."""
    spatial = problem.passes[0]
    if math.prod(spatial.kernel) > TAPS:
        return f"have gradients of at most {TAPS} spatial taps, not {math.prod(spatial.kernel)}"
    if spatial_tile(problem, 2) is None:
        return (
            f"have no shared memory for taps as far apart as a dilation of {spatial.dilation[1:]}"
        )
    return None


def is_narrow(p: Pass) -> bool:
    return p.in_channels <= NARROW and p.kernel[2] <= NARROW


def spatial_tile(
    problem: PairProblem, sources: int, instances: Instances = TILES
) -> WeightTile | None:
    """Tile of dWs, with du made of so many tensors (0: stored)."""
    p = problem.passes[0]
    _, kh, kw = p.kernel
    narrow = is_narrow(p)
    reach = Reach(
        (p.stride[2], p.stride[1]),
        (((NARROW if narrow else kw) - 1) * p.dilation[2], (kh - 1) * p.dilation[1]),
    )
    frames, height, width = problem.mid_size
    return weight_gradient(
        (width, height, problem.batch * frames), reach, kh if narrow else kh * kw,
        64 if narrow else p.in_channels, round_up(p.out_channels, ROW), sources, narrow,
        _processors(problem.device), instances,
    )  # fmt: skip


def temporal_tile(
    problem: PairProblem, sources: int, instances: Instances = TILES
) -> WeightTile | None:
    """Tile of dWt, with z made of one tensor, or stored."""
    p = problem.passes[1]
    taps, stride = p.kernel[0], p.stride[0]
    # dy is read at (t + padding − tap) / stride: of each residue, by every stride-th tap.
    reach = Reach((1, 1), (0, -(-(taps - 1) * p.dilation[0] // stride)), stride)
    frames, height, width = problem.mid_size
    return weight_gradient(
        (height * width, frames, problem.batch), reach, taps, p.out_channels,
        round_up(p.in_channels, ROW), sources, False, _processors(problem.device), instances,
    )  # fmt: skip


def spatial(
    k: Launcher,
    problem: PairProblem,
    x: Tensor,
    du: Gradient,
    weight: Tensor,
    instances: Instances = TILES,
) -> Tensor:
    """dWs (M, C, 1, kh, kw) in the accumulation dtype, from x (N, C, T, H, W)."""
    p = problem.passes[0]
    m, c, _, kh, kw = weight.shape
    narrow = is_narrow(p)
    if narrow and c < NARROW:  # rows of 16 bytes
        x = F.pad(x.permute(0, 2, 3, 4, 1), (0, NARROW - c)).permute(0, 4, 1, 2, 3)
    x = space_frames_evenly(channels_last(x))
    tile = spatial_tile(problem, 0 if du.u is None else 2, instances)
    (sums,) = k.sum_rows(_partials(k, du.g, du.u, x, p, tile, du.table, "none", narrow))
    if narrow:
        taps = sums.view(kh, NARROW, NARROW, -1)[:, :kw, :c, :m]
    else:
        taps = sums.view(kh, kw, c, -1)[..., :m]
    return taps.permute(3, 2, 0, 1).unsqueeze(2)


def temporal(
    k: Launcher,
    problem: PairProblem,
    z: Mid,
    dy: Tensor,
    weight: Tensor,
    biased: bool,
    instances: Instances = TILES,
) -> tuple[Tensor, Tensor | None]:
    """dWt (K, M, kt, 1, 1) and, where asked for, Σdy (K,), in the accumulation dtype.

    dy (N, K, T', H, W) is channels-last.
    """
    m, p = weight.shape[1], problem.passes[1]
    tile = temporal_tile(problem, 0 if z.table is None else 1, instances)
    assert tile is not None
    parts, tap = [], _common_tap(p)
    if biased and tap is not None:
        parts = [k.empty(tile.splits, dy.shape[1])]
    partials = _partials(
        k, z.u, None, dy, p, tile, z.table, z.activation, sums=next(iter(parts), None), tap=tap or 0
    )
    dwt, *rest = k.sum_rows(partials, *parts)
    dbt = rest[0] if rest else k.sums(k.plain(dy), dy.shape)[0] if biased else None
    return dwt[..., :m].permute(1, 2, 0)[..., None, None], dbt


def _common_tap(p: Pass) -> int | None:
    """A tap through which every frame of the output reads a frame that exists, if there is one."""
    before, after = p.padding[:2]
    taps, apart = p.kernel[0], p.dilation[0]
    found = (t for t in range(taps) if before <= t * apart <= (taps - 1) * apart - after)
    return next(found, None)


def _partials(
    k: Launcher,
    mid: Tensor,
    u: Tensor | None,
    other: Tensor,
    p: Pass,
    tile: WeightTile | None,
    table: Table | None,  # (3, M and more): scale, shift, second
    activation: str,
    narrow: bool = False,
    sums: Tensor | None = None,  # (splits, rows), to be filled with Σ other
    tap: int = 0,
) -> Tensor:
    """(splits, taps, rows, stored mid channels)"""
    assert tile is not None  # as why_not says
    columns = round_up(mid.shape[1], ROW)
    rows = 64 if narrow else other.shape[1]
    taps = math.prod(p.kernel[:2]) * (1 if narrow else p.kernel[2])
    partials = k.empty(tile.splits, taps, rows, columns)
    array: Any = k.lib.Array()
    if table is not None:
        k.kept.append(table.values)
        array = table.array(k.lib)
    argument = k.lib.HopperWeightGradient(
        k.view(_whole_rows(mid)), None if u is None else k.view(_whole_rows(u)),
        k.view(rows_of(other)),
        k.conv(p), p.kind == "temporal", narrow, array, k.act(activation), k.slope,
        k.array(partials), k.array(sums), tap,
        k.lib.HopperWeightTile(
            tile.columns, tile.units, tile.blocks, tile.box, tile.stages, tile.splits
        ),
    )  # fmt: skip
    k.lib.hopper_weight_gradient(k.dtype, argument, k.stream)
    return partials


def _whole_rows(t: Tensor) -> Tensor:
    """t with all the channels that its rows have: a multiple of 8, zeros behind the last."""
    n, m, *size = t.shape
    return rows_of(t.as_strided((n, round_up(m, ROW), *size), t.stride()))
