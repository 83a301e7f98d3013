"""What a call of ``conv3d`` computes, as plain data.

The letters of ``spec``; what the convolution reads is z = input_activation(input_norm(x)), of which
``past`` holds the frames before the first of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .norms import Norm, size_of_statistics
from .spec import (
    Padding,
    Pass,
    Problem,
    Triple,
    is_channels_last,
    memoize,
    offset_of,
    stride_of,
    time_height_width,
)


class ConvTensors(NamedTuple):
    """Tensor arguments of ``conv3d`` in the order of the op's schema."""

    x: Tensor  # (N, C, T, H, W)
    weight: Tensor  # (K, C/g, kt, kh, kw)
    bias: Tensor | None = None  # (K,)
    norm_weight: Tensor | None = None  # (C,) gamma
    norm_bias: Tensor | None = None  # (C,) beta
    mean: Tensor | None = None  # (C,) with norm="frozen"; with "batch" where they are known
    var: Tensor | None = None  # (C,) likewise, biased
    past: Tensor | None = None  # (N, C, P, H, W): z of the frames before x
    residual: Tensor | None = None  # (N, K, T', H', W'), any strides; may be x
    output_table: Tensor | None = None  # (5, K) by ``norms.tables``, with spec.output_norm


class ConvSpec(NamedTuple):
    """Everything about ``conv3d`` that is no tensor, in the order of the op's schema."""

    stride: Triple = (1, 1, 1)
    padding: Padding = (0, 0, 0, 0, 0, 0)  # before and after, of t, h, w
    dilation: Triple = (1, 1, 1)
    groups: tuple[int] = (1,)
    padding_mode: tuple[str, str] = ("zeros", "zeros")  # of height and width, and of time
    input_activation: str = "none"
    norm: str = "none"  # one of ``norms.KINDS``
    activation: str = "none"  # of y, after the residual; inference only
    slope: float = 0.01  # of leaky_relu, of either activation
    eps: float = 1e-5
    norm_groups: int = 1  # of norm="group"
    per_frame: bool = False  # norm="group" over each frame by itself
    output_statistics: bool = False  # also the mean and variance of y, for a norm that follows
    output_norm: bool = False  # of y, a frozen one, before the residual; inference only

    @property
    def norm_form(self) -> Norm:
        """The norm without its tensors."""
        return Norm(self.norm, None, None, self.norm_groups, self.per_frame, self.eps)


@dataclass(frozen=True, eq=False)
class ConvProblem(Problem):
    """A call of ``conv3d``: one pass."""

    op = "conv3d"

    spec: ConvSpec
    passes: tuple[Pass]
    past: int  # frames of z before x
    past_stride: tuple[int, ...] | None
    residual_stride: tuple[int, ...] | None  # of what is added to y

    @staticmethod
    def of(tensors: ConvTensors, spec: ConvSpec) -> ConvProblem:  # type: ignore[override]  # of other tensors
        """Describe a validated call. Remembered by sizes, so that it costs little on every one."""
        x, w = tensors[:2]
        found: ConvProblem = _describe(
            spec, x.shape, x.stride(), offset_of(x), x.dtype, x.device, w.shape, w.stride(),
            tuple([getattr(t, "dtype", None) for t in tensors[2:]]),
            0 if tensors.past is None else tensors.past.shape[2],
            stride_of(tensors.past), stride_of(tensors.residual),
        )  # fmt: skip
        return found

    @property
    def residual(self) -> bool:
        """Whether something is added to y."""
        return self.residual_stride is not None

    @property
    def conv(self) -> Pass:
        return self.passes[0]

    @property
    def read_size(self) -> Triple:
        """(T, H, W) of what the convolution reads, before padding."""
        return (self.past + self.size[0], *self.size[1:])

    @property
    def in_channels(self) -> int:
        return self.conv.in_channels

    @property
    def in_shape(self) -> tuple[int, int, int, int, int]:
        return (self.batch, self.in_channels, *self.size)

    @property
    def statistics_shape(self) -> tuple[int, ...]:
        """Shape of mean and variance of the norm of x."""
        return size_of_statistics(self.spec.norm_form, self.in_shape)

    def bytes(self, mid_transfers: int) -> int:
        """Bytes moved: x, past, weights, residual and y once each."""
        past = self.batch * self.in_channels * self.past * math.prod(self.size[1:])
        residual = math.prod(self.out_shape) if self.residual else 0
        return super().bytes(mid_transfers) + (past + residual) * self.dtype.itemsize


@memoize
def _describe(
    spec: ConvSpec,
    x: Sequence[int],
    x_stride: Sequence[int],
    x_offset: int,
    dtype: torch.dtype,
    device: torch.device,
    w: Sequence[int],
    w_stride: Sequence[int],
    others: tuple[torch.dtype | None, ...],
    past: int,
    past_stride: tuple[int, ...] | None,
    residual_stride: tuple[int, ...] | None,
) -> ConvProblem:
    """The problem of tensors with these shapes and strides."""
    size, kernel = time_height_width(x), time_height_width(w)
    channels_last = any(is_channels_last(*layout) for layout in ((x, x_stride), (w, w_stride)))
    dt, dh, dw = (d if k > 1 else 1 for d, k in zip(spec.dilation, kernel, strict=True))
    space, time = spec.padding_mode
    conv = Pass(
        "full", w[1] * spec.groups[0], w[0], kernel, spec.stride, spec.padding,
        (dt, dh, dw), spec.groups[0], space, time,
    )  # fmt: skip
    out = conv.out_size((past + size[0], *size[1:]))
    return ConvProblem(
        spec, (conv,), x[0], size, out, w[0], dtype, device, channels_last, tuple(x_stride),
        x_offset, (tuple(w_stride),), others, past, past_stride, residual_stride,
    )  # fmt: skip


def problem_of(tensors: Any, spec: Any) -> Problem:
    """The problem of a validated call of any op."""
    if isinstance(tensors, ConvTensors):
        return ConvProblem.of(tensors, spec)
    return Problem.of(tensors, spec)
