"""Tiles of the Hopper kernels for every named shape: they keep to the limits and waste little."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import hopper as predicted
from benchmarks import shapes
from benchmarks.shapes import Case
from fastst.backends.cuda import hopper
from fastst.backends.cuda.hopper import instances, launches, tiles
from fastst.backends.cuda.hopper.tiles import HopperTile
from fastst.machine.gpu import round_up
from fastst.problem.spec import Problem
from tests.support import ROOT

PROCESSORS = 132
# The pairs that the two kernels run; the stem has its own.
CASES = [
    c for c in shapes.ALL
    if not (c.depthwise or c.combine or c.order != "spatial-first" or c.name == "stem")
]  # fmt: skip


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_processors", lambda device: PROCESSORS)


def ids(case: Case) -> str:
    return f"{case.family}-{case.label}"


def tiles_of(problem: Problem) -> tuple[HopperTile, HopperTile]:
    return hopper.spatial_tile(problem), hopper.temporal_tile(problem)


def steps(channels: int) -> int:
    """Products of 16 channels each."""
    return math.ceil(channels / 16)


def multiplied(problem: Problem) -> tuple[int, int]:
    """Multiplications that the spatial and the temporal kernel execute, zeros included."""
    (a, b), (spatial, temporal) = tiles_of(problem), problem.passes
    frames, (h, w) = problem.batch * problem.size[0], problem.mid_size[1:]
    box = a.box[0] * a.cluster, *a.box[1:]
    boxes = (
        math.prod(math.ceil(n / b) for n, b in zip((frames, h, w), box, strict=True)) * a.cluster
    )
    columns = a.whole(problem.mid_shape[-1])
    first = boxes * 64 * a.groups * a.blocks * columns
    first *= math.prod(spatial.kernel) * 16 * steps(spatial.in_channels)
    t, pixels = problem.out_size[0], math.prod(problem.out_size[1:])
    clips, n_frames, n_pixels = b.box
    boxes = (
        math.ceil(problem.batch / clips) * math.ceil(pixels / n_pixels) * math.ceil(t / n_frames)
    )
    second = round_up(boxes, b.cluster) * 128 * n_frames
    second *= b.whole(temporal.out_channels)
    return first, second * temporal.kernel[0] * 16 * steps(temporal.in_channels)


def useful(problem: Problem) -> tuple[float, float]:
    """What part of them the convolutions ask for."""
    sizes = problem.mid_size, problem.out_size
    asked = [
        p.flops(problem.batch * math.prod(s)) / 2
        for p, s in zip(problem.passes, sizes, strict=True)
    ]
    first, second = multiplied(problem)
    return asked[0] / first, asked[1] / second


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_little_is_wasted(case: Case) -> None:
    """Rows of a box come in eights, so that one box serves three taps: 28² fills 28/32 of them,
    14² and 7² 7/8 of rows and of columns. One frame alone has no tile of its own."""
    problem = case.problem(torch.bfloat16)
    spatial, temporal = useful(problem)
    side = problem.mid_size[2]
    full = (side / round_up(side, 8)) ** (1 if side > 14 else 2)
    assert spatial >= 0.89 * full
    assert temporal >= (0.49 if case.name == "one-frame" else 0.81)


@pytest.mark.parametrize("side", [56, 28, 14, 7])
@pytest.mark.parametrize(("mid", "padded"), [(45, 48), (230, 232), (921, 928)])
def test_mid_channels_cost_what_their_multiples_of_8_do(mid: int, padded: int, side: int) -> None:
    def problem(m: int) -> Problem:
        case = Case("", "", 8, (64, m, 128), (4, side, side))
        return case.problem(torch.bfloat16)

    assert tiles_of(problem(mid)) == tiles_of(problem(padded))
    assert multiplied(problem(mid)) == multiplied(problem(padded))


@pytest.mark.parametrize(
    ("mid", "columns"),
    [
        (45, 48), (144, 144), (230, 232), (288, 144), (460, 232), (576, 144),
        (921, 232), (1152, 192),
    ],
)  # fmt: skip
def test_mid_channels_fit(mid: int, columns: int) -> None:
    """An instance multiplies less than 1% zeros, of 45 what a multiple of 8 asks for."""
    widths = [c for c, _, _ in instances.SPATIAL]
    least = min(round_up(mid, c) for c in widths)
    assert round_up(mid, columns) == least
    assert least <= max(1.01 * mid, round_up(mid, 8))


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("batch", [1, 8, None])
def test_tiles_keep_to_the_limits(case: Case, batch: int | None) -> None:
    problem = (case.at_batch(batch) if batch else case).problem(torch.bfloat16)
    a, b = tiles_of(problem)
    stride = problem.passes[0].stride
    rows = 64 * a.groups * a.blocks
    box_rows = a.box[0] * (a.box[1] + a.share - 1) * a.box[2]
    stage = max(rows, box_rows) * 128 + a.share * a.columns * 128
    assert math.prod(a.box) <= rows and 2 <= a.stages <= 16
    assert 2048 + a.stages * stage <= 227 << 10
    assert max(a.box[1] * stride[1], a.box[2] * stride[2], a.box[0]) <= 256
    if a.share > 1:
        assert math.prod(a.box) == rows and a.box[2] % 8 == 0 and stride == (1, 1, 1)
    assert b.box[0] * b.box[2] <= 128 and 2 <= b.stages <= 16
    weights, chunks = 3 * b.columns * 128, math.ceil(problem.mid_channels / 64)
    left = (227 << 10) - 1024 - b.stages * 128 * 128
    assert 2 * weights <= left or chunks * weights <= left  # for two chunks, or for all that exist
    for tile in (a, b):
        assert 1 <= tile.grid <= PROCESSORS
        assert tile.cluster in (1, 2) and tile.grid % tile.cluster == 0
    assert (a.columns, a.groups, a.blocks) in instances.SPATIAL
    assert (b.columns, b.box[1], problem.passes[1].stride[0]) in instances.TEMPORAL


def test_clusters_where_weights_are_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many columns to few places: most of a stage is weights; not where these stay in shared
    memory."""
    by_label = {c.label: c for c in CASES if c.family == "r2plus1d-18"}
    labels = [label for label in by_label if "s2" in label or "512" in label]
    wide, deep = by_label[labels[0]].problem(torch.bfloat16), by_label[labels[-1]]
    assert [t.cluster for t in tiles_of(wide)] == [2, 2]
    assert tiles_of(deep.problem(torch.bfloat16))[1].cluster == 2
    first = next(c for label, c in by_label.items() if label.startswith("64→144→64"))
    assert [t.cluster for t in tiles_of(first.problem(torch.bfloat16))] == [2, 1]  # 54 of 94 KiB
    # half a multiprocessor's neighbour is missing: no clusters
    monkeypatch.setattr(launches, "_processors", lambda device: 1)
    assert [t.cluster for t in tiles_of(wide)] == [1, 1]


def test_the_stem_fills_the_gpu() -> None:
    """Time is cut only where clips and places leave warpgroups idle."""
    assert tiles.stem(32, (16, 56, 56), PROCESSORS) == (PROCESSORS, 16)
    assert tiles.stem(1, (16, 56, 56), PROCESSORS) == (98, 4)


def test_documented_predictions_are_computed() -> None:
    text = (ROOT / "docs/design/performance.md").read_text()
    told = text.split("<!-- hopper:begin -->")[1].split("<!-- hopper:end -->")[0].strip()
    assert told == predicted.table()
