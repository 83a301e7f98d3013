"""Backward of the pair on Hopper's matrix units: of what is as large as u, only g is written.

    dv = act'(v)·(Wtᵀ∗dy), g = s·dv          with Σdv and Σdv·(u − mean) from the same kernel
    du = g + p·u + r, r = q − p·mean         formed in shared memory by the kernels that read it
    dx = Wsᵀ∗du

so dz, v, z, dv and du never exist in memory; u, where it was not kept, comes again from the forward
kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ....machine.gpu import round_up
from ....problem.spec import PairTensors
from ...contract import Gradients, PairBackward
from ..depthwise import channels_last
from ..library import Launcher, launching
from . import weights
from .gradient_tiles import GradientTile
from .launches import (
    ROW,
    STEM,
    Gradient,
    Launches,
    Mid,
    rows_of,
    space_frames_evenly,
    space_pixels_evenly,
    spatial_gradient_tile,
    spatial_tile,
    stem_why_not,
    temporal_gradient_tile,
)
from .packing import AFFINE, Packing, Table, round_to_chunk
from .tiles import HopperTile

Tiles = tuple[GradientTile, HopperTile]


class _Packed(NamedTuple):
    """What the kernels of a call read; what a kernel that is not launched reads is None."""

    again: tuple[Tensor, Table] | None = None  # by which u is computed again
    z: Table | None = None  # (3, ⌈M/64⌉·64): scale, shift, 0
    second: tuple[Tensor, Table] | None = None
    first: Tensor | None = None


def backward(
    call: PairBackward, tiles: Tiles | None = None, instances: weights.Instances = weights.TILES
) -> Gradients:
    """Gradients.

    Args:
        tiles: of the spatial and the temporal kernel, in place of the chosen ones.
        instances: of the weight gradient's kernel, among which its tiles are chosen.
    """
    problem, tensors, need, spec = call.problem, call.tensors, call.need, call.problem.spec
    m = problem.mid_channels
    counted = bool(need.first_bias or need.norm_weight or need.norm_bias)
    below = counted or need.x or need.first_weight
    straight = spec.norm == "none" and spec.activation == "none"  # nothing below depends on u
    mean, var = call.statistics()
    dx = dws = dwt = dbt = mid = None
    dgamma = dbeta = dbs = None
    with launching(problem) as k:
        launches, norm = Launches(k, problem), k.norm(m, None, tensors, mean, var)
        chosen = tiles or (spatial_gradient_tile(problem), temporal_gradient_tile(problem))
        packed = _pack(k, call, norm, chosen, bool(below), straight)
        if call.u is not None:
            mid = call.u.permute(0, 4, 1, 2, 3)
        elif packed.again is not None:
            mid = _recompute_u(launches, tensors, *packed.again)
        dy = space_pixels_evenly(call.dy_owner[0])
        if need.second_bias and not need.second_weight:
            dbt = k.sums(k.plain(dy), dy.shape)[0]
        if need.second_weight:
            assert mid is not None
            z = Mid(mid[:, :m], packed.z, spec.activation)
            dwt, dbt = weights.temporal(
                k, problem, z, dy, tensors.second_weight, bool(need.second_bias), instances
            )
        if below:
            assert packed.second is not None
            g = tensors.x.new_empty(problem.mid_shape).permute(0, 4, 1, 2, 3)
            partials = launches.temporal_gradient(
                dy, *packed.second, g, chosen[1], None if straight else mid,
                counted or spec.norm == "batch",
            )  # fmt: skip
            call.dy_owner.clear()
            del dy
            du = Gradient(g)
            if partials is not None:
                du, (dgamma, dbeta, dbs) = _norm_backward(k, call, norm, partials, g, mid)
            if need.first_weight:
                dws = weights.spatial(k, problem, tensors.x, du, tensors.first_weight, instances)
            if need.x:
                assert chosen[0] is not None and packed.first is not None  # as why_not says
                dx = call.empty_dx()
                _input_gradient(launches, packed.first, dx, du, chosen[0])
    return dx, dws, dwt, dbs, dbt, dgamma, dbeta


def _pack(
    k: Launcher,
    call: PairBackward,
    norm: Any,
    tiles: tuple[GradientTile | None, HopperTile],
    below: bool,
    straight: bool,
) -> _Packed:
    """Weights and tables of all kernels that will be launched."""
    problem, tensors, need = call.problem, call.tensors, call.need
    packing, packed, m = Packing(k), _Packed(), problem.mid_channels
    if call.u is None and (need.second_weight or not straight):
        bias = k.norm(m, tensors.first_bias)
        if stem_why_not(problem) is None:
            weight = packing.weight(tensors.first_weight, STEM[1], "stem")
            again = weight, packing.table(bias, STEM[1], AFFINE)
        else:
            tile = spatial_tile(problem)
            weight = packing.weight(tensors.first_weight, tile.columns)
            again = weight, packing.table(bias, tile.whole(problem.mid_shape[-1]), AFFINE)
        packed = packed._replace(again=again)
    if need.second_weight and not straight:
        packed = packed._replace(
            z=packing.table(norm, round_to_chunk(m), ("scale", "shift", "zero"))
        )
    if below:
        weight = packing.weight(tensors.second_weight, tiles[1].columns, "mirrored")
        columns = tiles[1].whole(problem.mid_shape[-1])
        rows = "mean", "scale", "beta", "scale"
        packed = packed._replace(second=(weight, packing.table(norm, columns, rows)))
    if need.x:
        assert tiles[0] is not None  # as why_not says
        first = packing.weight(tensors.first_weight, tiles[0].columns, "mirrored")
        packed = packed._replace(first=first)
    packing.launch()
    return packed


def _norm_backward(
    k: Launcher, call: PairBackward, norm: Any, partials: Tensor, g: Tensor, mid: Tensor | None
) -> tuple[Gradient, Sequence[Tensor | None]]:
    """du, and the gradients of gamma, beta and the first bias, from sums of dv."""
    spec, m = call.problem.spec, call.problem.mid_channels
    normed = spec.norm != "none"
    found = [k.empty(m) if normed else None, k.empty(m) if normed else None, k.empty(m)]
    du, tables, coefficients = Gradient(g), [], None
    if spec.norm == "batch":
        values = k.empty(3, round_to_chunk(m))
        du = Gradient(g, mid, Table(values))
        tables = [k.table(norm, values, ("one", "r", "p"))]
        if spec.group:
            coefficients = k.empty(5, m)  # of g, which has the scale
            tables.append(k.table(norm, coefficients, ("mean", "one", "beta", "p", "q")))
    k.norm_gradients(norm, partials, found, tables, call.means)
    if coefficients is not None and mid is not None:
        # The mean of this rank's values does not take their sum away, only that of all ranks does.
        source = k.norm_gradient(g[:, :m], mid[:, :m], coefficients)
        found[2] = k.sums(source, g[:, :m].shape)[0]
    return du, found


def _recompute_u(launches: Launches, tensors: PairTensors, packed: Tensor, affine: Table) -> Tensor:
    """u (N, M', T, H, W), as the forward pass would have kept it."""
    problem = launches.problem
    u = tensors.x.new_empty(problem.mid_shape).permute(0, 4, 1, 2, 3)
    if stem_why_not(problem) is None:
        launches.stem(tensors.x, packed, affine, u)
    else:
        x = rows_of(tensors.x)  # as it lies, like the forward pass
        launches.spatial(x, packed, affine, u, spatial_tile(problem))
    return u


def _input_gradient(
    launches: Launches, packed: Tensor, dx: Tensor, du: Gradient, tile: GradientTile
) -> None:
    n, c, *size = dx.shape
    rows = dx
    if c % ROW or space_frames_evenly(channels_last(dx)) is not dx:
        rows = dx.new_empty(n, *size, round_up(c, ROW)).permute(0, 4, 1, 2, 3)
    launches.spatial_gradient(du, packed, rows_of(rows), tile)
    if rows is not dx:
        dx.copy_(rows[:, :c])
