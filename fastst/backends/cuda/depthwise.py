"""The depthwise pair on the CUDA backend: which problems it fits, and its one or two launches.

Everything is channels-last: other layouts are copied into it on the way in and out. u is never
read: what needs it computes it again from x, which costs less than moving it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...problem.memory import read_address
from ...problem.spec import PairProblem, PairTensors
from ..contract import Begun, Gradients, PairBackward, PairResult
from .library import Launcher, is_emulated, launching, library

KERNELS = (3, 5)
STRIDES = (1, 2)
ROW = 8  # channels that are a multiple of it fill 16-byte rows in every dtype
# Time is cut when pixels and clips alone make fewer blocks than a large GPU runs at once, but not
# into pieces so short that the frames which neighbours load twice outweigh their own.
_FILLING_BLOCKS = 512
_LEAST_FRAMES = 8


def why_not(problem: PairProblem) -> str | None:
    if problem.spec.order != "spatial-first":
        return "run a spatial and then a temporal convolution"
    spatial, temporal = problem.passes
    channels = spatial.in_channels
    for p in problem.passes:
        if not channels == p.in_channels == p.out_channels == p.groups:
            return (
                f"need as many groups as channels in and out, not {p.groups} groups of "
                f"{p.in_channels} to {p.out_channels} channels"
            )
        if p.padding_mode != "zeros" and any(p.padding):
            return f"pad with zeros, not {p.padding_mode!r}"
        if any(pad >= k for pad, k in zip(p.padding, _twice_each(p.kernel), strict=True)):
            return f"need a padding below the kernel {p.kernel}, not {p.padding}"
        if any(d > 1 and k > 1 for d, k in zip(p.dilation, p.kernel, strict=True)):
            return f"need dilation 1, not {p.dilation}"
    if channels % ROW:
        return f"need channels that are a multiple of {ROW}, not {channels}"
    kt, (kh, kw) = temporal.kernel[0], spatial.kernel[1:]
    if kh != kw or kh not in KERNELS or kt not in KERNELS:
        return f"have kernels {KERNELS} × {KERNELS}², not {(kt, kh, kw)}"
    if spatial.stride[1] != spatial.stride[2] or spatial.stride[1] not in STRIDES:
        return f"need one spatial stride of {STRIDES}, not {spatial.stride[1:]}"
    if temporal.stride[0] > kt:
        return f"need a temporal stride of at most {kt}, not {temporal.stride[0]}"
    if problem.dtype == torch.float64:
        return "are for float16, bfloat16 and float32, not float64"
    if not (_stages(problem, False) and _stages(problem, True)):
        return "need more shared memory than a block of this GPU can have"
    return None


def _twice_each(kernel: Sequence[int]) -> list[int]:
    return [k for k in kernel for _ in range(2)]


def _stages(problem: PairProblem, backward: bool) -> int:
    """Frames of x in shared memory: 2 overlap loads with work, 1 where that is too much; or 0."""
    spatial, temporal = problem.passes
    index = problem.device.index or 0
    if problem.device.type == "cuda" and problem.device.index is None:
        index = torch.cuda.current_device()
    return _fitting_stages(
        is_emulated(), index, spatial.kernel[1], temporal.kernel[0], spatial.stride[1], backward
    )


@functools.cache
def _fitting_stages(
    emulate: bool, device: int, k: int, kt: int, stride: int, backward: bool
) -> int:
    lib = library()
    limit = lib.shared_memory_limit(device)
    fits = (s for s in (2, 1) if lib.depthwise_shared_bytes(k, kt, stride, s, backward) <= limit)
    return next(fits, 0)


def instance(problem: PairProblem, phase: str) -> str:
    """The name of the kernel of a phase, and of its tile."""
    spatial, temporal = problem.passes
    k, kt, stride = spatial.kernel[1], temporal.kernel[0], spatial.stride[1]
    stages = _stages(problem, phase == "backward")
    return f"depthwise {phase}, {kt} × {k}² of stride {stride}, {stages} stages"


def frames_per_block(frames: int, blocks: int) -> int:
    """Frames that one block walks over, where whole clips would make ``blocks`` blocks."""
    parts = min(-(-_FILLING_BLOCKS // max(blocks, 1)), max(1, frames // _LEAST_FRAMES))
    return -(-frames // parts)


class _Launches:
    """Forward and backward launches for one call."""

    def __init__(self, k: Launcher, problem: PairProblem, tensors: PairTensors) -> None:
        self.k, self.problem, self.tensors = k, problem, tensors
        self.x = channels_last(tensors.x)

    def _argument(
        self, coefficients: Tensor | None, frames: int, backward: bool
    ) -> tuple[Any, int]:
        """The library's description of the pair, and its number of partial results."""
        k, t, spec = self.k, self.tensors, self.problem.spec
        x, out = k.view(self.x), self.problem.out_size
        per_block = frames_per_block(frames, k.lib.depthwise_blocks(x, out, frames, backward))
        argument = k.lib.Depthwise(
            x, k.view(t.first_weight), k.view(t.second_weight), k.array(t.first_bias),
            k.array(t.second_bias), k.array(coefficients), spec.stride, spec.padding,
            k.act(spec.activation), k.slope, per_block, _stages(self.problem, backward),
        )  # fmt: skip
        return argument, k.lib.depthwise_blocks(x, out, per_block, backward)

    def forward(
        self, coefficients: Tensor | None, y: Tensor | None, u: Tensor | None, statistics: bool
    ) -> Tensor | None:
        """Fills y and u, where given; partial statistics of u, where asked for."""
        k, problem = self.k, self.problem
        argument, blocks = self._argument(coefficients, problem.out_size[0], False)
        partials = k.empty(blocks, 3, problem.mid_channels) if statistics else None
        k.lib.depthwise_forward(
            k.dtype, argument, None if y is None else k.view(y),
            None if u is None else k.view(u.permute(0, 4, 1, 2, 3)), problem.out_size,
            k.array(partials), k.stream,
        )  # fmt: skip
        return partials

    def backward(self, coefficients: Tensor | None, dy: Tensor, dx: Tensor | None) -> Tensor:
        """Fills dx, where given; the sums (kh·kw + kt + 4, C) that the library describes."""
        k, problem = self.k, self.problem
        argument, blocks = self._argument(coefficients, problem.mid_size[0], True)
        quantities = math.prod(problem.passes[0].kernel) + problem.passes[1].kernel[0] + 4
        partials = k.empty(blocks, quantities, problem.mid_channels)
        k.lib.depthwise_backward(
            k.dtype, argument, k.view(dy), None if dx is None else k.view(dx), k.array(partials),
            k.stream,
        )  # fmt: skip
        return k.sum_rows(partials)[0]


def channels_last(t: Tensor) -> Tensor:
    """t, or a copy of it, with the channels of a position in 16-byte rows."""
    row = 16 // t.itemsize
    strides = [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]
    others = [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 and s != 1]
    aligned = read_address(t) % 16 == 0 and all(s % row == 0 for s in others)
    if aligned and t.stride(1) == 1 and strides.count(1) == 1:
        return t
    return t.clone(memory_format=torch.channels_last_3d)


def forward(problem: PairProblem, tensors: PairTensors, save: bool) -> PairResult:
    spec = problem.spec
    x = tensors.x
    with launching(problem) as k:
        launches = _Launches(k, problem, tensors)
        u = x.new_empty(problem.mid_shape) if save and not spec.recompute else None
        mean, var, coefficients = tensors.mean, tensors.var, None
        if spec.norm == "batch":
            partials = launches.forward(None, None, u, True)
            assert partials is not None
            mean, var = k.combine_statistics(partials)
        if mean is not None and var is not None:
            coefficients = k.norm_coefficients(tensors, mean, var)
        y = problem.empty_output(x)
        rows = y
        if y.stride(1) != 1:
            rows = torch.empty_like(y, memory_format=torch.channels_last_3d)
        launches.forward(coefficients, rows, None if spec.norm == "batch" else u, False)
        if rows is not y:
            y.copy_(rows)
    if spec.norm != "batch":
        mean = var = None
    return PairResult(y, u, mean, var, k.total)


def first_pass(problem: PairProblem, tensors: PairTensors) -> Begun:
    """u, which autograd keeps, and its statistics; the kernels compute u again from x."""
    u = tensors.x.new_empty(problem.mid_shape)
    with launching(problem) as k:
        partials = _Launches(k, problem, tensors).forward(None, None, u, True)
        assert partials is not None
        mean, var = k.combine_statistics(partials)
    return Begun(u, mean, var, k.total)


def second_pass(problem: PairProblem, tensors: PairTensors, begun: Begun) -> PairResult:
    with launching(problem) as k:
        coefficients = k.norm_coefficients(tensors, begun.mean, begun.var)
        y = problem.empty_output(tensors.x)
        rows = y
        if y.stride(1) != 1:
            rows = torch.empty_like(y, memory_format=torch.channels_last_3d)
        _Launches(k, problem, tensors).forward(coefficients, rows, None, False)
        if rows is not y:
            y.copy_(rows)
    return PairResult(y, *begun)


def backward(call: PairBackward) -> Gradients:
    problem, tensors, need, spec = call.problem, call.tensors, call.need, call.problem.spec
    mean, var = call.statistics()
    taps, kt = math.prod(problem.passes[0].kernel), problem.passes[1].kernel[0]
    dx = dgamma = dbeta = None
    with launching(problem) as k:
        launches = _Launches(k, problem, tensors)
        dy = channels_last(call.dy_owner[0])
        coefficients = None
        if mean is not None and var is not None:
            coefficients = k.norm_coefficients(tensors, mean, var)
        if need.x:
            dx = call.empty_dx()
        rows = dx
        if dx is not None and channels_last(dx) is not dx:
            rows = torch.empty_like(dx, memory_format=torch.channels_last_3d)
        batch = spec.norm == "batch"
        # Through batch statistics du depends on sums over all of dv: it takes a pass of its own.
        sums = launches.backward(coefficients, dy, None if batch else rows)
        dwt, dbt = sums[taps : taps + kt], sums[taps + kt + 1]
        if coefficients is not None and mean is not None and var is not None:
            dbeta = sums[-2]
            dgamma = k.norm_gradient_coefficients(tensors, sums[-2:], (mean, var), coefficients)
            if batch and (need.x or need.first_weight or need.first_bias):
                sums = launches.backward(coefficients, dy, rows)
        if dx is not None and rows is not dx and rows is not None:
            dx.copy_(rows)
    dws, dbs = sums[:taps].t().contiguous(), sums[taps + kt]
    dwt = dwt.t().contiguous()
    weights = dws.view_as(tensors.first_weight), dwt.view_as(tensors.second_weight)
    return dx, *weights, dbs, dbt, dgamma, dbeta
