"""Weights as the kernels read them, and their gradients as users do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastst.backends import triton as backend
from fastst.backends.triton import packing, plans
from tests.support.triton import DEVICE

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("few_programs")


def packed(weight: Tensor, *jobs: tuple[int, int, int]) -> list[Tensor]:
    """A weight with (groups, rows of a tap, width) each, in one call."""

    def host(given: list[Tensor]) -> list[Tensor]:
        return [
            packing.pack_weight(
                found := packing.Weight.of(given[0], g), depth, found.rows(depth), width
            )
            for g, depth, width in jobs
        ]

    return plans.run(host, weight.device, [weight])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_packs_as_kernels_read(count: int, launched: dict[str, int]) -> None:
    w = torch.randn(12, 5, 1, 3, 2, device=DEVICE)
    jobs = [(1, 16, 32), (3, 5, 16), (2, 8, 70)][:count]
    for (g, depth, width), found in zip(jobs, packed(w, *jobs), strict=True):
        k = 12 // g
        expected = w.new_zeros(g, 6, depth, width)
        expected[:, :, :5, :k] = w.reshape(g, k, 5, 6).permute(0, 3, 2, 1)
        assert torch.equal(found, expected.view(g, 6 * depth, width))
    assert launched["pack"] == (count + 1) // 2


@pytest.mark.skipif(not backend.launch.interpreted(), reason="of the interpreter")
def test_a_comparison_of_scalars_stays_a_mask_over_a_block() -> None:
    """Triton 3.9 refuses masks of integers; its interpreter made this one of them."""
    import triton.language as tl
    from triton.runtime import interpreter

    one = interpreter.TensorHandle(np.array([1], np.int32), tl.int32)
    builder = interpreter.interpreter_builder
    block = builder.create_splat(tl.block_type(tl.int1, [4]), builder.create_icmpSLE(one, one))
    assert block.data.dtype == np.bool_ and block.data.all()


def test_rounds_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.arguments, "rounds", lambda dtype: True)
    odd = [1.0, 1 + 2**-11, 1 + 2**-10, 1 + 3 * 2**-11 - 2**-20, -1 - 2**-11, 0.0]
    odd += [float("inf"), float("-inf"), float("nan"), torch.finfo(torch.float32).max]
    w = torch.tensor(odd, device=DEVICE).view(10, 1, 1, 1, 1)
    (found,) = packed(w, (1, 1, 10))
    expected = [1.0, 1 + 2**-10, 1 + 2**-10, 1 + 2**-10, -1 - 2**-10, 0.0]
    expected += [float("inf"), float("-inf"), float("nan"), float("inf")]
    assert torch.equal(
        found[0, 0].nan_to_num(7), torch.tensor(expected, device=DEVICE).nan_to_num(7)
    )
