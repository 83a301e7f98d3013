"""Backward of the parallel op on the Triton backend."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

import fastst
from fastst.functional import parallel_conv2plus1d
from tests.support import fuzz
from tests.support.fuzz import Config, Limits
from tests.support.triton import DEVICE, check, planted_bugs

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("few_programs")

TINY = Limits(
    batch=2,
    channels=12,
    frames=4,
    space=5,
    work=10_000,
    fixed=dict(op="parallel_conv2plus1d", norm="none"),
)
ADD = Config(op="parallel_conv2plus1d", channels=5, mid=6, out=6, size=(3, 5, 4), activation="none")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_random_gradients_are_right(part: int) -> None:
    fuzz.fuzz("triton", 4, TINY, first=fuzz.SEED + 1000 * part, device=DEVICE, least=1.0)


CASES = {
    "added": ADD,
    "added, strides and dilations": replace(
        ADD, stride=(2, 1, 2), dilation=(1, 2, 1), padding=(1, 2, 1), size=(4, 6, 5)),
    "added, both activations": replace(ADD, activation="silu", branch_activation="gelu"),
    "added, one activation": replace(ADD, activation="relu", dtype=torch.bfloat16),
    "added, copied padding": replace(
        ADD, padding_mode=("reflect", "zeros"), stride=(1, 2, 1), dtype=torch.float64,
        size=(2, 4, 3), batch=1),
    "side by side": replace(ADD, combine="cat", mid=3, out=7, dtype=torch.float16),
    "side by side, activations": replace(
        ADD, combine="cat", mid=3, branch_activation="silu", activation="hardswish",
        grad_layout="channels_last"),
    "depthwise": replace(ADD, channels=6, groups=(6, 6), stride=(1, 2, 1), dtype=torch.bfloat16),
    "depthwise, copied padding": replace(
        ADD, channels=6, groups=(6, 6), padding_mode=("circular", "replicate"),
        size=(3, 2, 3), batch=1),
    "grouped": replace(ADD, channels=10, groups=(2, 2), x_layout="channels_last"),
    "grouped, activations": replace(
        ADD, channels=20, mid=12, out=12, groups=(2, 2), branch_activation="silu",
        activation="relu", stride=(1, 2, 1)),
    "grouped apart": replace(
        ADD, channels=30, mid=12, out=12, groups=(2, 3), branch_activation="gelu", size=(2, 4, 3)),
    "one branch depthwise": replace(
        ADD, channels=6, groups=(6, 1), branch_activation="silu", activation="hardswish",
        stride=(2, 2, 1), x_layout="channels_last"),
    "the other depthwise": replace(
        ADD, channels=6, groups=(1, 3), padding_mode=("zeros", "reflect"), size=(3, 3, 3)),
    "depthwise, activations": replace(
        ADD, channels=6, groups=(6, 6), branch_activation="relu", dtype=torch.bfloat16),
    "side by side, grouped": replace(
        ADD, combine="cat", channels=30, mid=3, groups=(2, 3), branch_activation="leaky_relu"),
    "input only": replace(
        ADD, constant=("spatial_weight", "temporal_weight", "spatial_bias", "temporal_bias")),
    "weights only": replace(ADD, constant=("x",)),
    "one weight only": replace(ADD, constant=("x", "spatial_weight", "spatial_bias")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    check(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_gradcheck(activation: str) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, 3, 3, 4, 3), (4, 3, 1, 3, 3), (4, 3, 3, 1, 1), (4,), (4,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE) for s in shapes]
    with fastst.use_backend("triton"):
        assert torch.autograd.gradcheck(
            lambda *t: parallel_conv2plus1d(
                *t, padding=1, stride=(1, 2, 1), branch_activation=activation
            ),
            [t.requires_grad_() for t in tensors], fast_mode=True,
        )  # fmt: skip


LAUNCHES = {
    "added": {"parallel_input_gradient": 1, "parallel_weight_gradient": 1, "channel_sums": 1},
    "added, both activations": {
        "parallel_conv": 1, "parallel_input_gradient": 1, "parallel_weight_gradient": 1},
    "side by side": {
        "parallel_input_gradient": 1, "parallel_weight_gradient": 1, "channel_sums": 2},
    "side by side, grouped": {
        "parallel_conv": 2, "parallel_input_gradient": 1, "parallel_weight_gradient": 1},
    "depthwise": {"parallel_direct_gradients": 1, "channel_sums": 1},
    "input only": {"parallel_input_gradient": 1},
    "one weight only": {"weight_gradient": 1, "channel_sums": 1},
}  # fmt: skip
HELPERS = ("pack", "sum_rows", "finish_weight")


@pytest.mark.parametrize("name", LAUNCHES)
def test_one_launch_for_each_kind_of_gradient(
    name: str,
    launched: Counter[str],
) -> None:
    config = CASES[name]
    tensors, dy = fuzz.make(config, DEVICE)
    for key, t in tensors.items():
        t.requires_grad_(key not in config.constant)
    with fastst.use_backend("triton"):
        y = fuzz.call(config, tensors)
        launched.clear()
        y.backward(dy)
    assert {k: n for k, n in launched.items() if k not in HELPERS} == LAUNCHES[name]


MUTANTS = {
    "one branch twice": (
        "side by side", "parallel", "acc, rest, db_ptr, db_strides",
        "acc, rest, da_ptr, da_strides"),
    "the second weight from the first branch": (
        "side by side", "parallel", "x_size, channels[1], db_ptr", "x_size, channels[1], da_ptr"),
    "no outer activation": (
        "added, one activation", "parallel", "dv = activate_gradient(dv, v, ACTIVATION, SLOPE)",
        "dv = activate_gradient(dv, v, BRANCH, SLOPE)"),
    "the mask of the other branch": (
        "grouped, activations", "parallel", "activate_gradient(dv, b, BRANCH, SLOPE)",
        "activate_gradient(dv, a, BRANCH, SLOPE)"),
    "a mask of the sum": (
        "depthwise, activations", "parallel", "activate_gradient(dv, a, BRANCH, SLOPE)",
        "activate_gradient(dv, v, BRANCH, SLOPE)"),
    "both biases of one branch": (
        "added, both activations", "parallel", "parts * per_part + n, tl.sum(db, 0)",
        "parts * per_part + n, tl.sum(da, 0)"),
    "parts of another group": (
        "grouped apart", "parallel", "part // shared, part % shared",
        "part // shared * 0, part % shared"),
    "the first part of every group": (
        "grouped apart", "parallel", "part % shared * per_part + first", "first"),
    "the last taps of a depthwise branch": (
        "one branch depthwise", "parallel", "c < all_channels, size, TAPS, ALIGN,",
        "c < channels, size, TAPS, ALIGN,"),
    "a depthwise branch of the first group": (
        "one branch depthwise", "parallel", "out_channels, channels,\n            per_group",
        "out_channels, channels,\n            out_channels"),
    "classes of one branch": (
        "added, strides and dilations", "input_gradient", "(residue + TAPS.before[AXIS]",
        "(residue + TAPS.before[2]"),
    "only the spatial branch, depthwise": (
        "depthwise", "parallel", "acc, x, per_group[1], out_per_group[1], channels, db_ptr",
        "tl.zeros_like(acc), x, per_group[1], out_per_group[1], channels, db_ptr"),
}  # fmt: skip


test_planted_bugs_are_seen = planted_bugs(
    {name: bug for name, (_, *bug) in MUTANTS.items()},
    lambda name, patch: check(CASES[MUTANTS[name][0]]),
)
