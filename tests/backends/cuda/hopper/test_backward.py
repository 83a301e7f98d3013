"""The Hopper kernels' backward through the emulator: every gradient, each instance, planted bugs.

Everything here ran on no GPU.
"""

from __future__ import annotations

import functools
import importlib
import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import fastst
from fastst import dispatch
from fastst.backends import cuda, ranks
from fastst.backends.contract import Backend, PairBackward
from fastst.backends.cuda import hopper as cuda_hopper
from fastst.backends.cuda.hopper import examples, gradient_tiles, instances, tiles, weight_tiles
from fastst.backends.cuda.hopper.gradient_tiles import Axis, GradientTile
from fastst.backends.cuda.hopper.launches import Gradient, Launches
from fastst.backends.cuda.hopper.tiles import HopperTile
from fastst.backends.triton.tiles import round_up
from fastst.dispatch import selfcheck
from fastst.problem.examples import pair_tensors
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import fuzz, hopper, planted
from tests.support.fuzz import Config
from tests.support.planted import Plant, more

MODULE = importlib.import_module("fastst.backends.cuda.hopper.backward")


pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems whose backward the Hopper kernels have run."""
    found: list[Problem] = []
    backward: Callable[..., object] = cuda_hopper.backward

    def recorded(call: PairBackward, *arguments: object) -> object:
        found.append(call.problem)
        return backward(call, *arguments)

    for module in (cuda_hopper, examples):
        monkeypatch.setattr(module, "backward", recorded)
    return found


# ---- random problems


def dense(seed: int, **fixed: object) -> Config:
    """A random configuration whose gradients the kernels take."""
    r = random.Random(f"gradients {seed}")
    choices: dict[str, object] = dict(
        padding_mode=("zeros", "zeros"), activation=r.choice(cuda_hopper.DERIVATIVES),
        residual=False, outer_activation="none",
        grad_layout=r.choice(("channels_last", *fuzz.LAYOUTS)),
        constant=r.choice(((), (), ("x",), ("spatial_weight",), ("temporal_weight", "norm_bias"))),
    )  # fmt: skip
    return hopper.dense(seed, **(choices | fixed))


@pytest.mark.parametrize("chunk", range(3))
def test_fuzz(chunk: int, ran: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = fuzz.CASES or 2
    if chunk % 2:
        hopper.in_clusters(monkeypatch, MODULE, ("spatial_tile", "temporal_gradient_tile"))
    for seed in range(100 * chunk + fuzz.SEED, 10**6):
        config = dense(seed)
        if config.invalid() or config.work() > 4_000_000:
            continue
        before = len(ran)
        assert fuzz.check(config, "cuda") is None, config
        assert len(ran) > before, f"not run by the Hopper kernels: {config}"
        cases -= 1
        if not cases:
            return


WEIGHTS = ("spatial_weight", "temporal_weight")  # whose gradients are other kernels


@pytest.mark.parametrize(
    ("tile", "cluster"),
    [(tile, 2 - i % 2) for i, tile in enumerate(instances.TEMPORAL_GRADIENT)],
)
def test_temporal_tiles(
    tile: tuple[int, int, int], cluster: int, monkeypatch: pytest.MonkeyPatch, ran: list[Problem]
) -> None:
    """Each instance; some of its frames, places and columns do not exist."""
    columns, frames, stride = tile
    chosen = HopperTile(columns, 2, frames, (2, frames, 7), 1, 2, 2, cluster)
    monkeypatch.setattr(MODULE, "temporal_gradient_tile", lambda problem: chosen)
    config = Config(
        seed=frames, channels=8, mid=columns - 6, out=8, batch=3, size=(frames + 1, 3, 3),
        kernel=(3, 1, 1), padding=(1, 0, 0), stride=(stride, 1, 1), norm="batch", activation="silu",
        dtype=torch.float16 if stride == 1 else torch.bfloat16, x_layout="channels_last",
        constant=WEIGHTS,
    )  # fmt: skip
    assert fuzz.check(config, "cuda") is None
    assert len(ran) == 1


def test_clusters_of_a_stride(monkeypatch: pytest.MonkeyPatch, ran: list[Problem]) -> None:
    """Both blocks have the same taps, for neighbouring frames."""
    config = Config(
        seed=1, channels=8, mid=72, out=8, batch=1, size=(3, 9, 10), stride=(1, 2, 2), norm="none",
        dtype=torch.float16, x_layout="channels_last", constant=WEIGHTS,
    )  # fmt: skip
    hopper.in_clusters(monkeypatch, MODULE, ("spatial_gradient_tile",))
    assert fuzz.check(config, "cuda") is None
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("tile", "strides"),
    [((64, 2), (1, 1)), ((64, 2), (2, 1)), ((64, 4), (1, 1)), ((64, 4), (2, 2)), ((128, 1), (1, 1)),
     ((128, 2), (1, 2))],
)  # fmt: skip
def test_spatial_tiles(
    tile: tuple[int, int], strides: tuple[int, int], monkeypatch: pytest.MonkeyPatch,
    ran: list[Problem],
) -> None:  # fmt: skip
    """Each instance; some frames, rows and columns of cells do not exist; q is not 0."""
    assert tile in instances.SPATIAL_GRADIENT
    columns, blocks = tile
    stages, cluster = 3 if columns == 64 else 2, 1 if strides == (1, 1) else 2
    chosen = GradientTile(columns, blocks, (2, 3, 5), stages, 2, cluster)
    monkeypatch.setattr(MODULE, "spatial_gradient_tile", lambda problem: chosen)
    config = Config(
        seed=columns, channels=columns - 8, mid=72, out=8, batch=1, size=(3, 9, 11), norm="batch",
        stride=(1, *strides), dtype=(torch.float16, torch.bfloat16)[blocks // 2 % 2],
        x_layout="channels_last", constant=WEIGHTS,
    )  # fmt: skip
    assert fuzz.check(config, "cuda") is None
    assert len(ran) == 1


def stem(seed: int) -> Config:
    """A random stem whose x wants a gradient, too."""
    r = random.Random(seed)
    return Config(
        seed=seed, batch=r.choice((1, 2)), channels=r.choice((2, 3, 4)), mid=r.choice((7, 45, 48)),
        out=r.choice((8, 64)), kernel=(3, 7, 7), stride=(1, 2, 2),
        size=(r.choice((1, 3, 5)), r.choice((7, 12)), r.choice((8, 15))),
        padding=(1, r.choice((3, 1)), r.choice((3, 1))), activation=r.choice(("relu", "silu")),
        norm=r.choice(("none", "batch", "frozen")), bias=(r.random() < 0.5, False),
        recompute=r.random() < 0.5, dtype=r.choice((torch.float16, torch.bfloat16)),
        x_layout="channels_last",
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(fuzz.SEED, fuzz.SEED + (fuzz.CASES or 3)))
def test_stem_fuzz(seed: int, ran: list[Problem]) -> None:
    config = stem(seed)
    assert fuzz.check(config, "cuda") is None
    assert cuda_hopper.stem_why_not(ran[-1]) is None


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_u_is_computed_again(
    activation: str, monkeypatch: pytest.MonkeyPatch, ran: list[Problem]
) -> None:
    """Without a norm and with recompute the mid tensor is kept by nobody."""
    kept: list[object] = []
    backward: Callable[..., object] = cuda_hopper.backward

    def recorded(call: PairBackward) -> object:
        kept.append(call.u)
        return backward(call)

    monkeypatch.setattr(cuda_hopper, "backward", recorded)
    config = Config(
        seed=5, channels=64, mid=64, out=64, batch=1, size=(3, 4, 4), activation=activation,
        causal=True, padding=(0, 1, 1), recompute=True, dtype=torch.bfloat16,
        x_layout="channels_last",
    )  # fmt: skip
    assert fuzz.check(config, "cuda") is None
    assert kept == [None] and ran


def test_gradients_are_the_same_bits_on_every_run() -> None:
    config = dense(
        1, norm="batch", activation="silu", channels=8, mid=72, out=8, batch=2, size=(3, 5, 6)
    )
    tensors, dy = fuzz.make(config)
    with fastst.use_backend("cuda"):
        runs = [fuzz.results(fuzz.call, config, tensors, dy) for _ in range(2)]
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


def test_statistics_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the generic kernels, which other tests hold to float64; no bias is taken away here."""
    dtype = torch.float16
    tensors = pair_tensors(dtype, (1, 8, 2, 4, 5), (24, 8, 1, 3, 3), (8, 24, 3, 1, 1))
    tensors = tensors._replace(mean=None, var=None)
    spec = PairSpec(padding=(1,) * 6, norm="batch", activation="silu")
    alone, together = (Problem.of(tensors, spec._replace(group=g)) for g in ("", "both"))
    y, u, mean, var, *_ = cuda_hopper.forward(alone, tensors, True)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    monkeypatch.setattr(ranks, "resolve", lambda name: name)
    # The other rank has as many values, and gradients of 0.
    monkeypatch.setattr(ranks, "pool_means", lambda sums, n, group: sums / (2 * n))
    rest = u, mean, var, [True] * 7 + [False] * 3
    ours = cuda.conv2plus1d_backward(PairBackward(together, tensors, [dy], *rest))
    monkeypatch.setattr(cuda_hopper, "backward_why_not", lambda problem: "are not asked")
    truth = cuda.conv2plus1d_backward(PairBackward(together, tensors, [dy], *rest))
    for got, true in zip(ours, truth, strict=True):
        assert got is not None and true is not None
        error = (got.double() - true.double()).abs().max() / true.double().abs().max()
        assert error < 8 * torch.finfo(dtype).eps


# ---- self-check


@pytest.mark.parametrize("trial", [0, more(2)])  # a narrow tile and a wide one
def test_self_check_runs_the_backward(
    trial: int, monkeypatch: pytest.MonkeyPatch, ran: list[Problem]
) -> None:
    trials = gradient_tiles.trials()
    assert {(t.columns, t.box[1], s) for _, t, (s, _) in trials} == {*instances.TEMPORAL_GRADIENT}
    assert {(a.columns, a.blocks) for a, _, _ in trials} == set(instances.SPATIAL_GRADIENT)
    monkeypatch.setattr(gradient_tiles, "trials", lambda: trials[trial : trial + 1])
    monkeypatch.setattr(weight_tiles, "TILES", weight_tiles.TILES[1:2])
    cpu, half = torch.device("cpu"), torch.float16
    found = examples.examples("hopper backward", half)
    assert selfcheck.check(cuda.BACKEND, found, cpu, half) is None
    norms = ("batch", "batch", "batch")  # the trial, a weight gradient, the stem
    assert [p.spec.norm for p in ran] == [n for n in norms for _ in range(2)]  # type: ignore[union-attr]


def test_self_check_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two inputs that make du only one, as if the other had never come."""
    spatial_gradient = Launches.spatial_gradient
    monkeypatch.setattr(
        Launches, "spatial_gradient",
        lambda self, du, *rest: spatial_gradient(self, Gradient(du.g), *rest),
    )  # fmt: skip
    trial = GradientTile(64, 2, (1, 5, 7), 2, 2)
    trials = [(trial, HopperTile(64, 2, 4, (1, 4, 30), 1, 2, 2), (1, 1))]
    monkeypatch.setattr(gradient_tiles, "trials", lambda: trials)
    half = torch.float16
    few = examples.examples("hopper backward", half)
    found = selfcheck.check(cuda.BACKEND, few, torch.device("cpu"), half)
    assert "of the largest gradient of x in its self-check" in str(found)


def test_auto_waits_for_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def broken(backend: Backend, problem: Problem, phase: str) -> str:
        asked.extend([phase] * (backend.name == "cuda"))
        return "is off by 1"

    monkeypatch.setattr(cuda, "is_emulated", lambda: False)
    monkeypatch.setattr(cuda_hopper, "is_emulated", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(selfcheck, "why_broken", broken)
    monkeypatch.setattr(cuda.BACKEND, "why_not", lambda *arguments: None)
    assert dispatch.reasons(problem(), "backward")["cuda"] == "is off by 1"
    gelu = problem(activation="gelu")
    assert "not of gelu" in str(dispatch.reasons(gelu, "backward")["cuda"])
    assert asked == ["backward"]


# ---- refusals


def problem(**spec: object) -> Problem:
    shapes = (1, 8, 3, 5, 5), (16, 8, 1, 3, 3), (8, 16, 3, 1, 1)
    last = torch.channels_last_3d
    if spec.get("order") == "temporal-first":
        shapes = shapes[0], (16, 8, 3, 1, 1), (8, 16, 1, 3, 3)
    tensors = PairTensors(*(torch.empty(s).half().to(memory_format=last) for s in shapes))
    fixed: dict[str, object] = {"padding": (1,) * 6}
    return Problem.of(tensors, PairSpec(**(fixed | spec)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({}, None),
        ({"activation": "gelu"}, "derivatives of none, relu, leaky_relu, silu, not of gelu"),
        ({"padding_mode": ("zeros", "replicate")}, "zeros around time, not 'replicate'"),
        ({"order": "temporal-first"}, "spatial and then a temporal"),
    ],
)
def test_says_what_it_does_not_take(spec: dict[str, object], why: str | None) -> None:
    found = cuda_hopper.backward_why_not(problem(**spec))
    assert found is None if why is None else why in str(found)


# ---- tiles


SHAPES = [
    (64, 144, 64, 16, 56, 1, 1), (64, 230, 128, 16, 56, 2, 2), (128, 288, 128, 8, 28, 1, 1),
    (128, 460, 256, 8, 28, 2, 2), (256, 576, 256, 4, 14, 1, 1), (256, 921, 512, 4, 14, 2, 2),
    (512, 1152, 512, 2, 7, 1, 1), (512, 512, 512, 5, 32, 1, 1), (8, 8, 8, 1, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sources", [1, 2])
def test_tiles_keep_to_the_limits(shape: tuple[int, ...], sources: int) -> None:
    c, m, k, t, side, stride, temporal = shape
    axis = Axis(side, math.ceil(side / stride), 3, stride, 1, 1)
    a = gradient_tiles.spatial_gradient(8 * t, axis, axis, m, c, sources, 132)
    assert a is not None and (a.columns, a.blocks) in instances.SPATIAL_GRADIENT
    span = a.blocks // stride
    (_, h, _), (_, w, _) = axis.boxes(span, a.box[1]), axis.boxes(stride, a.box[2])
    rows = a.box[0] * h * w
    assert math.prod(a.box) <= 128 and rows <= 1024 and 2 <= a.stages <= 16
    stage = sources * round_up(rows * 64, 1024)
    assert (5 << 10) + a.stages * stage + 2 * 3 * a.columns * 64 <= 227 << 10
    apart = replace(axis, size=side + 60, dilation=30)
    assert gradient_tiles.spatial_gradient(8, apart, apart, m, c, sources, 132) is None
    pixels = (side // stride) ** 2
    b = tiles.temporal(8, pixels, t, k, m, temporal, 132, gradient=True)
    assert b.box[0] * b.box[2] <= 128 and 2 <= b.stages <= 16 and b.box[1] % temporal == 0
    assert (
        1024 + min(2, math.ceil(k / 64)) * 3 * b.columns * 128 + b.stages * 128 * 128 <= 227 << 10
    )
    widths = [w for w, _, step in instances.TEMPORAL_GRADIENT if step == temporal]
    if m > 64:  # of the columns multiply zeros
        assert min(round_up(m, w) / m for w in widths) <= 1.05


# ---- planted bugs: each must be caught, by a wrong result or by the emulator's checks

NORM = Config(
    seed=1, channels=40, mid=72, out=8, batch=1, size=(2, 9, 10), norm="batch", activation="silu",
    dtype=torch.float16, x_layout="channels_last", constant=WEIGHTS,
)  # fmt: skip
DEEP = replace(NORM, mid=200)  # whose chunks are more than stages
STRIDED = replace(NORM, size=(4, 8, 9), stride=(2, 2, 2))
TABLE = replace(NORM, kernel=(3, 5, 3), padding=(1, 2, 1))  # taps that no pattern has


@pytest.fixture
def plant_anew(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """``plant``, of kernels whose tiles are chosen among those that are left."""
    wrapped = gradient_tiles.spatial_gradient.__wrapped__  # without what it remembers
    monkeypatch.setattr(gradient_tiles, "spatial_gradient", wrapped)
    return functools.partial(plant, **planted.HOPPER)


@pytest.mark.parametrize(
    ("file", "configs"),
    [("spatial_gradient", (NORM, DEEP, STRIDED, TABLE)), ("temporal_gradient", (NORM, STRIDED))],
)
def test_nothing_is_caught_without_a_bug(
    file: str, configs: tuple[Config, ...], plant_anew: Plant
) -> None:
    """What is left of the kernels is right: so it is the bugs that are caught below."""
    plant_anew(f"hopper/{file}.cu")
    for config in configs:
        fuzz.hold(config, "cuda")


@pytest.mark.parametrize(
    ("file", "right", "wrong", "config"),
    [
        # a tap off by one, an output of a cell left out
        ("spatial_gradient", "* dilation - narrow_size", "* dilation + 1 - narrow_size", NORM),
        ("spatial_gradient", "static_cast<uint8_t>(output)", "output * 0", STRIDED),
        more("temporal_gradient", "kTaps - 1 - before", "kTaps - before", NORM),
        more("temporal_gradient", "before & 1", "0", STRIDED),
        # du: p·u left out, r where there is no place
        ("spatial_gradient", "(norm_p[i] * widen", "(0 * norm_p[i] * widen", NORM),
        more("spatial_gradient", "inside ? widen", "inside || true ? widen", STRIDED),
        more("spatial_gradient", "thread >> steps", "thread >> 2", NORM),
        # a missing fence or barrier, a wrong phase, a stage given back too early, a wrong swizzle
        more("spatial_gradient", "fence_proxy_async();\n", "", DEEP),
        more("spatial_gradient", "if (p.affine) formed.wait();", "", NORM),
        more("spatial_gradient", "boxes.advance(), formed.advance();\n      at",
         "boxes.advance();\n      at", NORM),
        more("spatial_gradient", "if (i % kAtOnce == kAtOnce - 1) wgmma_wait<0>();", "", STRIDED),
        more("spatial_gradient", "wgmma_commit();\n            }\n            wgmma_wait<0>();",
         "wgmma_commit();\n            }", TABLE),
        # the taps of another kernel
        ("spatial_gradient", "fits<Pattern::same, Blocks>(p) ?", "true ?", TABLE),
        more("spatial_gradient", "^ r / 2 % 4", "^ r % 4", NORM),
        # the derivative and its sums
        ("temporal_gradient", "d * from_mean", "d * widen(u.lane[k])", NORM),
    ],
)  # fmt: skip
def test_planted_bug_is_caught(
    file: str, right: str, wrong: str, config: Config, plant_anew: Plant
) -> None:
    plant_anew(f"hopper/{file}.cu", right, wrong)
    with planted.caught():
        fuzz.hold(config, "cuda")
