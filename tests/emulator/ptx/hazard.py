"""A product whose operand stays in registers: what Triton 3.6 and 3.7.1 make of it on Hopper.

Triton leaves the product under way over the end of the loop, and the next round writes the
registers that it still reads: the hazard S1, which PTX calls undefined. The library's kernels avoid
it by multiplying transposed; CURED does as they do. Where the loop may have no step, ptxas makes
the products wait for each other instead.
"""

from __future__ import annotations

import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.language as tl

from emulator.ptx.machine import Error
from emulator.ptx.triton import executing

M, N, K, STEP = 64, 64, 128, 32


@triton.jit
def scaled_product(
    a, b, d, K, LEAST: tl.constexpr,  # LEAST: of K
    M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr, CURED: tl.constexpr,
):  # fmt: skip
    """d = relu(a) b"""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, STEP)
    sums = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, tl.maximum(K, LEAST), STEP, num_stages=3):
        left = tl.load(a + m[:, None] * K + start + k[None, :])
        right = tl.load(b + (start + k)[:, None] * N + n[None, :])
        left = tl.maximum(left.to(tl.float32), 0.0).to(tl.bfloat16)
        if CURED:
            sums = tl.trans(tl.dot(tl.trans(right), tl.trans(left), tl.trans(sums)))
        else:
            sums = tl.dot(left, right, sums)
    tl.store(d + m[:, None] * N + n[None, :], sums)


def main() -> None:
    """Print what executing each of the two says."""
    torch.manual_seed(7)
    with executing((9, 0)):
        a, b = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
        wanted = a.double().relu() @ b.double()
        for cured in (False, True):
            d = torch.full((M, N), torch.nan)
            try:
                scaled_product[(1,)](a, b, d, K, STEP, M, N, STEP, cured, num_warps=4)
                said = f"error {float((d - wanted).abs().max()):.0e}"
            except Error as error:
                said = str(error).splitlines()[0]
            print(f"{'cured' if cured else 'plain'}: {said}")


if __name__ == "__main__":
    sys.exit(main())
