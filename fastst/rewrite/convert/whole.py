"""Convolutions that are no half of a pair: alone, with what ends them, as one operation.

That is worth while where a backend has kernels of its own for them: elsewhere PyTorch's convolution
runs as it did.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import dispatch, functional
from ...functional import BatchNorm
from ...problem import conv3d_checks
from ...problem.conv3d import ConvProblem, ConvTensors
from . import endings, readings
from .begins import Begins, Event, tell
from .endings import PendingOperation, is_deferred
from .geometry import padding_of
from .layouts import Call, call
from .plain import plain_call
from .promise import real
from .readings import INPUT, Read
from .report import Alone
from .state import State


class Ran(NamedTuple):
    """An operation that ran: what it read, and what ended it."""

    chain: Read
    ending: dict[str, Any]

    def entry(self, name: str) -> Alone:
        plan, ending = self.chain.plan, self.ending
        outer = {
            "residual": "residual" in ending, "outer": ending.get("outer_activation", "none"),
            "outer_norm": "second" in ending or "outer_norm" in ending,
        }  # fmt: skip
        if plan is None:
            return Alone(name, **outer)
        kind = plan.norm and ("batch" if isinstance(plan.norm, BatchNorm) else plan.norm.kind)
        activation = (plan.activation or ("none",))[0]
        return Alone(name, kind, activation, plan.past, bool(plan.pads), **outer)


class Whole(Begins):
    """The convolution itself, which takes in what a promise has before it, and answers with one
    where a norm, the next convolution or a block's end may follow."""

    reads = True

    def __call__(self, x: Any, weight: Any, bias: Any) -> Tensor:
        conv = self.conv
        if not torch.compiler.is_compiling():
            if self.wanted and not self.barred and self._defers():
                made = self._operation(x, weight, bias)
                if made is not None:
                    return made
            x = real(x, f"{type(conv).__name__} {self.name}")
        plain: Tensor = type(conv)._conv_forward(conv, x, weight, bias)
        return plain

    def _operation(self, x: Any, weight: Any, bias: Any) -> Tensor | None:
        """The output as one operation, with the chain that x is one of; None where it is none."""
        conv = self.conv
        chain = readings.read(x, conv, weight)
        made = None if chain is None else self._run(chain, weight, bias)
        if made is not None:
            return made
        x = real(x, f"{type(conv).__name__} {self.name}")
        return self._run(Read({INPUT: x}, None, padding_of(conv), conv.padding_mode), weight, bias)

    def _run(self, chain: Read, weight: Any, bias: Any) -> Tensor | None:
        conv, x = self.conv, chain.tensors[INPUT]
        dtype = plain_call(x, weight, bias)
        if dtype is None:
            return None
        settings: dict[str, Any] = dict(
            stride=conv.stride, padding=chain.padding, dilation=conv.dilation, groups=conv.groups,
            padding_mode=chain.padding_mode,
        )  # fmt: skip
        options = chain.options(chain.tensors)
        norm, slope = options.get("input_norm"), options.get("negative_slope", 0.01)
        tensors = ConvTensors(x, weight, bias, past=options.get("past"))
        try:
            spec = conv3d_checks.conv3d(
                tensors, None if dtype == x.dtype else dtype, norm, *settings.values(), False,
                options.get("input_activation"), None, slope, False,
            )  # fmt: skip
        except (TypeError, ValueError):
            return None  # PyTorch says what is wrong
        if norm is not None:
            tensors = tensors._replace(norm_weight=norm.weight, norm_bias=norm.bias)
        if isinstance(norm, BatchNorm):
            tensors = tensors._replace(mean=norm.running_mean, var=norm.running_var)
        problem = ConvProblem.of(tensors, spec)
        if not dispatch.has_kernels(problem):
            return None

        def run(given: dict[str, Any], second: Any = None, **ending: Any) -> Tensor:
            folded = {} if second is None else {"second": second}
            tell(Event(self, Ran(chain, ending | folded)))
            w, b = second or (given["second weight"], given.get("second bias"))
            ending["activation"] = ending.pop("outer_activation", None)
            ending["output_norm"] = ending.pop("outer_norm", None)
            options = chain.options(given) | ending
            y: Tensor = functional.conv3d(given[INPUT], w, b, **settings, **options)
            return y

        given = chain.tensors | {"second weight": weight, "second bias": bias}
        given = {n: t for n, t in given.items() if t is not None}
        shared = slope if options.get("input_activation") == "leaky_relu" else None
        shape = torch.Size(problem.out_shape)
        op = PendingOperation(
            self,
            run,
            given,
            shape,
            dtype,
            shared,
            True,
            lambda: self._calls(chain),
            chain.viewed,
            held=chain.held,
        )
        state = State(x.device)
        return endings.defer(op, state) if is_deferred(self, x, state) else endings.compute(op)

    def _calls(self, chain: Read) -> tuple[Call, ...]:
        """What the operation stands for."""
        conv = self.conv
        how, mode = (conv.stride, conv.padding, conv.dilation, conv.groups), conv.padding_mode
        widths = tuple(conv._reversed_padding_repeated_twice)

        def source(_: None, x: Tensor) -> Tensor:
            return x

        def convolve(z: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            if mode == "zeros":
                return F.conv3d(z, weight, bias, *how)
            return F.conv3d(F.pad(z, widths, mode), weight, bias, how[0], 0, *how[2:])

        last = call(convolve, {"weight": "second weight", "bias": "second bias"})
        return (source, (("x", INPUT),)), *chain.calls, last


def is_whole(module: nn.Module) -> bool:
    """Whether a convolution is over space and time at once."""
    if not isinstance(module, nn.Conv3d):
        return False
    return module.kernel_size[0] > 1 and max(module.kernel_size[1:]) > 1
