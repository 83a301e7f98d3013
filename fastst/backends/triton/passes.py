"""One pass by itself, and the scale and shift of the norm between two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...problem.conv3d import ConvProblem, ConvTensors
from ...problem.spec import PairProblem, PairTensors, Pass
from . import arguments, launch
from . import rows as rows_of
from . import tiles as configs
from .packing import Weight, pack, pack_direct

PassConfig = configs.TapConfig | configs.StreamConfig


def candidates(
    p: Pass,
    channels: int,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
) -> Sequence[PassConfig]:
    """Configurations of a pass over ``count`` positions of y, best guess first.

    ``channels`` of x, with its padding channels; ``channels_last``: they are neighbours in memory.
    """
    if p.groups > 1:
        channels = p.in_channels // p.groups
    if (by_rows := rows_of.of(p)) is not None:
        p, channels = by_rows, by_rows.in_channels
    if configs.is_thin(channels, p.groups):
        capability = launch.capability(device)
        taps = math.prod(p.kernel)
        return [configs.direct(count, p.out_channels, taps, channels_last, capability)]
    out_channels = p.out_channels // p.groups
    taps = math.prod(p.kernel)
    return configs.candidates(
        arguments.sizes(count, channels, out_channels, p.groups, taps, dtype, device)
    )


def conv_pass(
    p: Pass,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    past: Tensor | None = None,  # frames before x, as in_activation leaves x
    in_scale: Tensor | None = None,  # x is read as in_activation(in_scale·x + in_shift); of
    in_shift: Tensor | None = None,  # thin passes only
    in_activation: str = "none",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    inner: str = "none",
    residual: Tensor | None = None,  # of the shape of y, any strides; may be y itself
    activation: str = "none",
    slope: float = 0.01,
    statistics: bool = False,
    store: bool = True,  # else only the statistics are wanted, and y tells its shape
    config: PassConfig | None = None,  # one of ``candidates``; None: the best guess
) -> tuple[Tensor | None, int]:
    """One convolution into y (N, K, T', H', W'), any strides; u and z may have padding channels.

    Returns:
        Partials (tiles, 2, K) of the statistics of y, if asked for, and positions per tile.
    """
    # One function: the two kernels share all but their tiles, and each would take 14 arguments.
    kernels = launch.kernels()
    laid_out = Weight.of(weight, p.groups)
    if (by_rows := rows_of.of(p)) is not None:
        x, laid_out, p = rows_of.video(p, by_rows, x, past), rows_of.weight(weight), by_rows
        past = None
    groups = p.groups
    # Padding channels of u are zeros and cost nothing where the tile has room for them.
    channels = x.shape[1] if groups == 1 else p.in_channels // groups
    out_channels = p.out_channels // groups
    count = y.shape[0] * math.prod(y.shape[2:])
    common = {
        "INNER": inner, "ACTIVATION": activation, "SLOPE": slope,
        "WIDE": arguments.is_wide(count),
    }  # fmt: skip
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32

    def partials(block_p: int) -> tuple[int, Tensor | None]:
        tiles = -(-count // block_p)
        shape = (tiles, 2, p.out_channels)
        return tiles, x.new_empty(shape, dtype=accumulate) if statistics else None

    if config is None:
        config = candidates(p, x.shape[1], count, x.dtype, launch.device(), x.stride(1) == 1)[0]
    if isinstance(config, configs.StreamConfig):
        tiles, partial = partials(config.block_p)
        x_args, x_align = arguments.sources(x, past, p.in_channels)
        end, y_align = arguments.results(y, residual, p.out_channels, store)
        run = arguments.run_length(x, y)
        launch.run(
            kernels.depthwise.direct_conv, (tiles * -(-p.out_channels // config.block_c),), config,
            *x_args, channels, out_channels, pack_direct(Weight.of(weight, 1)),
            in_scale, in_shift, scale, shift, partial, *end, arguments.grid(y.shape[2:], run),
            p.out_channels, count, TAPS=arguments.taps(p), X_ALIGN=x_align, Y_ALIGN=y_align,
            RUN=run, IN_ACTIVATION=in_activation, **common,
            BLOCK_P=config.block_p, BLOCK_C=config.block_c, UNROLL=config.unroll,
            **arguments.arithmetic(x.dtype, dot=False),
        )  # fmt: skip
        return partial, config.block_p

    assert in_scale is None and in_shift is None and in_activation == "none"
    if not config.flat:
        x = arguments.channels_last(x)
        past = None if past is None else arguments.channels_last(past)
    stored = y.shape[1] if groups == 1 else out_channels
    packed = pack(laid_out, channels, config)
    tiles_n = packed.shape[-1] // config.columns
    x_args, x_align = arguments.sources(x, past, channels)
    end, y_align = arguments.results(y, residual, stored, store)
    tiles, partial = partials(config.block_p)
    run = arguments.run_length(x, y)
    launch.run(
        kernels.tap_conv.tap_conv, (tiles * groups * tiles_n,), config,
        *x_args, channels, groups, packed, packed.shape[-1], tiles_n,
        scale, shift, partial, *end, arguments.grid(y.shape[2:], run), out_channels,
        None if stored == out_channels else stored, count,
        TAPS=arguments.taps(p), FLAT=channels if config.flat else 0, X_ALIGN=x_align,
        Y_ALIGN=y_align, RUN=run, WHOLE=statistics and count % config.block_p == 0,
        DENSE=arguments.is_dense(y, residual), **common, **arguments.tiling(config),
        **arguments.arithmetic(x.dtype),
    )  # fmt: skip
    return partial, config.block_p


def affine(
    v: Tensor,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    other: Tensor | None = None,
    p: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    slope: float = 0.01,
) -> Tensor:
    """act(scale·v + p·other + shift), written to out, which may be v; rows of channels."""
    channels = v.shape[-1]
    rows = v.numel() // channels
    block_p, block_c = configs.affine(channels)
    launch.run(
        launch.kernels().statistics.affine, (-(-rows // block_p) * -(-channels // block_c),), None,
        v, other, out, rows, channels, scale, p, shift, ACTIVATION=activation, SLOPE=slope,
        ROUND=arguments.rounds(v.dtype), BLOCK_P=block_p, BLOCK_C=block_c,
        **arguments.arithmetic(v.dtype, dot=False),
    )  # fmt: skip
    return out


def moments(partial: Tensor, rows: int, total: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``total`` values, from (tiles, 2, K) partials of ``rows``.

    From (sets, tiles, 2, K) those of each set, of few tiles.
    """
    *sets, _, _, k = partial.shape
    if sets:
        tiles = partial.shape[1]
    else:
        partial, tiles, rows = _combine_partials(partial, rows, total)
    mean, var = partial.new_empty(*sets, k), partial.new_empty(*sets, k)
    blocks = -(-k // configs.combine(k)[1])
    launch.run(
        launch.kernels().statistics.finish_norm, (blocks * math.prod(sets),), None,
        partial, tiles, rows, total, mean, var, None, None, None, None, None, k, k, EPS=0.0,
        **_blocks(partial),
    )  # fmt: skip
    return mean, var


def _combine_partials(partial: Tensor, rows: int, total: int) -> tuple[Tensor, int, int]:
    """Partials, how many and of how many positions, combined to what one program takes."""
    tiles, _, k = partial.shape
    _, block_c, per_split = configs.combine(k)
    if tiles <= per_split:
        return partial, tiles, rows
    splits = -(-tiles // per_split)
    into = partial.new_empty((splits, 2, k))
    launch.run(
        launch.kernels().statistics.combine_partials, (-(-k // block_c), splits), None,
        partial, tiles, rows, total, k, into, per_split, **_blocks(partial),
    )  # fmt: skip
    return into, splits, rows * per_split


def _blocks(partial: Tensor) -> dict[str, Any]:
    block_t, block_c, _ = configs.combine(partial.shape[-1])
    dtype = arguments.dot_type(partial.dtype)
    return {"BLOCK_T": block_t, "BLOCK_C": block_c, "ACCUMULATE": dtype}


def finish_norm(
    problem: PairProblem,
    t: PairTensors,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    partial: Tensor | None = None,
    rows: int = 1,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(scale, shift) of the norm, over the channels of u, from partials or from given statistics.

    mean and var are written where partials are given, else they are the problem's frozen ones.
    """
    total = problem.batch * math.prod(problem.mid_size)
    tiles = 0
    if partial is None:
        mean, var = t.mean, t.var
    else:
        partial, tiles, rows = _combine_partials(partial, rows, total)
    return coefficients(
        problem, t, mean, var, problem.mid_shape[-1], problem.mid_channels,
        (partial, tiles, rows, total), bias,
    )  # fmt: skip


def coefficients(
    problem: PairProblem | ConvProblem,
    t: PairTensors | ConvTensors,
    mean: Tensor | None,
    var: Tensor | None,
    padded: int,
    channels: int,
    partials: tuple[Tensor | None, int, int, int] = (None, 0, 1, 1),
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a norm; arguments as of the kernel ``finish_norm``."""
    scale, shift = (t.x.new_empty(padded, dtype=problem.accumulate_dtype) for _ in range(2))
    launch.run(
        launch.kernels().statistics.finish_norm, (-(-padded // configs.combine(channels)[1]),),
        None, *partials, mean, var, t.norm_weight, t.norm_bias, bias, scale, shift, channels,
        padded, EPS=problem.spec.eps, **_blocks(scale[:channels]),
    )  # fmt: skip
    return scale, shift
