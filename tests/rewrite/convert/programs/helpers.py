"""Names that generated forwards use."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "Base", "Doubles", "F", "Own", "Scale", "checkpoint", "copy", "halved", "in_thread", "io",
    "nn", "np", "pickle", "sharded", "tiled", "torch", "weakref",
]  # fmt: skip


class Base(nn.Module):
    """What every program has: lists of what its forward saw, and modules that it may share."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []
        self.kept: list[Tensor] = []
        self.retained: list[Tensor] = []
        self.caches: list[Tensor] = []
        self.last: Any = None
        self.count = 0
        self.stem, self.relu, self.bn = nn.Conv3d(4, 4, 1), nn.ReLU(True), nn.BatchNorm3d(4)

    def log(self, *values: Any) -> None:
        self.records.append(values)

    def seen(self, module: nn.Module, args: Any, y: Tensor) -> None:
        self.records.append((tuple(y.shape), y.detach().clone()))

    def halves(self, module: nn.Module, into: Any, out: Any) -> Any:
        self.records.append([g if g is None else g.clone() for g in out])
        return tuple(g if g is None else 0.5 * g for g in into)

    def doubles(self, module: nn.Module, out: Any) -> Any:
        return tuple(2 * g for g in out)


class Own(nn.Conv3d):
    """A subclass whose forward does something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x + 1)


def sharded(conv: nn.Module) -> nn.Module:
    """Parameters have memory only while they are needed, as FSDP's and offloaded ones."""

    def fill(module: nn.Module, *_: Any) -> None:
        for name, p in module.named_parameters():
            if p.untyped_storage().size() == 0:
                p.untyped_storage().resize_(p.numel() * p.itemsize)
                p.data.copy_(vars(module)["shards"][name])

    def free(module: nn.Module, *_: Any) -> None:
        vars(module)["shards"] = {n: p.detach().clone() for n, p in module.named_parameters()}
        for p in module.parameters():
            p.untyped_storage().resize_(0)

    conv.register_forward_pre_hook(fill)
    conv.register_forward_hook(free)
    conv.register_full_backward_pre_hook(fill)
    return conv


def tiled(conv: Any) -> Any:
    """Seamless tiling, as image generators patch it in."""

    def forward(self: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv3d(F.pad(x, (1, 1, 0, 0, 0, 0), mode="circular"), weight, bias)

    conv._conv_forward = types.MethodType(forward, conv)
    return conv


def halved(x: Tensor) -> Tensor:
    """Its gradient halved, as gradient-scaling tricks do."""
    return 0.5 * x + 0.5 * x.detach()


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 0.25 * grad


class Doubles(torch.autograd.Function):
    """Saves and reads its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a thread of its own, or what it raises."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((function(*args), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = found[0]
    if error is not None:
        raise error
    return value
