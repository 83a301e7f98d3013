"""The operators of ``conv3d``, and what joins them where a gradient is needed.

In training residual and activation stand outside of the op: PyTorch's own operators, whose
gradients it knows. Kept for backward are x and the statistics of its norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..backends import reference
from ..backends.contract import ConvBackward, ConvResult
from ..problem import activations, norms
from ..problem.conv3d import ConvSpec, ConvTensors
from .autograd import as_own, backward_of, needs_grad, put_aside, scatter, take_back
from .registered import as_laid_out, call, clone_aliases, register
from .schema import CONV, CONV_SPEC, CONV_TENSORS, conv_arguments, encode_spec


def _run(args: Sequence[Any], train: bool) -> tuple[ConvResult, ConvSpec]:
    tensors, spec, problem, backend = conv_arguments(args)
    chosen = dispatch.choose(problem, "forward", backend)
    assert chosen.conv3d is not None  # else it had been refused
    return chosen.conv3d(problem, tensors, train), spec


def _conv3d(*args: Any) -> Tensor:
    return _run(args, False)[0].y


def _conv3d_fake(*args: Any) -> Tensor:
    return conv_arguments(args)[2].empty_output(args[0])


def results_of(spec: ConvSpec, known: bool) -> tuple[bool, ...]:
    """Which of y, mean, var, out_mean and out_var ``conv3d_train`` returns.

    Args:
        known: whether the statistics of the norm were given.
    """
    takes = spec.norm != "none" and not known
    return (
        True, takes and norms.is_centred(spec.norm), takes,
        spec.output_statistics, spec.output_statistics,
    )  # fmt: skip


def _conv3d_train(*args: Any) -> list[Tensor]:
    result, spec = _run(args, True)
    results: Sequence[Any] = result  # of which those that are asked for are there
    there = results_of(spec, args[ConvTensors._fields.index("var")] is not None)
    return clone_aliases(list(compress(results, there)))


def _conv3d_train_fake(*args: Any) -> list[Tensor]:
    tensors, spec, problem, _ = conv_arguments(args)
    _, mean, var, *_ = results_of(spec, tensors.var is not None)

    def statistics(*shape: int) -> Tensor:
        return tensors.x.new_empty(shape, dtype=problem.accumulate_dtype)

    of_x = [statistics(*problem.statistics_shape) for asked in (mean, var) if asked]
    of_y = [statistics(problem.out_channels) for _ in range(2) if spec.output_statistics]
    return [problem.empty_output(tensors.x), *of_x, *of_y]


def _conv3d_backward(
    dy: Tensor, mean: Tensor | None, var: Tensor | None, *args: Any
) -> list[Tensor]:
    *given, needs = args
    tensors, _, problem, backend = conv_arguments(given)
    if tensors.var is not None:
        mean, var = tensors.mean, tensors.var
    problem = problem.with_gradient(dy)
    run = dispatch.choose(problem, "backward", backend).conv3d_backward
    assert run is not None  # else it had been refused
    return as_laid_out(run(ConvBackward(problem, tensors, dy, mean, var, needs)), tensors, needs)


def _conv3d_backward_fake(
    dy: Tensor, mean: Tensor | None, var: Tensor | None, *args: Any
) -> list[Tensor]:
    return [torch.empty_like(t) for t, n in zip(args[:CONV], args[-1], strict=False) if n]


register(f"conv3d({CONV_TENSORS}, {CONV_SPEC}, str backend) -> Tensor", _conv3d, _conv3d_fake)
register(
    f"conv3d_train({CONV_TENSORS}, {CONV_SPEC}, str backend) -> Tensor[]",
    _conv3d_train,
    _conv3d_train_fake,
)
register(
    f"conv3d_backward(Tensor dy, Tensor? x_mean, Tensor? x_var, {CONV_TENSORS}, {CONV_SPEC}, "
    "str backend, bool[] needs) -> Tensor[]",
    _conv3d_backward,
    _conv3d_backward_fake,
)


class _ConvFunction(torch.autograd.Function):
    """y of conv3d and the statistics; keeps x and those of its norm."""

    @staticmethod
    def forward(ctx: Any, spec: ConvSpec, backend: str, *tensors: Tensor | None) -> Any:
        results = call("conv3d_train", *tensors, *encode_spec(spec), backend)
        there = results_of(spec, ConvTensors._make(tensors).var is not None)
        _, mean, var, *_ = scatter(results, there)
        saved, ctx.aside = put_aside(tensors, ConvTensors._fields.index("bias"))
        ctx.save_for_backward(mean, var, *saved)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        # Those of y are no part of what backward computes.
        ctx.spec = spec._replace(output_statistics=False) if spec.output_statistics else spec
        ctx.backend = backend
        return as_own(results[0]), *results[1:]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Any:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        mean, var, *tensors = ctx.saved_tensors
        tensors = take_back(tensors, ctx.aside)
        grads = backward_of(
            torch.ops.fastst.conv3d_backward, reference.compose_conv3d, dy, (mean, var),
            ConvTensors(*tensors), ctx.spec, ctx.backend, ctx.needs_input_grad[2:],
        )  # fmt: skip
        return None, None, *grads


def conv3d(
    tensors: ConvTensors, spec: ConvSpec, backend: str
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """y; mean and biased variance of x with norm="batch"; those of y if they are asked for."""
    gradients = needs_grad(tensors)
    batch = spec.norm == "batch" and tensors.var is None
    if not (gradients or batch or spec.output_statistics):
        return call("conv3d", *tensors, *encode_spec(spec), backend), None, None
    bare, inner = tensors, spec
    if gradients:
        bare, inner = tensors._replace(residual=None), spec._replace(activation="none")
        results = _ConvFunction.apply(inner, backend, *bare)
    else:
        results = call("conv3d_train", *tensors, *encode_spec(spec), backend)
    found: Any = scatter(results, results_of(spec, tensors.var is not None))
    y, mean, var, *out = found
    if gradients:
        y = y if tensors.residual is None else y + tensors.residual
        y = activations.apply(spec.activation, y, spec.slope)
    return y, (mean, var) if batch else None, tuple(out) if spec.output_statistics else None
