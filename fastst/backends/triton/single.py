"""The pair in one kernel: which one can, whether it pays, and how it is started."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...machine import gpu
from ...problem.spec import PairProblem, PairTensors, Pass
from . import arguments, launch
from . import tiles as configs
from .packing import Weight, pack_direct, pack_weight

# Of compilers that are known to get kernels with several products in a loop wrong: major compute
# capability, first version of Triton without it (None: not yet), what goes wrong, and where it is
# told (github.com/triton-lang/triton/issues).
MISCOMPILED: tuple[tuple[int, tuple[int, ...] | None, str, str], ...] = (
    (9, (3, 8), "may read what is not its own or compute wrong numbers", "#10486 and #11366"),
    (10, None, "may lose products that are chained through one sum", "#10821 and #10988"),
)


def why_miscompiled(device: torch.device) -> str | None:
    """Why ``pair_conv`` is not trusted to the compiler for a GPU, as the end of "pair_conv …"."""
    if launch.is_interpreted():
        return None
    major, version = launch.capability(device)[0], launch.triton_version()
    for architecture, mended, fault, where in MISCOMPILED:
        if major == architecture and (mended is None or version < mended):
            told = ".".join(map(str, version))
            return f"{fault} as Triton {told} compiles it for {major}.x (issues {where} of Triton)"
    return None


def available(problem: PairProblem) -> list[str]:
    """Kernels that can run the pair where nobody asks for the mid tensor."""
    trusted = why_miscompiled(problem.device) is None
    return [k for k in fitting_kernels(problem) if k != "pair_conv" or trusted]


def fitting_kernels(problem: PairProblem) -> list[str]:
    """Kernels that a pair fits into, whatever the compiler makes of them."""
    first, second = problem.passes
    sums = second.kernel[_axis(problem)]
    found = []
    thin = second.groups > 1 and max(_per_group(first), _per_group(second)) <= configs.THIN
    if thin and configs.direct_fits(sums):
        found.append("direct_pair")
    out_channels = second.out_channels // second.groups
    cores = arguments.uses_tensor_cores(problem.dtype)
    if first.groups == second.groups and configs.pair_fits(
        out_channels, sums, problem.dtype, cores
    ):
        found.append("pair_conv")
    return found


def predict(problem: PairProblem) -> str | None:
    """The one of ``available`` that is expected to be faster than two passes, if any."""
    spec = problem.spec
    size, dtype = problem.dtype.itemsize, problem.dtype
    cores = arguments.uses_tensor_cores(dtype)
    x = problem.batch * problem.passes[0].in_channels * math.prod(problem.size) * size
    mid = problem.batch * problem.mid_channels * math.prod(problem.mid_size) * size
    y = math.prod(problem.out_shape) * size * (2 if problem.residual else 1)

    def time_alone(index: int, moved: float) -> float:
        p = problem.passes[index]
        thin = configs.is_thin(_per_group(p), p.groups)
        flat = _per_group(p) * (math.prod(p.kernel) if _per_group(p) < 16 else 1)
        out_channels = p.out_channels // p.groups
        padding = 1.0 if thin else _padding(flat) * _padding(out_channels)
        positions = problem.batch * math.prod((problem.mid_size, problem.out_size)[index])
        flops = p.flops(positions) * padding
        if cores and not thin:
            flops *= configs.tap_slots(out_channels)
        return configs.least_time(flops, moved, dtype, cores and not thin)

    two = time_alone(0, x + mid) + time_alone(1, mid + y)
    best = None
    for kernel in available(problem):
        flops = _direct_flops(problem) if kernel == "direct_pair" else _pair_flops(problem)
        if cores and kernel == "pair_conv":
            flops *= configs.pair_slots(_pair_config(problem))
        one = configs.least_time(flops, x + y, dtype, cores and kernel == "pair_conv")
        if spec.norm == "batch":
            one += time_alone(0, x)  # for its statistics
        # Dense passes by themselves come close to the roofline; a walk has less to overlap.
        if one * (1.15 if problem.passes[0].groups == 1 else 1) <= two:
            best, two = kernel, one
    return best


def _padding(channels: int) -> float:
    """Products that tiles of 16 compute for each that so many channels need."""
    return gpu.round_up(channels, 16) / channels


def _evaluations(problem: PairProblem) -> int:
    """Mid positions that a single kernel computes: each column tap computes its own."""
    axis, out = _axis(problem), list(problem.out_size)
    out[axis] = problem.mid_size[axis]
    return problem.batch * math.prod(out) * problem.passes[1].kernel[2]


def _direct_flops(problem: PairProblem) -> float:
    first, second = problem.passes
    mids = second.out_channels * _per_group(
        second
    )  # each output channel computes those that it reads
    taps = math.prod(first.kernel) * _per_group(first) + second.kernel[_axis(problem)]
    return 2.0 * _evaluations(problem) * mids * taps


def _pair_flops(problem: PairProblem) -> float:
    first, second = problem.passes
    c = _pair_config(problem)
    width = c.mid_width(first.out_channels // first.groups)
    reduction = math.prod(first.kernel) * _per_group(first)
    if not c.flat:
        reduction = math.prod(first.kernel) * gpu.round_up(_per_group(first), c.block_k)
    taps = reduction + second.kernel[_axis(problem)] * c.block_n
    return 2.0 * _evaluations(problem) * first.groups * width * taps


def _pair_config(problem: PairProblem) -> configs.PairConfig:
    first, second = problem.passes
    return configs.pair_conv(
        _per_group(first), first.out_channels // first.groups, second.out_channels // second.groups,
        math.prod(first.kernel), problem.dtype, arguments.uses_tensor_cores(problem.dtype),
        launch.capability(problem.device),
    )  # fmt: skip


def run(
    kernel: str,
    problem: PairProblem,
    tensors: PairTensors,
    y: Tensor,
    scale: Tensor | None,  # (M,) of the norm, or None
    shift: Tensor | None,  # (M,) with the bias of the first pass folded in, or None
    like: PairProblem,  # whose configuration is used
) -> None:
    """Both passes into y, with residual and outer activation."""
    x, spec, axis = tensors.x, problem.spec, _axis(problem)
    first, second = problem.passes
    describe = _direct if kernel == "direct_pair" else _matrix
    chosen = describe(problem, tensors, like)
    config = chosen.config
    end, y_align = arguments.results(y, tensors.residual, chosen.y_channels)
    count = problem.batch * _positions_across(problem)
    run = arguments.run_length(x, y)
    programs, pieces = _programs(problem, -(-count // config.block_p) * chosen.tiles)
    launch.run(
        chosen.kernel, (programs,), config, *chosen.x, *chosen.weights, scale, shift,
        tensors.second_bias, *end,
        arguments.hide(*y.shape[2:]), arguments.hide(*problem.mid_size),
        arguments.grid(tuple(1 if i == axis else n for i, n in enumerate(y.shape[2:])), run),
        count, pieces,
        FIRST=arguments.taps(first), SECOND=arguments.taps(second), AXIS=axis,
        X_ALIGN=chosen.x_align, Y_ALIGN=y_align, RUN=run, WIDE=arguments.is_wide(count),
        ACTIVATION=spec.activation, OUTER=spec.outer_activation, SLOPE=spec.slope,
        BLOCK_P=config.block_p, **chosen.meta,
        **arguments.arithmetic(x.dtype, dot=kernel == "pair_conv"),
    )  # fmt: skip


class _Kernel(NamedTuple):
    """What one of the kernels takes that the other does not."""

    kernel: Any
    config: configs.StreamConfig | configs.PairConfig
    x: tuple[Any, ...]
    x_align: int
    weights: tuple[Any, ...]
    y_channels: int  # of all groups, or of each
    tiles: int  # of channels
    meta: dict[str, int]


def _direct(problem: PairProblem, tensors: PairTensors, like: PairProblem) -> _Kernel:
    first, second = problem.passes
    m, k, x = first.out_channels, second.out_channels, tensors.x
    config = configs.direct(
        like.batch * _positions_across(like), like.out_channels, math.prod(first.kernel),
        x.stride(1) == 1, launch.capability(launch.device()), second.kernel[_axis(problem)],
    )  # fmt: skip
    weights = (
        _per_group(first), m // first.groups, m, _per_group(second), k // second.groups, k,
        pack_direct(Weight.of(tensors.first_weight, 1)),
        pack_direct(Weight.of(tensors.second_weight, 1)),
    )  # fmt: skip
    meta = {"BLOCK_C": config.block_c, "UNROLL": config.unroll}
    kernel = launch.kernels().depthwise.direct_pair
    read = arguments.operand(x, first.in_channels)
    return _Kernel(kernel, config, *read, weights, k, -(-k // config.block_c), meta)


def _matrix(problem: PairProblem, tensors: PairTensors, like: PairProblem) -> _Kernel:
    first, second = problem.passes
    config, groups, channels = _pair_config(like), first.groups, _per_group(first)
    m, k = first.out_channels // groups, second.out_channels // second.groups
    width = config.mid_width(m)
    depth = channels if config.flat else gpu.round_up(channels, config.block_k)
    reduction = gpu.round_up(depth * math.prod(first.kernel), config.block_k)
    one = pack_weight(Weight.of(tensors.first_weight, groups), depth, reduction, width)
    other = pack_weight(
        Weight.of(tensors.second_weight, groups), width, width * math.prod(second.kernel),
        config.block_n,
    )  # fmt: skip
    meta = {
        "FLAT": channels if config.flat else 0, "BLOCK_M": config.block_m, "REST_M": config.rest_m,
        "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }  # fmt: skip
    kernel, read = launch.kernels().pair.pair_conv, arguments.operand(tensors.x, channels)
    weights = (channels, m, k, groups, one, width, other)
    return _Kernel(kernel, config, *read, weights, k, groups, meta)


def _axis(problem: PairProblem) -> int:
    """The axis (of t, h, w) along which a single kernel walks: that of the second pass."""
    return 0 if problem.passes[1].kind == "temporal" else 1


def _positions_across(problem: PairProblem) -> int:
    """Positions of one clip of y across that axis."""
    return math.prod(n for i, n in enumerate(problem.out_size) if i != _axis(problem))


def _per_group(p: Pass) -> int:
    """Channels that each output of a pass reads."""
    return p.in_channels // p.groups


def _programs(problem: PairProblem, tiles: int) -> tuple[int, int]:
    """Programs for so many tiles, and how many of them share one walk."""
    axis, second = _axis(problem), problem.passes[1]
    walks = second.dilation[axis]  # each through one residue class
    outputs = -(-((problem.out_size[axis] - 1) * second.stride[axis] + 1) // walks)
    pieces = configs.pieces(
        tiles * walks, outputs, second.kernel[axis], launch.capability(problem.device)
    )
    return tiles * walks * pieces, pieces
