"""``parallel_conv2plus1d``: one launch for ungrouped sums, else one for each branch into y.

Backward runs each branch's gradient kernels; only where activations make the branches differ from
dy are their gradients tensors of their own, of which the branches' outputs are computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import activations, configs
from ...shapes import ParallelSpec, ParallelTensors, Pass, Problem
from . import arguments, launch
from .backward import pass_gradients
from .gradients import channel_sums
from .passes import conv_pass


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


def parallel_conv2plus1d_backward(
    problem: Problem, tensors: ParallelTensors, dy: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    x, ws, wt, bs, bt = tensors
    dx, dws, dwt, dbs, dbt = needs
    grads: list[Tensor | None] = [None] * 5
    branches = zip(problem.passes, (ws, wt), (bs, bt), (dws, dwt), (dbs, dbt), strict=True)
    above = _branch_gradients(problem, tensors, dy)
    for i, (g, (p, w, b, need_w, need_b)) in enumerate(zip(above, branches, strict=True)):
        into = torch.empty_like(x) if dx else None
        if dx or need_w:
            _, grads[1 + i] = pass_gradients(p, x, g, w, into, need_w)
        if need_b:
            assert b is not None
            grads[3 + i] = channel_sums(g, b)
        if into is not None:
            grads[0] = into if grads[0] is None else grads[0].add_(into)
    return [g for g in grads if g is not None]


def _branch_gradients(problem: Problem, tensors: ParallelTensors, dy: Tensor) -> list[Tensor]:
    """Gradients of what leaves the two convolutions, from that of y."""
    spec: ParallelSpec = problem.spec  # type: ignore[assignment]
    x, ws, wt, bs, bt = tensors
    channels = [p.out_channels for p in problem.passes]
    inner, outer, slope = spec.branch_activation, spec.activation, spec.slope
    if inner == outer == "none":
        return [dy, dy] if spec.combine == "add" else list(dy.split(channels, 1))
    rows = [x.new_empty((problem.batch, *problem.out_size, k)) for k in channels]
    ab = [r.permute(0, 4, 1, 2, 3) for r in rows]
    for p, w, b, out in zip(problem.passes, (ws, wt), (bs, bt), ab, strict=True):
        conv_pass(p, x, w, out, shift=b)
    if outer != "none":
        after = [activations.apply(inner, t, slope) for t in ab]
        y = after[0] + after[1] if spec.combine == "add" else torch.cat(after, 1)
        dy = activations.grad(outer, dy, y, slope)
    parts = [dy, dy] if spec.combine == "add" else dy.split(channels, 1)
    return [activations.grad(inner, g, t, slope) for g, t in zip(parts, ab, strict=True)]


def _parallel_conv(
    spec: ParallelSpec, spatial: Pass, temporal: Pass, tensors: ParallelTensors, y: Tensor
) -> None:
    """Both ungrouped branches, added, in one launch into y."""
    kernels = launch.kernels()
    x, ws, wt, bs, bt = tensors
    channels, out_channels = x.shape[1], y.shape[1]
    count = y.shape[0] * math.prod(y.shape[2:])
    config = configs.parallel_conv(
        count, channels, out_channels, 1, math.prod(spatial.kernel) + temporal.kernel[0] - 1,
        x.dtype, arguments.uses_tensor_cores(x.dtype), launch.capability(x.device),
    )  # fmt: skip
    packed = [arguments.pack(w, 1, channels, config) for w in (ws, wt)]
    width = packed[0].shape[-1]
    x_args, x_align = arguments.operand(x, channels)
    y_args, y_align = arguments.operand(y, out_channels)
    launch.run(
        kernels.tap_conv.parallel_conv,
        (-(-count // config.block_p) * (width // config.columns),), config,
        *x_args, channels, *packed, width, bs, bt, *y_args, out_channels, count,
        SPATIAL=arguments.taps(spatial), TEMPORAL=arguments.taps(temporal),
        FLAT=channels if config.flat else 0, X_ALIGN=x_align, Y_ALIGN=y_align,
        **arguments.layout(x, y, count),
        BRANCH=spec.branch_activation, ACTIVATION=spec.activation, SLOPE=spec.slope,
        **arguments.tiling(config), **arguments.arithmetic(x.dtype),
    )  # fmt: skip
