"""The backward pass of the native CPU kernels, in one call: see csrc/cpu/pair.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem.spec import Problem
from ..contract import Gradients, PairBackward
from . import library
from .library import buffer, floats, rows


def why_not(problem: Problem) -> str | None:
    for p in problem.passes:
        if p.padding_mode != "zeros" and any(p.padding):
            return f"pads with zeros only in the backward pass, not by {p.padding_mode!r}"
    return None


def _bias_gradient(dy: Tensor, bias: Tensor | None, wide: torch.dtype | None) -> Tensor:
    """Rounded once."""
    # Where all positions are neighbours, PyTorch adds 16 bits up in float32 and rounds the sum, ten
    # times as fast as where it is to stay in float32.
    joined = dy.is_contiguous(memory_format=torch.channels_last_3d)
    once = joined and wide is None and bias is not None and bias.dtype == dy.dtype
    return dy.sum((0, 2, 3, 4), dtype=None if once else torch.float32)


def conv2plus1d_backward(call: PairBackward) -> Gradients:
    problem, tensors, need = call.problem, call.tensors, call.need
    m = problem.mid_channels
    # What is added up over the slices of a batch is rounded once, at the end.
    wide = None if call.slice is None else torch.float32

    def empty_gradient(weight: Tensor, needed: bool) -> Tensor | None:
        return torch.empty_like(weight, dtype=wide) if needed else None

    dw1 = empty_gradient(tensors.first_weight, need.first_weight)
    dw2 = empty_gradient(tensors.second_weight, need.second_weight)
    db1, dgamma, dbeta = (
        floats(m) if needed else None
        for needed in (need.first_bias, need.norm_weight, need.norm_bias)
    )
    db2 = None
    if need.second_bias:
        db2 = _bias_gradient(call.dy_owner[0], tensors.second_bias, wide)
    u = rows(problem) if call.u is None else call.u
    dx = library.library().pair_backward(
        library.plan(problem), tensors, call.dy_owner, u, call.u is None, buffer(problem),
        *call.statistics(), call.means, dw1, dw2, db1, dgamma, dbeta,
        call.empty_dx if need.x else None, torch.get_num_threads(),
    )  # fmt: skip
    return dx, dw1, dw2, db1, db2, dgamma, dbeta
