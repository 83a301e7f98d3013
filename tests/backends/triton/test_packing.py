"""Weights as the kernels read them, and their gradients as users do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastst.backends import triton as backend
from fastst.backends.triton import packing, plans
from tests.support.fuzz import Config
from tests.support.triton import DEVICE, check, planted_bugs

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("few_programs")


def packed(weight: Tensor, *jobs: tuple[int, int, int], turned: bool = False) -> list[Tensor]:
    """A weight with (groups, rows of a tap, width) each, in one call."""

    def host(given: list[Tensor]) -> list[Tensor]:
        return [
            packing.pack_weight(
                found := packing.Weight.of(given[0], g), depth, found.rows(depth), width,
                turned=turned,
            )
            for g, depth, width in jobs
        ]  # fmt: skip

    return plans.run(host, weight.device, [weight])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_packs_as_kernels_read(count: int, turned: bool, launched: dict[str, int]) -> None:
    w = torch.randn(12, 5, 1, 3, 2, device=DEVICE)
    jobs = [(1, 16, 32), (3, 5, 16), (2, 8, 70)][:count]
    for (g, depth, width), found in zip(jobs, packed(w, *jobs, turned=turned), strict=True):
        k = 12 // g
        expected = w.new_zeros(g, 6, depth, width)
        expected[:, :, :5, :k] = w.reshape(g, k, 5, 6).permute(0, 3, 2, 1)
        assert torch.equal(found, expected.view(g, 6 * depth, width))
        assert found.stride(1 if turned else 2) == 1
    assert launched["pack"] == (count + 1) // 2


@pytest.mark.skipif(not backend.launch.is_interpreted(), reason="of the interpreter")
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


# ---- weights as AMD's products want them

BASE = Config(size=(3, 5, 4), batch=1, channels=17, out=33, mid=36, norm="batch")
TURNED = {
    "dense": BASE,
    "grouped": replace(BASE, channels=34, mid=36, out=34, groups=(2, 2), dtype=torch.float16),
    "rows": replace(BASE, channels=3, kernel=(3, 5, 5), padding=(1, 2, 2), norm="frozen"),
    "strides": replace(BASE, stride=(2, 2, 2), x_layout="channels_last"),
    "parallel": Config(
        op="parallel_conv2plus1d",
        size=(3, 5, 4),
        batch=1,
        channels=34,
        mid=34,
        out=34,
        groups=(2, 1),
    ),
}


def check_turned(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(backend.arguments, "turned", lambda: True)
    for name in names:
        check(TURNED[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", TURNED)
def test_turned_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_turned(monkeypatch, name)


MUTANTS = {
    "a tile of columns begins too early": (
        "tap_conv", "w_ptr += tl.cast(first, tl.int64) * rows", "w_ptr += first"),
    "columns as if they were rows": (
        "tap_conv", "k[:, None] + n.to(tl.int64)[None, :]", "n[None, :] + k.to(tl.int64)[:, None]"),
    "steps as if rows were apart": ("tap_conv", "pitch = 1 if TURNED else width", "pitch = width"),
    "written the other way round": ("pack", "* width + n) * rows + r", "* rows + r) * width + n"),
}  # fmt: skip


test_planted_bugs_are_seen = planted_bugs(
    MUTANTS, lambda name, monkeypatch: check_turned(monkeypatch, "dense", "parallel")
)
