"""``parallel_conv2plus1d``: one launch for ungrouped sums, else one for each branch into y."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ... import configs
from ...shapes import ParallelSpec, ParallelTensors, Pass, Problem
from . import arguments, launch
from .passes import candidates, conv_pass


def parallel_conv2plus1d(
    problem: Problem, tensors: ParallelTensors, like: Problem | None = None
) -> Tensor:
    """``like``: a problem as which it is run, in its configurations."""
    like = like or problem
    spec: ParallelSpec = problem.spec  # type: ignore[assignment]
    x, ws, wt, bs, bt = tensors
    spatial, temporal = problem.passes
    y = problem.empty_output(x)
    if spec.combine == "add" and spatial.groups == temporal.groups == 1:
        _parallel_conv(spec, spatial, temporal, tensors, y, like)
        return y
    one, two = (
        candidates(
            p, p.in_channels, like.batch * math.prod(like.out_size), x.dtype, x.device,
            x.stride(1) == 1,
        )[0]
        for p in like.passes
    )  # fmt: skip
    end: dict[str, Any] = {
        "inner": spec.branch_activation,
        "activation": spec.activation,
        "slope": spec.slope,
    }
    if spec.combine == "cat":
        conv_pass(spatial, x, ws, y[:, : spatial.out_channels], shift=bs, config=one, **end)
        conv_pass(temporal, x, wt, y[:, spatial.out_channels :], shift=bt, config=two, **end)
    else:
        inner: dict[str, Any] = {"inner": spec.branch_activation, "slope": spec.slope}
        conv_pass(spatial, x, ws, y, shift=bs, config=one, **inner)
        conv_pass(temporal, x, wt, y, shift=bt, residual=y, config=two, **end)
    return y


def _parallel_conv(
    spec: ParallelSpec,
    spatial: Pass,
    temporal: Pass,
    tensors: ParallelTensors,
    y: Tensor,
    like: Problem,
) -> None:
    """Both ungrouped branches, added, in one launch into y."""
    y_args, y_align = arguments.operand(y, y.shape[1])
    grid, config, args, meta = branches(spec, spatial, temporal, tensors, y, like)
    launch.run(
        launch.kernels().parallel.parallel_conv, grid, config, *args, *y_args, y.shape[1],
        y.shape[0] * math.prod(y.shape[2:]), Y_ALIGN=y_align, **meta,
    )  # fmt: skip


def branches(
    spec: ParallelSpec,
    spatial: Pass,
    temporal: Pass,
    tensors: ParallelTensors,
    y: Tensor,
    like: Problem | None = None,
) -> tuple[tuple[int], configs.TapConfig, tuple[Any, ...], dict[str, Any]]:
    """What ``kernels.parallel.branches`` needs: grid, configuration, arguments, the rest by name.

    y is a tensor like the output; the configuration is that of ``like``, by default of these
    tensors.
    """
    x, ws, wt, bs, bt = tensors
    channels, out_channels = x.shape[1], y.shape[1]
    count = y.shape[0] * math.prod(y.shape[2:])
    sizes = (count, channels, out_channels)
    if like is not None:
        sizes = (
            like.batch * math.prod(like.out_size), like.passes[0].in_channels, like.out_channels
        )  # fmt: skip
    config = configs.parallel_conv(
        *sizes, 1, math.prod(spatial.kernel) + temporal.kernel[0] - 1,
        x.dtype, arguments.uses_tensor_cores(x.dtype), launch.capability(x.device),
    )  # fmt: skip
    packed = [arguments.pack(w, 1, channels, config) for w in (ws, wt)]
    width = packed[0].shape[-1]
    x_args, x_align = arguments.operand(x, channels)
    meta = {
        "SPATIAL": arguments.taps(spatial), "TEMPORAL": arguments.taps(temporal),
        "FLAT": channels if config.flat else 0, "X_ALIGN": x_align,
        **arguments.layout(x, y, count), "BRANCH": spec.branch_activation,
        "ACTIVATION": spec.activation, "SLOPE": spec.slope, **arguments.tiling(config),
        **arguments.arithmetic(x.dtype),
    }  # fmt: skip
    grid = (-(-count // config.block_p) * (width // config.columns),)
    return grid, config, (*x_args, channels, *packed, width, bs, bt), meta
