"""Backward of ``parallel_conv2plus1d``: one launch for dx, one for both weights, one for a bias.

Without activations the gradient of either branch is dy, or its channels. Otherwise it is a tensor
of its own, formed as what leaves the convolutions is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import activations, configs
from ...shapes import ParallelSpec, ParallelTensors, Problem
from . import arguments, launch, parallel
from .backward import pass_gradients
from .direct import finish_direct, pack_direct
from .gradients import (
    accumulate_dtype,
    channel_sums,
    finish_weight,
    residue_classes,
    transposed,
    weight_gradient,
)
from .passes import conv_pass


def parallel_conv2plus1d_backward(
    problem: Problem, tensors: ParallelTensors, dy: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    x, *weights, bs, bt = tensors
    need: Any = ParallelTensors(*needs)  # type: ignore[arg-type]
    wanted = need[1:3]
    above = _branch_gradients(problem, tensors, dy)
    dx = torch.empty_like(x) if need.x else None
    dw: list[Tensor | None] = [None, None]
    groups = [p.groups for p in problem.passes]
    if all(configs.thin(x.shape[1] // g, g) for g in groups):
        if need.x or any(wanted):
            dw = _direct_gradients(problem, x, above, weights, dx, wanted)
    elif groups[0] == groups[1]:
        if dx is not None:
            _input_gradient(problem, above, weights, dx)
        if all(wanted):
            dw = _weight_gradients(problem, x, above, weights)
        for i, p in enumerate(problem.passes):
            if wanted[i] and not all(wanted):
                dw[i] = weight_gradient(p, x, above[i], weights[i])
    else:  # one group of a branch reads channels of several of the other
        for i, p in enumerate(problem.passes):
            part = dx if dx is None or i == 0 else torch.empty_like(dx)
            if need.x or wanted[i]:
                _, dw[i] = pass_gradients(p, x, above[i], weights[i], part, wanted[i])
            if dx is not None and part is not None and part is not dx:
                dx += part
    dbs = dbt = None
    if need.spatial_bias:
        assert bs is not None
        dbs = channel_sums(above[0], bs)
    if need.temporal_bias:
        assert bt is not None
        again = dbs is not None and above[0] is above[1]
        dbt = dbs.clone() if again else channel_sums(above[1], bt)  # type: ignore[union-attr]
    return [g for g in (dx, *dw, dbs, dbt) if g is not None]


def _branch_gradients(
    problem: Problem, tensors: ParallelTensors, dy: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what leaves the two convolutions, from that of y."""
    spec: ParallelSpec = problem.spec  # type: ignore[assignment]
    inner, outer, slope = spec.branch_activation, spec.activation, spec.slope
    channels = [p.out_channels for p in problem.passes]
    parts = (dy, dy) if spec.combine == "add" else dy.split(channels, 1)
    if inner == outer == "none":
        return parts[0], parts[1]
    x, *weights, bs, bt = tensors
    a, b = (_rows(x, problem, n) for n in channels)
    if spec.combine == "add" and all(p.groups == 1 for p in problem.passes):
        return _fused_branch_gradients(problem, tensors, dy, a, None if inner == "none" else b)
    for p, w, bias, out in zip(problem.passes, weights, (bs, bt), (a, b), strict=True):
        conv_pass(p, x, w, out, shift=bias)
    if outer != "none":
        after = [activations.apply(inner, t, slope) for t in (a, b)]
        y = after[0] + after[1] if spec.combine == "add" else torch.cat(after, 1)
        dy = activations.grad(outer, dy, y, slope)
        parts = (dy, dy) if spec.combine == "add" else dy.split(channels, 1)
    da, db = (activations.grad(inner, g, t, slope) for g, t in zip(parts, (a, b), strict=True))
    return da, db


def _rows(x: Tensor, problem: Problem, channels: int) -> Tensor:
    """An uninitialised (N, channels, T', H', W') whose channels are neighbours."""
    return x.new_empty((problem.batch, *problem.out_size, channels)).permute(0, 4, 1, 2, 3)


def _fused_branch_gradients(
    problem: Problem, tensors: ParallelTensors, dy: Tensor, da: Tensor, db: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in one launch, with nothing else written; db is da where it is None."""
    spec: ParallelSpec = problem.spec  # type: ignore[assignment]
    grid, config, args, meta = parallel.branches(spec, *problem.passes, tensors, da)
    dy_align = arguments.alignment(dy, dy.shape[1])
    da_align = arguments.alignment(da, da.shape[1])
    launch.run(
        launch.kernels().parallel.branch_gradients, grid, config, *args,
        dy, arguments.strides(dy, dy_align), da, db, arguments.strides(da, da_align),
        tuple(da.shape[2:]), da.shape[1], da.shape[0] * math.prod(da.shape[2:]),
        DY_ALIGN=dy_align, Y_ALIGN=da_align, **meta,
    )  # fmt: skip
    return da, da if db is None else db


def _operands(above: Sequence[Tensor], groups: Sequence[int]) -> tuple[tuple[Any, ...], int]:
    """Pointers and strides of both branches, their size, and the ALIGN that holds for both."""
    align = math.gcd(
        *(arguments.alignment(t, t.shape[1] // g) for t, g in zip(above, groups, strict=True))
    )
    a, b = above
    size = tuple(a.shape[2:])
    return (a, arguments.strides(a, align), b, arguments.strides(b, align), size), align


def _input_gradient(
    problem: Problem, above: Sequence[Tensor], weights: Sequence[Tensor], dx: Tensor
) -> None:
    spatial, temporal = problem.passes
    groups = spatial.groups
    channels = [t.shape[1] // groups for t in above]
    in_channels = dx.shape[1] // groups
    classes = residue_classes(spatial, temporal)
    grid = tuple(-(-n // s) for n, s in zip(dx.shape[2:], classes, strict=True))
    count = dx.shape[0] * math.prod(grid)
    c = configs.parallel_input_gradient(
        count, max(channels), in_channels, groups, math.prod(spatial.kernel) + temporal.kernel[0],
        dx.dtype, arguments.uses_tensor_cores(dx.dtype), launch.capability(dx.device),
        classes=math.prod(classes),
    )  # fmt: skip
    packed = [
        arguments.pack(transposed(w, groups), groups, n, c)
        for w, n in zip(weights, channels, strict=True)
    ]
    width = packed[0].shape[-1]
    dy_args, dy_align = _operands(above, (groups, groups))
    dx_args, dx_align = arguments.operand(dx, in_channels)
    tiles = -(-count // c.block_p) * math.prod(classes)
    launch.run(
        launch.kernels().parallel.parallel_input_gradient,
        (tiles * groups * (width // c.columns),), c,
        *dy_args, *channels, groups, *packed, width, *dx_args, in_channels, grid, count,
        SPATIAL=arguments.transposed_taps(spatial), TEMPORAL=arguments.transposed_taps(temporal),
        CLASSES=classes, Y_ALIGN=dy_align, X_ALIGN=dx_align,
        SPATIAL_FLAT=channels[0] if c.flat else 0, TEMPORAL_FLAT=channels[1] if c.flat else 0,
        RUN=arguments.run_length(above[0], dx) if classes[2] == 1 else 1,
        WIDE=arguments.wide(count), **arguments.tiling(c), **arguments.arithmetic(dx.dtype),
    )  # fmt: skip


def _weight_gradients(
    problem: Problem, x: Tensor, above: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor | None]:
    passes = problem.passes
    groups = tuple(p.groups for p in passes)
    channels = tuple(p.in_channels // p.groups for p in passes)
    out_channels = tuple(p.out_channels // p.groups for p in passes)
    taps = [math.prod(p.kernel) for p in passes]
    count = problem.batch * math.prod(problem.out_size)
    capability = launch.capability(x.device)
    c = configs.weight_gradient(
        count, channels[0], out_channels[0], groups[0], max(taps), x.dtype,
        arguments.uses_tensor_cores(x.dtype), capability,
    )[0]  # fmt: skip
    rows, widths = zip(
        *(
            configs.weight_blocks(c, *sizes)
            for sizes in zip(channels, out_channels, taps, strict=True)
        ),
        strict=True,
    )
    blocks = sum(math.prod(n) for n in zip(groups, rows, widths, strict=True))
    per_split = configs.positions_per_split(c, count, blocks, capability)
    splits = max(1, -(-count // per_split))
    partials = [x.new_empty((splits, w.numel()), dtype=accumulate_dtype(x.dtype)) for w in weights]
    x_args, x_align = arguments.operand(x, math.gcd(*channels))
    dy_args, dy_align = _operands(above, groups)
    launch.run(
        launch.kernels().parallel.parallel_weight_gradient, (splits * blocks,), c,
        *x_args, *dy_args, *partials, channels, out_channels, groups, rows, widths, count,
        per_split, SPATIAL=arguments.taps(passes[0]), TEMPORAL=arguments.taps(passes[1]),
        SPATIAL_FLAT=channels[0] if c.flat else 0, TEMPORAL_FLAT=channels[1] if c.flat else 0,
        SWAP=c.swap, X_ALIGN=x_align, Y_ALIGN=dy_align, **arguments.layout(x, above[0], count),
        BLOCK_P=c.block_p, BLOCK_R=c.block_r, BLOCK_N=c.block_n, REST_N=c.rest_n,
        **arguments.arithmetic(x.dtype),
    )  # fmt: skip
    return [
        finish_weight(p, partial, w, c.swap)
        for p, partial, w in zip(passes, partials, weights, strict=True)
    ]


def _direct_gradients(
    problem: Problem,
    x: Tensor,
    above: Sequence[Tensor],
    weights: Sequence[Tensor],
    dx: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    passes = problem.passes
    channels = x.shape[1]
    per_group = tuple(channels // p.groups for p in passes)
    out_per_group = tuple(p.out_channels // p.groups for p in passes)
    count = x.shape[0] * math.prod(x.shape[2:])
    c = configs.direct_gradients(
        count, channels, above[0].stride(1) == 1, launch.capability(x.device)
    )
    tiles = -(-count // c.block_p)
    parts = [
        x.new_empty(
            (tiles, math.prod(p.kernel), n, channels), dtype=accumulate_dtype(x.dtype)
        ) if need else None
        for p, n, need in zip(passes, out_per_group, wanted, strict=True)
    ]  # fmt: skip
    x_args, x_align = arguments.operand(x, channels)
    dy_args, dy_align = _operands(above, (1, 1))
    dx_align = 1 if dx is None else arguments.alignment(dx, channels)
    launch.run(
        launch.kernels().parallel.parallel_direct_gradients, (tiles * -(-channels // c.block_c),),
        c, *x_args, channels, per_group, out_per_group, *dy_args,
        *(pack_direct(p, w) for p, w in zip(passes, weights, strict=True)),
        dx, None if dx is None else arguments.strides(dx, dx_align), *parts, count,
        SPATIAL=arguments.transposed_taps(passes[0]), TEMPORAL=arguments.transposed_taps(passes[1]),
        X_ALIGN=x_align, Y_ALIGN=dy_align, DX_ALIGN=dx_align,
        **arguments.layout(above[0], x, count), BLOCK_P=c.block_p, BLOCK_C=c.block_c,
        **arguments.arithmetic(x.dtype, dot=False),
    )  # fmt: skip
    return [
        None if part is None else finish_direct(p, part, w)
        for p, part, w in zip(passes, parts, weights, strict=True)
    ]
