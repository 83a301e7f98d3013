"""Backward of the pair on Hopper's matrix units: of what is as large as u, only g is written.

    dv = act'(v)·(Wtᵀ∗dy), g = s·dv          with Σdv and Σdv·(u − mean) from the same kernel
    du = g + p·u + q                         formed in shared memory by the kernels that read it
    dx = Wsᵀ∗du

so dz, v, z, dv and du never exist in memory; u, where it was not kept, comes again from the forward
kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....machine.gpu import round_up
from ....problem.spec import PairSpec, PairTensors, Problem
from ...contract import Part
from ..depthwise import channels_last
from ..library import call, finish
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
    problem: Problem,
    tensors: PairTensors,
    box: list[Tensor],
    u: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    needs: Sequence[bool],
    part: Part | None = None,
    tiles: tuple[GradientTile, HopperTile] | None = None,
) -> list[Tensor]:
    """Gradients; tiles: of the spatial and the temporal kernel, in place of the chosen ones."""
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    need = PairTensors(*needs)  # type: ignore[arg-type]
    m = problem.mid_channels
    counted = need.spatial_bias or need.norm_weight or need.norm_bias
    below = counted or need.x or need.spatial_weight
    straight = spec.norm == "none" and spec.activation == "none"  # nothing below depends on u
    dx = dws = dwt = dbs = dbt = dgamma = dbeta = coefficients = mid = sums = None
    with call(problem) as k:
        launches = Launches(k)
        if u is not None:
            mid = u.permute(0, 4, 1, 2, 3)
        elif need.temporal_weight or not straight:
            mid = _recomputed(launches, tensors)
        if spec.norm == "frozen":
            mean, var = tensors.mean, tensors.var
        if mean is not None and var is not None:
            coefficients = k.norm_coefficients(tensors, mean, var)
        dy = evenly_placed(box[0])
        if need.temporal_bias and not need.temporal_weight:
            dbt = k.sums(k.plain(dy), dy.shape)[0]
        if need.temporal_weight:
            assert mid is not None
            scale, shift = (None, None) if coefficients is None else affine_of(coefficients)
            affine = None if straight else launches.coefficients(scale, shift, round_up(m, 64))
            z = Mid(mid[:, :m], affine, spec.activation)
            dwt, dbt = weights.temporal(k, z, dy, tensors.temporal_weight, bool(need.temporal_bias))
        if below:
            g = tensors.x.new_empty(problem.mid_shape).permute(0, 4, 1, 2, 3)
            sums = launches.temporal_gradient(
                dy, tensors.temporal_weight, g,
                tiles[1] if tiles else temporal_gradient_tile(problem),
                None if straight else mid, coefficients, bool(counted) or spec.norm == "batch",
            )  # fmt: skip
            box.clear()
            del dy
            means = None if part is None else part.means
            du = Gradient(g)
            if sums is not None:
                dbs = dbeta = sums[0]
                if coefficients is not None:
                    assert var is not None
                    dgamma = k.norm_gradient_coefficients(sums, var, coefficients, means)
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
            if need.spatial_weight:
                dws = weights.spatial(k, tensors.x, du, tensors.spatial_weight)
            if need.x:
                tile = tiles[0] if tiles else spatial_gradient_tile(problem)
                assert tile is not None  # as why_not says
                dx = torch.empty_like(tensors.x) if part is None or part.dx is None else part.dx
                _input_gradient(launches, tensors, dx, du, tile)
    return finish((dx, dws, dwt, dbs, dbt, dgamma, dbeta), tensors, needs, part)


def _recomputed(launches: Launches, tensors: PairTensors) -> Tensor:
    """u (N, M', T, H, W), as the forward pass would have kept it."""
    problem = launches.problem
    u = tensors.x.new_empty(problem.mid_shape).permute(0, 4, 1, 2, 3)
    bias = tensors.spatial_bias
    if stem_why_not(problem) is None:
        launches.stem(tensors, u, None, shift=bias)
    else:
        x = rows_of(tensors.x)  # as it lies, like the forward pass
        launches.spatial(x, tensors.spatial_weight, u, spatial_tile(problem), shift=bias)
    return u


def _input_gradient(
    launches: Launches, tensors: PairTensors, dx: Tensor, du: Gradient, tile: GradientTile
) -> None:
    n, c, *size = dx.shape
    rows = dx
    if c % ROW or evenly_framed(channels_last(dx)) is not dx:
        rows = dx.new_empty(n, *size, round_up(c, ROW)).permute(0, 4, 1, 2, 3)
    launches.spatial_gradient(du, tensors.spatial_weight, rows_of(rows), tile)
    if rows is not dx:
        dx.copy_(rows[:, :c])
