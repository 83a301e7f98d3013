"""Random calls of ``conv3d``, their tensors, and the ground truth, of ``torch.nn.functional``."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastst.functional import BatchNorm, Norm, conv3d

from .config import ACTIVATIONS, DTYPES, KINKS, LAYOUTS, Triple, documented_pads
from .truth import MOMENTUM, ChannelsLast, act
from .truth import outer_norm as outer_norm_of
from .values import lay_out, near_a_kink, outer_norm

KINDS = ("none", "batch", "frozen", "group", "instance", "layer", "rms", "l2")
NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "past", "residual")


@dataclass(frozen=True)
class ConvConfig:
    """One call; prints as the expression that makes it again."""

    seed: int = 0  # of the values
    batch: int = 2
    channels: int = 4  # C
    out: int = 5  # K
    size: Triple = (5, 7, 6)
    kernel: Triple = (3, 3, 3)
    stride: Triple = (1, 1, 1)
    padding: Any = 1
    dilation: Triple = (1, 1, 1)
    groups: int = 1
    padding_mode: tuple[str, str] = ("zeros", "zeros")
    causal: Any = False
    norm: str = "none"
    norm_groups: int = 1
    per_frame: bool = False
    affine: bool = True
    wide_norm: bool = False  # norm tensors in float32 beside a 16-bit x
    eps: float = 1e-3
    input_activation: str = "none"
    activation: str = "none"
    slope: float = 0.2
    bias: bool = True
    past: int = 0  # frames
    residual: bool = False
    outer_norm: bool = False  # a frozen one
    dtype: torch.dtype = torch.float32
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    past_layout: str = "contiguous"
    residual_layout: str = "contiguous"
    constant: tuple[str, ...] = ()  # tensors that need no gradient

    @property
    def pads(self) -> list[tuple[int, int]]:
        """(before, after) of t, h, w."""
        return documented_pads(self, self.past)

    @property
    def read(self) -> Triple:
        return (self.size[0] + self.past, *self.size[1:])

    @property
    def out_size(self) -> Triple:
        return tuple(  # type: ignore[return-value]
            (n + sum(p) - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.read, self.pads, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    def invalid(self) -> bool:
        """Whether the documentation refuses it, or float64 would not be the measure."""
        if min(self.out_size) < 1 or any(min(p) < 0 for p in self.pads):
            return True
        space, time = self.padding_mode
        for pads, n, mode in zip(self.pads, self.read, (time, space, space), strict=True):
            limit = {"reflect": n - 1, "circular": n}.get(mode, math.inf)
            if max(pads) > limit:
                return True
        if self.causal and time not in ("zeros", "replicate"):
            return True
        # A norm over a handful of values has gradients that cancel: its own tests have those.
        t, h, w = self.size
        frames = 1 if self.per_frame else t
        values = {
            "batch": self.batch * t * h * w, "instance": frames * h * w,
            "group": self.channels // self.norm_groups * frames * h * w,
            "layer": self.channels, "rms": self.channels, "l2": self.channels,
        }  # fmt: skip
        return values.get(self.norm, 16) < (
            16 if self.norm in ("batch", "group", "instance") else 3
        )

    def work(self) -> int:
        taps = math.prod(self.kernel) * self.channels // self.groups
        return self.batch * math.prod(self.out_size) * taps * self.out

    @property
    def jumps_between_roundings(self) -> bool:
        """Whether a value that is rounded to 16 bits goes through a kink."""
        inner = self.input_activation in KINKS and self.norm != "none"
        return self.dtype.itemsize == 2 and (inner or self.activation in KINKS)


@dataclass(frozen=True)
class ConvLimits:
    """What random calls keep to."""

    batch: int = 3
    channels: int = 48
    frames: int = 7
    space: int = 11
    work: int = 3_000_000
    dtypes: tuple[torch.dtype, ...] = DTYPES
    fixed: dict[str, Any] = field(default_factory=dict)  # fields of ConvConfig


def random_conv(seed: int, limits: ConvLimits) -> ConvConfig:
    """The call of a seed: always the same one for the same limits."""
    rng = random.Random(seed)
    for _ in range(100_000):
        config = replace(_draw(rng, limits), seed=seed, **limits.fixed)
        if not config.invalid() and config.work() <= limits.work:
            return config
    raise ValueError(f"nothing valid in {limits}")


def _draw(rng: random.Random, limits: ConvLimits) -> ConvConfig:
    def often(usual: Any, *others: Any, odds: float = 0.5) -> Any:
        return usual if rng.random() < odds else rng.choice(others)

    odd = [c for c in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 24, 31, 33, 45, 48) if c <= limits.channels]
    c, k, groups = rng.choice(odd), rng.choice(odd), 1
    style = often("dense", "depthwise", "grouped", odds=0.6)
    if style == "depthwise":
        groups, k = c, c * rng.choice((1, 1, 2))
    elif style == "grouped":
        groups = rng.choice((2, 3, 4))
        c, k = (groups * rng.choice((1, 2, 3, 5, 8)) for _ in range(2))
    kernel = tuple(rng.choice((1, 2, 3, 3, 3, 4)) for _ in range(3))
    dilation = tuple(often(1, 2, odds=0.85) for _ in range(3))
    stride = tuple(often(1, 2, 3, odds=0.75) for _ in range(3))
    half = tuple(d * (n - 1) // 2 for d, n in zip(dilation, kernel, strict=True))
    uneven = tuple((rng.randrange(3), rng.randrange(3)) for _ in range(3))
    padding = often(half, "same", "valid", 1, uneven)
    causal = often(False, True, "strided", odds=0.6)
    if padding == "same":
        stride = (1, 1, 1)
    if causal and not isinstance(padding, str):
        padding = (0, *((padding,) * 3 if isinstance(padding, int) else padding)[1:])
    norm = rng.choice(KINDS)
    divisors = [g for g in (1, 2, 3, 4, 8) if c % g == 0]
    return ConvConfig(
        batch=rng.randint(1, limits.batch), channels=c, out=k,
        size=(rng.randint(1, limits.frames), *(rng.randint(1, limits.space) for _ in range(2))),
        kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,  # type: ignore[arg-type]
        padding_mode=tuple(  # type: ignore[arg-type]
            often("zeros", "replicate", "reflect", "circular", odds=0.6) for _ in range(2)
        ),
        causal=causal, norm=norm, norm_groups=rng.choice(divisors) if norm == "group" else 1,
        per_frame=norm in ("group", "instance") and rng.random() < 0.5,
        affine=rng.random() < 0.8, wide_norm=rng.random() < 0.5, eps=rng.choice((1e-5, 1e-3)),
        input_activation=often("none", *ACTIVATIONS, odds=0.3),
        activation=often("none", *ACTIVATIONS), bias=rng.random() < 0.6,
        past=often(0, 1, 2, 3, odds=0.7), residual=rng.random() < 0.3,
        outer_norm=rng.random() < 0.3,
        dtype=rng.choice(limits.dtypes), x_layout=often("contiguous", *LAYOUTS[1:]),
        weight_layout=often("contiguous", *LAYOUTS[1:], odds=0.7),
        grad_layout=often("contiguous", *LAYOUTS[1:]), past_layout=rng.choice(LAYOUTS),
        residual_layout=rng.choice(LAYOUTS),
        constant=tuple(n for n in NAMES if rng.random() < 0.3) if rng.random() < 0.2 else (),
    )  # fmt: skip


# ---- values


def make_conv(config: ConvConfig, device: str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """Tensors by name, laid out, and the gradient of the output; as ``values.make``."""
    for attempt in range(20):
        generator = torch.Generator().manual_seed(1000 * config.seed + attempt)
        tensors, dy = _values(config, generator)
        rng = random.Random(config.seed)
        layouts = {
            "x": config.x_layout, "residual": config.residual_layout, "past": config.past_layout,
            "weight": config.weight_layout,
        }  # fmt: skip
        tensors = {
            n: lay_out(t.to(device), layouts.get(n, "contiguous"), rng) for n, t in tensors.items()
        }
        if config.jumps_between_roundings or clear_conv(config, tensors):
            break
    return tensors, lay_out(dy.to(device), config.grad_layout, rng)


def _values(config: ConvConfig, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    n, c, k = config.batch, config.channels, config.out
    shape = (k, c // config.groups, *config.kernel)
    tensors = {
        "x": normal(n, c, *config.size) + normal(1, c, 1, 1, 1) / 2,
        "weight": normal(*shape) / math.sqrt(math.prod(shape[1:])),
    }
    if config.bias:
        tensors["bias"] = normal(k)
    if config.norm != "none" and config.affine:
        tensors["norm_weight"], tensors["norm_bias"] = 1 + normal(c) / 4, normal(c) / 2
    if config.norm in ("batch", "frozen"):
        tensors["running_mean"] = normal(c) / 2
        tensors["running_var"] = 0.5 + normal(c).square()
    if config.past:
        tensors["past"] = normal(n, c, config.past, *config.size[1:])
    if config.residual:
        tensors["residual"] = normal(n, k, *config.out_size)
    if config.outer_norm:
        tensors |= outer_norm(normal, k)
    widens = config.wide_norm and config.dtype.itemsize == 2
    wide = ["outer", "running_outer"]
    wide += ["norm", "running"] if config.norm in ("batch", "frozen") else []
    tensors = {
        n: t.to(torch.float32 if widens and n.startswith(tuple(wide)) else config.dtype)
        for n, t in tensors.items()
    }
    return tensors, normal(n, k, *config.out_size).to(config.dtype)


def clear_conv(config: ConvConfig, tensors: dict[str, Tensor]) -> bool:
    """As ``values.clear_of_kinks``."""
    if config.jumps_between_roundings:
        return False
    _, fed = compose_conv(config, {n: t.double() for n, t in tensors.items()})
    return not any(
        near_a_kink(name, v, exact=i == 0 and config.norm == "none")
        for i, (name, v) in enumerate(fed)
    )


# ---- by fastst, and the truth


def frozen_norm(config: Any, t: dict[str, Tensor]) -> BatchNorm | None:
    """The norm of the output, if it has one."""
    if not config.outer_norm:
        return None
    running = t["running_outer_mean"], t["running_outer_var"]
    return BatchNorm(*running, t["outer_weight"], t["outer_bias"], eps=config.eps)


def call_conv(config: ConvConfig, t: dict[str, Tensor]) -> Tensor:
    """y by fastst."""
    norm: Any = None
    affine = t.get("norm_weight"), t.get("norm_bias")
    if config.norm in ("batch", "frozen"):
        running = t["running_mean"], t["running_var"]
        norm = BatchNorm(*running, *affine, config.norm == "batch", MOMENTUM, config.eps)
    elif config.norm != "none":
        norm = Norm(config.norm, *affine, config.norm_groups, config.per_frame, config.eps)
    return conv3d(  # type: ignore[no-any-return]
        t["x"], t["weight"], t.get("bias"), config.stride, config.padding, config.dilation,
        config.groups, padding_mode=config.padding_mode, causal=config.causal, input_norm=norm,
        input_activation=config.input_activation, past=t.get("past"), residual=t.get("residual"),
        activation=config.activation, negative_slope=config.slope,
        output_norm=frozen_norm(config, t),
    )  # fmt: skip


Held = tuple[Tensor | float, Tensor]  # mean and 1/deviation, as they broadcast against x


def compose_conv(
    config: ConvConfig, t: dict[str, Tensor], held: Held | None = None, channels_last: bool = False
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """y by PyTorch's operators, in the dtype of the tensors, and what each activation was fed.

    ``held``: to normalise with instead of the statistics of the configuration. Running statistics
    are updated in place. ``channels_last``: what is read comes in that format.
    """
    fed: list[tuple[str, Tensor]] = []

    def feed(name: str, v: Tensor) -> Tensor:
        fed.append((name, v.detach()))
        return act(name, v, config.slope)

    x = ChannelsLast.apply(t["x"]) if channels_last else t["x"]
    z = feed(config.input_activation, _normed(config, x, t) if held is None else _by(held, x, t))
    z = torch.cat((t["past"], z), 2) if config.past else z
    pads, (space, time) = config.pads, config.padding_mode
    for i, mode in ((0, time), (1, space), (2, space)):
        if any(pads[i]):
            flat = [p for j in (2, 1, 0) for p in (pads[i] if j == i else (0, 0))]
            z = F.pad(z, flat, "constant" if mode == "zeros" else mode)
    # PyTorch 2.13 on CPU: bfloat16 gradients are wrong with a stride and a dilation over one tap.
    dilation = tuple(d if k > 1 else 1 for d, k in zip(config.dilation, config.kernel, strict=True))
    if z.device.type == "cpu":  # PyTorch's channels-last gradients access memory out of bounds
        z = z.contiguous()
    elif channels_last:
        z = ChannelsLast.apply(z)
    y = F.conv3d(z, t["weight"], t.get("bias"), config.stride, 0, dilation, config.groups)
    y = outer_norm_of(config, y, t)
    y = y + t["residual"] if config.residual else y
    return feed(config.activation, y), fed


def _normed(config: ConvConfig, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    affine, (n, c, frames, *_) = (t.get("norm_weight"), t.get("norm_bias")), x.shape
    if config.norm == "none":
        return x
    if config.norm in ("batch", "frozen"):
        running, training = (t["running_mean"], t["running_var"]), config.norm == "batch"
        return F.batch_norm(x, *running, *affine, training, MOMENTUM, config.eps)
    if config.norm in ("group", "instance"):
        groups = config.norm_groups if config.norm == "group" else c
        if config.per_frame:
            x = x.transpose(1, 2).reshape(n * frames, c, 1, *x.shape[3:])
        # PyTorch 2.13 on CPU: a channels-last one without a gradient of x crashes.
        v = F.group_norm(x.contiguous(), groups, *affine, config.eps)
        return v.reshape(n, frames, c, *v.shape[3:]).transpose(1, 2) if config.per_frame else v
    rows = x.movedim(1, -1)
    if config.norm == "layer":
        return F.layer_norm(rows, (c,), *affine, config.eps).movedim(-1, 1)
    if config.norm == "rms":
        v = F.rms_norm(rows, (c,), affine[0], config.eps)
    else:
        v = F.normalize(rows, dim=-1, eps=config.eps) * math.sqrt(c)
        v = v if affine[0] is None else v * affine[0]
    return (v if affine[1] is None else v + affine[1]).movedim(-1, 1)


def held_conv(config: ConvConfig, tensors: dict[str, Tensor]) -> Held | None:
    """What the norm takes from x, in float64, as constants."""
    x = tensors["x"].double()
    if config.norm in ("none", "frozen"):
        return None
    n, c, t, _, _ = x.shape
    if config.norm in ("rms", "l2"):
        square = x.square().mean(1, keepdim=True)
        if config.norm == "rms":
            return 0.0, (square + config.eps).rsqrt()
        return 0.0, 1 / square.sqrt().clamp_min(config.eps / math.sqrt(c))
    axes = {"batch": (0, 2, 3, 4), "layer": (1,)}.get(config.norm)
    if axes is None:
        groups = config.norm_groups if config.norm == "group" else c
        split = x.reshape(n, groups, c // groups, t, -1)
        dims = (2, 4) if config.per_frame else (2, 3, 4)
        var, mean = torch.var_mean(split, dims, correction=0, keepdim=True)
        mean, var = (
            s.expand(n, groups, c // groups, -1, 1).reshape(n, c, -1, 1, 1) for s in (mean, var)
        )
    else:
        var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return mean, (var + config.eps).rsqrt()


def _by(held: Held, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    mean, r = held
    v = (x - mean) * r
    if "norm_weight" not in t:
        return v
    return v * t["norm_weight"].view(1, -1, 1, 1, 1) + t["norm_bias"].view(1, -1, 1, 1, 1)
