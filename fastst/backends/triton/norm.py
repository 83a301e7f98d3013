"""The norm of what ``conv3d`` reads: statistics of x, z, and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...problem import norms
from ...problem.conv3d import ConvProblem, ConvTensors
from . import arguments, launch, passes, tiles


def sets_of(problem: ConvProblem) -> norms.Sets:
    return norms.sets_of(problem.spec.norm_form, problem.in_shape)


def moments(problem: ConvProblem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of x for a norm whose statistics are of channels; as ``norms.moments``."""
    sets, channels = sets_of(problem), problem.in_channels
    block_p, block_c = tiles.norm(channels)
    blocks = -(-channels // block_c)
    parts, per_part = tiles.parts_of_set(
        sets.length, block_p, sets.number * blocks, launch.processors(launch.device())
    )
    partial = x.new_empty((sets.number, parts, 2, channels), dtype=problem.accumulate_dtype)
    align = arguments.alignment(x, channels)
    grid, shape = _tiles(problem, x, x, block_p, block_c)
    launch.run(
        launch.kernels().norm.channel_moments, (sets.number * parts * blocks,), None,
        x, arguments.strides(x, align), grid, channels, partial, sets.length, parts, per_part,
        ALIGN=align, **shape, ACCUMULATE=arguments.dot_type(x.dtype),
    )  # fmt: skip
    mean, var = passes.moments(partial, per_part, sets.length)
    return norms.of_sets(problem.spec.norm_form, mean, var, x.shape)


def write_z(
    problem: ConvProblem, t: ConvTensors, mean: Tensor | None, var: Tensor | None, z: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Write z; it may have more channels than x.

    Args:
        mean, var: the statistics of the norm; None where they are to be taken.

    Returns:
        Those that there are then.
    """
    spec, x, channels = problem.spec, t.x, problem.in_channels
    take = False
    if spec.norm != "none" and var is None:
        if norms.by_position(problem.spec.norm):
            take, size = True, (problem.batch, *problem.size)
            var = x.new_empty(size, dtype=problem.accumulate_dtype)
            mean = torch.empty_like(var) if norms.is_centred(spec.norm) else None
        else:
            mean, var = moments(problem, x)
    sets = sets_of(problem)
    block_p, block_c = tiles.norm(z.shape[1], whole=take)
    parts = -(-sets.length // block_p)
    align, z_align = arguments.alignment(x, channels), arguments.alignment(z, z.shape[1])
    grid, shape = _tiles(problem, x, z, block_p, block_c)
    launch.run(
        launch.kernels().norm.normalise, (sets.number * parts * -(-z.shape[1] // block_c),), None,
        x, arguments.strides(x, align), grid, channels, *_operands(problem, t, mean, var),
        z, arguments.strides(z, z_align), z.shape[1], sets.length, parts,
        TAKE=take, CENTRED=norms.is_centred(spec.norm), **_form(problem),
        ROUND=arguments.rounds(x.dtype), X_ALIGN=align, Z_ALIGN=z_align, **shape,
        **arguments.arithmetic(x.dtype, dot=False),
    )  # fmt: skip
    return mean, var


def gradients(
    problem: ConvProblem,
    t: ConvTensors,
    mean: Tensor | None,
    var: Tensor | None,
    dz: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, γ and β where needed, from that of z; as ``norms.gradient``."""
    spec, x, channels, sets = problem.spec, t.x, problem.in_channels, sets_of(problem)
    kernels, operands = launch.kernels().norm, _operands(problem, t, mean, var)
    align, z_align = arguments.alignment(x, channels), arguments.alignment(dz, channels)
    read = (x, arguments.strides(x, align)), (dz, arguments.strides(dz, z_align))
    aligned = {"X_ALIGN": align, "Z_ALIGN": z_align}
    sums = centre = slope = None
    own = spec.norm in ("batch", "group")
    if any(needs[1:]) or (needs[0] and own):
        block_p, block_c = tiles.norm(channels)
        blocks = -(-channels // block_c)
        parts, per_part = tiles.parts_of_set(
            sets.length, block_p, sets.number * blocks, launch.processors(launch.device())
        )
        partial = x.new_empty((sets.number, parts, 2, channels), dtype=problem.accumulate_dtype)
        grid, shape = _tiles(problem, x, dz, block_p, block_c)
        launch.run(
            kernels.norm_sums, (sets.number * parts * blocks,), None,
            *read[0], grid, channels, *operands, *read[1], partial, sets.length, parts, per_part,
            **_form(problem), **aligned, **shape, ACCUMULATE=arguments.dot_type(x.dtype),
        )  # fmt: skip
        sums = partial.sum(1)
        if needs[0] and own:
            groups, per_group = operands[4:6]
            weighted = sums if t.norm_weight is None else sums * t.norm_weight
            of_groups = weighted.view(-1, sets.frames, 2, groups, per_group).sum(-1)
            means = of_groups.permute(2, 0, 3, 1).div(sets.length * per_group).contiguous()
            centre, slope = means[0], means[1]
    dx = dbeta = dgamma = None
    if sums is not None:
        dbeta, dgamma = sums.sum(0)
    if needs[0]:
        dx = torch.empty_like(x)
        dx_align = arguments.alignment(dx, channels)
        block_p, block_c = tiles.norm(channels, whole=norms.by_position(problem.spec.norm))
        parts = -(-sets.length // block_p)
        grid, shape = _tiles(problem, x, dx, block_p, block_c)
        launch.run(
            kernels.normalise_gradient, (sets.number * parts * -(-channels // block_c),), None,
            *read[0], grid, channels, *operands, *read[1], centre, slope,
            dx, arguments.strides(dx, dx_align), sets.length, parts,
            CENTRED=norms.is_centred(spec.norm), **_form(problem), **aligned, DX_ALIGN=dx_align,
            **shape, **arguments.arithmetic(x.dtype, dot=False),
        )  # fmt: skip
    return dx, dgamma if needs[1] else None, dbeta if needs[2] else None


def _tiles(
    problem: ConvProblem, x: Tensor, y: Tensor, block_p: int, block_c: int
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The grid of positions of x, and tiles of what is read and written there."""
    run = math.gcd(arguments.run_length(x, y), block_p)
    wide = arguments.is_wide(problem.batch * math.prod(problem.size))
    shape = {"RUN": run, "WIDE": wide, "BLOCK_P": block_p, "BLOCK_C": block_c}
    return arguments.grid(problem.size, run), shape


def _operands(
    problem: ConvProblem, t: ConvTensors, mean: Tensor | None, var: Tensor | None
) -> tuple[Any, ...]:
    """Statistics, γ and β, and how statistics lie in memory."""
    channels = problem.in_channels
    groups = problem.spec.norm_groups if problem.spec.norm == "group" else channels
    return (
        mean, var, t.norm_weight, t.norm_bias, groups, channels // groups, sets_of(problem).frames
    )  # fmt: skip


def _form(problem: ConvProblem) -> dict[str, Any]:
    """What kernels are compiled for."""
    spec, l2 = problem.spec, problem.spec.norm == "l2"
    least = spec.eps / math.sqrt(problem.in_channels)
    return {
        "EPS": 0.0 if l2 else spec.eps, "LEAST": least if l2 else 0.0,
        "POSITION": norms.by_position(spec.norm), "ACTIVATION": spec.input_activation,
        "SLOPE": spec.slope,
    }  # fmt: skip
