"""The Hopper weight gradients through the emulator: exact sums, tiles, refusals, planted bugs.

Everything here ran on no GPU. Values are small whole numbers, so that every sum is exact in float32
and results must be equal to float64's, whatever the order of the sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv3d_weight

from fastst.backends.cuda import library
from fastst.backends.cuda.hopper import instances, weight_tiles, weights
from fastst.backends.cuda.hopper.launches import Gradient, Mid
from fastst.backends.cuda.hopper.packing import Table
from fastst.backends.cuda.hopper.weight_tiles import Reach, WeightTile
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import fuzz, planted
from tests.support.planted import Plant, more


@pytest.fixture(autouse=True)
def _poisoned(emulated: ModuleType) -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    seed: int = 0
    batch: int = 1
    channels: int = 8
    mid: int = 16
    out: int = 8
    size: tuple[int, int, int] = (3, 5, 7)
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (1, 1, 1)
    dilation: tuple[int, int, int] = (1, 1, 1)
    made: bool = True  # du of g and u, z of u; else they are stored
    activation: str = "relu"
    dtype: torch.dtype = torch.float16

    def tensors(self) -> PairTensors:
        n, (kt, kh, kw) = self.batch, self.kernel
        shapes = (n, self.channels, *self.size), (self.mid, self.channels, 1, kh, kw)
        return PairTensors(*map(self.numbers, (*shapes, (self.out, self.mid, kt, 1, 1))))

    def problem(self) -> Problem:
        padding = tuple(p for p in self.padding for _ in range(2))
        spec = PairSpec(stride=self.stride, padding=padding, dilation=self.dilation)  # type: ignore[arg-type]
        return Problem.of(self.tensors(), spec)

    def numbers(self, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, shape)) % 2**31)
        drawn = torch.randint(-3, 4, shape, generator=generator).to(self.dtype)
        return drawn.to(memory_format=torch.channels_last_3d) if len(shape) == 5 else drawn

    def rows(self, problem: Problem, salt: int) -> Tensor:
        """(N, M, T, H, W) of rows of whole vectors, zeros behind the last channel."""
        shape = problem.batch, self.mid, *problem.mid_size
        stored = torch.zeros(problem.mid_shape, dtype=self.dtype).permute(0, 4, 1, 2, 3)
        stored[:, : self.mid] = dataclasses.replace(self, seed=self.seed + salt).numbers(shape)
        return stored


def random_case(seed: int) -> Case:
    r = random.Random(seed)
    kernel = r.choice((1, 3, 3, 3, 4)), r.choice((1, 2, 3, 3, 5)), r.choice((1, 3, 3, 4))
    return Case(
        seed=seed, batch=r.choice((1, 2, 3)), channels=r.choice((3, 8, 8, 16, 72)),
        mid=r.choice((1, 10, 45, 64, 72, 150)), out=r.choice((8, 64, 72, 136)),
        size=(r.choice((1, 2, 4, 5)), r.choice((1, 5, 8)), r.choice((4, 8, 11))),
        kernel=kernel, stride=(r.choice((1, 1, 2)), r.choice((1, 2, 3)), r.choice((1, 2))),
        padding=(r.choice((0, 1, 2)), r.choice((0, 1, 2)), r.choice((0, 1, 2))),
        dilation=(r.choice((1, 1, 2)), r.choice((1, 1, 2)), r.choice((1, 1, 2))),
        made=r.random() < 0.6, activation=r.choice(("none", "relu")),
        dtype=r.choice((torch.float16, torch.bfloat16)),
    )  # fmt: skip


def valid(case: Case) -> bool:
    reached = [d * (k - 1) for d, k in zip(case.dilation, case.kernel, strict=True)]
    sizes = zip(case.size, case.padding, reached, strict=True)
    products = case.mid * (case.channels * math.prod(case.kernel[1:]) + case.out * case.kernel[0])
    small = case.batch * math.prod(case.size) * products < 10_000_000
    return small and all(n + 2 * p > r for n, p, r in sizes)


def check(case: Case) -> None:
    """Both weight gradients against float64's."""
    problem, t = case.problem(), case.tensors()
    p, q = (case.numbers((2, case.mid)) / 2).unbind()

    def table(*rows: Tensor) -> Table:  # scale, shift, and what the second tensor is multiplied by
        values = torch.zeros(3, -(-case.mid // 64) * 64)
        values[:, : case.mid] = torch.stack(rows)
        return Table(values)

    g, u = case.rows(problem, 1), case.rows(problem, 2)
    dy = case.numbers((case.batch, case.out, *problem.out_size))
    with library.launching(problem) as k:
        if case.made:
            du = Gradient(g, u, table(torch.ones_like(p), q, p))
            z = Mid(u, table(p, q, torch.zeros_like(p)), case.activation)
        else:
            du, z = Gradient(g), Mid(u, None, "none")
        found = (
            weights.spatial(k, problem, t.x, du, t.first_weight),
            *weights.temporal(k, problem, z, dy, t.second_weight, biased=True),
        )
    g, u = (rows[:, : case.mid].double() for rows in (g, u))
    if case.made:
        affine_u = p.double().view(-1, 1, 1, 1) * u + q.double().view(-1, 1, 1, 1)
        g, u = g + affine_u, affine_u.relu() if case.activation == "relu" else affine_u
    (st, sh, sw), (pt, ph, pw), (dt, dh, dw) = case.stride, case.padding, case.dilation
    truth = (
        conv3d_weight(t.x.double(), t.first_weight.shape, g, (1, sh, sw), (0, ph, pw), (1, dh, dw)),
        conv3d_weight(u, t.second_weight.shape, dy.double(), (st, 1, 1), (pt, 0, 0), (dt, 1, 1)),
        dy.double().sum((0, 2, 3, 4)),
    )
    for name, got, true in zip(("spatial", "temporal", "bias"), found, truth, strict=True):
        assert got.dtype == torch.float32 and got.shape == true.shape
        assert torch.equal(got.double(), true), f"{name} of {case}"


@pytest.mark.parametrize("seed", range(fuzz.SEED, fuzz.SEED + (fuzz.CASES or 4)))
def test_fuzz(seed: int) -> None:
    drawn = (random_case(seed + 1000 * i) for i in range(1000))
    check(next(case for case in drawn if valid(case) and weights.why_not(case.problem()) is None))


@pytest.mark.parametrize("tile", instances.WEIGHT_GRADIENT)
def test_tiles(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each instance: two tiles of columns and of rows, several of positions, and two parts."""
    columns, units = tile
    dtype = (torch.float16, torch.bfloat16)[instances.WEIGHT_GRADIENT.index(tile) % 2]
    chosen = WeightTile(columns, units, units, (3, 2, 1), 2, 2)
    monkeypatch.setattr(weights, "spatial_tile", lambda *_: chosen)
    monkeypatch.setattr(weights, "temporal_tile", lambda *_: chosen)
    case = Case(mid=columns + 5, channels=72, out=64 * units + 8, size=(2, 2, 4), dtype=dtype)
    check(dataclasses.replace(case, kernel=(2, 2, 1), padding=(1, 0, 0)))


@pytest.mark.parametrize("blocks", [1, 4])
def test_blocks_of_rows(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block may have several blocks of rows, several taps, or both; units may be idle."""
    chosen = WeightTile(48, 3, blocks, (4, 2, 1), 2, 3)
    monkeypatch.setattr(weights, "spatial_tile", lambda *_: chosen)
    monkeypatch.setattr(weights, "temporal_tile", lambda *_: chosen)
    check(Case(mid=48, channels=136, out=200, size=(2, 3, 4)))


@pytest.mark.parametrize(("channels", "made"), [(3, True), (8, False)])
def test_stem(channels: int, made: bool) -> None:
    """Eight taps of up to eight channels make the rows of a product."""
    case = Case(channels=channels, mid=45, kernel=(3, 7, 7), stride=(1, 2, 2), made=made)
    check(dataclasses.replace(case, padding=(1, 3, 3), size=(1, 10, 13)))


@pytest.mark.parametrize(
    ("stride", "padding", "frames"),
    [(1, 0, 4), (1, 1, 1), (1, 3, 5), (2, 0, 5), (2, 1, 4), (2, 1, 1), (2, 3, 5)],
)
def test_frames_out_of_range(stride: int, padding: int, frames: int) -> None:
    """z is padded with zeros, and act(shift) is not zero."""
    check(Case(size=(frames, 2, 3), stride=(stride, 1, 1), padding=(padding, 1, 1)))


def test_single_position() -> None:
    check(Case(size=(1, 1, 1), kernel=(1, 1, 1), padding=(0, 0, 0)))


@pytest.mark.parametrize(
    ("spec", "kernel", "why"),
    [
        ({}, (3, 3, 3), None),
        ({}, (3, 8, 8), "at most 49 spatial taps, not 64"),
        ({"dilation": (1, 30, 30)}, (3, 5, 5), "as far apart as a dilation of (30, 30)"),
    ],
)
def test_says_what_it_does_not_take(
    spec: dict[str, object], kernel: tuple[int, int, int], why: str | None
) -> None:
    tensors = Case(kernel=kernel, size=(5, 150, 150)).tensors()
    found = weights.why_not(Problem.of(tensors, PairSpec(**({"padding": (1,) * 6} | spec))))  # type: ignore[arg-type]
    assert found is None if why is None else why in str(found)


# ---- tiles


SHAPES = [
    (64, 144, 64, 16, 56, 1), (64, 230, 128, 16, 28, 2), (128, 288, 128, 8, 28, 1),
    (128, 460, 256, 8, 14, 2), (256, 576, 256, 4, 14, 1), (256, 921, 512, 4, 7, 2),
    (512, 1152, 512, 2, 7, 1), (8, 8, 8, 1, 1, 1),
]  # fmt: skip


def tiles_of(shape: tuple[int, ...], batch: int) -> Iterator[tuple[Reach, int, WeightTile]]:
    """Reach, tensors that mid is made of, and tile, of the spatial and of the temporal pass."""
    c, m, k, t, side, stride = shape
    spatial = Reach((stride, stride), (2, 2))
    temporal = Reach((1, 1), (0, -(-2 // stride)), stride)
    cases = (
        (spatial, (side, side, batch * t), 9, c, 2), (temporal, (side * side, t, batch), 3, k, 1),
    )  # fmt: skip
    for reach, size, taps, rows, sources in cases:
        tile = weight_tiles.weight_gradient(size, reach, taps, rows, m, sources, False, 132)
        assert tile is not None
        yield reach, sources, tile


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 32])
def test_tiles_keep_to_the_limits(shape: tuple[int, ...], batch: int) -> None:
    for reach, sources, tile in tiles_of(shape, batch):
        positions = math.prod(tile.box)
        halo = reach.box(tile.box)
        a = tile.blocks * -(-math.prod(halo) * 128 // 1024) * 1024
        b = sources * -(-tile.columns // 32) * -(-positions // 16) * 16 * 64
        assert positions <= 256 and max(*halo, tile.box[1] * reach.residues) <= 256
        assert 5 * 1024 + tile.stages * (a + b) <= 227 << 10 and tile.stages >= 2
        assert (tile.columns, tile.units) in instances.WEIGHT_GRADIENT
        assert tile.blocks <= weight_tiles.GROUPS * tile.units
        assert reach.residues == 1 or tile.blocks % tile.units == 0


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[-1] == 2])
def test_whole_spans_where_they_cost_nothing(shape: tuple[int, ...]) -> None:
    assert all(tile.columns % 32 == 0 for *_, tile in tiles_of(shape, 32))


@pytest.mark.parametrize(
    ("mid", "waste"),
    [(45, 1.07), (144, 1), (230, 1.05), (288, 1), (460, 1.05), (576, 1), (921, 1.05), (1152, 1)],
)
def test_mid_channels_fit(mid: int, waste: float) -> None:
    """Some instance has few columns for which there are no mid channels of R(2+1)D-18."""
    assert min(-(-mid // n) * n for n, _ in instances.WEIGHT_GRADIENT) <= waste * mid


# ---- planted bugs: each must be caught, by a wrong result or by the emulator's checks

MUTANT = Case(channels=72, mid=45, out=72, size=(5, 5, 6), stride=(2, 1, 1), batch=2)
STEM = Case(
    channels=3, mid=45, kernel=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), size=(1, 9, 9)
)


@pytest.fixture
def plant_small(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Puts a bug into the weight gradient, with small tiles."""
    chosen = WeightTile(48, 3, 1, (5, 3, 1), 2, 2)
    monkeypatch.setattr(weights, "spatial_tile", lambda *_: chosen)
    chosen_temporal = dataclasses.replace(chosen, blocks=3)
    monkeypatch.setattr(weights, "temporal_tile", lambda *_: chosen_temporal)
    return functools.partial(plant, "hopper/weight_gradient.cu", unused=planted.NO_BF16)


def test_nothing_is_caught_without_a_bug(plant_small: Plant) -> None:
    """What is left of the library is right: so it is the bugs that are caught below."""
    plant_small()
    for case in (MUTANT, STEM):
        check(case)


@pytest.mark.parametrize(
    ("right", "wrong", "case"),
    [
        # a tap off by one, in the plane and in time
        ("t % width * at(conv.dilation, 2)", "(t + 1) % width * at(conv.dilation, 2)", MUTANT),
        more("/ p.residues - least)", "/ p.residues + 1 - least)", MUTANT),
        # the layout of B: its swizzle, its major dimension
        more("Swizzle::b64, 8 * 2", "Swizzle::b32, 8 * 2", MUTANT),
        more("wgmma<T, N, Major::mn>", "wgmma<T, N>", MUTANT),
        # what makes B: places outside, the second tensor, the fence
        ("there ? values[k]", "there || true ? values[k]", MUTANT),
        more("if (p.two) {", "if (false) {", MUTANT),
        more("        fence_proxy_async();\n        formed", "        formed", MUTANT),
        # phases, waits, and positions that fill up a step
        more("ring.advance(), formed.advance();\n  });", "ring.advance();\n  });", MUTANT),
        more("    ring.wait();\n    if", "    if", dataclasses.replace(MUTANT, made=False)),
        ("wgmma_wait<0>();", "", MUTANT),
        more("int i = positions * 16 + thread", "int i = padded * 16 + thread", MUTANT),
        # positions lost at the end of a part, and sums of dy
        ("i < end", "i + 1 < end", MUTANT),
        more("sum[0] = sum[0] + values[e]", "sum[0] = values[e]", MUTANT),
        # the stem's rows: taps in place of channels
        ("piece * p.narrow", "0", STEM),
    ],
)
def test_planted_bug_is_caught(right: str, wrong: str, case: Case, plant_small: Plant) -> None:
    plant_small(right, wrong)
    with planted.caught():
        check(case)
