"""Modules whose parameters are no plain tensors with values."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


def why_altered(modules: Callable[[str], nn.Module], paths: Iterable[str]) -> str | None:
    """Why the parameters of some modules are not plain tensors with values, or None."""
    for path in paths:
        module = modules(path)
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            return f"{path} is lazy: it has no weights before its first call"
        if torch.nn.utils.parametrize.is_parametrized(module):
            return f"{path} is parametrized"
        for name, p in module.named_parameters(recurse=False):
            if p.is_meta:
                return f"{path}.{name} is on the meta device"
            if not p.is_floating_point() or type(p.data) is not torch.Tensor:
                return f"{path}.{name} is quantised or a tensor of another class"
    return None
