"""A random configuration: one call of a public function, drawn from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh", "leaky_relu", "hardswish")
LAYOUTS = (
    "contiguous", "channels_last", "sliced", "sliced_channels_last", "permuted", "expanded",
    "offset",
)  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = (
    "x", "spatial_weight", "temporal_weight", "spatial_bias", "temporal_bias", "norm_weight",
    "norm_bias", "residual",
)  # fmt: skip
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Config:
    """One call; prints as the expression that makes it again."""

    seed: int = 0  # of the values
    op: str = "conv2plus1d"
    batch: int = 2
    channels: int = 4  # C
    mid: int = 6  # M; of the parallel op the channels of the temporal branch
    out: int = 5  # K; of the parallel op the channels of the spatial branch
    size: Triple = (5, 7, 6)
    kernel: Triple = (3, 3, 3)
    stride: Triple = (1, 1, 1)
    padding: Any = 1
    dilation: Triple = (1, 1, 1)
    groups: tuple[int, int] = (1, 1)
    padding_mode: tuple[str, str] = ("zeros", "zeros")
    activation: str = "relu"
    branch_activation: str = "none"
    slope: float = 0.2
    norm: str = "none"
    affine: bool = True
    wide_norm: bool = False  # norm tensors in float32 beside a 16-bit x
    eps: float = 1e-3
    order: str = "spatial-first"
    causal: Any = False
    combine: str = "add"
    bias: tuple[bool, bool] = (True, True)
    recompute: bool = False
    dtype: torch.dtype = torch.float32
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    residual: bool = False
    residual_layout: str = "contiguous"
    outer_activation: str = "none"
    outer_norm: bool = False  # a frozen one
    constant: tuple[str, ...] = ()  # tensors that need no gradient

    @property
    def parallel(self) -> bool:
        return self.op == "parallel_conv2plus1d"

    @property
    def kinds(self) -> tuple[str, str]:
        """The passes in the order of execution."""
        forward = self.parallel or self.order == "spatial-first"
        return ("spatial", "temporal") if forward else ("temporal", "spatial")

    @property
    def pads(self) -> list[tuple[int, int]]:
        """(before, after) of t, h, w."""
        return documented_pads(self)

    def geometry(self, kind: str) -> tuple[Triple, Triple, Triple, list[tuple[int, int]], str]:
        """Kernel, stride, dilation, padding and padding mode of one pass, in all three axes."""
        axes = (1, 2) if kind == "spatial" else (0,)
        kernel = tuple(self.kernel[i] if i in axes else 1 for i in range(3))
        dilation = tuple(self.dilation[i] if i in axes else 1 for i in range(3))
        striding = range(3) if self.parallel else axes
        stride = tuple(self.stride[i] if i in striding else 1 for i in range(3))
        pads = [self.pads[i] if i in axes else (0, 0) for i in range(3)]
        return kernel, stride, dilation, pads, self.padding_mode[kind == "temporal"]

    def sizes(self) -> list[Triple]:
        """(T, H, W) after the first and after the second pass; of the two branches if parallel."""
        out, size = [], self.size
        for kind in self.kinds:
            k, s, d, p, _ = self.geometry(kind)
            after = tuple(
                (n + sum(p[i]) - d[i] * (k[i] - 1) - 1) // s[i] + 1 for i, n in enumerate(size)
            )
            out.append(after)
            size = size if self.parallel else after
        return out

    def invalid(self) -> bool:
        """Whether the documentation refuses it, or float64 would not be the measure."""
        sizes = self.sizes()
        if min(min(s) for s in sizes) < 1 or (self.parallel and sizes[0] != sizes[1]):
            return True
        if self.parallel and self.combine == "add" and self.mid != self.out:
            return True
        read = [self.size, self.size if self.parallel else sizes[0]]
        for kind, size in zip(self.kinds, read, strict=True):
            pads, mode = self.geometry(kind)[3:]
            limit = {"reflect": -1, "circular": 0}.get(mode, math.inf)
            if any(max(p) > n + limit or min(p) < 0 for p, n in zip(pads, size, strict=True)):
                return True
        causal_ok = self.padding_mode[1] in ("zeros", "replicate")
        if self.causal and (not causal_ok or (isinstance(self.padding, tuple) and self.padding[0])):
            return True
        # Batch norm over a handful of values has gradients that cancel: its own tests have those.
        if self.norm == "batch" and self.batch * math.prod(sizes[0]) < 16:
            return True
        ending = self.residual or self.outer_norm or self.outer_activation != "none"
        if self.parallel and ending:
            return True
        return self.dtype.itemsize == 2 and self._kinks_unavoidable()

    def _kinks_unavoidable(self) -> bool:
        """Whether ``make`` cannot keep rounded values on their side of where a gradient jumps."""
        if self.parallel:
            return self.activation in KINKS and self.branch_activation not in ("none", "relu")
        return self.activation == "hardswish" and self.norm != "none"

    def work(self) -> int:
        """Multiplications of both passes."""
        last = self.mid if not self.parallel else self.channels
        channels = (self.channels * (self.out if self.parallel else self.mid), last * self.out)
        work = 0
        for kind, size, c in zip(self.kinds, self.sizes(), channels, strict=True):
            work += self.batch * math.prod(size) * math.prod(self.geometry(kind)[0]) * c
        return work

    def kwargs(self) -> dict[str, Any]:
        """Arguments of the public function beside the tensors and the norm."""
        common: dict[str, Any] = dict(
            stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups,
            padding_mode=self.padding_mode, activation=self.activation, negative_slope=self.slope,
            causal=self.causal,
        )  # fmt: skip
        if self.parallel:
            return common | dict(branch_activation=self.branch_activation, combine=self.combine)
        return common | dict(
            order=self.order, recompute=self.recompute, outer_activation=self.outer_activation
        )


def documented_pads(config: Any, past: int = 0) -> list[tuple[int, int]]:
    """(before, after) of t, h, w, worked out here from what the documentation says."""
    extent = [d * (k - 1) for d, k in zip(config.dilation, config.kernel, strict=True)]
    if config.padding == "same":
        pads = [(e // 2, e - e // 2) for e in extent]
    elif config.padding == "valid":
        pads = [(0, 0)] * 3
    else:
        p = (config.padding,) * 3 if isinstance(config.padding, int) else config.padding
        pads = [(i, i) if isinstance(i, int) else i for i in p]
    if config.causal:
        less = 1 - config.stride[0] if config.causal == "strided" else 0
        pads[0] = (extent[0] + less - past, 0)
    return pads


@dataclass(frozen=True)
class Limits:
    """What random configurations keep to: sizes to draw from, and any other condition."""

    batch: int = 3
    channels: int = 48
    frames: int = 9
    space: int = 13
    work: int = 4_000_000
    dtypes: tuple[torch.dtype, ...] = DTYPES
    fixed: dict[str, Any] = field(default_factory=dict)  # fields of Config
    accept: Callable[[Config], bool] = lambda config: True


USUAL = Limits()
SMALL = Limits(batch=2, channels=20, frames=5, space=7, work=200_000)


def random_config(seed: int, limits: Limits = USUAL) -> Config:
    """The configuration of a seed: always the same one for the same limits."""
    rng = random.Random(seed)
    for _ in range(100_000):
        config = replace(_draw(rng, limits), seed=seed, **limits.fixed)
        if not config.invalid() and config.work() <= limits.work and limits.accept(config):
            return config
    raise ValueError(f"nothing valid in {limits}")


def _draw(rng: random.Random, limits: Limits) -> Config:
    def often(usual: Any, *others: Any, odds: float = 0.5) -> Any:
        return usual if rng.random() < odds else rng.choice(others)

    parallel = rng.random() < 0.25
    odd = [c for c in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 31, 33, 45, 48) if c <= limits.channels]
    c, m, k = rng.choice(odd), rng.choice(odd), rng.choice(odd)
    groups = (1, 1)
    combine = rng.choice(("add", "cat"))
    style = often("dense", "depthwise", "grouped", "spatial", "temporal", odds=0.6)
    if style == "depthwise":
        m = k = c
        groups = (c, c)
    elif style != "dense":
        g = rng.choice((2, 3, 4))
        groups = (g if style != "temporal" else 1, g if style != "spatial" else 1)
        c, m, k = (g * rng.choice((1, 2, 3, 5)) for _ in range(3))
    if parallel and combine == "add":
        m = k
    kernel = (rng.choice((1, 2, 3, 3, 4, 5)), *(rng.choice((1, 2, 3, 3, 4, 5)) for _ in range(2)))
    dilation = tuple(often(1, 2, 3, odds=0.85) for _ in range(3))
    stride = tuple(often(1, 2, 3, odds=0.7) for _ in range(3))
    half = tuple(d * (n - 1) // 2 for d, n in zip(dilation, kernel, strict=True))
    padding = often(half, "same", "valid", 1, tuple(rng.randrange(4) for _ in range(3)))
    causal = often(False, True, "strided", odds=0.8)
    if padding == "same":
        stride = (1, 1, 1)
    if causal and not isinstance(padding, str):
        padding = (0, *((padding,) * 3 if isinstance(padding, int) else padding)[1:])
    modes = tuple(often("zeros", "replicate", "reflect", "circular", odds=0.7) for _ in range(2))
    config = Config(
        op="parallel_conv2plus1d" if parallel else "conv2plus1d",
        batch=rng.randint(1, limits.batch), channels=c, mid=m, out=k,
        size=(rng.randint(1, limits.frames), *(rng.randint(1, limits.space) for _ in range(2))),
        kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
        padding_mode=modes, activation=rng.choice(ACTIVATIONS),
        branch_activation=often("none", *ACTIVATIONS) if parallel else "none",
        norm="none" if parallel else rng.choice(("none", "batch", "frozen")),
        affine=rng.random() < 0.8, wide_norm=rng.random() < 0.5, eps=rng.choice((1e-5, 1e-3)),
        order=rng.choice(("spatial-first", "temporal-first")), causal=causal, combine=combine,
        bias=(rng.random() < 0.6, rng.random() < 0.6), recompute=rng.random() < 0.4,
        dtype=rng.choice(limits.dtypes), x_layout=often("contiguous", *LAYOUTS[1:]),
        weight_layout=often("contiguous", *LAYOUTS[1:], odds=0.7),
        grad_layout=often("contiguous", *LAYOUTS[1:]),
        constant=tuple(n for n in NAMES if rng.random() < 0.3) if rng.random() < 0.2 else (),
        residual=not parallel and rng.random() < 0.25, residual_layout=rng.choice(LAYOUTS),
        outer_activation="none" if parallel else often("none", *ACTIVATIONS, odds=0.6),
        outer_norm=not parallel and rng.random() < 0.25,
    )  # fmt: skip
    return _with_single_taps(config, rng) if rng.random() < 0.12 else config


def _with_single_taps(config: Config, rng: random.Random) -> Config:
    """One tap along some axes or all, and strides that differ: oneDNN has had bugs there."""
    axes = rng.choice(((0, 1, 2), (0,), (1, 2), (1,), (2,)))
    kernel = tuple(1 if i in axes else k for i, k in enumerate(config.kernel))
    strides = rng.sample((1, 2, 3), 3) if config.padding != "same" else (1, 1, 1)
    return replace(config, kernel=kernel, stride=tuple(strides))
