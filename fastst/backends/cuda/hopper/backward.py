"""Backward of the pair on Hopper's matrix units: of what is as large as u, only g is written.

    dv = act'(v)·(Wtᵀ∗dy), g = s·dv          with Σdv and Σdv·(u − mean) from the same kernel
    du = g + p·u + r, r = q − p·mean         formed in shared memory by the kernels that read it
    dx = Wsᵀ∗du

so dz, v, z, dv and du never exist in memory; u, where it was not kept, comes again from the forward
kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....machine.gpu import round_up
from ....problem.spec import PairTensors
from ...contract import Gradients, PairBackward
from ..depthwise import channels_last
from ..library import launching
from . import weights
from .gradient_tiles import GradientTile
from .launches import (
    ROW,
    Gradient,
    Launches,
    Mid,
    affine_of,
    evenly_framed,
    evenly_placed,
    rows_of,
    spatial_gradient_tile,
    spatial_tile,
    stem_why_not,
    temporal_gradient_tile,
)
from .tiles import HopperTile


def backward(
    call: PairBackward,
    tiles: tuple[GradientTile, HopperTile] | None = None,
    instances: weights.Instances = weights.TILES,
) -> Gradients:
    """Gradients.

    Args:
        tiles: of the spatial and the temporal kernel, in place of the chosen ones.
        instances: of the weight gradient's kernel, among which its tiles are chosen.
    """
    problem, tensors, need, spec = call.problem, call.tensors, call.need, call.problem.spec
    m = problem.mid_channels
    counted = need.first_bias or need.norm_weight or need.norm_bias
    below = counted or need.x or need.first_weight
    straight = spec.norm == "none" and spec.activation == "none"  # nothing below depends on u
    dx = dws = dwt = dbs = dbt = dgamma = dbeta = coefficients = mid = sums = None
    with launching(problem) as k:
        launches = Launches(k, problem)
        if call.u is not None:
            mid = call.u.permute(0, 4, 1, 2, 3)
        elif need.second_weight or not straight:
            mid = _recomputed(launches, tensors)
        mean, var = call.statistics()
        if mean is not None and var is not None:
            coefficients = k.norm_coefficients(tensors, mean, var)
        dy = evenly_placed(call.dy_owner[0])
        if need.second_bias and not need.second_weight:
            dbt = k.sums(k.plain(dy), dy.shape)[0]
        if need.second_weight:
            assert mid is not None
            scale, shift = (None, None) if coefficients is None else affine_of(coefficients)
            affine = None if straight else launches.coefficients(scale, shift, round_up(m, 64))
            z = Mid(mid[:, :m], affine, spec.activation)
            dwt, dbt = weights.temporal(
                k, problem, z, dy, tensors.second_weight, bool(need.second_bias), instances
            )
        if below:
            g = tensors.x.new_empty(problem.mid_shape).permute(0, 4, 1, 2, 3)
            sums = launches.temporal_gradient(
                dy, tensors.second_weight, g,
                tiles[1] if tiles else temporal_gradient_tile(problem),
                None if straight else mid, coefficients, bool(counted) or spec.norm == "batch",
            )  # fmt: skip
            call.dy_owner.clear()
            del dy
            du = Gradient(g)
            if sums is not None:
                dbs = dbeta = sums[0]
                if coefficients is not None:
                    assert var is not None
                    dgamma = k.norm_gradient_coefficients(sums, var, coefficients, call.means)
                    dbs = dbeta * coefficients[1]
            if spec.norm == "batch":
                assert coefficients is not None and mid is not None
                mean, _, _, p, q = coefficients
                du = Gradient(g, mid, launches.coefficients(p, q - p * mean, round_up(m, 64)))
                # The mean takes its own sum away; that of a group only the sum of all its ranks.
                dbs = torch.zeros_like(q)
                if spec.group:
                    coefficients[1] = 1  # the scale is in g
                    source = k.norm_gradient(g[:, :m], mid[:, :m], coefficients)
                    dbs = k.sums(source, g[:, :m].shape)[0]
            if need.first_weight:
                dws = weights.spatial(k, problem, tensors.x, du, tensors.first_weight, instances)
            if need.x:
                tile = tiles[0] if tiles else spatial_gradient_tile(problem)
                assert tile is not None  # as why_not says
                dx = call.empty_dx()
                _input_gradient(launches, tensors, dx, du, tile)
    return dx, dws, dwt, dbs, dbt, dgamma, dbeta


def _recomputed(launches: Launches, tensors: PairTensors) -> Tensor:
    """u (N, M', T, H, W), as the forward pass would have kept it."""
    problem = launches.problem
    u = tensors.x.new_empty(problem.mid_shape).permute(0, 4, 1, 2, 3)
    bias = tensors.first_bias
    if stem_why_not(problem) is None:
        launches.stem(tensors, u, None, shift=bias)
    else:
        x = rows_of(tensors.x)  # as it lies, like the forward pass
        launches.spatial(x, tensors.first_weight, u, spatial_tile(problem), shift=bias)
    return u


def _input_gradient(
    launches: Launches, tensors: PairTensors, dx: Tensor, du: Gradient, tile: GradientTile
) -> None:
    n, c, *size = dx.shape
    rows = dx
    if c % ROW or evenly_framed(channels_last(dx)) is not dx:
        rows = dx.new_empty(n, *size, round_up(c, ROW)).permute(0, 4, 1, 2, 3)
    launches.spatial_gradient(du, tensors.first_weight, rows_of(rows), tile)
    if rows is not dx:
        dx.copy_(rows[:, :c])
