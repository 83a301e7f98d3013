"""Bytes of the tensors that a call makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Made(TorchDispatchMode):
    """Counts what operators allocate, each storage once; tensors of no device have no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    @property
    def largest(self) -> int:
        return max(self.sizes, default=0)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = any(not r.alias_info for r in func._schema.returns)
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if made and isinstance(t, torch.Tensor) and not t.is_meta:
                self.sizes.append(t.untyped_storage().nbytes())
        return out


def watched(function: Callable[..., Any], made: Made) -> Callable[..., Any]:
    """The function with all that it makes counted: what a mode does not see inside of an op."""

    def run(*args: Any) -> Any:
        with made:
            return function(*args)

    return run
