"""Gradients of one pass, and of the norm between two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...problem.spec import PairProblem, PairTensors, Pass
from . import arguments, gradient_tiles, launch
from . import rows as rows_of
from . import tiles as configs
from .packing import Weight, pack


class NormTerms(NamedTuple):
    """Of du = s·dv + p·u + r, as kernels take them: (M,) each, u with the strides of dv."""

    s: Tensor | None = None
    r: Tensor | None = None
    u: Tensor | None = None
    p: Tensor | None = None


def input_gradient(
    p: Pass,
    dy: Tensor,
    weight: Tensor,
    dx: Tensor,
    *,
    u: Tensor | None = None,
    u_scale: Tensor | None = None,
    u_shift: Tensor | None = None,
    mean: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.01,
    sums: bool = False,
    scaled: bool = False,
    rank: int = 0,
) -> Tensor | None:
    """Gradient of the input of a pass into dx (N, C, T, H, W), any strides.

    What is written is multiplied by act'(u_scale·u + u_shift), u of the strides of dx, and, where
    it is to be ``scaled``, by u_scale. dy and dx may have padding channels.

    Returns:
        With ``sums``, partials (tiles, 2, C) of Σdx before it is scaled and, where there is a
        mean, Σdx·(u − mean).
    """
    groups = p.groups
    channels = dy.shape[1] if groups == 1 else p.out_channels // groups
    in_channels = p.in_channels // groups
    stored = dx.shape[1] if groups == 1 else in_channels
    classes = residue_classes(p)
    grid = tuple(-(-n // s) for n, s in zip(dx.shape[2:], classes, strict=True))
    count = dx.shape[0] * math.prod(grid)
    found = gradient_tiles.input_gradient(
        arguments.sizes(
            count, channels, in_channels, groups, math.prod(p.kernel), dy.dtype,
            launch.device(),
        ),
        masks=u is not None, classes=math.prod(classes),
    )  # fmt: skip
    config = found[min(rank, len(found) - 1)]
    if not config.flat:
        dy = arguments.channels_last(dy)
    packed = pack(Weight.transposed(weight, groups), channels, config)
    tiles_n = packed.shape[-1] // config.columns
    dy_args, dy_align = arguments.operand(dy, channels)
    dx_args, dx_align = arguments.operand(dx, stored)
    tiles = -(-count // config.block_p) * math.prod(classes)
    partial = None
    if sums:
        partial = dy.new_empty((tiles, 2, p.in_channels), dtype=accumulate_dtype(dy.dtype))
    run = arguments.run_length(dy, dx) if classes[2] == 1 else 1
    launch.run(
        launch.kernels().input_gradient.input_gradient,
        (tiles * groups * tiles_n,), config,
        *dy_args, channels, groups, packed, packed.shape[-1], tiles_n,
        *dx_args, in_channels, None if stored == in_channels else stored,
        u, u_scale, u_shift, mean, partial,
        arguments.grid(grid, run), count,
        TAPS=arguments.transposed_taps(p, classes), FLAT=channels if config.flat else 0,
        CLASSES=classes, Y_ALIGN=dy_align, X_ALIGN=dx_align,
        RUN=run, WIDE=arguments.is_wide(count), WHOLE=sums and count % config.block_p == 0,
        DENSE=classes == (1, 1, 1) and arguments.is_dense(dx),
        SCALED=scaled, ACTIVATION=activation, SLOPE=slope, **arguments.tiling(config),
        **arguments.arithmetic(dy.dtype),
    )  # fmt: skip
    return partial


def residue_classes(*passes: Pass) -> tuple[int, ...]:
    """Residue classes along each axis, of one pass or of several of the same stride.

    Images of one class belong to others: then there is one.
    """
    if all(math.prod(arguments.images(p)) == 1 for p in passes):
        return passes[0].stride
    return (1, 1, 1)


def weight_gradient(
    p: Pass,
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    *,
    rank: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient of the weight of a pass, in its dtype or another, strides of ``torch.empty_like``.

    x and dy may have padding channels, which are not read.
    """
    dw = torch.empty_like(weight, dtype=dtype)
    laid_out = Weight.of(dw, p.groups)
    if (by_rows := rows_of.of(p)) is not None:
        x, laid_out, p = rows_of.video(p, by_rows, x), rows_of.weight(dw), by_rows
    groups, taps = p.groups, math.prod(p.kernel)
    channels, out_channels = p.in_channels // groups, p.out_channels // groups
    count = dy.shape[0] * math.prod(dy.shape[2:])
    sizes = arguments.sizes(count, channels, out_channels, groups, taps, x.dtype, launch.device())
    found = gradient_tiles.weight_gradient(sizes)
    c = found[min(rank, len(found) - 1)]
    rows, widths = gradient_tiles.weight_blocks(c, channels, out_channels, taps)
    box, boxes, per_split, splits = split_into_boxes(
        c, dy, rows * widths * groups, sizes.processors
    )
    partial = x.new_empty(
        (splits, p.out_channels * taps * channels), dtype=accumulate_dtype(x.dtype)
    )
    x, dy = (x if c.flat else arguments.channels_last(x)), arguments.channels_last(dy)
    x_args, x_align = arguments.operand(x, x.shape[1] if groups == 1 else channels)
    dy_args, dy_align = arguments.operand(dy, dy.shape[1] if groups == 1 else out_channels)
    launch.run(
        launch.kernels().weight_gradient.weight_gradient, (splits * groups * rows * widths,), c,
        *x_args, channels, *dy_args, out_channels, partial, groups, rows, widths,
        x.shape[0], box, boxes, per_split,
        TAPS=arguments.taps(p), FLAT=channels if c.flat else 0, SWAP=c.swap, X_ALIGN=x_align,
        Y_ALIGN=dy_align, BLOCK_P=c.block_p, BLOCK_R=c.block_r, BLOCK_N=c.block_n,
        REST_N=c.rest_n, **arguments.arithmetic(x.dtype),
    )  # fmt: skip
    finish_weight(partial, laid_out, SWAPPED if c.swap else STRAIGHT, channels)
    return dw


def split_into_boxes(
    c: gradient_tiles.WeightConfig, dy: Tensor, blocks: int, processors: int
) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Boxes of positions as ``weight_gradient`` takes them, how many a program has, and splits.

    ``blocks``: programs that each part of the positions has.
    """
    size = (dy.shape[0], *dy.shape[2:])
    box = gradient_tiles.box(c.block_p, size)
    n, *thw = (-(-s >> b) for s, b in zip(size, box, strict=True))
    total = n * math.prod(thw)
    per_split = gradient_tiles.boxes_per_split(total, blocks, processors)
    splits = max(1, -(-total // per_split))
    return arguments.hide(*box), arguments.hide(*thw, n), per_split, splits


# Axes of ``Weight.view`` in the order of partials.
STRAIGHT, SWAPPED, DIRECT = (0, 5, 6, 7, 3, 4, 1), (0, 1, 5, 6, 7, 3, 4), (5, 6, 7, 3, 4, 1, 2)


def finish_weight(partial: Tensor, dw: Weight, axes: Sequence[int], channels: int) -> None:
    """The sum of (splits, …) partials into dw, as which they are laid out.

    Args:
        axes: of ``dw.view``, slowest first.
        channels: that partials have of each group, in the place of c and c'.
    """
    sizes = [*dw.view.shape]
    sizes[2:5] = dw.lanes, channels // dw.parts, dw.parts
    of_axes = ([n[i] for i in axes] for n in (sizes, dw.view.shape, dw.view.stride()))
    count = partial[0].numel()
    launch.run(
        launch.kernels().weight_gradient.finish_weight, (-(-count // 256),), None,
        partial, partial.shape[0], count, dw.view, *(arguments.hide(*n) for n in of_axes),
        BLOCK=256, EMULATE=launch.is_interpreted() and dw.view.dtype == torch.bfloat16,
        ACCUMULATE=arguments.dot_type(partial.dtype),
    )  # fmt: skip


def channel_sums(
    dy: Tensor,
    bias: Tensor,
    *,
    norm: NormTerms | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gradient of a bias: the sums over positions of dy or, with ``norm``, of du where dy is dv."""
    channels = bias.shape[0]
    count = dy.shape[0] * math.prod(dy.shape[2:])
    block_p, block_c, per_tile = gradient_tiles.sums(count, channels)
    tiles = -(-count // per_tile)
    partial = dy.new_empty((tiles, channels), dtype=accumulate_dtype(dy.dtype))
    align = arguments.alignment(dy, dy.shape[1])
    run = arguments.run_length(dy, dy)
    launch.run(
        launch.kernels().weight_gradient.channel_sums, (tiles * -(-channels // block_c),), None,
        dy, arguments.strides(dy, align), arguments.grid(dy.shape[2:], run), channels,
        *(norm or NormTerms()), partial, count, per_tile,
        ALIGN=align, RUN=run, WIDE=arguments.is_wide(count), BLOCK_P=block_p, BLOCK_C=block_c,
        **arguments.arithmetic(dy.dtype, dot=False),
    )  # fmt: skip
    return sum_rows(partial, torch.empty_like(bias, dtype=dtype))


def sum_rows(partial: Tensor, out: Tensor) -> Tensor:
    """Sums over the first axis into ``out``, in an order that is always the same."""
    rows, columns = partial.shape[0], out.numel()
    block_t, block_c, per_split = configs.combine(columns)
    splits = -(-rows // per_split)
    into = out if splits <= 1 else partial.new_empty((splits, columns))
    launch.run(
        launch.kernels().statistics.sum_rows, (-(-columns // block_c), max(1, splits)), None,
        partial, rows, columns, into, per_split, BLOCK_T=block_t, BLOCK_C=block_c,
        EMULATE=launch.is_interpreted() and into.dtype == torch.bfloat16,
        ACCUMULATE=arguments.dot_type(partial.dtype),
    )  # fmt: skip
    return out if splits <= 1 else sum_rows(into, out)


def norm_gradient(
    problem: PairProblem,
    t: PairTensors,
    sums: Tensor,
    pooled: Tensor | None,
    mean: Tensor,
    var: Tensor,
    s: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of γ and of the bias before the norm; p and r of du.

    du = s·dv + p·u + r

    Args:
        sums: (2, M) of ``input_gradient``, added up.
        pooled: those of all ranks, or the same; None where the norm is frozen.
    """
    m, padded = problem.mid_channels, problem.mid_shape[-1]
    _, block_c, _ = configs.combine(m)
    dgamma, dbias = sums.new_empty(m), sums.new_empty(m)
    p, r = (None if pooled is None else sums.new_empty(padded) for _ in range(2))
    launch.run(
        launch.kernels().statistics.norm_gradient, (-(-padded // block_c),), None,
        sums, pooled, mean, var, s, problem.batch * math.prod(problem.mid_size), dgamma, dbias,
        p, r, m, padded, EPS=problem.spec.eps, BLOCK_C=block_c,
        ACCUMULATE=arguments.dot_type(problem.dtype),
    )  # fmt: skip
    return dgamma, dbias, p, r


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
