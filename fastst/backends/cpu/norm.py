"""The backward pass of a batch norm that follows a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    if not y.stride(1) == dv.stride(1) == 1:
        return None
    lib = library()

    def view(t: Tensor) -> Any:
        return lib.View(t.data_ptr(), t.shape, t.stride())

    vectors = [t if t is None else t.contiguous() for t in (mean, var, weight)]
    arrays = [lib.Array() if t is None else lib.Array(t.data_ptr(), t.numel()) for t in vectors]
    dy = torch.empty_like(y) if needs[0] else None
    sums = floats(2, y.shape[1])
    lib.batch_norm_backward(
        view(dv), view(y), *arrays, eps, None if dy is None else view(dy),
        lib.Array(sums.data_ptr(), sums.numel()), torch.get_num_threads(),
    )  # fmt: skip
    dbeta, dgamma = sums
    return [dy, dgamma, dbeta]
