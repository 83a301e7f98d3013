"""``parallel_conv2plus1d``: one launch for a sum, one for each branch into its channels of y."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ...machine import gpu
from ...problem.spec import ParallelProblem, ParallelSpec, ParallelTensors, Pass
from . import arguments, launch, plans
from . import tiles as configs
from .gradients import accumulate_dtype
from .packing import Weight, pack, pack_direct
from .passes import PassConfig, candidates, conv_pass


class Branch(NamedTuple):
    """One of the convolutions."""

    conv: Pass
    weight: Tensor
    bias: Tensor | None


class Cut(NamedTuple):
    """Channels of what is written, in parts that lie within one group of every dense branch."""

    parts: int
    per_part: int
    columns: int  # of a tile

    @classmethod
    def of(cls, convs: Sequence[Pass], channels: int, columns: int) -> Cut:
        parts = math.lcm(*(p.groups for p in convs if not direct(p)))
        return cls(parts, channels // parts, columns)

    @property
    def tiles(self) -> int:
        """Of a part."""
        return -(-self.per_part // self.columns)

    def width(self, p: Pass) -> int:
        """Columns of a group of packed weights: tiles of its last part may reach beyond them."""
        before = (self.parts // p.groups - 1) * self.per_part
        return gpu.round_up(before + self.tiles * self.columns, 16)


def direct(p: Pass) -> bool:
    """Whether a branch runs on ordinary cores."""
    return configs.is_thin(p.in_channels // p.groups, p.groups)


def branches(problem: ParallelProblem, tensors: ParallelTensors) -> list[Branch]:
    spatial, temporal = problem.passes
    return [
        Branch(spatial, tensors.spatial_weight, tensors.spatial_bias),
        Branch(temporal, tensors.temporal_weight, tensors.temporal_bias),
    ]


def parallel_conv2plus1d(
    problem: ParallelProblem, tensors: ParallelTensors, like: ParallelProblem | None = None
) -> Tensor:
    """``like``: a problem as which it is run, in its configurations."""
    (y,) = plans.run(_run, problem.device, [*tensors], problem, like or problem)
    return y


def _run(given: Sequence[Tensor], problem: ParallelProblem, like: ParallelProblem) -> list[Tensor]:
    tensors, spec = ParallelTensors(*given), problem.spec
    x = tensors.x
    y = problem.empty_output(x)
    both = branches(problem, tensors)
    count = like.batch * math.prod(like.out_size)
    if spec.combine == "add":
        parallel_conv(spec, both, x, y, config=_config(like.passes, x, like.out_channels, count))
        return [y]
    first = 0
    for (conv, weight, bias), p in zip(both, like.passes, strict=True):
        config = candidates(p, p.in_channels, count, x.dtype, launch.device(), x.stride(1) == 1)[0]
        end = first + conv.out_channels
        conv_pass(
            conv, x, weight, y[:, first:end], shift=bias, config=config,
            inner=spec.branch_activation, activation=spec.activation, slope=spec.slope,
        )  # fmt: skip
        first = end
    return [y]


def parallel_conv(
    spec: ParallelSpec,
    chosen: Sequence[Branch],
    x: Tensor,
    y: Tensor,
    *,
    dy: Tensor | None = None,
    db: Tensor | None = None,
    sums: bool = False,
    config: PassConfig | None = None,
) -> Tensor | None:
    """The sum of both branches, or one of them, into y (N, K, T', H', W').

    With dy, the gradients of what leaves the convolutions instead: that of the first into y, that
    of the second, where it is another, into db, of the strides of y.

    Returns:
        With ``sums``, partials (tiles, 1 or 2, K) of the sums of the gradients over positions.
    """
    convs = [b.conv for b in chosen]
    out_channels, count = y.shape[1], y.shape[0] * math.prod(y.shape[2:])
    config = config or _config(convs, x, out_channels, count)
    tiling = arguments.tiling(config)
    cut = Cut.of(convs, out_channels, tiling["BLOCK_N"] + tiling["REST_N"])
    channels = tuple(p.in_channels // p.groups for p in convs)
    widths = tuple(cut.width(p) for p in convs)
    packed = []
    for b, n, width in zip(chosen, channels, widths, strict=True):
        if isinstance(config, configs.StreamConfig) or direct(b.conv):
            packed.append(pack_direct(Weight.of(b.weight, 1)))
        else:
            packed.append(pack(Weight.of(b.weight, b.conv.groups), n, config, width))
    flat = isinstance(config, configs.TapConfig) and config.flat
    if isinstance(config, configs.TapConfig) and not flat:
        x = arguments.channels_last(x)
    run = arguments.run_length(x, y)
    x_args, x_align = arguments.operand(
        x, math.gcd(x.shape[1], *(n for p, n in zip(convs, channels, strict=True) if not direct(p)))
    )
    y_align = arguments.alignment(y, cut.per_part)
    dy_align = 1 if dy is None else arguments.alignment(dy, cut.per_part)
    tiles = -(-count // config.block_p)
    partial = None
    if sums:
        shape = (tiles, 1 if db is None else 2, out_channels)
        partial = x.new_empty(shape, dtype=accumulate_dtype(x.dtype))
    absent = [None] * (2 - len(chosen))  # the second branch, where there is one
    spatial, temporal = [arguments.taps(p) for p in convs] + absent
    launch.run(
        launch.kernels().parallel.parallel_conv, (tiles * cut.tiles * cut.parts,), config,
        *x_args, channels, tuple(p.out_channels // p.groups for p in convs), widths,
        *packed, *absent, *(b.bias for b in chosen), *absent, cut.tiles, cut.parts, cut.per_part,
        dy, None if dy is None else arguments.strides(dy, dy_align),
        y, db, arguments.strides(y, y_align), arguments.grid(y.shape[2:], run), partial, count,
        SPATIAL=spatial, TEMPORAL=temporal, SPATIAL_FLAT=channels[0] if flat else 0,
        TEMPORAL_FLAT=channels[-1] if flat else 0, DIRECT=tuple(direct(p) for p in convs),
        X_ALIGN=x_align, DY_ALIGN=dy_align, Y_ALIGN=y_align, RUN=run, WIDE=arguments.is_wide(count),
        BRANCH=spec.branch_activation, ACTIVATION=spec.activation, SLOPE=spec.slope, **tiling,
        UNROLL=config.unroll if isinstance(config, configs.StreamConfig) else 1,
        **arguments.arithmetic(x.dtype),
    )  # fmt: skip
    return partial


def _config(convs: Sequence[Pass], x: Tensor, out_channels: int, count: int) -> PassConfig:
    taps = sum(math.prod(p.kernel) for p in convs) - len(convs) + 1
    dense = [p for p in convs if not direct(p)]
    if not dense:
        capability = launch.capability(launch.device())
        return configs.direct(count, out_channels, taps, x.stride(1) == 1, capability)
    cut = Cut.of(convs, out_channels, 1)
    channels = max(p.in_channels // p.groups for p in dense)
    return configs.parallel_conv(
        arguments.sizes(count, channels, cut.per_part, cut.parts, taps, x.dtype, launch.device()),
        mixed=len(dense) < len(convs),
    )
