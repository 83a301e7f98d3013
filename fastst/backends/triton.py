"""Triton kernels: every NVIDIA GPU from compute capability 8.0 on, without a compiler.

Each pass is a tap convolution (``kernels.tap_conv``) that reads x by its own strides. The pair
keeps u or, where nothing needs u, z = act(norm(u)) between its two as ``Problem.mid_shape``.
Under ``TRITON_INTERPRET=1`` the same code runs on CPU tensors, when asked for by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import configs
from ..shapes import PairSpec, PairTensors, ParallelSpec, ParallelTensors, Pass, Problem
from . import PairResult

_WIDE = 1 << 31  # positions from which coordinates are int64
_ON_CPU = "runs on CUDA tensors; on CPU tensors only with TRITON_INTERPRET=1 set at start"


@functools.cache
def _kernels() -> tuple[ModuleType | None, str | None]:
    """The kernels, or why there are none."""
    if importlib.util.find_spec("triton") is None:
        return None, "needs the package triton, which is not installed"
    try:
        from .. import kernels
        from ..kernels import depthwise, pair, statistics, tap_conv  # noqa: F401
    except Exception as error:  # a broken Triton must not break the other backends
        return None, f"needs a working Triton: importing it failed with {error!r}"
    return kernels, None


@functools.cache
def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (set before Triton was imported)."""
    kernels, _ = _kernels()
    return kernels is not None and type(kernels.tap_conv.tap_conv).__name__ == "InterpretedFunction"


@functools.cache
def capability(device: torch.device) -> configs.Capability:
    """Compute capability; that of the data-centre Hopper where the interpreter stands in."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def why_not(problem: Problem, phase: str) -> str | None:
    if phase != "forward":
        return "has no backward kernels yet"
    device = problem.device
    if device.type not in ("cuda", "cpu") or torch.version.hip is not None:
        return f"runs on NVIDIA GPUs, not on {device.type} tensors"
    # Asked first: importing Triton takes half a second that calls on a CPU need not pay.
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return _ON_CPU
    _, missing = _kernels()
    if missing is not None:
        return missing
    if device.type == "cpu":
        return None if interpreted() else _ON_CPU
    if interpreted():
        return (
            "interprets its kernels because TRITON_INTERPRET is set, and that on CPU tensors only"
        )
    has, least = capability(device), configs.LEAST_CAPABILITY
    if has < least:
        return "needs compute capability {}.{}, but {} has {}.{}".format(*least, device, *has)
    return None


def avoid(problem: Problem, phase: str) -> str | None:
    if problem.device.type == "cpu":
        return "interprets its kernels on CPU tensors, when asked for by name"
    from .. import selfcheck

    return selfcheck.why_broken("triton", problem)


def tf32_allowed() -> bool:
    """Whether float32 convolutions may round their operands to TF32, by PyTorch's own switch."""
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def conv2plus1d(problem: Problem, tensors: PairTensors, save: bool) -> PairResult:
    from .. import tuning

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
                math.prod(p.kernel), problem.dtype, uses_tensor_cores(problem.dtype),
                capability(problem.device),
            )  # fmt: skip
            tiles = max(tiles, len(found))
    one = ["one kernel"] if single_kernel(problem, save=False) else []
    return (one + [f"tiles {i}" for i in range(tiles)])[:12]


def trial(problem: Problem, phase: str, way: str) -> Callable[[], None]:
    """Run the problem once in one of its ways, on random tensors, to the end."""
    from .. import tuning

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
    if first.groups == second.groups == 1 and fits and uses_tensor_cores(problem.dtype):
        return "pair_conv"
    return None


def _pair_conv(problem: Problem, tensors: PairTensors) -> Tensor:
    kernels, _ = _kernels()
    assert kernels is not None
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    first, second = problem.passes
    x, y = tensors.x, problem.empty_output(tensors.x)
    channels, m, k = first.in_channels, first.out_channels, second.out_channels
    scale, shift = None, tensors.spatial_bias
    if spec.norm == "frozen":
        scale, shift = finish_norm(problem, tensors, bias=tensors.spatial_bias)
    count = problem.batch * math.prod(problem.out_size[1:])
    c = configs.pair_conv(channels, m, k, math.prod(first.kernel), capability(x.device))
    spatial = c.pass_config(c.block_m, c.block_k, c.flat)
    temporal = c.pass_config(c.block_n, c.block_m, False)
    packed = pack(tensors.spatial_weight, 1, channels, spatial)
    x_align, y_align = alignment(x, channels), alignment(y, k)
    launch(
        kernels.pair.pair_conv, (-(-count // c.block_p),), c,
        x, strides(x, x_align), tuple(x.shape[2:]), channels, m, k, packed, packed.shape[-1],
        pack(tensors.temporal_weight, 1, m, temporal), scale, shift, tensors.temporal_bias,
        y, strides(y, y_align), problem.out_size, problem.mid_size[0], count,
        SPATIAL=taps(first), TEMPORAL=taps(second), FLAT=channels if c.flat else 0,
        X_ALIGN=x_align, Y_ALIGN=y_align, RUN=run_length(x, y), WIDE=count >= _WIDE,
        ACTIVATION=spec.activation, SLOPE=spec.slope,
        BLOCK_P=c.block_p, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
        **arithmetic(x.dtype),
    )  # fmt: skip
    return y


def _depthwise_pair(problem: Problem, tensors: PairTensors) -> Tensor:
    kernels, _ = _kernels()
    assert kernels is not None
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    first, second = problem.passes
    x, y, channels = tensors.x, problem.empty_output(tensors.x), problem.out_channels
    scale, shift = None, tensors.spatial_bias
    if spec.norm == "frozen":
        scale, shift = finish_norm(problem, tensors, bias=tensors.spatial_bias)
    count = problem.batch * math.prod(problem.out_size[1:])
    config = configs.direct(
        count, channels, math.prod(first.kernel), x.stride(1) == 1, capability(x.device)
    )
    x_align, y_align = alignment(x, channels), alignment(y, channels)
    launch(
        kernels.depthwise.depthwise_pair,
        (-(-count // config.block_p) * -(-channels // config.block_c),), config,
        x, strides(x, x_align), tuple(x.shape[2:]),
        pack_direct(tensors.spatial_weight), pack_direct(tensors.temporal_weight), channels,
        scale, shift, tensors.temporal_bias, y, strides(y, y_align), problem.out_size,
        problem.mid_size[0], count,
        SPATIAL=taps(first), TEMPORAL=taps(second), X_ALIGN=x_align, Y_ALIGN=y_align,
        RUN=run_length(x, y), WIDE=count >= _WIDE, ACTIVATION=spec.activation, SLOPE=spec.slope,
        BLOCK_P=config.block_p, BLOCK_C=config.block_c, UNROLL=config.unroll,
        **arithmetic(x.dtype, dot=False),
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
    mean = var = None
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
        prologue.update(in_scale=scale, in_shift=shift)
    else:
        conv_pass(first, x, w1, mid, **epilogue)
    conv_pass(second, mid, w2, y, **prologue)
    return PairResult(y, mid_rows if keep else None, mean, var)


def parallel_conv2plus1d(problem: Problem, tensors: ParallelTensors) -> Tensor:
    spec: ParallelSpec = problem.spec  # type: ignore[assignment]
    x, ws, wt, bs, bt = tensors
    spatial, temporal = problem.passes
    y = problem.empty_output(x)
    if spec.combine == "add" and spatial.groups == temporal.groups == 1:
        _parallel_conv(spec, spatial, temporal, tensors, y)
        return y
    end: dict[str, Any] = {
        "inner": spec.branch_activation,
        "activation": spec.activation,
        "slope": spec.slope,
    }
    if spec.combine == "cat":
        conv_pass(spatial, x, ws, y[:, : spatial.out_channels], shift=bs, **end)
        conv_pass(temporal, x, wt, y[:, spatial.out_channels :], shift=bt, **end)
    else:
        conv_pass(spatial, x, ws, y, shift=bs, inner=spec.branch_activation, slope=spec.slope)
        conv_pass(temporal, x, wt, y, shift=bt, residual=y, **end)
    return y


def _parallel_conv(
    spec: ParallelSpec, spatial: Pass, temporal: Pass, tensors: ParallelTensors, y: Tensor
) -> None:
    """Both ungrouped branches, added, in one launch into y."""
    kernels, _ = _kernels()
    assert kernels is not None
    x, ws, wt, bs, bt = tensors
    channels, out_channels = x.shape[1], y.shape[1]
    count = y.shape[0] * math.prod(y.shape[2:])
    config = configs.parallel_conv(
        count, channels, out_channels, 1, math.prod(spatial.kernel) + temporal.kernel[0] - 1,
        x.dtype, uses_tensor_cores(x.dtype), capability(x.device),
    )  # fmt: skip
    packed = [pack(w, 1, channels, config) for w in (ws, wt)]
    width = packed[0].shape[-1]
    x_align, y_align = alignment(x, channels), alignment(y, out_channels)
    launch(
        kernels.tap_conv.parallel_conv,
        (-(-count // config.block_p) * (width // config.columns),), config,
        x, strides(x, x_align), tuple(x.shape[2:]), channels, *packed, width, bs, bt,
        y, strides(y, y_align), tuple(y.shape[2:]), out_channels, count,
        SPATIAL=taps(spatial), TEMPORAL=taps(temporal), FLAT=channels if config.flat else 0,
        X_ALIGN=x_align, Y_ALIGN=y_align, RUN=run_length(x, y), WIDE=count >= _WIDE,
        BRANCH=spec.branch_activation, ACTIVATION=spec.activation, SLOPE=spec.slope,
        **tiling(config), **arithmetic(x.dtype),
    )  # fmt: skip


def conv_pass(
    p: Pass,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    *,
    in_scale: Tensor | None = None,
    in_shift: Tensor | None = None,
    in_activation: str = "none",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    inner: str = "none",
    residual: Tensor | None = None,  # of the strides of y, or y itself
    activation: str = "none",
    slope: float = 0.01,
    statistics: bool = False,
    rank: int = 0,  # of the configuration among the candidates
) -> tuple[Tensor | None, int]:
    """One convolution into y (N, K, T', H', W'), any strides; u and z may have padding channels.

    Returns:
        Partials (tiles, 2, K) of the statistics of y, if asked for, and positions per tile.
    """
    kernels, _ = _kernels()
    assert kernels is not None
    groups = p.groups
    # Padding channels of u are zeros and cost nothing where the tile has room for them.
    channels = x.shape[1] if groups == 1 else p.in_channels // groups
    out_channels = p.out_channels // groups
    count = y.shape[0] * math.prod(y.shape[2:])
    common = {
        "RUN": run_length(x, y), "WIDE": count >= _WIDE, "IN_ACTIVATION": in_activation,
        "INNER": inner, "ACTIVATION": activation, "SLOPE": slope,
    }  # fmt: skip
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32

    def partials(block_p: int) -> tuple[int, Tensor | None]:
        tiles = -(-count // block_p)
        shape = (tiles, 2, p.out_channels)
        return tiles, x.new_empty(shape, dtype=accumulate) if statistics else None

    if configs.thin(channels, groups):
        direct = configs.direct(
            count, p.out_channels, math.prod(p.kernel), x.stride(1) == 1, capability(x.device)
        )
        tiles, partial = partials(direct.block_p)
        x_align, y_align = alignment(x, p.in_channels), alignment(y, p.out_channels)
        launch(
            kernels.depthwise.direct_conv, (tiles * -(-p.out_channels // direct.block_c),), direct,
            x, strides(x, x_align), tuple(x.shape[2:]), channels, out_channels, pack_direct(weight),
            in_scale, in_shift, scale, shift, partial,
            residual, None if residual is None else strides(residual, y_align),
            y, strides(y, y_align), tuple(y.shape[2:]), p.out_channels, count,
            TAPS=taps(p), X_ALIGN=x_align, Y_ALIGN=y_align, **common,
            BLOCK_P=direct.block_p, BLOCK_C=direct.block_c, UNROLL=direct.unroll,
            **arithmetic(x.dtype, dot=False),
        )  # fmt: skip
        return partial, direct.block_p

    stored = y.shape[1] if groups == 1 else out_channels
    found = configs.candidates(
        count, channels, out_channels, groups, math.prod(p.kernel), x.dtype,
        uses_tensor_cores(x.dtype), capability(x.device),
    )  # fmt: skip
    config = found[min(rank, len(found) - 1)]
    packed = pack(weight, groups, channels, config)
    x_align, y_align = alignment(x, channels), alignment(y, stored)
    tiles, partial = partials(config.block_p)
    launch(
        kernels.tap_conv.tap_conv, (tiles * groups * (packed.shape[-1] // config.columns),), config,
        x, strides(x, x_align), tuple(x.shape[2:]), channels, groups, packed, packed.shape[-1],
        in_scale, in_shift, scale, shift, partial,
        residual, None if residual is None else strides(residual, y_align),
        y, strides(y, y_align), tuple(y.shape[2:]), out_channels, stored, count,
        TAPS=taps(p), FLAT=channels if config.flat else 0, X_ALIGN=x_align, Y_ALIGN=y_align,
        **common, **tiling(config), **arithmetic(x.dtype),
    )  # fmt: skip
    return partial, config.block_p


def finish_norm(
    problem: Problem,
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
    kernels, _ = _kernels()
    assert kernels is not None
    m, padded = problem.mid_channels, problem.mid_shape[-1]
    total = problem.batch * math.prod(problem.mid_size)
    block_t, block_c, per_split = configs.combine(m)
    meta = {"BLOCK_T": block_t, "BLOCK_C": block_c, "ACCUMULATE": _dot_type(problem.dtype)}
    blocks = -(-padded // block_c)
    tiles = 0
    if partial is None:
        mean, var = t.mean, t.var
    else:
        tiles = partial.shape[0]
        if tiles > per_split:
            splits = -(-tiles // per_split)
            into = partial.new_empty((splits, 2, m))
            launch(
                kernels.statistics.combine_partials, (blocks, splits), None,
                partial, tiles, rows, total, m, into, per_split, **meta,
            )  # fmt: skip
            partial, tiles, rows = into, splits, rows * per_split
    scale, shift = (t.x.new_empty(padded, dtype=problem.accumulate_dtype) for _ in range(2))
    launch(
        kernels.statistics.finish_norm, (blocks,), None,
        partial, tiles, rows, total, mean, var, t.norm_weight, t.norm_bias, bias, scale, shift,
        m, padded, EPS=problem.spec.eps, **meta,  # type: ignore[union-attr]
    )  # fmt: skip
    return scale, shift


# ---- from tensors to kernel arguments


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    config: configs.TapConfig | configs.PairConfig | configs.StreamConfig | None,
    *args: Any,
    **meta: Any,
) -> None:
    """Run a kernel on the device of its first tensor."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    guard: Any = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    if config is not None:
        meta |= configs.launch_options(config)
    with guard:
        kernel[grid](*args, **meta)


def pack(weight: Tensor, groups: int, channels: int, config: configs.TapConfig) -> Tensor:
    """(K, C/g, kt, kh, kw) as (groups, reduction, width): see ``kernels.tap_conv``."""
    k, c = weight.shape[:2]
    w = weight.reshape(groups, k // groups, c, -1).permute(0, 3, 2, 1)  # (g, taps, C/g, K/g)
    width = configs.round_up(k // groups, config.columns) - k // groups
    if config.flat:
        w = F.pad(w, (0, 0, 0, channels - c)).flatten(1, 2)
        return F.pad(w, (0, width, 0, -w.shape[1] % config.block_k)).contiguous()
    depth = configs.round_up(channels, config.block_k) - c
    return F.pad(w, (0, width, 0, depth)).flatten(1, 2).contiguous()


def pack_direct(weight: Tensor) -> Tensor:
    """(K, C/g, kt, kh, kw) as (taps · C/g, K)."""
    return weight.flatten(2).permute(2, 1, 0).flatten(0, 1).contiguous()


def tiling(config: configs.TapConfig) -> dict[str, int]:
    return {
        "BLOCK_P": config.block_p, "BLOCK_N": config.block_n, "REST_N": config.rest_n,
        "BLOCK_K": config.block_k,
    }  # fmt: skip


def taps(p: Pass) -> Any:
    """Geometry of a pass as the kernels take it."""
    from ..kernels.common import Taps

    return Taps(p.kernel, p.stride, p.dilation, p.padding[::2], p.padding_mode)


def alignment(t: Tensor, channels: int) -> int:
    """Largest divisor up to 8 of row offsets and channel count, where channels are contiguous."""
    if t.stride(1) != 1:
        return 1
    used = (s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 and s != 1)
    return math.gcd(8, channels, *used)


def strides(t: Tensor, align: int) -> tuple[int, ...]:
    """Strides as the kernels take them: of positions in units of ``align``."""
    n, c, *thw = t.stride()
    return (n // align, c, *(s // align for s in thw))


def run_length(x: Tensor, y: Tensor) -> int:
    """Positions that are neighbours in memory for certain, where w is the contiguous axis."""
    contiguous = any(t.stride(4) == 1 != t.stride(1) for t in (x, y))
    return math.gcd(16, y.shape[4]) if contiguous else 1


def uses_tensor_cores(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2 or (dtype == torch.float32 and tf32_allowed())


def arithmetic(dtype: torch.dtype, dot: bool = True) -> dict[str, Any]:
    """How products and sums are formed; ``dot``: of matrices."""
    kinds: dict[str, Any] = {
        "EMULATE": interpreted() and dtype == torch.bfloat16,
        "ACCUMULATE": _dot_type(dtype),
    }
    if dot:
        tf32 = dtype == torch.float32 and tf32_allowed()
        kinds["PRECISION"] = "tf32" if tf32 else "ieee"
    return kinds


def _dot_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
