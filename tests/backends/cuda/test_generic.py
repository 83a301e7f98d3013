"""The CUDA backend through the emulator: its host code, its kernels, and bugs planted in them.

Everything here ran on no GPU. Sizes are small: an emulated thread takes a thousand times as long.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from fastst.backends import cuda
from fastst.backends.cuda import depthwise as cuda_depthwise
from fastst.backends.cuda import library as native
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import fuzz, planted
from tests.support.fuzz import Config
from tests.support.planted import Plant, more

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which family ran, phase by phase."""
    ran: list[str] = []

    def recorded(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object) -> object:
            ran.append(name)
            return function(*args)

        return run

    for name in ("forward", "backward"):
        function = recorded(f"depthwise {name}", getattr(cuda_depthwise, name))
        monkeypatch.setattr(cuda_depthwise, name, function)
    return ran


# ---- generic


@pytest.mark.parametrize("chunk", range(4))
def test_generic_fuzz(chunk: int) -> None:
    fuzz.fuzz("cuda", 12, first=fuzz.SEED + 1000 * chunk, least=1.0)


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect", "circular"])
@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
def test_generic_padding(mode: str, order: str) -> None:
    config = Config(
        seed=5, size=(4, 5, 6), kernel=(3, 3, 5), padding=(2, 2, 3), stride=(2, 1, 2),
        padding_mode=(mode, mode), order=order, norm="batch", activation="silu",
    )  # fmt: skip
    assert fuzz.check(config, "cuda") is None


# ---- depthwise


def depthwise(seed: int, **fixed: object) -> Config:
    """A random configuration that the depthwise kernels take."""
    r = random.Random(seed)
    k, kt, c = r.choice((3, 3, 5)), r.choice((3, 3, 5)), r.choice((8, 16, 72))
    causal = r.random() < 0.2
    choices: dict[str, object] = dict(
        seed=seed, batch=r.choice((1, 2)), channels=c, mid=c, out=c, groups=(c, c),
        size=(r.choice((1, 4)), r.choice((5, 9)), r.choice((6, 10))), kernel=(kt, k, k),
        stride=(r.choice((1, 1, 2)), *(r.choice((1, 1, 2)),) * 2), causal=causal,
        padding=(0 if causal else r.choice((kt // 2, kt - 1)), k // 2, r.choice((k // 2, k - 1))),
        activation=r.choice(fuzz.ACTIVATIONS), norm=r.choice(("none", "batch", "frozen")),
        bias=(r.random() < 0.5, r.random() < 0.5), recompute=r.random() < 0.3,
        affine=r.random() < 0.7,
        dtype=r.choice((torch.float32, torch.float16, torch.bfloat16)),
        x_layout=r.choice(("contiguous", "channels_last", "sliced_channels_last")),
        grad_layout=r.choice(("contiguous", "channels_last")),
    )  # fmt: skip
    return Config(**(choices | fixed))  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk", range(4))
def test_depthwise_fuzz(chunk: int, families: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(100 * chunk + fuzz.SEED, 100 * chunk + fuzz.SEED + 6):
        # Also with time cut into short pieces, of which each loads some of its neighbours' frames.
        per_block = random.Random(seed).choice((1, 2, 100))
        monkeypatch.setattr(cuda_depthwise, "frames_per_block", lambda f, b, n=per_block: min(f, n))
        config = depthwise(seed)
        assert fuzz.check(config, "cuda") is None, config
    assert families == ["depthwise forward", "depthwise backward"] * 6


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 5, 5), (5, 3, 3), (5, 5, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_with_one_stage(
    kernel: tuple[int, int, int], stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_depthwise, "_fitting_stages", lambda *_: 1)
    padding = tuple(k // 2 for k in kernel)
    config = depthwise(
        3, kernel=kernel, stride=(1, stride, stride), padding=padding, causal=False, channels=8,
        mid=8, out=8, groups=(8, 8), size=(3, 9, 10), batch=1, norm="batch", dtype=torch.float32,
        activation="gelu",
    )  # fmt: skip
    assert fuzz.check(config, "cuda") is None


def problem(channels: int = 8, kernel: tuple[int, int, int] = (3, 3, 3), **spec: object) -> Problem:
    kt, kh, kw = kernel
    shapes = (
        (1, channels, 3, 5, 5), (channels, 1, 1, kh, kw), (channels, 1, kt, 1, 1),
    )  # fmt: skip
    tensors = PairTensors(*(torch.empty(s) for s in shapes))
    settings = dict(padding=(1,) * 6, groups=(channels, channels)) | spec
    return Problem.of(tensors, PairSpec(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (problem(channels=12), "multiple of 8, not 12"),
        (problem(kernel=(3, 7, 7)), "have kernels"),
        (problem(kernel=(3, 3, 5)), "have kernels"),
        (problem(order="temporal-first"), "spatial and then a temporal"),
        (problem(padding=(1, 1, 3, 1, 1, 1)), "padding below the kernel"),
        (problem(padding_mode=("zeros", "replicate")), "pad with zeros, not 'replicate'"),
        (problem(dilation=(1, 2, 2)), "need dilation 1"),
        (problem(stride=(1, 1, 2)), "one spatial stride"),
        (problem(stride=(4, 1, 1)), "temporal stride of at most 3"),
    ],
)
def test_depthwise_says_what_it_does_not_take(case: Problem, why: str) -> None:
    assert why in str(cuda_depthwise.why_not(case))


def test_auto_passes_over_what_would_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "is_emulated", lambda: False)
    assert cuda.BACKEND.why_not_auto(problem(), "forward") is None
    assert "generic" in str(cuda.BACKEND.why_not_auto(problem(channels=12), "forward"))


@pytest.mark.parametrize(("frames", "blocks"), [(16, 1), (16, 100), (300, 49), (8, 4000), (1, 1)])
def test_time_is_cut_only_where_blocks_are_few(frames: int, blocks: int) -> None:
    per_block = cuda_depthwise.frames_per_block(frames, blocks)
    assert 1 <= per_block <= frames
    assert per_block == frames or per_block >= 8
    assert per_block == frames or blocks < 512


def combine(rows: int) -> None:
    """Parts of all sizes, some empty, of values far from 0."""
    lib = native.library()
    random, channels = torch.Generator().manual_seed(rows), 40
    counts = torch.randint(0, 5, (rows,), generator=random)
    counts[rows // 2] = 4
    values = 100 + 3 * torch.randn(int(counts.sum()), channels, generator=random).double()
    partials = torch.full((rows + 1, 3, channels), torch.nan)[:rows].zero_()  # NaN behind
    for row, part in zip(partials, values.split(counts.tolist()), strict=True):
        if len(part):
            row[0], row[1] = len(part), part.mean(0)
            row[2] = (part - part.mean(0)).square().sum(0)
    out = torch.full((2, channels), torch.nan)
    arrays = (lib.Array(t.data_ptr(), t.numel()) for t in (partials, *out))
    lib.combine_statistics(lib.Dtype.f32, *arrays, rows, [], 0)
    truth = torch.stack((values.mean(0), values.var(0, correction=0)))
    assert (out / truth - 1).abs().max() < 1e-5, "error 1e-5 > it"


@pytest.mark.parametrize("rows", [1, 31, 256, 1056])
def test_statistics_of_parts(rows: int) -> None:
    combine(rows)


# ---- planted bugs: each must be caught, by a wrong result or by the emulator's checks

GENERIC = Config(
    seed=1, channels=3, mid=4, out=3, batch=1, size=(3, 5, 5), kernel=(3, 3, 3), stride=(1, 2, 1),
    norm="batch", dtype=torch.float32, activation="silu",
)  # fmt: skip
REFLECT = Config(seed=1, size=(4, 5, 6), padding=2, padding_mode=("reflect", "reflect"))
DEPTHWISE = Config(
    seed=1, channels=8, mid=8, out=8, batch=1, groups=(8, 8), size=(4, 9, 10), kernel=(3, 3, 3),
    norm="batch", dtype=torch.float32, activation="silu", x_layout="channels_last",
)  # fmt: skip


@pytest.mark.parametrize(
    ("file", "configs"),
    [("generic/tap_conv.cu", (GENERIC, REFLECT)), ("reductions.cu", (GENERIC,)),
     ("depthwise/forward.cu", (DEPTHWISE,)), ("depthwise/backward.cu", (DEPTHWISE,)),
     more("generic/weight_gradient.cu", (GENERIC,))],
)  # fmt: skip
def test_nothing_is_caught_without_a_bug(
    file: str, configs: tuple[Config, ...], plant: Plant
) -> None:
    """What is left of the kernels is right: so it is the bugs that are caught below."""
    plant(file, **planted.GENERIC)
    for config in configs:
        fuzz.hold(config, "cuda")


@pytest.mark.parametrize(
    ("file", "right", "wrong", "config"),
    [
        # off by one in an index
        ("generic/tap_conv.cu", "i < size) return i", "i <= size) return i", GENERIC),
        ("generic/tap_conv.cu", "2 * (size - 1) - i;\n      case",
         "2 * size - 1 - i;\n      case", REFLECT),
        more("generic/tap_conv.cu", "c % in_per_group * b", "(c + 1) % in_per_group * b", GENERIC),
        more("generic/weight_gradient.cu", "i < end; ++i", "i + 1 < end; ++i", GENERIC),
        ("reductions.cu", "begin + threadIdx.y;", "begin + 1 + threadIdx.y;", GENERIC),
        # a missing barrier
        ("reductions.cu", "    sync_block();\n    if (lane", "    if (lane", GENERIC),
        ("depthwise/forward.cu", "copy_wait<0>();\n      sync_block();", "copy_wait<0>();",
         DEPTHWISE),
        more("depthwise/backward.cu", "dx.data) continue;\n    sync_block();", "dx.data) continue;",
         DEPTHWISE),
        more("depthwise/backward.cu", "    copy_wait<0>();\n", "", DEPTHWISE),
        # a wrong pad
        ("depthwise/forward.cu", "task.h0 * S - p.pad_h", "task.h0 * S - p.pad_h + 1", DEPTHWISE),
        more("depthwise/forward.cu", "p.pad_t - (KT - 1)", "p.pad_t - KT", DEPTHWISE),
        more("depthwise/backward.cu", "oh0 * S - p.pad_h", "oh0 * S", DEPTHWISE),
        # a wrong term
        ("depthwise/backward.cu", "(k == 0 || t == 0)", "(k == 0)", DEPTHWISE),
        more("reductions.cu", "+ delta * delta * count * share", "", GENERIC),
        # a ring of frames that is one too short
        ("depthwise/backward.cu", "KT - 1 + p.stages", "KT - 2 + p.stages", DEPTHWISE),
    ],
)  # fmt: skip
def test_planted_bug_is_caught(
    file: str, right: str, wrong: str, config: Config, plant: Plant
) -> None:
    plant(file, right, wrong, **planted.GENERIC)
    with planted.caught():
        fuzz.hold(config, "cuda")


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # a row too many, rows counted twice, squares between the parts lost, a missing barrier
        ("there = r < rows_;", "there = r <= rows_;"),
        more("first = threadIdx.y; first < rows_", "first = threadIdx.y / 2; first < rows_"),
        ("m2 + n * (row - centre) * (row - centre)", "m2 + 0 * n * row"),
        ("  sync_block();  // it may be called again\n", ""),
    ],
)
def test_planted_bug_in_statistics_is_caught(right: str, wrong: str, plant: Plant) -> None:
    plant("reductions.cu", right, wrong, **planted.GENERIC)
    with planted.caught():
        combine(250)
