"""Backends: each a module with the same functions, none of which validates or chooses.

``why_not(problem, phase)``    why it cannot run this problem ("forward" | "backward"), or None
``output_statistics(problem)``  whether it gives those of y without reading y again; optional
``norm_backward(dv, y, mean, var, weight, eps, needs)``
                              gradients of y, weight and bias of v, the batch norm of y by its own
                              statistics, or None where PyTorch's are as good; optional
``avoid(problem, phase)``     reason why "auto" passes it over although it could run it; optional
``rehearse(problem)``         a small problem for the self-check, run by the same kernels; optional
``conv2plus1d(problem, tensors, save)``                   -> ``PairResult``
``mids(problem)``             how many tensors as large as u its backward makes at once where u was
                              not kept; optional, without it the batch is never cut into parts
``conv2plus1d_backward(problem, tensors, box, u, mean, var, needs, part=None)``
                              -> one gradient per need; ``box`` is [dy], and is emptied once dy is
                              read no more, so that its memory can serve what comes after
``parallel_conv2plus1d(problem, tensors)``                -> y
``parallel_conv2plus1d_backward(problem, tensors, dy, needs)``         -> one gradient per need

``problem`` is a ``Problem``, ``tensors`` a ``PairTensors`` or ``ParallelTensors`` of any
strides. y has the strides of ``problem.empty_output``; each gradient those of ``torch.empty_like``
of its tensor; u is ``problem.mid_shape`` in the dtype of x (channels beyond M are zeros); mean and
var are (M,) in ``problem.accumulate_dtype``. u is what leaves the first convolution, its bias
included, before norm and activation. It is the same for all backends, so that forward and backward
may run on different ones. Phases that a backend lacks are refused by ``why_not``. With
``spec.group`` mean and var are those of all its ranks together (``collectives.pool_statistics``,
``collectives.pool_means``); gradients are this rank's.

y = outer_activation(pair + residual), where these are given: then nothing is saved, and the norm is
none or frozen. A backend whose last kernel takes them in says so in its result; for the others
``finished`` does it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..problem import activations
from ..problem.spec import PairTensors, Problem


class PairResult(NamedTuple):
    """What the forward pass of ``conv2plus1d`` leaves; the last three only where asked for."""

    y: Tensor
    u: Tensor | None = None  # with save and not spec.recompute
    mean: Tensor | None = None  # with norm="batch"
    var: Tensor | None = None  # with norm="batch": biased
    total: Tensor | None = None  # (), with spec.group: values per channel of all its ranks together
    outer: bool = False  # whether the residual and the outer activation are in y
    out_mean: Tensor | None = None  # of y, with spec.output_statistics
    out_var: Tensor | None = None  # likewise, biased


class Part(NamedTuple):
    """What a backward call for a part of the batch knows of the whole.

    Its gradients of parameters may be in the accumulation dtype: they are going to be added up.
    """

    dx: Tensor | None  # where the gradient of x may be written, of any strides
    means: Tensor | None  # with norm="batch", (2, M): of dv and dv·(u − mean), over all ranks, too


def finished(result: PairResult, problem: Problem, tensors: PairTensors) -> Tensor:
    """y with the residual and the outer activation, in place where the backend has not done it."""
    y, spec = result.y, problem.spec
    if result.outer:
        return y
    if tensors.residual is not None:
        y = y.add_(tensors.residual)
    return activations.apply(spec.outer_activation, y, spec.slope, inplace=True)  # type: ignore[union-attr]
