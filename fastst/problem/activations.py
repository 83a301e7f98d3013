"""The activations that kernels know: their functions, gradients and modules.

The formulas of the compiled kernels are in ``csrc/common/activations.h``, Triton's in
``fastst/backends/triton/kernels/common.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """act(v), with a slope where the activation has one."""

    module: type[nn.Module]
    function: str | None  # of torch.nn.functional
    value: Callable[[Tensor, float, bool], Tensor]  # v, slope, whether v may be overwritten
    gradient: Callable[[Tensor, Tensor, float], Tensor]  # dz, v, slope: the gradient of v
    settings: dict[str, Any] = field(default_factory=dict)  # that tell modules of a class apart
    slope: str | None = None  # what the module calls it


ACTIVATIONS = {
    "none": Activation(nn.Identity, None, lambda v, _, __: v, lambda dz, _, __: dz),
    "relu": Activation(
        nn.ReLU, "relu",
        lambda v, _, inplace: F.relu(v, inplace),
        lambda dz, v, _: aten.threshold_backward(dz, v, 0),
    ),
    "silu": Activation(
        nn.SiLU, "silu",
        lambda v, _, inplace: F.silu(v, inplace),
        lambda dz, v, _: aten.silu_backward(dz, v),
    ),
    "gelu": Activation(
        nn.GELU, "gelu",
        lambda v, _, __: F.gelu(v),
        lambda dz, v, _: aten.gelu_backward(dz, v),
        {"approximate": "none"},
    ),
    "gelu_tanh": Activation(
        nn.GELU, "gelu",
        lambda v, _, __: F.gelu(v, approximate="tanh"),
        lambda dz, v, _: aten.gelu_backward(dz, v, approximate="tanh"),
        {"approximate": "tanh"},
    ),
    "leaky_relu": Activation(
        nn.LeakyReLU, "leaky_relu",
        lambda v, slope, inplace: F.leaky_relu(v, slope, inplace),
        lambda dz, v, slope: aten.leaky_relu_backward(dz, v, slope, False),
        slope="negative_slope",
    ),
    "hardswish": Activation(
        nn.Hardswish, "hardswish",
        lambda v, _, inplace: F.hardswish(v, inplace),
        lambda dz, v, _: aten.hardswish_backward(dz, v),
    ),
}  # fmt: skip
MODULES = tuple(dict.fromkeys(a.module for a in ACTIVATIONS.values()))
FUNCTIONS = tuple(dict.fromkeys(a.function for a in ACTIVATIONS.values() if a.function))
_SLOPE = 0.01  # where an activation has none
_BY_MODULE = {m: [(n, a) for n, a in ACTIVATIONS.items() if a.module is m] for m in MODULES}


def apply(name: str, v: Tensor, slope: float, inplace: bool = False) -> Tensor:
    """act(v); ``inplace`` may overwrite v (callers then own it and need no gradient)."""
    return ACTIVATIONS[name].value(v, slope, inplace)


def grad(name: str, dz: Tensor, v: Tensor, slope: float) -> Tensor:
    """Gradient with respect to v, given dz = d/d act(v)."""
    return ACTIVATIONS[name].gradient(dz, v, slope)


def to_module(name: str, slope: float = _SLOPE) -> nn.Module:
    """The nn.Module of a name."""
    known = ACTIVATIONS[name]
    return known.module(**known.settings, **({known.slope: slope} if known.slope else {}))


def from_module(module: nn.Module | None) -> tuple[str, float] | None:
    """Name and slope of a module, or None where no kernel knows it. Subclasses are not trusted."""
    if module is None:
        return "none", _SLOPE
    for name, known in _BY_MODULE.get(type(module), ()):
        if all(getattr(module, k, None) == v for k, v in known.settings.items()):
            return name, float(getattr(module, known.slope)) if known.slope else _SLOPE
    return None
