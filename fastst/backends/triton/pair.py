"""``conv2plus1d``: in one kernel where that is possible and pays, else in two passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import collectives, configs
from ...shapes import PairSpec, PairTensors, Problem
from .. import PairResult
from . import arguments, launch
from .passes import conv_pass, finish_norm


def conv2plus1d(problem: Problem, tensors: PairTensors, save: bool) -> PairResult:
    from ... import tuning

    return _run(problem, tensors, save, tuning.choice("triton", problem, "forward"))


def ways(problem: Problem, phase: str) -> list[str]:
    """What ``tune`` may choose from: one kernel where there is one, and tiles for two passes."""
    if phase != "forward" or problem.op != "conv2plus1d":
        return []
    tiles = 1
    for p, size in zip(problem.passes, (problem.mid_size, problem.out_size), strict=True):
        channels = p.in_channels // p.groups
        if not configs.thin(channels, p.groups):
            found = configs.candidates(
                problem.batch * math.prod(size), channels, p.out_channels // p.groups, p.groups,
                math.prod(p.kernel), problem.dtype, arguments.uses_tensor_cores(problem.dtype),
                launch.capability(problem.device),
            )  # fmt: skip
            tiles = max(tiles, len(found))
    one = ["one kernel"] if single_kernel(problem, save=False) else []
    return (one + [f"tiles {i}" for i in range(tiles)])[:12]


def trial(problem: Problem, phase: str, way: str) -> Callable[[], None]:
    """Run the problem once in one of its ways, on random tensors, to the end."""
    from ... import tuning

    tensors: PairTensors = tuning.example(problem)  # type: ignore[assignment]

    def run() -> None:
        _run(problem, tensors, False, way)
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)

    return run


def _run(problem: Problem, tensors: PairTensors, save: bool, way: str | None) -> PairResult:
    kernel = single_kernel(problem, save)
    if kernel is not None and way in (None, "one kernel"):
        run = _depthwise_pair if kernel == "depthwise_pair" else _pair_conv
        return PairResult(run(problem, tensors))
    rank = int(way.removeprefix("tiles ")) if way and way.startswith("tiles ") else 0
    return _two_passes(problem, tensors, save, rank)


def single_kernel(problem: Problem, save: bool) -> str | None:
    """Name of the one kernel that runs the pair, where nothing of the mid tensor is asked for."""
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    first, second = problem.passes
    span = second.dilation[0] * (second.kernel[0] - 1) + 1
    if spec.order != "spatial-first" or spec.norm == "batch" or (save and not spec.recompute):
        return None
    if second.padding_mode != "zeros" or second.padding[0] >= span:
        return None
    if all(p.groups == p.in_channels == p.out_channels > 1 for p in problem.passes):
        return "depthwise_pair" if span <= 5 else None  # so many sums are in registers
    fits = configs.pair_fits(first.out_channels, second.out_channels, span)
    if first.groups == second.groups == 1 and fits and arguments.uses_tensor_cores(problem.dtype):
        return "pair_conv"
    return None


def _pair_conv(problem: Problem, tensors: PairTensors) -> Tensor:
    kernels = launch.kernels()
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    first, second = problem.passes
    x, y = tensors.x, problem.empty_output(tensors.x)
    channels, m, k = first.in_channels, first.out_channels, second.out_channels
    scale, shift = None, tensors.spatial_bias
    if spec.norm == "frozen":
        scale, shift = finish_norm(problem, tensors, bias=tensors.spatial_bias)
    count = problem.batch * math.prod(problem.out_size[1:])
    c = configs.pair_conv(channels, m, k, math.prod(first.kernel), launch.capability(x.device))
    spatial = c.pass_config(c.block_m, c.block_k, c.flat)
    temporal = c.pass_config(c.block_n, c.block_m, False)
    packed = arguments.pack(tensors.spatial_weight, 1, channels, spatial)
    x_args, x_align = arguments.operand(x, channels)
    y_args, y_align = arguments.operand(y, k)
    packed_temporal = arguments.pack(tensors.temporal_weight, 1, m, temporal)
    launch.run(
        kernels.pair.pair_conv, (-(-count // c.block_p),), c,
        *x_args, channels, m, k, packed, packed.shape[-1], packed_temporal, scale, shift,
        tensors.temporal_bias, *y_args, problem.mid_size[0], count,
        SPATIAL=arguments.taps(first), TEMPORAL=arguments.taps(second),
        FLAT=channels if c.flat else 0, X_ALIGN=x_align, Y_ALIGN=y_align,
        **arguments.layout(x, y, count),
        ACTIVATION=spec.activation, SLOPE=spec.slope,
        BLOCK_P=c.block_p, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
        **arguments.arithmetic(x.dtype),
    )  # fmt: skip
    return y


def _depthwise_pair(problem: Problem, tensors: PairTensors) -> Tensor:
    kernels = launch.kernels()
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    first, second = problem.passes
    x, y, channels = tensors.x, problem.empty_output(tensors.x), problem.out_channels
    scale, shift = None, tensors.spatial_bias
    if spec.norm == "frozen":
        scale, shift = finish_norm(problem, tensors, bias=tensors.spatial_bias)
    count = problem.batch * math.prod(problem.out_size[1:])
    config = configs.direct(
        count, channels, math.prod(first.kernel), x.stride(1) == 1, launch.capability(x.device)
    )
    x_args, x_align = arguments.operand(x, channels)
    y_args, y_align = arguments.operand(y, channels)
    weights = [arguments.pack_direct(w) for w in tensors[1:3]]
    launch.run(
        kernels.depthwise.depthwise_pair,
        (-(-count // config.block_p) * -(-channels // config.block_c),), config,
        *x_args, *weights, channels, scale, shift, tensors.temporal_bias, *y_args,
        problem.mid_size[0], count,
        SPATIAL=arguments.taps(first), TEMPORAL=arguments.taps(second), X_ALIGN=x_align,
        Y_ALIGN=y_align, **arguments.layout(x, y, count), ACTIVATION=spec.activation,
        SLOPE=spec.slope,
        BLOCK_P=config.block_p, BLOCK_C=config.block_c, UNROLL=config.unroll,
        **arguments.arithmetic(x.dtype, dot=False),
    )  # fmt: skip
    return y


def _two_passes(problem: Problem, tensors: PairTensors, save: bool, rank: int = 0) -> PairResult:
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    first, second = problem.passes
    w1, b1, w2, b2 = tensors[1], tensors[3], tensors[2], tensors[4]
    if first.kind == "temporal":
        w1, b1, w2, b2 = w2, b2, w1, b1
    m, padded = problem.mid_channels, problem.mid_shape[-1]
    x, y = tensors.x, problem.empty_output(tensors.x)
    mid_rows = x.new_empty(problem.mid_shape)
    mid = mid_rows.permute(0, 4, 1, 2, 3)
    if first.groups > 1 and padded > m:
        mid_rows[..., m:].zero_()  # channels that belong to no group
    keep = save and not spec.recompute
    epilogue: dict[str, Any] = {"shift": b1, "slope": spec.slope, "rank": rank}
    prologue: dict[str, Any] = {"shift": b2, "slope": spec.slope, "rank": rank}
    mean = var = count = None
    if spec.norm == "frozen":
        scale, shift = finish_norm(problem, tensors, bias=None if keep else b1)
        if keep:
            prologue |= {"in_scale": scale, "in_shift": shift}
        else:
            epilogue |= {"scale": scale, "shift": shift}
    if keep or spec.norm == "batch":
        prologue["in_activation"] = spec.activation
    else:
        epilogue["activation"] = spec.activation
    if spec.norm == "batch":
        partial, rows = conv_pass(first, x, w1, mid, statistics=True, **epilogue)
        assert partial is not None
        mean, var = partial.new_empty(m), partial.new_empty(m)
        scale, shift = finish_norm(problem, tensors, mean, var, partial, rows)
        if spec.group:
            mean, var, count = collectives.pool_statistics(
                mean, var, problem.batch * math.prod(problem.mid_size),
                collectives.resolve(spec.group),
            )  # fmt: skip
            scale, shift = finish_norm(problem, tensors._replace(mean=mean, var=var))
        prologue.update(in_scale=scale, in_shift=shift)
    else:
        conv_pass(first, x, w1, mid, **epilogue)
    conv_pass(second, mid, w2, y, **prologue)
    return PairResult(y, mid_rows if keep else None, mean, var, count)
