"""Tile configurations: pure functions, tested without Triton and without a GPU."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from benchmarks import floors, predicted, shapes
from fastst.backends.triton import tiles
from fastst.machine import gpu
from tests.support import ROOT

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
DENSE = [case for case in shapes.ALL if not case.depthwise]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = [
    (8 * 16 * 56 * 56, 64, 144, 9), (8 * 16 * 56 * 56, 144, 64, 3), (8 * 7 * 7, 512, 1152, 9),
    (8 * 16 * 56 * 56, 3, 45, 49), (1, 1, 1, 1), (100, 5, 921, 3),
]  # fmt: skip


def sure(channels: int, dtype: torch.dtype = torch.bfloat16) -> tiles.TapConfig:
    return tiles.tap_conv(tiles.Sizes(400_000, 64, channels, 1, 9, dtype, True, (9, 0)))


@pytest.mark.parametrize(
    ("channels", "computed"),
    [
        (45, 48), (64, 64), (128, 128), (144, 144), (256, 256), (288, 288), (512, 512), (576, 576),
        (1152, 1152), (230, 256), (460, 480), (921, 960),
    ],
)  # fmt: skip
def test_columns_fit(channels: int, computed: int) -> None:
    """144 channels are computed as 128 + 16, not as 192 or 256; never more than 12% in vain."""
    config = sure(channels)
    assert gpu.round_up(channels, config.columns) == computed
    assert computed <= 1.12 * channels


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("case", DENSE, ids=lambda case: f"{case.family} {case.name}")
def test_padding_of_named_shapes(case: shapes.Case, capability: tuple[int, int]) -> None:
    """Products of whole tiles over products of the convolutions, dense layers in bfloat16."""
    p = case.problem(torch.bfloat16)
    computed = 0
    channels = (
        p.passes[0].in_channels,
        p.mid_shape[-1] if case.combine is None else case.channels[0],
    )
    for c, one, size in zip(channels, p.passes, p.pass_sizes, strict=True):
        positions, taps = p.batch * math.prod(size), math.prod(one.kernel)
        k = one.out_channels
        config = tiles.tap_conv(tiles.Sizes(positions, c, k, 1, taps, p.dtype, True, capability))
        rows = gpu.round_up(positions, config.block_p)
        columns = gpu.round_up(k, config.columns)
        reduction = taps * gpu.round_up(c, config.block_k)
        if config.flat:
            reduction = gpu.round_up(taps * c, config.block_k)
        padded = 2 * rows * columns * reduction
        assert padded <= 1.17 * one.flops(positions)
        assert columns <= 1.12 * k
        computed += padded
    assert computed <= 1.12 * p.flops()


def test_padding_of_the_stem_in_one_kernel() -> None:
    """45 mid channels are computed as 48, 147 products of taps and channels as 160."""
    for capability in ((8, 0), (9, 0), (10, 0)):
        config = tiles.pair_conv(3, 45, 64, 49, torch.bfloat16, True, capability)
        assert config.mid_width(45) == 48
        assert config.block_n == 64 and gpu.round_up(147, config.block_k) == 160
        assert (
            tiles.pair_conv(64, 144, 64, 9, torch.bfloat16, True, capability).mid_width(144) <= 160
        )


def test_documented_floors_are_computed() -> None:
    text = (ROOT / "docs/design/performance.md").read_text()
    told = text.split("<!-- floors:begin -->")[1].split("<!-- floors:end -->")[0].strip()
    assert told == floors.table()
    told = text.split("<!-- training-floors:begin -->")[1].split("<!-- training-floors:end -->")[0]
    assert told.strip() == floors.training_table()
    told = text.split("<!-- triton-predicted:begin -->")[1].split("<!-- triton-predicted:end -->")[
        0
    ]
    assert told.strip() == predicted.table()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_candidates_are_few_and_fit(
    size: tuple[int, int, int, int], dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    positions, channels, out_channels, taps = size
    for cores in {dtype.itemsize == 2, dtype != torch.float64}:
        sizes = tiles.Sizes(positions, channels, out_channels, 1, taps, dtype, cores, capability)
        found = tiles.candidates(sizes)
        assert 1 <= len(found) <= 12
        assert len(set(found)) == len(found)
        assert found[0] == tiles.tap_conv(sizes)
        for c in found:
            taken = tiles.shared_memory(c, dtype.itemsize, capability)
            assert taken <= gpu.shared_memory_limit(capability)
            assert min(c.block_p, c.block_n, c.block_k) >= 16
            for block in (c.block_p, c.block_n, c.block_k, c.rest_n or 16):
                assert block & (block - 1) == 0
            assert c.flat == (channels < 16 and taps > 1)


def test_few_positions_take_shorter_tiles() -> None:
    assert sure(512).block_p == 128
    few = tiles.tap_conv(tiles.Sizes(8 * 7 * 7, 512, 512, 1, 9, torch.bfloat16, True, (9, 0)))
    assert few.block_p == 64


@pytest.mark.parametrize("channels", [1, 3, 24, 64, 100])
@pytest.mark.parametrize("positions", [1, 50, 10_000_000])
@pytest.mark.parametrize("channels_last", [True, False])
def test_direct(channels: int, positions: int, channels_last: bool) -> None:
    c = tiles.direct(positions, channels, 9, channels_last, (9, 0))
    assert c.block_p * c.block_c <= 1024
    assert c.block_c == 1 or channels_last
    assert c.block_p & (c.block_p - 1) == c.block_c & (c.block_c - 1) == 0
    assert c.block_p % 16 == 0  # runs of positions start at multiples of 16
    assert 1 <= c.unroll <= 9


def test_slots_are_those_of_the_machine_code() -> None:
    """What kernels are compared by is no less than the worst that was read off, and hardly more."""
    rows = json.loads((ROOT / "tests/static/table.json").read_text())
    seen = []
    for row in rows:
        if row["arch"] != "9.0" or row["kernel"] not in ("tap_conv", "pair_conv"):
            continue
        if row["slots"] is None or row["case"].startswith("conv3d"):
            continue
        numbers = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", row["config"])}
        flat = "flat=True" in row["config"]
        if row["kernel"] == "tap_conv":
            told = tiles.tap_slots(numbers["n"])
        else:
            config = tiles.PairConfig(
                numbers["p"], numbers["m"], numbers["rest_m"], numbers["n"], numbers["k"], flat,
                numbers["warps"], numbers["stages"],
            )  # fmt: skip
            told = tiles.pair_slots(config)
        assert row["slots"] <= told, row
        seen.append((row["kernel"], row["slots"] / told))
    for kernel in ("tap_conv", "pair_conv"):
        assert max(share for name, share in seen if name == kernel) > 0.9
