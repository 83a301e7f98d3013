"""A pair in a module whose forward is a function of the test's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A pair whose forward is a function of the test's."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.s = nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1))
        self.n = nn.BatchNorm3d(6)
        self.t = nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0))
        self.body, self.kept = body, []

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


def compute_pair(m: Any, x: Tensor) -> Tensor:
    return m.t(F.relu(m.n(m.s(x))))


def results(m: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = m(x)
    y.square().sum().backward()
    grads = [torch.zeros(()) if p.grad is None else p.grad for p in (x, *m.parameters())]
    return [y.detach(), *grads, *(b.clone() for b in m.buffers())]
