"""Training on the Triton backend: what a step of each layer launches and writes; losses."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst
from fastst.backends import triton as backend
from fastst.backends.triton import gradient_tiles
from fastst.problem.spec import ParallelSpec, ParallelTensors, Problem
from tests.backends.triton.test_backward import STEP, step, watched
from tests.support import fuzz
from tests.support.fuzz import Config
from tests.support.triton import DEVICE, problem_of

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("few_programs")

# ---- launches, and tensors of the size of u


DENSE = ["weight_gradient", "input_gradient"]
BOTH = ["affine", *DENSE, "norm_gradient", "affine", *DENSE]  # of z, and of du
WIDE = replace(STEP, channels=32, mid=32, out=32, size=(4, 20, 20))
FAMILIES = {
    "dense": (STEP, False, 1, ["finish_norm", *BOTH]),
    "temporal first": (
        replace(STEP, order="temporal-first"), False, 1,
        ["finish_norm", *BOTH]),
    "frozen norm": (
        replace(STEP, norm="frozen"), False, 1,
        ["finish_norm", "affine", *DENSE, "norm_gradient", *DENSE]),
    "no norm": (replace(STEP, norm="none"), False, 1, ["affine", *DENSE, *DENSE]),
    "recompute": (STEP, True, 2, ["tap_conv", "finish_norm", *BOTH]),
    "no norm, recompute": (
        replace(STEP, norm="none"), True, 2, ["tap_conv", "affine", *DENSE, *DENSE]),
    "grouped": (replace(WIDE, groups=(4, 4)), False, 1, ["finish_norm", *BOTH]),
    "depthwise": (
        replace(WIDE, groups=(32, 32)), False, 1,
        ["finish_norm", "direct_gradients", "norm_gradient", "direct_gradients"]),
    "depthwise, no norm, recompute": (
        replace(WIDE, groups=(32, 32), norm="none"), True, 2,
        ["direct_conv", "direct_gradients", "direct_gradients"]),
}  # fmt: skip
HELPERS = ("pack", "sum_rows", "finish_weight")


@pytest.mark.parametrize("family", FAMILIES)
def test_launches_and_bytes_of_a_step(family: str) -> None:
    """Backward writes dv, u where it was not kept, and what has the size of x, y or of weights."""
    config, recompute, mids, launches = FAMILIES[family]
    problem, tensors = problem_of(config, recompute)
    (_, forward), (names, backward) = step(config, recompute=recompute)
    assert [n for n in names if n not in HELPERS] == launches
    u = math.prod(problem.mid_shape) * problem.dtype.itemsize
    x = tensors.x.numel() * problem.dtype.itemsize
    y = math.prod(problem.out_shape) * problem.dtype.itemsize
    # Sums of a tile are a small part of it; those of a depthwise tile have a row for each tap.
    small = 0.15 * (u + x) if "depthwise" not in family else 0.6 * (u + x)
    assert sum(size for _, size in backward.made.values()) <= mids * u + x + small
    made = 1 if recompute or "depthwise" in family else 2  # u, and z by itself where u is kept
    assert sum(size for _, size in forward.made.values()) <= made * u + y + small


def parallel_step(config: Config) -> tuple[list[str], float]:
    """Launches of the backward, and elements of videos that it makes beside dx, in those of y."""
    t, dy = fuzz.make(config, DEVICE)
    biases = t.get("spatial_bias"), t.get("temporal_bias")
    tensors = ParallelTensors(t["x"], t["spatial_weight"], t["temporal_weight"], *biases)
    padding = tuple(p for pair in config.pads for p in pair)
    spec = ParallelSpec(
        padding=padding, groups=config.groups, branch_activation=config.branch_activation,
        activation=config.activation, combine=config.combine,
    )  # type: ignore[call-arg]  # fmt: skip
    problem = Problem.of(tensors, spec)
    with watched() as (names, made):
        backend.parallel_conv2plus1d_backward(problem, tensors, dy, [True] * 5)
    videos = sum(math.prod(shape) for shape in made.large(0) if len(shape) == 5)
    weights = t["spatial_weight"].numel() + t["temporal_weight"].numel()  # 5-D, too
    own = videos - weights - t["x"].numel()
    return [n for n in names if n not in HELPERS], own / dy.numel()


PARALLEL = Config(
    op="parallel_conv2plus1d", channels=32, mid=32, out=32, size=(4, 20, 20), activation="none",
    dtype=torch.bfloat16, branch_activation="silu", x_layout="channels_last",
    grad_layout="channels_last",
)  # fmt: skip
AGAIN, INPUT, WEIGHT = "parallel_conv", "parallel_input_gradient", "parallel_weight_gradient"
BIAS = "channel_sums"
# What differs from it; launches; and what is made of the size of y.
PARALLEL_FAMILIES: dict[str, tuple[dict[str, Any], list[str], int]] = {
    "linear": (dict(branch_activation="none"), [BIAS, INPUT, WEIGHT], 0),
    "linear, side by side": (
        dict(branch_activation="none", combine="cat", mid=16, out=16),
        [BIAS, BIAS, INPUT, WEIGHT], 0),
    "one activation, after the sum": (
        dict(branch_activation="none", activation="relu"), [AGAIN, INPUT, WEIGHT], 1),
    "activations": ({}, [AGAIN, INPUT, WEIGHT], 2),
    "side by side": (
        dict(combine="cat", mid=16, out=16, activation="relu"), [AGAIN, AGAIN, INPUT, WEIGHT], 1),
    "grouped": (dict(groups=(4, 4), activation="relu"), [AGAIN, INPUT, WEIGHT], 2),
    "grouped apart": (dict(groups=(4, 2)), [AGAIN, INPUT, WEIGHT], 2),
    "one depthwise": (
        dict(groups=(32, 1)), [AGAIN, INPUT, "direct_gradients", "weight_gradient"], 2),
    "depthwise, linear": (
        dict(groups=(32, 32), branch_activation="none"), [BIAS, "parallel_direct_gradients"], 0),
    "depthwise": (dict(groups=(32, 32)), [AGAIN, "parallel_direct_gradients"], 2),
    "depthwise, side by side": (
        dict(groups=(32, 32), combine="cat"), [AGAIN, AGAIN, "parallel_direct_gradients"], 1),
}  # fmt: skip


@pytest.mark.parametrize("family", PARALLEL_FAMILIES)
def test_launches_and_bytes_of_the_parallel_layer(family: str) -> None:
    """Beside dx there are only the gradients of the branches, where these are not dy."""
    change, launches, own = PARALLEL_FAMILIES[family]
    names, made = parallel_step(replace(PARALLEL, **change))
    assert names == launches
    assert made == own


# ---- memory of a step of the pair, by what is alive at once


def test_memory_of_a_step() -> None:
    """Between forward and backward, of what eager PyTorch keeps: x, u and z."""
    problem, tensors = problem_of(STEP)
    size = problem.dtype.itemsize
    x, u = tensors.x.numel() * size, math.prod(problem.mid_shape) * size
    eager = x + 2 * u
    for recompute, limit in ((False, 0.65), (True, 0.4)):
        problem, tensors = problem_of(STEP, recompute)
        with watched():
            result = backend.BACKEND.conv2plus1d(problem, tensors, save=True)
        kept = [tensors.x, *(t for t in result[1:4] if isinstance(t, Tensor))]
        assert sum(t.numel() * t.element_size() for t in kept) <= limit * eager


# ---- deterministic


@pytest.mark.slow
def test_deterministic_and_still_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients in many parts, which are added up in one order."""
    monkeypatch.setattr(gradient_tiles, "boxes_per_split", lambda *sizes: 1)
    splits: list[int] = []
    finish = backend.gradients.finish_weight

    def counted(partial: Tensor, *rest: Any) -> None:
        splits.append(partial.shape[0])
        finish(partial, *rest)

    monkeypatch.setattr(backend.gradients, "finish_weight", counted)
    config = Config(norm="batch", channels=5, size=(2, 12, 12))
    tensors, dy = fuzz.make(config, DEVICE)
    torch.use_deterministic_algorithms(True)
    try:
        with fastst.use_backend("triton"):
            one, two = (fuzz.results(fuzz.call, config, tensors, dy) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert min(splits) > 1
    assert all(torch.equal(one[n], two[n]) for n in one)


# ---- batch norm in its modes


NORMS: dict[str, dict[str, Any]] = {
    "plain": {}, "cumulative": {"momentum": None}, "no running statistics":
    {"track_running_stats": False}, "no affine": {"affine": False}, "frozen": {},
}  # fmt: skip


def network(norm: str = "plain", **settings: Any) -> nn.Sequential:
    torch.manual_seed(1)
    layer = fastst.Conv2Plus1d(
        3, 4, 3, padding=1, norm=nn.BatchNorm3d(6, **NORMS[norm]), mid_channels=6, **settings
    )
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(4 * 2 * 4 * 4, 3)).to(DEVICE)


def separate(model: nn.Sequential) -> nn.Sequential:
    pair: Any = model[0]
    return nn.Sequential(
        nn.Sequential(pair.spatial, pair.norm, pair.activation, pair.temporal), *model[1:]
    )


def train(
    model: nn.Module, dtype: torch.dtype, steps: int = 3, frozen: bool = False
) -> list[float]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(steps, 2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    label = torch.randint(3, (steps, 2), generator=generator).to(DEVICE)
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for i in range(steps):
        if frozen:
            next(m for m in model.modules() if isinstance(m, nn.BatchNorm3d)).eval()
        loss = F.cross_entropy(model(x[i].to(DEVICE, dtype)), label[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_losses_and_running_statistics(norm: str) -> None:
    """In float64 nothing hides behind rounding."""
    ours = network(norm, recompute=norm == "cumulative")
    eager = separate(copy.deepcopy(ours))
    with fastst.use_backend("triton"):
        got = train(ours, torch.float64, frozen=norm == "frozen")
    expected = train(eager, torch.float64, frozen=norm == "frozen")
    assert got == pytest.approx(expected, rel=1e-6)
    a, b = (m.state_dict().values() for m in (ours, eager))
    for one, two in zip(a, b, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_gradient_scaler(dtype: torch.dtype) -> None:
    """Scaled, skipped on an overflow, and stepped as with the separate modules."""
    histories = []
    for fused in (True, False):
        model = network()
        model = model if fused else separate(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=2)
        generator = torch.Generator().manual_seed(3)
        history = []
        for i in range(4):
            x = torch.randn(2, 3, 2, 4, 4, generator=generator).to(DEVICE)
            with fastst.use_backend("triton" if fused else "auto"):
                with torch.autocast(DEVICE, dtype):
                    y = model(x)
                    loss = F.cross_entropy(y, torch.tensor([0, 2], device=DEVICE))
                if i == 2:
                    loss = loss * math.inf
                optimizer.zero_grad()
                scaler.scale(loss).backward()
            before = [p.detach().clone() for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            history.append((loss.item(), scaler.get_scale(), same))
        histories.append(history)
    for (loss, scale, same), (their, their_scale, theirs) in zip(*histories, strict=True):
        assert (scale, same) == (their_scale, theirs)
        assert loss == pytest.approx(their, rel=0.03)
    assert [same for _, _, same in histories[0]] == [False, False, True, False]
