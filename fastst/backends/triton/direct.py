"""Both gradients of a depthwise or thinly grouped pass, from one kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...problem.spec import Pass
from . import arguments, gradient_tiles, launch
from .gradients import DIRECT, NormTerms, accumulate_dtype, finish_weight, sum_rows
from .packing import Weight, pack_direct


def direct_gradients(
    p: Pass,
    x: Tensor,
    dy: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    needs_weight: bool,
    *,
    x_scale: Tensor | None = None,
    x_shift: Tensor | None = None,
    activation: str = "none",
    norm: NormTerms | None = None,
    mean: Tensor | None = None,
    sums: bool = False,
    slope: float = 0.01,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input, written into dx, and of the weight of a pass.

    The pass has read act(x_scale·x + x_shift); dx, where it is given, is the gradient of what is in
    the brackets. With ``norm`` dy is dv and du comes from above. x, dx and dy may have padding
    channels; where the activation is not "none" or there is a mean, dx has the strides of x.

    Returns:
        With ``sums``, partials (tiles, 2, C) of Σdx and, where there is a mean, Σdx·(x − mean); and
        the gradient of the weight, in its dtype or another, and the strides of
        ``torch.empty_like``.
    """
    channels, taps = p.in_channels, math.prod(p.kernel)
    per_group, out_per_group = channels // p.groups, p.out_channels // p.groups
    count = x.shape[0] * math.prod(x.shape[2:])
    c = gradient_tiles.direct_gradients(
        count, channels, dy.stride(1) == 1, launch.capability(launch.device())
    )
    stored = channels if dx is None else dx.shape[1]
    tiles = -(-count // c.block_p)
    wide = accumulate_dtype(x.dtype)
    partial = x.new_empty((tiles, 2, channels), dtype=wide) if sums else None
    parts = (
        x.new_empty((tiles, taps, out_per_group, channels), dtype=wide) if needs_weight else None
    )
    x_args, x_align = arguments.operand(x, channels)
    dy_args, dy_align = arguments.operand(dy, p.out_channels)
    dx_align = 1 if dx is None else arguments.alignment(dx, math.gcd(channels, stored))
    run = arguments.run_length(dy, x)
    launch.run(
        launch.kernels().depthwise_backward.direct_gradients,
        (tiles * -(-stored // c.block_c),), c,
        *x_args, arguments.grid(x.shape[2:], run), channels, stored, per_group, out_per_group,
        x_scale, x_shift,
        *dy_args, *(norm or NormTerms()), pack_direct(Weight.of_inputs(weight, p.groups)),
        dx, None if dx is None else arguments.strides(dx, dx_align),
        x if activation != "none" or mean is not None else None, mean, partial, parts, count,
        TAPS=arguments.transposed_taps(p), X_ALIGN=x_align, Y_ALIGN=dy_align, DX_ALIGN=dx_align,
        RUN=run, WIDE=arguments.is_wide(count), ACTIVATION=activation, SLOPE=slope,
        BLOCK_P=c.block_p, BLOCK_C=c.block_c, **arguments.arithmetic(x.dtype, dot=False),
    )  # fmt: skip
    return partial, None if parts is None else finish_direct(p, parts, weight, dtype)


def finish_direct(
    p: Pass, parts: Tensor, weight: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """The sum of the (tiles, taps, K/g, C) parts, in the dtype and the strides of the weight."""
    dw = torch.empty_like(weight, dtype=dtype)
    total = sum_rows(parts.flatten(1), parts.new_empty(parts.shape[1:]))
    finish_weight(total[None], Weight.of_inputs(dw, p.groups), DIRECT, parts.shape[2])
    return dw
