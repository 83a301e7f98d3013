"""The activations that kernels know: their functions, gradients and modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten
MODULES = nn.Identity, nn.ReLU, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.Hardswish


def apply(name: str, v: Tensor, slope: float, inplace: bool = False) -> Tensor:
    """act(v); ``inplace`` may overwrite v (callers then own it and need no gradient)."""
    match name:
        case "none":
            return v
        case "relu":
            return F.relu(v, inplace)
        case "silu":
            return F.silu(v, inplace)
        case "gelu":
            return F.gelu(v)
        case "gelu_tanh":
            return F.gelu(v, approximate="tanh")
        case "leaky_relu":
            return F.leaky_relu(v, slope, inplace)
        case "hardswish":
            return F.hardswish(v, inplace)
    raise ValueError(f"unknown activation {name!r}")


def grad(name: str, dz: Tensor, v: Tensor, slope: float) -> Tensor:
    """Gradient with respect to v, given dz = d/d act(v)."""
    match name:
        case "none":
            return dz
        case "relu":
            return aten.threshold_backward(dz, v, 0)
        case "silu":
            return aten.silu_backward(dz, v)
        case "gelu":
            return aten.gelu_backward(dz, v)
        case "gelu_tanh":
            return aten.gelu_backward(dz, v, approximate="tanh")
        case "leaky_relu":
            return aten.leaky_relu_backward(dz, v, slope, False)
        case "hardswish":
            return aten.hardswish_backward(dz, v)
    raise ValueError(f"unknown activation {name!r}")


def to_module(name: str, slope: float = 0.01) -> nn.Module:
    """The nn.Module of a name."""
    match name:
        case "none":
            return nn.Identity()
        case "relu":
            return nn.ReLU()
        case "silu":
            return nn.SiLU()
        case "gelu":
            return nn.GELU()
        case "gelu_tanh":
            return nn.GELU(approximate="tanh")
        case "leaky_relu":
            return nn.LeakyReLU(slope)
        case "hardswish":
            return nn.Hardswish()
    raise ValueError(f"unknown activation {name!r}")


def from_module(module: nn.Module | None) -> tuple[str, float] | None:
    """Name and slope of a module, or None where no kernel knows it. Subclasses are not trusted."""
    kind = type(module)
    if module is None or kind is nn.Identity:
        return "none", 0.01
    if kind is nn.ReLU:
        return "relu", 0.01
    if kind is nn.SiLU:
        return "silu", 0.01
    if isinstance(module, nn.GELU) and kind is nn.GELU:
        return ("gelu" if module.approximate == "none" else "gelu_tanh"), 0.01
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return "leaky_relu", float(module.negative_slope)
    if kind is nn.Hardswish:
        return "hardswish", 0.01
    return None
