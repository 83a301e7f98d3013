"""A kernel that only computes offsets, to test them with strides that no small tensor has."""

from __future__ import annotations

import triton
import triton.language as tl

from fastst.backends.triton.kernels.common import grid_of, positions, row_offsets


@triton.jit
def offsets_kernel(out_ptr, strides, grid):
    p = tl.arange(0, 16)
    tl.store(out_ptr + p, row_offsets(positions(p, grid_of(grid), 1), strides, 1))
