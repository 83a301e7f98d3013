"""The backward pass of a batch norm that follows a pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import floats, library


def norm_backward(
    dv: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None] | None:
    """dy, dγ and dβ where channels are neighbours in memory, else None.

    Such a channel PyTorch adds up position by position in float32, which costs a digit; others it
    adds up in pieces.
    """
    if not y.stride(1) == dv.stride(1) == 1 or y.dtype != dv.dtype:
        return None
    dy = torch.empty_like(y) if needs[0] else None
    sums = floats(2, y.shape[1])
    library().batch_norm_backward(dv, y, mean, var, weight, eps, dy, sums, torch.get_num_threads())
    dbeta, dgamma = sums
    return [dy, dgamma, dbeta]
