"""Random configurations of every function, and the check of a backend against float64.

The ground truth is composed here, of ``torch.nn.functional`` alone: nothing in this file knows how
fastst computes. ``check`` holds the output, every gradient and the running statistics to

    error ≤ 2 · (error of PyTorch's own operators in that dtype) + a few ulps

where errors are against float64, and outputs and workspaces of the library are filled with NaN
first. Environment: FASTST_SEED (first seed), FASTST_FUZZ (cases per test).
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import fastst
from fastst.functional import BatchNorm, conv2plus1d, parallel_conv2plus1d

SEED = int(os.environ.get("FASTST_SEED", "0"))
CASES = int(os.environ.get("FASTST_FUZZ", "0"))

# A few ulps beside PyTorch's own error, of the largest magnitude that enters the result. float32
# has more of them: its sums are rounded at every step (a thousand terms one after the other lose
# about ten), those of 16 bits only at the end.
ULPS = {torch.float32: 12.0, torch.float16: 4.0, torch.bfloat16: 4.0}
# PyTorch being off by more in channels_last_3d is a bug of its convolutions, not a tolerance: on
# the CPU there are some in grouped float32 gradients and in bfloat16.
VENDOR_BUG = {torch.float32: 1024.0, torch.float16: 64.0, torch.bfloat16: 32.0}
FLOAT64 = 1e-10
MOMENTUM = 0.3

KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}
ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh", "leaky_relu", "hardswish")
LAYOUTS = (
    "contiguous", "channels_last", "sliced", "sliced_channels_last", "permuted", "expanded",
    "offset",
)  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = (
    "x", "spatial_weight", "temporal_weight", "spatial_bias", "temporal_bias", "norm_weight",
    "norm_bias",
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
        """(before, after) of t, h, w, worked out here from what the documentation says."""
        extent = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        if self.padding == "same":
            pads = [(e // 2, e - e // 2) for e in extent]
        elif self.padding == "valid":
            pads = [(0, 0)] * 3
        else:
            p = (self.padding,) * 3 if isinstance(self.padding, int) else self.padding
            pads = [(i, i) for i in p]
        if self.causal:
            pads[0] = (extent[0] + (1 - self.stride[0] if self.causal == "strided" else 0), 0)
        return pads

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
        return common | dict(order=self.order, recompute=self.recompute)


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


SMALL = Limits(batch=2, channels=20, frames=5, space=7, work=200_000)


def random_config(seed: int, limits: Limits = Limits()) -> Config:
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
    return Config(
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
    )  # fmt: skip


# ---- values


def lay_out(t: Tensor, layout: str, rng: random.Random | None = None) -> Tensor:
    """``t`` in another memory layout; what lies between its elements is NaN.

    "expanded" repeats the first entry of an axis by a stride of 0, so its values differ from t's.
    """
    rng = rng or random.Random(0)
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last_3d) if t.dim() == 5 else t
    if layout == "expanded":
        axis = rng.choice([0, 2, 3]) if t.dim() == 5 else 0
        return t.narrow(axis, 0, 1).expand_as(t) if t.numel() else t
    if layout == "permuted":
        order = rng.sample(range(t.dim()), t.dim())
        back = [order.index(i) for i in range(t.dim())]
        return t.permute(order).contiguous().permute(back)
    if layout == "offset":  # a pointer aligned to one element only
        flat = t.new_full((t.numel() + 1,), torch.nan)[1:]
        return flat.view(t.shape).copy_(t)
    if layout.startswith("sliced"):
        steps = [rng.choice((1, 1, 2)) for _ in t.shape]
        last = "channels" in layout and t.dim() == 5
        fmt = torch.channels_last_3d if last else torch.contiguous_format
        wide = [n * s + 2 for n, s in zip(t.shape, steps, strict=True)]
        whole = t.new_full(wide, torch.nan).contiguous(memory_format=fmt)
        part = whole[tuple(slice(1, 1 + n * s, s) for n, s in zip(t.shape, steps, strict=True))]
        return part.copy_(t)
    raise ValueError(layout)


def make(config: Config, device: str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """Tensors by name, laid out, and the gradient of the output.

    No activation is fed a value that rounding could carry over one of its kinks, where the
    gradient jumps: with 16 bits values lie on a coarse grid and the kink between its points.
    """
    for attempt in range(20):
        generator = torch.Generator().manual_seed(1000 * config.seed + attempt)
        tensors, dy = _values(config, generator)
        rng = random.Random(config.seed)
        layouts = {"x": config.x_layout}
        layouts |= dict.fromkeys(("spatial_weight", "temporal_weight"), config.weight_layout)
        tensors = {
            n: lay_out(t.to(device), layouts.get(n, "contiguous"), rng) for n, t in tensors.items()
        }
        if _on_grid(config) and config.norm != "none" and config.affine:
            _move_kinks_off_grid(config, tensors)
        if clear_of_kinks(config, tensors):
            break
    return tensors, lay_out(dy.to(device), config.grad_layout, rng)


def _on_grid(config: Config) -> bool:
    kinked = config.activation in KINKS or config.branch_activation in KINKS
    return kinked and config.dtype.itemsize == 2


def _values(config: Config, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    g = dict(zip(("spatial", "temporal"), config.groups, strict=True))
    first, second = config.kinds
    c, m, k = config.channels, config.mid, config.out
    io = {first: (c, k), second: (c, m)} if config.parallel else {first: (c, m), second: (m, k)}
    tensors = {"x": normal(config.batch, c, *config.size)}
    for kind, has_bias in zip(("spatial", "temporal"), config.bias, strict=True):
        i, o = io[kind]
        shape = (o, i // g[kind], *config.geometry(kind)[0])
        tensors[f"{kind}_weight"] = normal(*shape) / math.sqrt(math.prod(shape[1:]))
        if has_bias:
            tensors[f"{kind}_bias"] = normal(o)
    if config.norm != "none" and config.affine:
        tensors["norm_weight"] = 1 + normal(m) / 4
        tensors["norm_bias"] = normal(m) / 2
    if config.norm != "none":
        tensors["running_mean"] = normal(m) / 2
        tensors["running_var"] = 0.5 + normal(m).square()
    if _on_grid(config):
        tensors["x"] = (2 * tensors["x"]).round().clamp(-3, 3)
        for kind in (first, second) if config.parallel else (first,):
            weight = tensors[f"{kind}_weight"]
            weight.copy_((weight * math.sqrt(math.prod(weight.shape[1:]))).round().clamp(-1, 1))
            if f"{kind}_bias" in tensors:
                bias = tensors[f"{kind}_bias"]
                bias.copy_(bias.round() + (0.5 if kind == "spatial" else 0.25))
    wide = config.wide_norm and config.dtype.itemsize == 2
    tensors = {
        n: t.to(torch.float32 if wide and n.startswith(("norm", "running")) else config.dtype)
        for n, t in tensors.items()
    }
    total = m + k if config.parallel and config.combine == "cat" else k
    return tensors, normal(config.batch, total, *config.sizes()[1]).to(config.dtype)


def _first_pass(config: Config, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """u, and the mean and variance that normalise it, in float64."""
    double = {n: t.double() for n, t in tensors.items()}
    u = _conv(config, config.kinds[0], double["x"], double)
    if config.norm == "frozen":
        return u, double["running_mean"], double["running_var"]
    var, mean = torch.var_mean(u, (0, 2, 3, 4), correction=0)
    return u, mean, var


def _move_kinks_off_grid(config: Config, tensors: dict[str, Tensor]) -> None:
    """Set beta so that v = 0 where u is a whole number and three quarters."""
    _, mean, var = _first_pass(config, tensors)
    scale = tensors["norm_weight"].double() * (var + config.eps).rsqrt()
    crossing = (mean - tensors["norm_bias"] / scale).round().clamp(-8, 8) + 0.75
    tensors["norm_bias"].copy_(scale * (mean - crossing))


def clear_of_kinks(config: Config, tensors: dict[str, Tensor]) -> bool:
    """Whether float32 arithmetic keeps every value on its side of the kinks of its activation."""
    eps = torch.finfo(torch.float32).eps
    _, fed = compose(config, {n: t.double() for n, t in tensors.items()})
    for name, v in fed:
        for kink in KINKS.get(name, ()):
            near = (v - kink).abs() < 64 * eps * (1 + v.abs().max())
            if config.norm == "none":
                near &= v != kink  # of small whole numbers, and so in every dtype
            if bool(near.any()):
                return False
    return True


# ---- truth


def act(name: str, v: Tensor, slope: float) -> Tensor:
    if name == "none":
        return v
    if name == "leaky_relu":
        return F.leaky_relu(v, slope)
    if name == "gelu_tanh":
        return F.gelu(v, approximate="tanh")
    return getattr(F, name)(v)


def _conv(config: Config, kind: str, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    kernel, stride, dilation, pads, mode = config.geometry(kind)
    flat = [p for pair in reversed(pads) for p in pair]
    if any(flat):
        x = F.pad(x, flat, "constant" if mode == "zeros" else mode)
    # PyTorch 2.13 on CPU: bfloat16 gradients are wrong with a stride and a dilation over one tap.
    dilation = tuple(d if k > 1 else 1 for d, k in zip(dilation, kernel, strict=True))
    groups = config.groups[kind == "temporal"]
    weight, bias = t[f"{kind}_weight"], t.get(f"{kind}_bias")
    return F.conv3d(x, weight, bias, stride, 0, dilation, groups)


class _ChannelsLast(torch.autograd.Function):
    """Identity whose value and gradient are in channels_last_3d."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last_3d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous(memory_format=torch.channels_last_3d)


def compose(
    config: Config,
    t: dict[str, Tensor],
    statistics: tuple[Tensor, Tensor] | None = None,
    channels_last: bool = False,
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """y by PyTorch's operators, in the dtype of the tensors, and what each activation was fed.

    ``statistics``: mean and variance to normalise with instead of those of the configuration.
    Running statistics are updated in place by norm="batch". ``channels_last`` keeps everything in
    that format, where PyTorch sums in another order.
    """
    first, second = config.kinds
    fed: list[tuple[str, Tensor]] = []

    def feed(name: str, v: Tensor) -> Tensor:
        fed.append((name, v.detach()))
        return act(name, v, config.slope)

    def conv(kind: str, x: Tensor) -> Tensor:
        if not channels_last:
            return _conv(config, kind, x, t)
        return _ChannelsLast.apply(_conv(config, kind, _ChannelsLast.apply(x), t))

    if config.parallel:
        a, b = (feed(config.branch_activation, conv(kind, t["x"])) for kind in config.kinds)
        y = a + b if config.combine == "add" else torch.cat((a, b), 1)
        return feed(config.activation, y), fed
    u = conv(first, t["x"])
    if config.norm != "none":
        running = statistics or (t["running_mean"], t["running_var"])
        u = F.batch_norm(
            u, *running, t.get("norm_weight"), t.get("norm_bias"),
            config.norm == "batch" and statistics is None, MOMENTUM, config.eps,
        )  # fmt: skip
    return conv(second, feed(config.activation, u)), fed


def call(config: Config, t: dict[str, Tensor]) -> Tensor:
    """y by fastst."""
    weights = t["spatial_weight"], t["temporal_weight"]
    main = (t["x"], *weights, t.get("spatial_bias"), t.get("temporal_bias"))
    if config.parallel:
        return parallel_conv2plus1d(*main, **config.kwargs())
    norm = None
    if config.norm != "none":
        norm = BatchNorm(
            t["running_mean"], t["running_var"], t.get("norm_weight"), t.get("norm_bias"),
            config.norm == "batch", MOMENTUM, config.eps,
        )  # fmt: skip
    return conv2plus1d(*main, norm=norm, **config.kwargs())


Results = dict[str, Tensor]


def results(
    function: Callable[[Config, dict[str, Tensor]], Tensor],
    config: Config,
    tensors: dict[str, Tensor],
    dy: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Results:
    """Output, gradients by the name of their tensor, and running statistics after the call."""
    leaves = {}
    for name, t in tensors.items():
        leaf = t.detach() if dtype is None else t.detach().to(dtype)
        if name.startswith("running"):
            leaf = leaf.clone()
        elif dy is not None and name not in config.constant:
            leaf.requires_grad_()
        leaves[name] = leaf
    wanted = [n for n, t in leaves.items() if t.requires_grad]
    y = function(config, leaves)
    out = {"y": y.detach()}
    if config.norm == "batch":
        out |= {n: leaves[n] for n in ("running_mean", "running_var")}
    if dy is not None and wanted:
        grads = torch.autograd.grad(y, [leaves[n] for n in wanted], dy.to(y.dtype))
        out |= {f"grad of {n}": g for n, g in zip(wanted, grads, strict=True)}
    return out


def scales(
    config: Config, tensors: dict[str, Tensor], dy: Tensor | None, truth: Results
) -> dict[str, float]:
    """Largest magnitude that enters each result.

    Some gradients are 0, or nearly, because large terms cancel: through batch statistics (a bias
    before batch norm has none at all), or where the gradient of the output is constant. The terms
    are as large as gradients with those statistics held, as it is and with random signs.
    """
    largest = {n: float(t.abs().max()) if t.numel() else 0.0 for n, t in truth.items()}
    if dy is None:
        return largest
    statistics = None
    if config.norm == "batch":
        with torch.no_grad():
            statistics = _first_pass(config, tensors)[1:]
    generator = torch.Generator().manual_seed(config.seed)
    for draw in range(4):
        signs = torch.randint(2, dy.shape, generator=generator) * 2 - 1 if draw else 1
        held = results(
            lambda c, t: compose(c, t, statistics)[0], config, tensors, dy * signs, torch.float64
        )
        for n in largest.keys() & held.keys() - {"y"}:
            largest[n] = max(largest[n], float(held[n].abs().max()))
    return largest


# ---- the check


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Everything that Python code allocates without writing to it is full of NaN."""

    def fill(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisonous(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            if type(t) is Tensor and t.device.type != "meta":
                t.detach().fill_(torch.nan if t.is_floating_point() else 113)
            return t

        return poisonous

    with contextlib.ExitStack() as stack:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
            (Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, fill(getattr(owner, name))))
        yield


def error(result: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite where one of them is no number."""
    if not truth.numel():
        return 0.0
    worst = float((result.double().to(truth.device) - truth).abs().max())
    return math.inf if math.isnan(worst) else worst


def complaints(
    config: Config, ours: Results, peers: list[Results], truth: Results, scale: dict[str, float]
) -> list[str]:
    """What of ``ours`` is further from the truth than the rule allows."""
    found = []
    eps = torch.finfo(config.dtype).eps
    for name, true in truth.items():
        got, own = ours[name], peers[0][name]
        if got.shape != true.shape or got.dtype != own.dtype:
            found.append(
                f"{name}: {got.dtype} {tuple(got.shape)}, not {own.dtype} {tuple(true.shape)}"
            )
            continue
        err, bound, told = error(got, true), FLOAT64 * scale[name], ""
        if config.dtype != torch.float64:
            ulp = eps * scale[name]
            errors = [error(peer[name], true) for peer in peers]
            sane = [e for e in errors[1:] if e <= VENDOR_BUG[config.dtype] * ulp]
            bound = 2 * max(errors[:1] + sane) + ULPS[config.dtype] * ulp
            told = f", PyTorch {' and '.join(f'{e:.3g}' for e in errors)}"
        if not err <= bound:
            found.append(f"{name}: error {err:.3g} > {bound:.3g} (largest {scale[name]:.3g}{told})")
    return found


def check(
    config: Config, backend: str = "auto", backward: bool = True, device: str = "cpu"
) -> str | None:
    """Hold one backend to the rule for one configuration.

    Args:
        backend: name; every phase must run on it, or the reason why it refuses is returned.
        backward: also compare every gradient (but none where values lie on a kink after all).

    Returns:
        None, or why the backend refused (``BackendError``); nothing was compared then.

    Raises:
        AssertionError: the configuration, and everything that is wrong with its results.
    """
    tensors, dy = make(config, device)
    grad = dy if backward and clear_of_kinks(config, tensors) else None
    before = {n: t.clone() for n, t in tensors.items()}
    with fastst.use_backend(backend), poisoned():
        try:
            ours = results(call, config, tensors, grad)
        except fastst.BackendError as refusal:
            return str(refusal)
    changed = [n for n, t in tensors.items() if not torch.equal(t, before[n])]
    on_cpu = {n: t.cpu() for n, t in tensors.items()}
    dy_cpu = None if grad is None else grad.cpu()
    truth = results(lambda c, t: compose(c, t)[0], config, on_cpu, dy_cpu, torch.float64)
    peers = [
        results(lambda c, t, last=last: compose(c, t, None, last)[0], config, tensors, grad)
        for last in (False, True)
    ]
    found = complaints(config, ours, peers, truth, scales(config, on_cpu, dy_cpu, truth))
    found += [f"{n} was overwritten" for n in changed]
    assert not found, f"\nbackend {backend!r}, {config}\n  " + "\n  ".join(found)
    return None


def fuzz(
    backend: str,
    cases: int,
    limits: Limits = Limits(),
    *,
    first: int = SEED,
    backward: bool = True,
    device: str = "cpu",
    least: float = 0.5,
) -> None:
    """Check ``cases`` random configurations (FASTST_FUZZ if set), and that most did run.

    Raises:
        AssertionError: with the configuration and the seed; or when less than the share ``least``
            of the configurations was accepted by the backend.
    """
    cases = CASES or cases
    refused = []
    for seed in range(first, first + cases):
        config = random_config(seed, limits)
        try:
            why = check(config, backend, backward, device)
        except Exception as wrong:
            raise AssertionError(f"FASTST_SEED={seed} FASTST_FUZZ=1: {config}: {wrong}") from wrong
        if why is not None:
            refused.append(why)
    assert len(refused) <= (1 - least) * cases, f"refused {len(refused)} of {cases}: {refused[0]}"
