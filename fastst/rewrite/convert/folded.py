"""Frozen norms behind convolutions of copies for inference, multiplied into their weights.

On a CPU a norm is part of the operation instead: writes to ``.data`` and by NumPy change no version
counter, and to look for them takes as long as to multiply.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...problem.memory import read_address


def folds(weight: Tensor) -> bool:
    """Whether a frozen norm behind a convolution is to be in its weights."""
    return not weight.is_cpu


class Folded:
    """Weight and bias of a convolution with the norm behind it.

    Remembered as long as version counters and addresses of all of them say that they are the same;
    of inference tensors, which have no version, made anew each time.
    """

    def __init__(self) -> None:
        self._found: Any = None

    def __call__(self, second: Any, norm: Any) -> tuple[Tensor, Tensor]:
        tensors = [t for t in (*second, *norm[:4]) if t is not None]
        if any(t.is_inference() for t in tensors):
            return _multiply_in(second, norm)
        versions = [(t._version, read_address(t)) for t in tensors], norm.eps
        if self._found is not None:
            same = all(a is b for a, b in zip(self._found[0], tensors, strict=False))
            if same and len(self._found[0]) == len(tensors) and self._found[1] == versions:
                found: tuple[Tensor, Tensor] = self._found[2]
                return found
        with torch.inference_mode(False):  # it may be saved for backward later
            made = _multiply_in(second, norm)
        self._found = tensors, versions, made
        return made


def _multiply_in(second: Any, norm: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        weight, bias = second
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean
        shift = shift * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        wide = torch.promote_types(weight.dtype, torch.float32)
        scale = scale.to(wide).view(-1, *[1] * (weight.dim() - 1))
        return (weight.to(wide) * scale).to(weight.dtype), shift.to(weight.dtype)
