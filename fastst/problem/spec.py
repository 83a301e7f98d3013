"""What a call computes, as plain data: the specification, its tensors, and the sizes that follow.

Letters (see CONTRIBUTING): the input ``x`` is ``(N, C, T, H, W)``; the first pass writes ``M`` mid
channels, the second ``K`` output channels; triples are in the order time, height, width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, wraps
from typing import Any, ClassVar, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from .memory import read_address

PADDING_MODES = ("zeros", "replicate", "reflect", "circular")
ORDERS = ("spatial-first", "temporal-first")
NORMS = ("none", "batch", "frozen")
COMBINES = ("add", "cat")

T = TypeVar("T")
Some = TypeVar("Some", bound="Problem")
Triple = tuple[int, int, int]
Padding = tuple[int, int, int, int, int, int]


def time_height_width(shape: Sequence[int]) -> Triple:
    """The last three of the five sizes of a clip or of a weight."""
    _, _, t, h, w = shape
    return t, h, w


def memoize(function: Callable[..., Any]) -> Any:
    """``lru_cache``, but not while a graph is traced, nor for symbolic sizes, which do not hash."""
    lookup = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        try:
            return lookup(*args)
        except TypeError:
            return function(*args)

    return call


class PairTensors(NamedTuple):
    """Tensor arguments of ``conv2plus1d`` in the order of the op's schema.

    The two passes are in the order of execution from here on: ``functional`` alone turns
    (spatial, temporal) into (first, second), by ``in_execution_order``.
    """

    x: Tensor  # (N, C, T, H, W)
    first_weight: Tensor  # (M, C/g, 1, kh, kw), or (M, C/g, kt, 1, 1) when temporal-first
    second_weight: Tensor  # (K, M/g, kt, 1, 1), or (K, M/g, 1, kh, kw) when temporal-first
    first_bias: Tensor | None = None
    second_bias: Tensor | None = None
    norm_weight: Tensor | None = None  # (M,) gamma
    norm_bias: Tensor | None = None  # (M,) beta
    mean: Tensor | None = None  # (M,) only with norm="frozen"
    var: Tensor | None = None  # (M,) only with norm="frozen", biased as it stands
    residual: Tensor | None = None  # (N, K, T', H', W'), any strides; may be x; inference only
    outer_table: Tensor | None = None  # (5, K) by ``norms.tables``, with spec.outer_norm


class BatchNorm(NamedTuple):
    """Batch norm between the two passes: the arguments of ``torch.nn.functional.batch_norm``.

    In training the statistics of the batch normalise, and running_mean and running_var, where
    given, are updated in place (with the unbiased variance). Otherwise the running ones normalise.

    Attributes:
        running_mean: (M,) or None.
        running_var: (M,) or None.
        weight: (M,) gamma, or None for ones.
        bias: (M,) beta, or None for zeros.
        training: normalise with the statistics of this batch.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        group: name of a process group (``ProcessGroup.group_name``) over whose ranks the statistics
            of the batch are taken in training, as by ``nn.SyncBatchNorm``; "" for this rank alone.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    group: str = ""


class PairSpec(NamedTuple):
    """Everything about ``conv2plus1d`` that is no tensor, in the order of the op's schema."""

    stride: Triple = (1, 1, 1)
    padding: Padding = (0, 0, 0, 0, 0, 0)  # before and after, of t, h, w
    dilation: Triple = (1, 1, 1)
    groups: tuple[int, int] = (1, 1)  # of the spatial and of the temporal pass
    padding_mode: tuple[str, str] = ("zeros", "zeros")  # of the spatial and of the temporal pass
    activation: str = "relu"
    slope: float = 0.01  # of leaky_relu only
    norm: str = "none"  # "batch": statistics of this batch; "frozen": mean and var are given
    eps: float = 1e-5
    order: str = "spatial-first"
    recompute: bool = False  # keep only x for backward, not the mid tensor u
    outer_activation: str = "none"  # of y, after the residual; inference only
    group: str = ""  # name of the process group whose batches norm="batch" takes together
    output_statistics: bool = False  # also the mean and variance of y, for a norm that follows
    outer_norm: bool = False  # of y, a frozen one, before the residual; inference only


class ParallelTensors(NamedTuple):
    """Tensor arguments of ``parallel_conv2plus1d`` in the order of the op's schema."""

    x: Tensor  # (N, C, T, H, W)
    spatial_weight: Tensor  # (Ks, C/g, 1, kh, kw)
    temporal_weight: Tensor  # (Kt, C/g, kt, 1, 1)
    spatial_bias: Tensor | None = None
    temporal_bias: Tensor | None = None


class ParallelSpec(NamedTuple):
    """Everything about ``parallel_conv2plus1d`` that is no tensor, in the order of the schema."""

    stride: Triple = (1, 1, 1)
    padding: Padding = (0, 0, 0, 0, 0, 0)
    dilation: Triple = (1, 1, 1)
    groups: tuple[int, int] = (1, 1)
    padding_mode: tuple[str, str] = ("zeros", "zeros")
    branch_activation: str = "none"  # of each branch, before they are combined
    activation: str = "none"  # after they are combined
    slope: float = 0.01
    combine: str = "add"


class Pass(NamedTuple):
    """One convolution: of a pair a spatial (1, kh, kw) or a temporal (kt, 1, 1) one."""

    kind: str  # "spatial" | "temporal" | "full"
    in_channels: int
    out_channels: int
    kernel: Triple
    stride: Triple
    padding: Padding
    dilation: Triple
    groups: int
    padding_mode: str
    frame_mode: str | None = None  # the padding mode of time, where it is another one

    @property
    def modes(self) -> tuple[str, str, str]:
        """Padding modes of t, h, w."""
        return self.frame_mode or self.padding_mode, self.padding_mode, self.padding_mode

    def out_size(self, size: Triple) -> Triple:
        """(T, H, W) of the output for (T, H, W) of the input."""
        p = self.padding
        t, h, w = (
            (size[i] + p[2 * i] + p[2 * i + 1] - self.dilation[i] * (self.kernel[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in range(3)
        )
        return t, h, w

    def subsampling(self) -> tuple[Triple, Pass]:
        """Steps along the axes with one tap, and the pass with stride and dilation 1 there.

        Over one tap a stride only says which values are read. PyTorch's convolutions are given
        none: oneDNN's weight gradient of 1×1 channels-last ones with unequal strides writes out of
        bounds, and its bfloat16 gradients with a dilation over one tap are wrong.
        """
        steps, stride, dilation = zip(
            *(
                (s, 1, 1) if k == 1 else (1, s, d)
                for k, s, d in zip(self.kernel, self.stride, self.dilation, strict=True)
            ),
            strict=True,
        )
        return steps, self._replace(stride=stride, dilation=dilation)

    def flops(self, out_positions: int) -> int:
        """Multiplications and additions, padding counted as if it were multiplied."""
        taps = math.prod(self.kernel)
        return 2 * out_positions * taps * (self.in_channels // self.groups) * self.out_channels


def _passes(
    spec: PairSpec | ParallelSpec, ws: Sequence[int], wt: Sequence[int]
) -> tuple[Pass, Pass]:
    """The spatial and the temporal pass, each with its own dimensions of stride and padding."""
    stride, padding, groups, padding_mode = (
        spec.stride,
        spec.padding,
        spec.groups,
        spec.padding_mode,
    )
    # A single tap has no dilation; PyTorch's bfloat16 input gradient on CPUs is wrong if told one.
    kernel = (wt[2], ws[3], ws[4])
    dt, dh, dw = (d if k > 1 else 1 for d, k in zip(spec.dilation, kernel, strict=True))
    spatial = Pass(
        "spatial", ws[1] * groups[0], ws[0], (1, ws[3], ws[4]), (1, *stride[1:]),
        (0, 0, *padding[2:]), (1, dh, dw), groups[0], padding_mode[0],
    )  # fmt: skip
    temporal = Pass(
        "temporal", wt[1] * groups[1], wt[0], (wt[2], 1, 1), (stride[0], 1, 1),
        (*padding[:2], 0, 0, 0, 0), (dt, 1, 1), groups[1], padding_mode[1],
    )  # fmt: skip
    return spatial, temporal


def in_execution_order(order: str, spatial: T, temporal: T) -> tuple[T, T]:
    """What belongs to the first and to the second pass."""
    return (temporal, spatial) if order == "temporal-first" else (spatial, temporal)


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of an op: specification, sizes, dtype, device and layout; what dispatch decides on.

    Hashed by identity, which costs nothing: ``of`` gives the same object for the same call.
    """

    op: ClassVar[str]

    spec: Any  # narrowed by what a problem is
    passes: tuple[Pass, ...]
    batch: int
    size: Triple  # (T, H, W) of x
    out_size: Triple
    out_channels: int
    dtype: torch.dtype
    device: torch.device
    channels_last: bool  # memory format of the output
    x_stride: tuple[int, ...]  # of x, in elements
    x_offset: int  # bytes from an address that is a multiple of 16 to x
    weight_strides: tuple[tuple[int, ...], ...]  # in the order of the tensors
    others: tuple[torch.dtype | None, ...]  # of the tensors after the weights; None: there is none
    # Strides and offset of the dy of a backward pass, as those of x; None: it lies as y.
    dy_layout: tuple[tuple[int, ...], int] | None = field(default=None, kw_only=True)

    @overload
    @staticmethod
    def of(tensors: PairTensors, spec: PairSpec) -> PairProblem: ...

    @overload
    @staticmethod
    def of(tensors: ParallelTensors, spec: ParallelSpec) -> ParallelProblem: ...

    @staticmethod
    def of(tensors: PairTensors | ParallelTensors, spec: PairSpec | ParallelSpec) -> Problem:
        """Describe a validated call. Remembered by sizes, so that it costs little on every one."""
        x, one, other = tensors[:3]
        found: Problem = _describe(
            spec, x.shape, x.stride(), offset_of(x), x.dtype, x.device,
            one.shape, one.stride(), other.shape, other.stride(),
            tuple([getattr(t, "dtype", None) for t in tensors[3:]]),
            stride_of(tensors.residual) if isinstance(tensors, PairTensors) else None,
        )  # fmt: skip
        return found

    def with_gradient(self: Some, dy: Tensor) -> Some:
        """The same call with the layout of this gradient of y: kernels are compiled for it."""
        layout = dy.stride(), offset_of(dy)
        found: Some = self if layout == self._as_y else _with_layout(self, layout)
        return found

    @cached_property
    def _as_y(self) -> tuple[tuple[int, ...], int]:
        return self.empty_output(torch.empty((), dtype=self.dtype, device="meta")).stride(), 0

    @property
    def out_shape(self) -> tuple[int, int, int, int, int]:
        return (self.batch, self.out_channels, *self.out_size)

    @property
    def pass_sizes(self) -> tuple[Triple, ...]:
        """(T, H, W) of what each pass writes."""
        return (self.out_size,) * len(self.passes)

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """dtype of statistics and of accumulation."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def flops(self) -> int:
        """Multiplications and additions of both convolutions, forward."""
        return sum(
            p.flops(self.batch * math.prod(size))
            for p, size in zip(self.passes, self.pass_sizes, strict=True)
        )

    def bytes(self, mid_transfers: int) -> int:
        """Bytes moved: x, weights and y once each."""
        weights = sum(
            p.out_channels * p.in_channels // p.groups * math.prod(p.kernel) for p in self.passes
        )
        x = self.batch * self.passes[0].in_channels * math.prod(self.size)
        return (x + weights + math.prod(self.out_shape)) * self.dtype.itemsize

    def empty_output(self, x: Tensor) -> Tensor:
        """Uninitialised y with the strides that ``nn.Conv3d`` would give it."""
        if type(x) is Tensor and not x.is_meta:  # in half the time
            stride, _ = self._as_y
            return torch.empty_strided(self.out_shape, stride, dtype=x.dtype, device=x.device)
        fmt = torch.channels_last_3d if self.channels_last else torch.contiguous_format
        return torch.empty(self.out_shape, dtype=x.dtype, device=x.device, memory_format=fmt)


@memoize
def _with_layout(problem: Problem, layout: tuple[tuple[int, ...], int]) -> Problem:
    return replace(problem, dy_layout=layout)


@dataclass(frozen=True, eq=False)
class PairProblem(Problem):
    """A call of ``conv2plus1d``; ``passes`` are in the order of execution."""

    op = "conv2plus1d"

    spec: PairSpec
    passes: tuple[Pass, Pass]
    mid_size: Triple  # (T, H, W) after the first pass
    residual_stride: tuple[int, ...] | None  # of what is added to y

    @property
    def residual(self) -> bool:
        """Whether something is added to y."""
        return self.residual_stride is not None

    @property
    def has_ending(self) -> bool:
        """Whether something becomes of y, which has no backward here."""
        spec = self.spec
        return self.residual or spec.outer_norm or spec.outer_activation != "none"

    @property
    def pass_sizes(self) -> tuple[Triple, Triple]:
        return self.mid_size, self.out_size

    @property
    def mid_channels(self) -> int:
        return self.passes[0].out_channels

    @property
    def mid_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of the saved mid tensor u: (N, T', H', W', M rounded up to 8), contiguous.

        Rows of whole 16-byte vectors in every dtype, whatever M is. Nobody outside sees it.
        """
        return (self.batch, *self.mid_size, -(-self.mid_channels // 8) * 8)

    def bytes(self, mid_transfers: int) -> int:
        """Bytes moved: x, weights, residual and y once each, u ``mid_transfers`` times."""
        mid = self.batch * self.mid_channels * math.prod(self.mid_size)
        residual = math.prod(self.out_shape) if self.residual else 0
        more = (residual + mid_transfers * mid) * self.dtype.itemsize
        return super().bytes(mid_transfers) + more


@dataclass(frozen=True, eq=False)
class ParallelProblem(Problem):
    """A call of ``parallel_conv2plus1d``; ``passes`` are (spatial, temporal)."""

    op = "parallel_conv2plus1d"

    spec: ParallelSpec
    passes: tuple[Pass, Pass]


@memoize
def _describe(
    spec: PairSpec | ParallelSpec,
    x: Sequence[int],
    x_stride: Sequence[int],
    x_offset: int,
    dtype: torch.dtype,
    device: torch.device,
    one: Sequence[int],
    one_stride: Sequence[int],
    other: Sequence[int],
    other_stride: Sequence[int],
    others: tuple[torch.dtype | None, ...],
    residual_stride: tuple[int, ...] | None,
) -> Problem:
    """The problem of tensors with these shapes and strides; weights in the order of the tensors."""
    size = time_height_width(x)
    layouts = ((x, x_stride), (one, one_stride), (other, other_stride))
    channels_last = any(is_channels_last(shape, stride) for shape, stride in layouts)
    strides = tuple(one_stride), tuple(other_stride)
    layout = (dtype, device, channels_last, tuple(x_stride), x_offset, strides, others)
    if isinstance(spec, PairSpec):
        ws, wt = in_execution_order(spec.order, one, other)  # swapping twice is no swap
        first, second = in_execution_order(spec.order, *_passes(spec, ws, wt))
        mid_size = first.out_size(size)
        return PairProblem(
            spec, (first, second), x[0], size, second.out_size(mid_size), second.out_channels,
            *layout, mid_size, residual_stride,
        )  # fmt: skip
    # Both branches stride in all three dimensions; each pads only its own.
    spatial, temporal = (p._replace(stride=spec.stride) for p in _passes(spec, one, other))
    a, b = spatial.out_channels, temporal.out_channels
    out_channels = a + b if spec.combine == "cat" else a
    return ParallelProblem(
        spec, (spatial, temporal), x[0], size, spatial.out_size(size), out_channels, *layout
    )


def stride_of(t: Tensor | None) -> tuple[int, ...] | None:
    return t.stride() if isinstance(t, Tensor) else None


def offset_of(x: Tensor) -> int:
    """Bytes from an address that is a multiple of 16 to x; 0 where x has no memory."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return 0  # of fake tensors, among others
    try:
        return read_address(x) % 16
    except RuntimeError:  # inside of functorch's transforms
        return 0


def is_channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether 5-D strides mean channels_last_3d, by the rule of PyTorch's suggest_memory_format.

    Dense or sliced alike: only the order of the strides counts. Ambiguous ones (all sizes 1 in
    channels or in space) count as contiguous.
    """
    if len(shape) != 5 or stride[1] == 0:
        return False
    least = 0
    for d in (1, 4, 3, 2, 0):
        if shape[d] == 0 or stride[d] < least:
            return False
        if d == 0 and least == stride[1]:
            return False  # N, 1, 1, 1, 1 and N, C, 1, 1, 1: contiguous as well
        least = stride[d] * (shape[d] if shape[d] > 1 else 1)
    return True


def pad_index(mode: str, size: int, before: int, after: int, device: torch.device) -> Tensor:
    """Source index of each padded position along one axis, for modes other than zeros."""
    i = torch.arange(-before, size + after, device=device)
    if mode == "replicate":
        return i.clamp(0, size - 1)
    if mode == "circular":
        return i.remainder(size)
    i = i.abs()  # reflect about the first, then about the last sample
    return torch.where(i < size, i, 2 * (size - 1) - i)


def default_mid_channels(in_channels: int, out_channels: int, kernel_size: Triple) -> int:
    """Mid channels that match the parameters of one kt×kh×kw convolution (arXiv 1711.11248)."""
    kt, kh, kw = kernel_size
    c, k = in_channels, out_channels
    return max(1, kt * kh * kw * c * k // (kh * kw * c + kt * k))
