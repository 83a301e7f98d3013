"""Backward of ``parallel_conv2plus1d``: one launch for dx, one for both weights, one for a bias.

Without activations the gradient of either branch is dy, or its channels. Otherwise the convolutions
are computed again, and what leaves that launch is the gradient of each and its sums: formed while
dx and the weight gradients are read, it would take tensors as large, read with dy in both, and the
activation once for every tap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...problem.spec import ParallelProblem, ParallelTensors
from ..contract import Gradients, by_name
from . import arguments, gradient_tiles, launch, parallel, plans
from .backward import pass_gradients
from .direct import finish_direct
from .gradients import (
    STRAIGHT,
    SWAPPED,
    accumulate_dtype,
    channel_sums,
    finish_weight,
    residue_classes,
    split_into_boxes,
    sum_rows,
)
from .packing import Weight, pack, pack_direct


def parallel_conv2plus1d_backward(
    problem: ParallelProblem, tensors: ParallelTensors, dy: Tensor, needs: Sequence[bool]
) -> Gradients:
    return plans.run(_run, problem.device, [*tensors, dy], problem, tuple(needs))


def _run(given: Sequence[Tensor], problem: ParallelProblem, needs: Sequence[bool]) -> Gradients:
    *rest, dy = given
    tensors = ParallelTensors(*rest)
    x, *weights, _, _ = tensors
    need = by_name(tensors, needs)
    wanted = need[1:3]
    above, db = _branch_gradients(problem, tensors, dy, need[3:5])
    dx = torch.empty_like(x) if need.x else None
    dw: list[Tensor | None] = [None, None]
    direct = [parallel.direct(p) for p in problem.passes]
    if all(direct):
        if need.x or any(wanted):
            dw = _direct_gradients(problem, x, above, weights, dx, wanted)
    else:
        if dx is not None:
            _input_gradient(problem, above, weights, dx)
        if all(wanted) and not any(direct):
            dw = _weight_gradients(problem, x, above, weights)
        else:  # tensor cores and ordinary ones share nothing that they read
            for i, p in enumerate(problem.passes):
                if wanted[i]:
                    _, dw[i] = pass_gradients(p, x, above[i], weights[i], None, True)
    return dx, *dw, *db


def _branch_gradients(
    problem: ParallelProblem, tensors: ParallelTensors, dy: Tensor, need_bias: Sequence[bool]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Gradients of what leaves the two convolutions, and of those biases that need one."""
    spec = problem.spec
    x, both = tensors.x, parallel.branches(problem, tensors)
    add = spec.combine == "add"
    same = add and spec.branch_activation == "none"
    parts = [dy, dy] if add else list(dy.split([b.conv.out_channels for b in both], 1))
    bias: list[Tensor | None] = [None, None]
    if spec.branch_activation == spec.activation == "none":
        for i, (part, b) in enumerate(zip(parts, both, strict=True)):
            if need_bias[i]:
                assert b.bias is not None
                first = bias[0] if same else None  # of the same sums
                bias[i] = channel_sums(part, b.bias) if first is None else first.clone()
        return parts, bias
    above = [_rows(problem, x, b.conv.out_channels) for b in (both[:1] if same else both)]
    if add:
        db = None if same else above[1]
        sums = any(need_bias)
        found = [parallel.parallel_conv(spec, both, x, above[0], dy=dy, db=db, sums=sums)] * 2
    else:
        found = [
            parallel.parallel_conv(spec, [b], x, a, dy=part, sums=needed)
            for b, a, part, needed in zip(both, above, parts, need_bias, strict=True)
        ]
    for i, (b, partial) in enumerate(zip(both, found, strict=True)):
        if need_bias[i]:
            assert b.bias is not None and partial is not None
            total = sum_rows(partial.flatten(1), partial.new_empty(partial.shape[1:]))
            bias[i] = total[min(i, len(total) - 1)].to(b.bias.dtype, copy=True)
    return above * 2 if same else above, bias


def _rows(problem: ParallelProblem, x: Tensor, channels: int) -> Tensor:
    """An uninitialised (N, channels, T', H', W') whose channels are neighbours."""
    return x.new_empty((problem.batch, *problem.out_size, channels)).permute(0, 4, 1, 2, 3)


def _operands(above: Sequence[Tensor], groups: Sequence[int]) -> tuple[tuple[Any, ...], int]:
    """Pointers and strides of both branches, their size, and the ALIGN that holds for both."""
    align = math.gcd(
        *(arguments.alignment(t, t.shape[1] // g) for t, g in zip(above, groups, strict=True))
    )
    a, b = above
    size = arguments.hide(*a.shape[2:])
    return (a, arguments.strides(a, align), b, arguments.strides(b, align), size), align


def _channels_last(above: Sequence[Tensor]) -> list[Tensor]:
    """Those of both branches, of which one tensor stays one."""
    a, b = above
    first = arguments.channels_last(a)
    return [first, first if b is a else arguments.channels_last(b)]


def _input_gradient(
    problem: ParallelProblem, above: Sequence[Tensor], weights: Sequence[Tensor], dx: Tensor
) -> None:
    passes = problem.passes
    channels = tuple(p.out_channels // p.groups for p in passes)
    direct = tuple(parallel.direct(p) for p in passes)
    classes = residue_classes(*passes)
    grid = tuple(-(-n // s) for n, s in zip(dx.shape[2:], classes, strict=True))
    count = dx.shape[0] * math.prod(grid)
    cut = parallel.Cut.of(passes, dx.shape[1], 1)
    most = max(n for n, d in zip(channels, direct, strict=True) if not d)
    taps = sum(math.prod(p.kernel) for p in passes)
    c = gradient_tiles.parallel_input_gradient(
        arguments.sizes(count, most, cut.per_part, cut.parts, taps, dx.dtype, launch.device()),
        classes=math.prod(classes), mixed=any(direct),
    )  # fmt: skip
    cut = cut._replace(columns=c.columns)
    widths = tuple(cut.width(p) for p in passes)
    packed = [
        pack_direct(Weight.of_inputs(w, p.groups))
        if d
        else pack(Weight.transposed(w, p.groups), n, c, width)
        for p, w, n, width, d in zip(passes, weights, channels, widths, direct, strict=True)
    ]
    above = _channels_last(above)
    dy_args, dy_align = _operands(
        above, [1 if d else p.groups for p, d in zip(passes, direct, strict=True)]
    )
    dx_args, dx_align = arguments.operand(dx, cut.per_part)
    tiles = -(-count // c.block_p) * math.prod(classes)
    run = arguments.run_length(above[0], dx) if classes[2] == 1 else 1
    launch.run(
        launch.kernels().parallel.parallel_input_gradient, (tiles * cut.tiles * cut.parts,), c,
        *dy_args, channels, tuple(p.in_channels // p.groups for p in passes), widths, *packed,
        cut.tiles, cut.parts, cut.per_part, *dx_args, arguments.grid(grid, run), count,
        SPATIAL=arguments.transposed_taps(passes[0], classes),
        TEMPORAL=arguments.transposed_taps(passes[1], classes),
        CLASSES=classes, Y_ALIGN=dy_align, X_ALIGN=dx_align, DIRECT=direct,
        SPATIAL_FLAT=channels[0] if c.flat else 0, TEMPORAL_FLAT=channels[1] if c.flat else 0,
        RUN=run, WIDE=arguments.is_wide(count), **arguments.tiling(c),
        **arguments.arithmetic(dx.dtype),
    )  # fmt: skip


def _weight_gradients(
    problem: ParallelProblem, x: Tensor, above: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor | None]:
    passes = problem.passes
    groups = tuple(p.groups for p in passes)
    channels = tuple(p.in_channels // p.groups for p in passes)
    out_channels = tuple(p.out_channels // p.groups for p in passes)
    taps = [math.prod(p.kernel) for p in passes]
    count = problem.batch * math.prod(problem.out_size)
    sizes = arguments.sizes(
        count, channels[0], out_channels[0], groups[0], max(taps), x.dtype, launch.device()
    )
    c = gradient_tiles.weight_gradient(sizes)[0]
    rows, widths = zip(
        *(
            gradient_tiles.weight_blocks(c, *sizes)
            for sizes in zip(channels, out_channels, taps, strict=True)
        ),
        strict=True,
    )
    blocks = sum(math.prod(n) for n in zip(groups, rows, widths, strict=True))
    box, boxes, per_split, splits = split_into_boxes(c, above[0], blocks, sizes.processors)
    partials = [x.new_empty((splits, w.numel()), dtype=accumulate_dtype(x.dtype)) for w in weights]
    x = x if c.flat else arguments.channels_last(x)
    x_args, x_align = arguments.operand(x, math.gcd(*channels))
    dy_args, dy_align = _operands(_channels_last(above), groups)
    launch.run(
        launch.kernels().parallel.parallel_weight_gradient, (splits * blocks,), c,
        *x_args, *dy_args, *partials, channels, out_channels, groups, rows, widths, x.shape[0],
        box, boxes, per_split,
        SPATIAL=arguments.taps(passes[0]), TEMPORAL=arguments.taps(passes[1]),
        SPATIAL_FLAT=channels[0] if c.flat else 0, TEMPORAL_FLAT=channels[1] if c.flat else 0,
        SWAP=c.swap, X_ALIGN=x_align, Y_ALIGN=dy_align,
        BLOCK_P=c.block_p, BLOCK_R=c.block_r, BLOCK_N=c.block_n, REST_N=c.rest_n,
        **arguments.arithmetic(x.dtype),
    )  # fmt: skip
    dw = [torch.empty_like(w) for w in weights]
    for p, partial, d, n in zip(passes, partials, dw, channels, strict=True):
        finish_weight(partial, Weight.of(d, p.groups), SWAPPED if c.swap else STRAIGHT, n)
    return list(dw)


def _direct_gradients(
    problem: ParallelProblem,
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
    c = gradient_tiles.direct_gradients(
        count, channels, above[0].stride(1) == 1, launch.capability(launch.device())
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
    run = arguments.run_length(above[0], x)
    launch.run(
        launch.kernels().parallel.parallel_direct_gradients, (tiles * -(-channels // c.block_c),),
        c, *x_args, arguments.grid(x.shape[2:], run), channels, per_group, out_per_group, *dy_args,
        *(pack_direct(Weight.of_inputs(w, p.groups)) for p, w in zip(passes, weights, strict=True)),
        dx, None if dx is None else arguments.strides(dx, dx_align), *parts, count,
        SPATIAL=arguments.transposed_taps(passes[0]), TEMPORAL=arguments.transposed_taps(passes[1]),
        X_ALIGN=x_align, Y_ALIGN=dy_align, DX_ALIGN=dx_align,
        RUN=run, WIDE=arguments.is_wide(count), BLOCK_P=c.block_p, BLOCK_C=c.block_c,
        **arguments.arithmetic(x.dtype, dot=False),
    )  # fmt: skip
    return [
        None if part is None else finish_direct(p, part, w)
        for p, part, w in zip(passes, parts, weights, strict=True)
    ]
