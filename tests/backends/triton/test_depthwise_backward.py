"""Backward of depthwise and thinly grouped pairs on the Triton backend."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import fastst
from fastst.backends.triton import tiles
from fastst.functional import conv2plus1d
from tests.support import fuzz
from tests.support.fuzz import Config, Limits
from tests.support.triton import DEVICE, check, planted_bugs

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("few_programs")


def thin(config: Config) -> bool:
    channels = (config.channels, config.mid)
    if config.order == "temporal-first":
        channels = channels[::-1]
    groups = zip(channels, config.groups, strict=True)
    return any(tiles.is_thin(c // g, g) for c, g in groups)


TINY = Limits(
    batch=2, channels=12, frames=4, space=5, work=10_000, fixed=dict(op="conv2plus1d"), accept=thin
)  # fmt: skip
DEPTHWISE = Config(channels=4, mid=4, out=4, groups=(4, 4), size=(3, 5, 4), norm="batch")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_random_gradients_are_right(part: int) -> None:
    fuzz.fuzz("triton", 3, TINY, first=fuzz.SEED + 1000 * part, device=DEVICE, least=1.0)


CASES = {
    "frozen, temporal first, no activation": replace(
        DEPTHWISE, norm="frozen", order="temporal-first", activation="none"),
    "strides, recomputed": replace(
        DEPTHWISE, stride=(2, 2, 1), recompute=True, activation="silu", dtype=torch.float16),
    "several channels a group": Config(
        channels=4, mid=8, out=12, groups=(2, 4), size=(3, 4, 4), norm="batch", x_layout="sliced"),
    "one thin pass of two": Config(
        channels=6, mid=9, out=3, groups=(1, 3), size=(3, 4, 4), norm="batch",
        dtype=torch.bfloat16),
    "one dense pass of two": Config(
        channels=3, mid=9, out=4, groups=(1, 3), size=(3, 4, 4), order="temporal-first"),
    "copied padding": replace(
        DEPTHWISE, padding_mode=("reflect", "replicate"), size=(3, 3, 3), batch=1,
        dtype=torch.float64),
    "circular": replace(DEPTHWISE, padding_mode=("circular", "circular"), size=(2, 3, 3), batch=1),
    "weights only": replace(DEPTHWISE, constant=("x",)),
    "second weight only": replace(
        DEPTHWISE, norm="none", constant=("x", "spatial_weight", "spatial_bias")),
    "input only": replace(
        DEPTHWISE, norm="none", activation="none",
        constant=("spatial_weight", "temporal_weight", "spatial_bias", "temporal_bias")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    check(CASES[name])


def test_one_kernel_gives_both_gradients_of_a_pass(launched: Counter[str]) -> None:
    check(DEPTHWISE)
    assert launched["direct_gradients"] == 2
    assert launched["input_gradient"] == launched["weight_gradient"] == 0


@pytest.mark.slow
def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, 4, 2, 2, 2), (4, 2, 1, 2, 2), (4, 2, 2, 1, 1), (4,), (4,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes]
    with fastst.use_backend("triton"):
        assert torch.autograd.gradcheck(
            lambda *t: conv2plus1d(*t, padding=1, groups=2, activation="silu"),
            [t.requires_grad_() for t in tensors], fast_mode=True,
        )  # fmt: skip


BUGS = {
    "no activation before the weight gradient": (
        "x = activate(x, ACTIVATION, SLOPE)", "x = x"),
    "weights of another tap": (
        "row = tap * out_per_group + r", "row = (TAP_COUNT - 1 - tap) * out_per_group + r"),
    "outputs of another group": (
        "k = (c // per_group * out_per_group + r)", "k = (c % per_group * out_per_group + r)"),
    "only the first image": (
        "inside = inside & exists & row_ok", "inside = inside & exists & row_ok & (m == 0)"),
    "sums beside the input": ("tl.where(read, dy * x, 0.0)", "tl.where(read, dy * x, 1.0)"),
}  # fmt: skip


def all_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(CASES["several channels a group"])
    check(CASES["copied padding"])


test_planted_bugs_are_seen = planted_bugs(
    {name: ("depthwise_backward", *bug) for name, bug in BUGS.items()}, all_checks
)
