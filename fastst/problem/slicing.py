"""Into how many parts of the batch backward is cut where u is not kept."""

from __future__ import annotations

import math

from .spec import PairProblem

# Less than this is not cut: its parts would no longer fill a large GPU several times over.
_LEAST_BYTES = 64 << 20


def count(problem: PairProblem, mids: int) -> int:
    """Into how many parts of the batch backward is cut where u is not kept; one clip never is.

    As many as make what a part writes at once no larger than x.

    Args:
        mids: how many tensors as large as u the backend makes at once.
    """
    itemsize = problem.dtype.itemsize
    x = problem.batch * problem.passes[0].in_channels * math.prod(problem.size) * itemsize
    made = mids * math.prod(problem.mid_shape) * itemsize
    if made <= max(x, _LEAST_BYTES):
        return 1
    clips = max(1, problem.batch * max(x, _LEAST_BYTES) // made)
    return -(-problem.batch // clips)
