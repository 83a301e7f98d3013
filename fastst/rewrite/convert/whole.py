"""Convolutions that are no half of a pair: alone, with what ends them, as one operation.

That is worth while where a backend has kernels of its own for them: elsewhere PyTorch's convolution
runs as it did.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import dispatch, functional
from ...problem import conv3d_checks
from ...problem.conv3d import ConvProblem, ConvTensors
from . import endings, rules
from .begins import Begins
from .promise import real


class Whole(Begins):
    """The convolution itself, answered with a promise where a norm or a block's end may follow."""

    def __call__(self, x: Any, weight: Any, bias: Any) -> Tensor:
        conv = self.conv
        if not torch.compiler.is_compiling():
            x = real(x, f"{type(conv).__name__} {self.name}")
            if self.wanted and not self.barred and self._defers():
                made = self._operation(x, weight, bias)
                if made is not None:
                    return made
        plain: Tensor = type(conv)._conv_forward(conv, x, weight, bias)
        return plain

    def _operation(self, x: Any, weight: Any, bias: Any) -> Tensor | None:
        dtype = rules.plain_call(x, weight, bias)
        if dtype is None:
            return None
        conv = self.conv
        settings: dict[str, Any] = dict(
            stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
            padding_mode=conv.padding_mode,
        )  # fmt: skip
        tensors = ConvTensors(x, weight, bias)
        try:
            spec = conv3d_checks.conv3d(
                tensors, None if dtype == x.dtype else dtype, None, *settings.values(), False,
                None, None, 0.01, False,
            )  # fmt: skip
        except (TypeError, ValueError):
            return None  # PyTorch says what is wrong
        problem = ConvProblem.of(tensors, spec)
        if not dispatch.has_kernels(problem):
            return None

        def run(given: dict[str, Any], second: Any = None, **ending: Any) -> Tensor:
            w, b = second or (given["second weight"], given.get("second bias"))
            ending["activation"] = ending.pop("outer_activation", None)
            ending["output_norm"] = ending.pop("outer_norm", None)
            y: Tensor = functional.conv3d(given["first input"], w, b, **settings, **ending)
            return y

        given = {"first input": x, "second weight": weight, "second bias": bias}
        given = {n: t for n, t in given.items() if t is not None}
        return endings.defer(self, run, given, None, torch.Size(problem.out_shape), dtype, True)


def is_whole(module: nn.Module) -> bool:
    """Whether a convolution is over space and time at once."""
    if not isinstance(module, nn.Conv3d):
        return False
    return module.kernel_size[0] > 1 and max(module.kernel_size[1:]) > 1
