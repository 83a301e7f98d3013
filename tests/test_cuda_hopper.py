"""The Hopper kernels through the emulator: random problems, refusals, tiles, and planted bugs.

Everything here ran on no GPU. Forward only: that is all that these kernels do.
"""

from __future__ import annotations

import math
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest
import torch
import torch.nn.functional as F
from fuzz import Config

import fastst
from fastst import activations, configs, configs_hopper, selfcheck
from fastst.backends import cuda, cuda_hopper, native
from fastst.functional import conv2plus1d
from fastst.shapes import PairSpec, PairTensors, Problem

CSRC = Path(__file__).parents[1] / "csrc"


@pytest.fixture(autouse=True)
def _emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTST_CUDA_EMULATE", "1")
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    native.library()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that the Hopper kernels have run."""
    found: list[Problem] = []
    forward: Callable[..., object] = cuda_hopper.forward

    def recorded(problem: Problem, *arguments: object) -> object:
        found.append(problem)
        return forward(problem, *arguments)

    monkeypatch.setattr(cuda_hopper, "forward", recorded)
    return found


# ---- random problems


def dense(seed: int, **fixed: object) -> Config:
    """A random configuration that the kernels take."""
    r = random.Random(seed)
    causal = r.choice((False, False, True, "strided"))
    stride = (r.choice((1, 1, 2)), r.choice((1, 2)), r.choice((1, 2)))
    k = r.choice((1, 2, 3, 3, 3, 5))
    choices: dict[str, object] = dict(
        seed=seed, batch=r.choice((1, 2, 3)), channels=r.choice((8, 64, 72)),
        mid=r.choice((1, 10, 45, 64, 72, 150)), out=r.choice((8, 64, 72, 136)),
        size=(r.choice((1, 2, 4, 5)), r.choice((1, 5, 8, 9)), r.choice((4, 8, 10, 17))),
        kernel=(3, k, r.choice((k, k, 3))), stride=stride, causal=causal,
        padding=(0 if causal else r.choice((1, 1, 2)), k // 2, r.choice((1, 2))),
        dilation=(1, r.choice((1, 1, 2)), r.choice((1, 1, 2))),
        padding_mode=("zeros", r.choice(("zeros", "zeros", "replicate"))),
        activation=r.choice(fuzz.ACTIVATIONS), norm=r.choice(("none", "batch", "frozen")),
        bias=(r.random() < 0.5, r.random() < 0.5), recompute=r.random() < 0.3,
        affine=r.random() < 0.7, dtype=r.choice((torch.float16, torch.bfloat16)),
        residual=r.random() < 0.3, outer_activation=r.choice(("none", "relu", "silu")),
        x_layout=r.choice(("channels_last", "channels_last", "sliced_channels_last")),
    )  # fmt: skip
    return Config(**(choices | fixed))  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", range(4))
def test_fuzz(chunk: int, ran: list[Problem]) -> None:
    cases = fuzz.CASES or 4
    for seed in range(100 * chunk + fuzz.SEED, 10**6):
        config = dense(seed)
        if config.invalid() or config.work() > 8_000_000:
            continue
        before = len(ran)
        assert fuzz.check(config, "cuda", backward=False) is None, config
        assert len(ran) > before, f"not run by the Hopper kernels: {config}"
        cases -= 1
        if not cases:
            return


@pytest.mark.parametrize("tile", configs_hopper.SPATIAL_TILES)
@pytest.mark.parametrize("share", [1, 3])
def test_spatial_tiles(
    tile: tuple[int, int, int], share: int, monkeypatch: pytest.MonkeyPatch, ran: list[Problem]
) -> None:
    """Each instance, with one box per tap and with one box for a column of taps."""
    columns, groups, blocks = tile
    planes = groups * blocks
    boxes = {1: (1, 3, 5), 3: (planes, 8, 8)}
    chosen = configs_hopper.HopperTile(columns, groups, blocks, boxes[share], share, 2, 2)
    monkeypatch.setattr(cuda_hopper, "spatial_tile", lambda problem: chosen)
    config = Config(
        seed=columns, channels=8, mid=columns + 8, out=8, batch=1, size=(2, 9, 5), norm="batch",
        dtype=(torch.float16, torch.bfloat16)[share // 2], x_layout="channels_last",
    )  # fmt: skip
    assert fuzz.check(config, "cuda", backward=False) is None
    assert len(ran) == 1


@pytest.mark.parametrize("tile", configs_hopper.TEMPORAL_TILES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_temporal_tiles(
    tile: tuple[int, int], stride: int, norm: str, monkeypatch: pytest.MonkeyPatch,
    ran: list[Problem],
) -> None:  # fmt: skip
    """Each instance with and without a norm in registers; some of its frames do not exist."""
    columns, frames = tile
    if (columns, stride) == (64, 2):
        pytest.skip("not built")
    chosen = configs_hopper.HopperTile(columns, 2, frames, (2, frames, 7), 1, 2, 2)
    monkeypatch.setattr(cuda_hopper, "temporal_tile", lambda problem: chosen)
    config = Config(
        seed=frames, channels=8, mid=72, out=columns + 8, batch=3, size=(stride * frames + 1, 3, 3),
        stride=(stride, 1, 1), norm=norm, activation="gelu" if norm == "batch" else "relu",
        dtype=torch.float16 if stride == 1 else torch.bfloat16, x_layout="channels_last",
    )  # fmt: skip
    assert fuzz.check(config, "cuda", backward=False) is None
    assert len(ran) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("replicate", [False, True])
def test_causal_pair_of_a_tokenizer(
    dtype: torch.dtype, replicate: bool, ran: list[Problem]
) -> None:
    """C = M = K, nothing between the convolutions, time padded on the left only."""
    config = Config(
        seed=3, channels=128, mid=128, out=128, batch=1, size=(5, 4, 4), padding=(0, 1, 1),
        causal=True, padding_mode=("zeros", "replicate" if replicate else "zeros"),
        activation="none", dtype=dtype, x_layout="channels_last",
    )  # fmt: skip
    assert fuzz.check(config, "cuda", backward=False) is None
    assert len(ran) == 1


def stem(seed: int, **fixed: object) -> Config:
    """A random stem."""
    r = random.Random(seed)
    causal = r.random() < 0.3
    choices: dict[str, object] = dict(
        seed=seed, batch=r.choice((1, 2)), channels=r.choice((2, 3, 3, 4)),
        mid=r.choice((7, 45, 48)), out=r.choice((8, 64)), kernel=(3, 7, 7), stride=(1, 2, 2),
        size=(r.choice((1, 2, 5, 9)), r.choice((7, 16, 20)), r.choice((8, 15, 21))), causal=causal,
        padding=(0 if causal else r.choice((1, 1, 2)), r.choice((3, 1)), r.choice((3, 0))),
        activation=r.choice(fuzz.ACTIVATIONS), norm=r.choice(("none", "batch", "frozen")),
        bias=(r.random() < 0.5, r.random() < 0.5), recompute=r.random() < 0.3,
        dtype=r.choice((torch.float16, torch.bfloat16)), residual=r.random() < 0.3,
        outer_activation=r.choice(("none", "relu")),
        x_layout=r.choice(("channels_last", "sliced_channels_last")),
    )  # fmt: skip
    return Config(**(choices | fixed))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(fuzz.SEED, fuzz.SEED + (fuzz.CASES or 6)))
def test_stem_fuzz(seed: int, ran: list[Problem]) -> None:
    config = stem(seed)
    if config.invalid():
        config = stem(seed, norm="none", activation="silu", size=(5, 16, 15))
    assert fuzz.check(config, "cuda", backward=False) is None
    assert ran and cuda_hopper.stem_why_not(ran[-1]) is None


def test_stem_keeps_to_its_window(ran: list[Problem]) -> None:
    """The kernel has an eighth column of zero weights: what it would read must not count."""
    x = torch.zeros(1, 3, 1, 24, 24, dtype=torch.float16)
    x[..., 10] = torch.nan
    x = x.to(memory_format=torch.channels_last_3d)
    ws, wt = torch.ones(45, 3, 1, 7, 7).half(), torch.ones(64, 45, 3, 1, 1).half()
    with fastst.use_backend("cuda"):
        y = conv2plus1d(x, ws, wt, stride=(1, 2, 2), padding=(1, 3, 3), activation="none")
    expected = F.conv3d(F.conv3d(x, ws, None, (1, 2, 2), (0, 3, 3)), wt, None, 1, (1, 0, 0))
    assert torch.equal(y.isnan(), expected.isnan()) and ran


@pytest.mark.parametrize("activation", fuzz.ACTIVATIONS)
def test_activations_in_registers(ran: list[Problem], activation: str) -> None:
    """Of every size, and of what is no number, as PyTorch's: approximate exponentials must do."""
    values = torch.cat((
        torch.linspace(-12, 12, 239), torch.tensor([0.0, -0.0, 65504, -65504, 1e-7, -1e-7]),
        torch.tensor([torch.inf, -torch.inf, torch.nan]),
    )).half()  # fmt: skip
    x = torch.zeros(1, 8, 1, 1, len(values), dtype=torch.float16)
    x[0, 0, 0, 0] = values
    x = x.to(memory_format=torch.channels_last_3d)
    ws, wt = torch.zeros(1, 8, 1, 1, 1).half(), torch.zeros(8, 1, 3, 1, 1).half()
    ws[0, 0], wt[:, :, 1] = 1, 1
    with fastst.use_backend("cuda"):
        y = conv2plus1d(x, ws, wt, padding=(1, 0, 0), activation=activation)
    expected = activations.apply(activation, values.double(), 0.01)
    torch.testing.assert_close(
        y[0, :, 0, 0].double(), expected.half().double().expand(8, -1), rtol=2**-10, atol=2**-24,
        equal_nan=True,
    )  # fmt: skip
    assert ran


# ---- self-check


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_self_check_runs_both_kernels(dtype: torch.dtype, ran: list[Problem]) -> None:
    assert selfcheck.check("cuda", "hopper", torch.device("cpu"), dtype) is None
    assert len(ran) == 1


def test_auto_waits_for_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def broken(backend: str, problem: Problem, kind: str | None = None) -> str:
        asked.append(kind)
        return "is off by 1"

    monkeypatch.setattr(cuda, "emulating", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda_hopper, "emulating", lambda: False)
    monkeypatch.setattr(selfcheck, "why_broken", broken)
    assert cuda.avoid(problem(), "forward") == "is off by 1"
    assert asked == ["hopper"]
    assert "run forward" in str(cuda.avoid(problem(), "backward"))


# ---- refusals


def problem(
    channels: int = 8,
    out: int = 8,
    kernel: tuple[int, int, int] = (3, 3, 3),
    dtype: torch.dtype = torch.float16,
    layout: torch.memory_format = torch.channels_last_3d,
    **spec: object,
) -> Problem:
    kt, kh, kw = kernel
    g1, g2 = spec.get("groups", (1, 1))  # type: ignore[misc]
    shapes = (1, channels, 3, 5, 5), (16, channels // g1, 1, kh, kw), (out, 16 // g2, kt, 1, 1)
    tensors = PairTensors(*(torch.empty(s, dtype=dtype).to(memory_format=layout) for s in shapes))
    return Problem.of(tensors, PairSpec(**({"padding": (1,) * 6} | spec)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (problem(), None),
        (problem(channels=12), "input channels that are a multiple of 8, not 12, or a stem"),
        (problem(channels=3), "7 × 7 taps of stride 2"),
        (problem(channels=3, kernel=(3, 7, 7), stride=(1, 2, 2)), None),
        (problem(out=12), "output channels that are a multiple of 8, not 12"),
        (problem(dtype=torch.float32), "float16 and bfloat16, not torch.float32"),
        (problem(layout=torch.contiguous_format), "channels_last_3d, not contiguous"),
        (problem(groups=(2, 1)), "no groups, not (2, 1)"),
        (problem(order="temporal-first"), "spatial and then a temporal"),
        (problem(padding_mode=("replicate", "zeros")), "the plane with zeros, not 'replicate'"),
        (problem(padding_mode=("zeros", "reflect")), "time with zeros or copies"),
        (problem(kernel=(5, 3, 3)), "3 temporal taps without dilation, not 5"),
        (problem(dilation=(2, 1, 1)), "without dilation, not 3 with 2"),
        (problem(stride=(1, 1, 3)), "have strides (1, 2), not 3"),
    ],
)
def test_says_what_it_does_not_take(case: Problem, why: str | None) -> None:
    found = cuda_hopper.why_not(case)
    assert found is None if why is None else why in str(found)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_needs_hopper(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_hopper, "emulating", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert "need compute capability 9.0 (Hopper)" in str(cuda_hopper.why_not(problem()))


# ---- tiles


@pytest.mark.parametrize(
    ("mid", "columns"),
    [(45, 64), (144, 144), (230, 232), (288, 144), (460, 232), (576, 144), (921, 232), (1152, 192)],
)
def test_mid_channels_fit(mid: int, columns: int) -> None:
    """Of the widths of R(2+1)D-18 at most 1% of the columns multiply zeros, the stem's apart."""
    widths = [c for c, _, _ in configs_hopper.SPATIAL_TILES]
    waste = min(configs.round_up(mid, c) / mid for c in widths)
    assert configs.round_up(mid, columns) / mid == pytest.approx(waste)
    assert waste <= 1.01 or mid == 45


SHAPES = [
    (64, 144, 64, 16, 56, 1, 1), (64, 230, 128, 16, 28, 2, 2), (128, 288, 128, 8, 28, 1, 1),
    (128, 460, 256, 8, 14, 2, 2), (256, 576, 256, 4, 14, 1, 1), (256, 921, 512, 4, 7, 2, 2),
    (512, 1152, 512, 2, 7, 1, 1), (512, 512, 512, 5, 32, 1, 1), (8, 8, 8, 1, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 8, 32])
def test_tiles_keep_to_the_limits(shape: tuple[int, ...], batch: int) -> None:
    c, m, k, t, side, stride, temporal = shape
    a = configs_hopper.spatial(
        batch * t, (side, side), c, m, (3, 3), (stride, stride), 1, processors=132
    )
    rows = 64 * a.groups * a.blocks
    box_rows = a.box[0] * (a.box[1] + a.share - 1) * a.box[2]
    stage = max(rows, box_rows) * 128 + a.share * a.columns * 128
    assert math.prod(a.box) <= rows and 2 <= a.stages <= 16
    assert 1024 + a.stages * stage <= 227 << 10
    assert max(a.box[1] * stride, a.box[2] * stride, a.box[0]) <= 256
    if a.share > 1:
        assert math.prod(a.box) == rows and a.box[2] % 8 == 0 and stride == 1
    b = configs_hopper.temporal(batch, side * side, -(-t // temporal), m, k, temporal, 132)
    assert b.box[0] * b.box[2] <= 128 and 2 <= b.stages <= 16
    assert 1024 + 2 * 3 * b.columns * 128 + b.stages * 128 * 128 <= 227 << 10


def test_tiles_waste_little() -> None:
    """Of the products of a wave-filling batch, by the shares of tiles that exist."""
    for side, frames in ((56, 512), (28, 256), (14, 128), (7, 64)):
        a = configs_hopper.spatial(frames, (side, side), 128, 144, (3, 3), (1, 1), 1, 132)
        tiles = math.prod(
            math.ceil(n / b) for n, b in zip((frames, side, side), a.box, strict=True)
        )
        used = frames * side * side / (tiles * 64 * a.groups * a.blocks)
        assert used >= 0.75, (side, used, a)


# ---- planted bugs: each must be caught, by a wrong result or by the emulator's checks

SPATIAL = Config(
    seed=1, channels=72, mid=40, out=8, batch=1, size=(5, 9, 10), norm="batch",
    dtype=torch.float16, x_layout="channels_last",
)  # fmt: skip
TEMPORAL = Config(
    seed=1, channels=8, mid=72, out=136, batch=2, size=(5, 3, 3), norm="batch", activation="silu",
    dtype=torch.float16, x_layout="channels_last",
)  # fmt: skip
STEM = Config(
    seed=1, channels=3, mid=45, out=64, batch=1, size=(4, 20, 21), kernel=(3, 7, 7),
    stride=(1, 2, 2), padding=(1, 3, 3), norm="frozen", dtype=torch.float16,
    x_layout="channels_last",
)  # fmt: skip
# Left out of the mutants to compile them quickly, as (file, pattern, replacement).
UNUSED = (
    ("hopper_spatial.cu", r" *if \(is\((?!64).*\n", ""),
    ("hopper_temporal.cu", r" *if \(is\((?!64).*\n", ""),
    ("hopper_spatial.cu", r" *if \(dtype == Dtype::bf16\).*\n", ""),
    ("hopper_temporal.cu", r" *if \(dtype == Dtype::bf16\).*\n", ""),
    ("hopper_stem.cu", r" *if \(dtype == Dtype::bf16\).*\n", ""),
)
# Put into the source, so that only it is compiled again.
HEADERS = ("hopper_spatial", "hopper_temporal", "pipeline", "accumulators")


@pytest.mark.parametrize(
    ("file", "right", "wrong", "config"),
    [
        # a tap off by one
        ("hopper_spatial.cu", "(block * p.h.kernel + kh + i) * N",
         "(block * p.h.kernel + (kh + i + 1) % p.h.kernel) * N", SPATIAL),
        ("hopper_spatial.cu", "+ k * dilation - before) / up;",
         "+ k * dilation - before + 1) / up;", SPATIAL),
        ("hopper_temporal.cu", "- before) / Up + i;", "- before) / Up + i + 1;", TEMPORAL),
        ("hopper_stem.cu", "(i + kTaps - tap) % kTaps", "(i + tap) % kTaps", STEM),
        # a wrong swizzle
        ("hopper_spatial.cu", ".swizzle = Swizzle::b128", ".swizzle = Swizzle::none", SPATIAL),
        ("hopper_temporal.cu", "^ (row % 8)", "^ (row % 4)", TEMPORAL),
        # a wrong phase
        ("hopper_spatial.cu", "mbarrier_wait(empty_ + stage_, phase_ ^ 1)",
         "mbarrier_wait(empty_ + stage_, phase_)", SPATIAL),
        ("hopper_temporal.cu", "stage_ = 0, phase_ ^= 1", "stage_ = 0", TEMPORAL),
        # a missing fence
        ("hopper_spatial.cu", "wgmma_fence();", "", SPATIAL),
        ("hopper_temporal.cu", "wgmma_fence();", "", TEMPORAL),
        ("hopper_spatial.cu", "fence_proxy_async();", "", SPATIAL),
        ("hopper_temporal.cu", "mbarrier_fence_init();", "", TEMPORAL),
        ("hopper_stem.cu", "keep(sums[tap]);\n            wgmma_fence();", "", STEM),
        # a stage given back too early
        ("hopper_spatial.cu", "wgmma_wait<1>();", "", SPATIAL),
        ("hopper_temporal.cu", "wgmma_wait<0>();", "", TEMPORAL),
        ("hopper_stem.cu", "sync_warp();\n    if (threadIdx.x % 32 == 0) mbarrier_arrive(full());",
         "if (threadIdx.x % 32 == 0) mbarrier_arrive(full());", STEM),
        # statistics of rows that do not exist, and normalised padding
        ("hopper_spatial.cu", "float(there[0]) + float(there[1])", "2.0f", SPATIAL),
        ("hopper_temporal.cu", "return !replicate ? -1 :", "return", TEMPORAL),
    ],
)  # fmt: skip
def test_planted_bug_is_caught(
    file: str,
    right: str,
    wrong: str,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changed = tmp_path / "csrc"
    shutil.copytree(CSRC, changed)
    for name, unused, instead in UNUSED:
        text, times = re.subn(unused, instead, (changed / name).read_text())
        assert times, f"{name} no longer has {unused}"
        (changed / name).write_text(text)
    text = (changed / file).read_text()
    for header in HEADERS:
        inside = (changed / f"device/{header}.cuh").read_text().replace("#pragma once", "")
        text = text.replace(f"#include <device/{header}.cuh>\n", inside, 1)
    assert right in text, f"{file} no longer has {right!r}: plant the bug elsewhere"
    (changed / file).write_text(text.replace(right, wrong, 1))
    builder = native.import_file("fastst_emulator_build", native._EMULATOR)
    built = builder.module(changed)
    # A module of its own name: pybind11 hands out the first module of a name again.
    library = native.import_file(f"mutant_{built.parent.name}.{builder.MODULE}", built)
    monkeypatch.setattr(native, "emulated", lambda: library)
    monkeypatch.setattr(configs_hopper, "SPATIAL_TILES", ((64, 2, 2),))
    monkeypatch.setattr(configs_hopper, "TEMPORAL_TILES", ((64, 4),))
    with pytest.raises((AssertionError, RuntimeError)):
        fuzz.check(config, "cuda", backward=False)
