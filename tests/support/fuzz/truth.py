"""The ground truth, composed of ``torch.nn.functional`` alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Config

MOMENTUM = 0.3


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


class ChannelsLast(torch.autograd.Function):
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
        return ChannelsLast.apply(_conv(config, kind, ChannelsLast.apply(x), t))

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
    y = outer_norm(config, conv(second, feed(config.activation, u)), t)
    y = y + t["residual"] if config.residual else y
    return feed(config.outer_activation, y), fed


def outer_norm(config: Any, y: Tensor, t: dict[str, Tensor]) -> Tensor:
    """The frozen norm of what a convolution gives, if it has one."""
    if not config.outer_norm:
        return y
    running = t["running_outer_mean"], t["running_outer_var"]
    return F.batch_norm(y, *running, t["outer_weight"], t["outer_bias"], eps=config.eps)


def first_pass(config: Config, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """u, and the mean and variance that normalise it, in float64."""
    double = {n: t.double() for n, t in tensors.items()}
    u = _conv(config, config.kinds[0], double["x"], double)
    if config.norm == "frozen":
        return u, double["running_mean"], double["running_var"]
    var, mean = torch.var_mean(u, (0, 2, 3, 4), correction=0)
    return u, mean, var
