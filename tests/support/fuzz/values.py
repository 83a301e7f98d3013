"""Tensors of a configuration: laid out in memory, and clear of where gradients jump."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from .config import KINKS, Config
from .truth import compose, first_pass


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
        layouts = {"x": config.x_layout, "residual": config.residual_layout}
        layouts |= dict.fromkeys(("spatial_weight", "temporal_weight"), config.weight_layout)
        tensors = {
            n: lay_out(t.to(device), layouts.get(n, "contiguous"), rng) for n, t in tensors.items()
        }
        if _on_grid(config) and config.norm != "none" and config.affine:
            _move_kinks_off_grid(config, tensors)
        if jumps_between_roundings(config) or clear_of_kinks(config, tensors):
            break
    return tensors, lay_out(dy.to(device), config.grad_layout, rng)


def _on_grid(config: Config) -> bool:
    kinked = config.activation in KINKS or config.branch_activation in KINKS
    return kinked and config.dtype.itemsize == 2


def jumps_between_roundings(config: Config) -> bool:
    """Whether the output, which is rounded to 16 bits, goes through a kink: on no grid of ours."""
    return config.outer_activation in KINKS and config.dtype.itemsize == 2


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
    if config.outer_norm:
        tensors |= outer_norm(normal, k)
    if _on_grid(config):
        tensors["x"] = (2 * tensors["x"]).round().clamp(-3, 3)
        for kind in (first, second) if config.parallel else (first,):
            weight = tensors[f"{kind}_weight"]
            weight.copy_((weight * math.sqrt(math.prod(weight.shape[1:]))).round().clamp(-1, 1))
            if f"{kind}_bias" in tensors:
                bias = tensors[f"{kind}_bias"]
                bias.copy_(bias.round() + (0.5 if kind == "spatial" else 0.25))
    if config.residual:
        tensors["residual"] = normal(config.batch, k, *config.sizes()[1])
    widens = config.wide_norm and config.dtype.itemsize == 2
    wide = ("norm", "outer", "running")
    tensors = {
        n: t.to(torch.float32 if widens and n.startswith(wide) else config.dtype)
        for n, t in tensors.items()
    }
    total = m + k if config.parallel and config.combine == "cat" else k
    return tensors, normal(config.batch, total, *config.sizes()[1]).to(config.dtype)


def outer_norm(normal: Callable[..., Tensor], channels: int) -> dict[str, Tensor]:
    """Tensors of a frozen norm of the output."""
    return {
        "running_outer_mean": normal(channels) / 2,
        "running_outer_var": 0.5 + normal(channels).square(),
        "outer_weight": 1 + normal(channels) / 4,
        "outer_bias": normal(channels) / 2,
    }


def _move_kinks_off_grid(config: Config, tensors: dict[str, Tensor]) -> None:
    """Set beta so that v = 0 where u is a whole number and three quarters."""
    _, mean, var = first_pass(config, tensors)
    scale = tensors["norm_weight"].double() * (var + config.eps).rsqrt()
    crossing = (mean - tensors["norm_bias"] / scale).round().clamp(-8, 8) + 0.75
    tensors["norm_bias"].copy_(scale * (mean - crossing))


def clear_of_kinks(config: Config, tensors: dict[str, Tensor]) -> bool:
    """Whether float32 arithmetic keeps every value on its side of the kinks of its activation."""
    if jumps_between_roundings(config):
        return False
    _, fed = compose(config, {n: t.double() for n, t in tensors.items()})
    return not any(near_a_kink(name, v, exact=config.norm == "none") for name, v in fed)


def near_a_kink(name: str, v: Tensor, exact: bool) -> bool:
    """Whether float32 arithmetic may carry a value over a kink of its activation.

    ``exact``: what lies on a kink is the sum of small whole numbers, and so does in every dtype.
    """
    eps = torch.finfo(torch.float32).eps
    for kink in KINKS.get(name, ()):
        near = (v - kink).abs() < 64 * eps * (1 + v.abs().max())
        if exact:
            near &= v != kink
        if bool(near.any()):
            return True
    return False
