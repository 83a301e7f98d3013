"""The backward pass of a batch norm that follows a pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import floats, library, load


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, mean: Tensor, var: Tensor,
    n: int | Tensor, momentum: float,
) -> bool:  # fmt: skip
    """As ``backends.ranks.update_running``, in one call; False for tensors that are not its own.

    What is written by address has its version counter as it was.
    """
    if not (mean.is_cpu and isinstance(n, int)) or torch.compiler.is_compiling():
        return False
    for t in (running_mean, running_var, mean, var):
        if t is not None and not (
            type(t) is Tensor and t.dtype is torch.float32 and t.is_contiguous()
        ):
            return False
    lib = load()
    if isinstance(lib, str) or any(
        t is not None and t.is_inference() for t in (running_mean, running_var)
    ):
        return False
    lib.update_running(running_mean, running_var, mean, var, n / (n - 1), momentum)
    return True


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
