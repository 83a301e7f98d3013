"""Modules of which more than the class has a say in what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody sees a module's call, or moves what it needs when it returns."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def does_more(module: nn.Module) -> bool:
    """Whether calling a module runs more than the forward of its class."""
    return has_hooks(module) or "forward" in module.__dict__


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
