"""The Hopper kernels through the emulator: random problems, refusals, tiles, and planted bugs.

Everything here ran on no GPU. Forward only: that is all that these kernels do.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastst
from fastst import dispatch
from fastst.backends import cuda
from fastst.backends.contract import Backend
from fastst.backends.cuda import hopper as cuda_hopper
from fastst.backends.cuda.hopper import examples, instances, tiles
from fastst.backends.cuda.hopper.tiles import HopperTile
from fastst.dispatch import quarantine, selfcheck
from fastst.functional import conv2plus1d
from fastst.problem import activations
from fastst.problem.spec import PairSpec, PairTensors, Problem, in_execution_order
from tests.nn.test_outer_norm import reads_of_statistics
from tests.support import fuzz, hopper
from tests.support.fuzz import Config

pytestmark = pytest.mark.usefixtures("emulated")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems that the Hopper kernels have run."""
    found: list[Problem] = []
    forward: Callable[..., object] = cuda_hopper.forward

    def recorded(problem: Problem, *arguments: object) -> object:
        found.append(problem)
        return forward(problem, *arguments)

    for module in (cuda_hopper, examples):
        monkeypatch.setattr(module, "forward", recorded)
    return found


# ---- random problems


@pytest.mark.parametrize("chunk", range(4))
def test_fuzz(chunk: int, ran: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    cases = fuzz.CASES or 4
    if chunk % 2:
        hopper.in_clusters(monkeypatch)
    for seed in range(100 * chunk + fuzz.SEED, 10**6):
        config = hopper.dense(seed)
        if config.invalid() or config.work() > 8_000_000:
            continue
        before = len(ran)
        assert fuzz.check(config, "cuda", backward=False) is None, config
        assert len(ran) > before, f"not run by the Hopper kernels: {config}"
        cases -= 1
        if not cases:
            return


@pytest.mark.parametrize(
    ("tile", "share", "cluster"),
    [(tile, (1, 3)[i % 2], (1, 2)[i // 2 % 2]) for i, tile in enumerate(instances.SPATIAL)],
)
def test_spatial_tiles(
    tile: tuple[int, int, int], share: int, cluster: int, monkeypatch: pytest.MonkeyPatch,
    ran: list[Problem],
) -> None:  # fmt: skip
    """Each instance, with one box per tap or for a column of taps, alone and in clusters of two, of
    which the second block may have no frames."""
    columns, groups, blocks = tile
    planes = groups * blocks
    boxes = {1: (1, 5, 5), 3: (planes, 8, 8)}
    grid = 2 if groups == tiles.GROUPS else cluster  # turns come again
    chosen = HopperTile(columns, groups, blocks, boxes[share], share, 2, grid, cluster)
    monkeypatch.setattr(cuda_hopper, "spatial_tile", lambda problem: chosen)
    config = Config(
        seed=columns, channels=8, mid=columns + 8, out=8, batch=1, size=(3, 9, 5), norm="batch",
        dtype=(torch.float16, torch.bfloat16)[share // 2], x_layout="channels_last",
    )  # fmt: skip
    assert fuzz.check(config, "cuda", backward=False) is None
    assert len(ran) == 1


@pytest.mark.parametrize("tile", instances.TEMPORAL)
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_temporal_tiles(
    tile: tuple[int, int, int], norm: str, monkeypatch: pytest.MonkeyPatch, ran: list[Problem]
) -> None:
    """Each instance with and without a norm in registers; some of its frames do not exist. Those
    with a norm in clusters of two, of which the last block has a tile less."""
    columns, frames, stride = tile
    box, grid, cluster = ((3, frames, 3), 4, 2) if norm == "batch" else ((2, frames, 7), 2, 1)
    chosen = HopperTile(columns, 2, frames, box, 1, 2, grid, cluster)
    monkeypatch.setattr(cuda_hopper, "temporal_tile", lambda problem: chosen)
    config = Config(
        seed=frames, channels=8, mid=72, out=columns + 8, batch=3,
        size=(2 * stride * frames + 1, 3, 3),
        stride=(stride, 1, 1), norm=norm, activation="gelu" if norm == "batch" else "relu",
        dtype=torch.float16 if stride == 1 else torch.bfloat16, x_layout="channels_last",
    )  # fmt: skip
    assert fuzz.check(config, "cuda", backward=False) is None
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("channels", "mode"),
    [(128, "zeros"), (128, "replicate"), (256, "not causal"), (512, "zeros")],
)
def test_pairs_with_nothing_between(channels: int, mode: str, ran: list[Problem]) -> None:
    """Of video tokenizers, whose time is padded on the left only, and of pseudo-3D networks."""
    causal = mode != "not causal"
    config = Config(
        seed=3, channels=channels, mid=channels, out=channels, batch=1, size=(2, 4, 4),
        padding=(0 if causal else 1, 1, 1), causal=causal, activation="none",
        padding_mode=("zeros", mode if causal else "zeros"), x_layout="channels_last",
        dtype=torch.float16 if channels == 256 else torch.bfloat16,
    )  # fmt: skip
    assert fuzz.check(config, "cuda", backward=False) is None
    assert len(ran) == 1


@pytest.mark.parametrize("norm", ["none", "batch", "frozen"])
@pytest.mark.parametrize("kind", ["dense", "stem"])
def test_what_is_saved(norm: str, kind: str, ran: list[Problem]) -> None:
    """u before norm and activation, with zeros beyond its channels, and its statistics."""
    geometry: dict[str, Any] = dict(kernel=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3))
    if kind == "dense":
        geometry = dict(kernel=(3, 3, 3), stride=(2, 1, 2), padding=1)
    config = Config(
        seed=7, channels=3 if kind == "stem" else 72, mid=45, out=64 if kind == "stem" else 136,
        batch=2, size=(3, 9, 10),
        norm=norm, activation="silu", bias=(True, True), dtype=torch.float16,
        x_layout="channels_last", **geometry,
    )  # fmt: skip
    tensors, _ = fuzz.make(config)
    t = {n: v.detach() for n, v in tensors.items()}
    frozen = (t["running_mean"], t["running_var"]) if norm == "frozen" else (None, None)
    arguments = PairTensors(
        t["x"], t["spatial_weight"], t["temporal_weight"], t["spatial_bias"], t["temporal_bias"],
        t.get("norm_weight"), t.get("norm_bias"), *frozen,
    )  # fmt: skip
    pt, ph, pw = (1, 3, 3) if kind == "stem" else (1, 1, 1)
    spec = PairSpec(config.stride, (pt, pt, ph, ph, pw, pw), activation="silu", norm=norm)
    spec = spec._replace(output_statistics=kind == "dense")
    assert cuda.BACKEND.gives_output_statistics(Problem.of(arguments, spec)) == (kind == "dense")
    with fuzz.poisoned():
        found = cuda.conv2plus1d(Problem.of(arguments, spec), arguments, True)
    assert len(ran) == 1 and found.u is not None
    u = F.conv3d(
        t["x"].double(), t["spatial_weight"].double(), t["spatial_bias"].double(),
        (1, *config.stride[1:]), (0, ph, pw),
    )  # fmt: skip
    rows = found.u.permute(0, 4, 1, 2, 3).double()
    torch.testing.assert_close(rows[:, :45], u, rtol=1e-3, atol=2e-3 * float(u.abs().max()))
    assert rows.shape[1] == 48 and bool((rows[:, 45:] == 0).all())
    assert (found.mean is None) == (norm != "batch")
    if norm == "batch":
        var, mean = torch.var_mean(u, (0, 2, 3, 4), correction=0)
        torch.testing.assert_close(found.mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.var.double(), var, rtol=1e-5, atol=1e-5)
    if kind == "stem":
        assert found.out_mean is None
        return
    y = found.y.double()
    var, mean = torch.var_mean(y, (0, 2, 3, 4), correction=0)
    rounding = 1e-4 * float(y.abs().max())  # of y, which the statistics come before
    torch.testing.assert_close(found.out_mean.double(), mean, rtol=0, atol=rounding)
    torch.testing.assert_close(found.out_var.double(), var, rtol=1e-3, atol=0)


def test_a_norm_after_the_pair_takes_its_statistics(ran: list[Problem]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 9, 10).half().to(memory_format=torch.channels_last_3d)
    ws, wt = torch.randn(10, 8, 1, 3, 3).half() / 8, torch.randn(16, 10, 3, 1, 1).half() / 6
    mean, var = torch.zeros(16), torch.ones(16)
    norm = fastst.functional.BatchNorm(mean, var, torch.rand(16), torch.rand(16), training=True)
    with fastst.use_backend("cuda"), reads_of_statistics() as seen:
        got = conv2plus1d(x, ws, wt, padding=1, outer_norm=norm)
    assert seen == [] and ran
    z = F.relu(F.conv3d(x.double(), ws.double(), padding=(0, 1, 1)))
    y = F.conv3d(z, wt.double(), padding=(1, 0, 0))
    kept = [torch.zeros(16).double(), torch.ones(16).double()]
    expected = F.batch_norm(y, *kept, *(t.double() for t in norm[2:4]), True)
    torch.testing.assert_close(got.double(), expected, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close([mean.double(), var.double()], kept, rtol=1e-4, atol=1e-4)


def test_statistics_do_not_cancel(ran: list[Problem]) -> None:
    """They come from accumulators, not from u: rounding it would add 1/12 of a squared ulp of 1."""
    x = torch.randn(2, 8, 3, 9, 10, generator=torch.Generator().manual_seed(0)).half()
    x = x.to(memory_format=torch.channels_last_3d)
    ws, wt = torch.full((10, 8, 1, 1, 1), 1 / 8).half(), torch.ones(8, 10, 3, 1, 1).half()
    tensors = PairTensors(x, ws, wt, torch.full((10,), 2048.0).half())
    found = cuda.conv2plus1d(Problem.of(tensors, PairSpec(norm="batch")), tensors, False)
    true = x.double().mean(1).var(correction=0)
    torch.testing.assert_close(found.var, true.float().expand(10), rtol=2e-3, atol=0)
    assert ran


CUTS: dict[str, Any] = {
    "channels": lambda x: x[:, 8:72], "frames": lambda x: x[:1, :64, 1:],
    "rows": lambda x: x[:, :64, :, 2:], "columns": lambda x: x[:, :64, :, :, 1:-1],
    "every other clip": lambda x: x[::2, :64, :1],
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_reads_x_as_it_lies(cut: str, ran: list[Problem]) -> None:
    """A part of a larger tensor, whose rest is no number, gives the bits of a copy of it."""
    whole = torch.randn(3, 80, 4, 7, 8, generator=torch.Generator().manual_seed(1)).half()
    whole = whole.to(memory_format=torch.channels_last_3d)
    alone = CUTS[cut](whole).clone(memory_format=torch.channels_last_3d)
    marked = torch.full_like(whole, torch.nan)
    CUTS[cut](marked).copy_(alone)
    ws, wt = torch.randn(16, 64, 1, 3, 3).half() / 24, torch.randn(8, 16, 3, 1, 1).half() / 7
    with fastst.use_backend("cuda"):
        got, expected = (
            conv2plus1d(x, ws, wt, padding=1) for x in (CUTS[cut](marked), alone)
        )  # fmt: skip
    assert torch.equal(got, expected) and len(ran) == 2


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


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.thorough)])
def test_self_check_runs_every_instance(
    step: int, ran: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here some of them: all run above."""
    trials = tiles.trials()
    some = trials[::step]
    monkeypatch.setattr(tiles, "trials", lambda: some)
    found = examples.examples("hopper", torch.float16)
    assert selfcheck.check(cuda.BACKEND, found, torch.device("cpu"), torch.float16) is None
    spatial = {((a.columns, a.groups, a.blocks), a.cluster) for a, _, _ in trials}
    shared = {((a.columns, a.groups, a.blocks), a.share) for a, _, _ in trials}
    temporal = {((b.columns, b.box[1], s), b.cluster) for _, b, s in trials}
    assert spatial == set(itertools.product(instances.SPATIAL, (1, 2)))
    assert shared == set(itertools.product(instances.SPATIAL, (1, 3)))
    assert temporal == set(itertools.product(instances.TEMPORAL, (1, 2)))
    assert {(a.share, a.cluster) for a, _, _ in trials} == {(1, 1), (1, 2), (3, 1), (3, 2)}
    norms = ["batch"] * -(-len(some) // 2) + ["frozen"] * (len(some) // 2) + ["batch"]
    assert [p.spec.norm for p in ran] == [n for n in norms for _ in range(2)]  # type: ignore[union-attr]
    assert cuda_hopper.stem_why_not(ran[-1]) is None


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the emulated kernels ran on a GPU, for whoever chooses among backends."""
    for module in (cuda, cuda_hopper):
        monkeypatch.setattr(module, "is_emulated", lambda: False)
    monkeypatch.setattr(cuda.BACKEND, "why_not", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_auto_waits_for_the_self_check(on_hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def broken(backend: Backend, problem: Problem, phase: str) -> str:
        asked.extend([phase] * (backend.name == "cuda"))
        return "is off by 1"

    monkeypatch.setattr(selfcheck, "why_broken", broken)
    assert dispatch.reasons(problem())["cuda"] == "is off by 1"
    assert asked == ["forward"]


def test_auto_takes_no_unchecked_kernel_into_a_graph(
    on_hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("checked during a capture")

    monkeypatch.setattr(quarantine, "ask", never)
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(selfcheck, "_key", lambda *arguments: "key")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    case = replace(problem(), device=torch.device("cuda", 0))
    assert "has not been checked before this graph capture" in str(dispatch.reasons(case)["cuda"])
    monkeypatch.setattr(selfcheck, "_verdicts", {"key": ""})
    assert dispatch.reasons(case)["cuda"] is None


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
    taps = in_execution_order(str(spec.get("order", "")), (1, kh, kw), (kt, 1, 1))
    shapes = (1, channels, 3, 5, 5), (16, channels // g1, *taps[0]), (out, 16 // g2, *taps[1])
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
        (problem(layout=torch.contiguous_format), "write channels_last_3d, not contiguous"),
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


def laid_out(cut: Callable[[torch.Tensor], torch.Tensor]) -> Problem:
    x = cut(torch.empty(2, 32, 3, 5, 5).half().to(memory_format=torch.channels_last_3d))
    ws, wt = torch.empty(16, x.shape[1], 1, 3, 3).half(), torch.empty(8, 16, 3, 1, 1).half()
    ws = ws.to(memory_format=torch.channels_last_3d)
    return Problem.of(PairTensors(x, ws, wt), PairSpec(padding=(1,) * 6))


@pytest.mark.parametrize(
    ("cut", "why"),
    [
        (lambda x: x.contiguous(), "as whole 16-byte vectors (channels_last_3d), not with strides"),
        (lambda x: x[:, 1:9], "from 2 bytes past such a vector's start"),
        (lambda x: x[:, :1].expand(-1, 8, -1, -1, -1), "as whole 16-byte vectors"),
        (lambda x: x[:, :, :2], "frames of all clips evenly apart, not with strides (2400, 1, 800"),
        (lambda x: x[:, 8:24], None),
    ],
)
def test_copies_nothing(
    cut: Callable[[torch.Tensor], torch.Tensor], why: str | None, on_hopper: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What the copy engine cannot read is refused, and whoever asks is told."""
    found = cuda_hopper.why_not(laid_out(cut))
    assert found is None if why is None else why in str(found)
    monkeypatch.setattr(selfcheck, "why_broken", lambda *arguments: None)
    told = dispatch.reasons(laid_out(cut))["cuda"]
    assert told is None if why is None else why in str(told)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_needs_hopper(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_hopper, "is_emulated", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    why = f"need compute capability 9.0 (Hopper), but cpu has {capability[0]}.{capability[1]}"
    assert cuda_hopper.why_not(problem()) == why
    monkeypatch.setattr(cuda, "is_emulated", lambda: False)
    monkeypatch.setattr(cuda.BACKEND, "why_not", lambda *arguments: None)
    assert why in str(dispatch.reasons(problem())["cuda"])  # which is what explain prints


# ---- tiles that do not fit are refused by the library


@pytest.mark.parametrize(
    ("spatial", "why"),
    [
        (dict(box=(1, 9, 32)), "boxes of at most a tile's places"),
        (dict(stages=17), "1 to 16 stages"),
        (dict(share=3, box=(4, 4, 8)), "whole blocks of 64 places in rows of 8"),
        (dict(columns=56), "no tile (56, 1, 2)"),
        (dict(cluster=2, grid=3), "a grid of whole ones"),
        (dict(cluster=3, grid=3), "clusters of 1 or 2 blocks"),
    ],
)
def test_refuses_tiles(spatial: dict[str, Any], why: str) -> None:
    a, b, _ = tiles.trials()[0]
    x = torch.zeros(1, 8, 3, 5, 5).half().to(memory_format=torch.channels_last_3d)
    t = PairTensors(x, torch.zeros(8, 8, 1, 3, 3).half(), torch.zeros(8, 8, 3, 1, 1).half())
    case = Problem.of(t, PairSpec(padding=(1,) * 6))
    with pytest.raises(ValueError, match=re.escape(why)):
        cuda_hopper.forward(case, t, False, (replace(a, **spatial), b))
    with pytest.raises(ValueError, match="at most 128 places, 1 to 16 stages"):
        cuda_hopper.forward(case, t, False, (a, replace(b, box=(2, 4, 65))))
