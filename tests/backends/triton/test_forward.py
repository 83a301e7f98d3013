"""The Triton backend: in the interpreter on CPU tensors, on a GPU where there is one."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastst
from fastst import dispatch
from fastst.backends import conv_pass, reference
from fastst.backends import triton as backend
from fastst.backends.contract import no_instances, no_reason
from fastst.backends.triton import single, tiles
from fastst.functional import conv2plus1d
from fastst.machine import choices, gpu
from fastst.problem.spec import PairSpec, PairTensors, Problem, in_execution_order
from tests.support import fuzz
from tests.support.fuzz import Config, Limits
from tests.support.triton import DEVICE, forward, planted_bugs, problem_of

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("few_programs")

TINY = Limits(batch=2, channels=20, frames=5, space=7, work=40_000)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_random_calls_are_right(part: int) -> None:
    fuzz.fuzz(
        "triton", 8, TINY, first=fuzz.SEED + 1000 * part, backward=False, device=DEVICE, least=1.0
    )


@pytest.mark.slow
@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
@pytest.mark.parametrize("kind", ["depthwise", "grouped", "dense"])
def test_random_pairs_take_one_kernel(
    kind: str, order: str, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any stride, dilation, padding, norm, activation, residual: one launch writes y from x."""
    kernel = "direct_pair" if kind == "depthwise" else "pair_conv"
    monkeypatch.setattr(single, "predict", lambda problem: kernel)
    sizes = {
        "depthwise": dict(groups=(3, 3), channels=3, mid=3, out=3),
        "grouped": dict(groups=(2, 2), channels=10, mid=12, out=6),
        "dense": dict(groups=(1, 1), mid=9),
    }[kind]
    limits = Limits(
        batch=1, channels=9, frames=4, space=4, work=2_500,
        fixed=dict(op="conv2plus1d", order=order, **sizes),
    )  # fmt: skip
    for pieces in (1, 3):  # programs that share a walk
        monkeypatch.setattr(tiles, "pieces", lambda *sizes, n=pieces: n)
        first = fuzz.SEED + 50 * pieces
        fuzz.fuzz("triton", 2, limits, first=first, backward=False, device=DEVICE)
    assert launched[kernel] == 4
    assert launched["direct_conv"] + launched["tap_conv"] <= 4  # the statistics of batch norms


@pytest.mark.slow
@pytest.mark.parametrize(
    "groups",
    [(1, 8), (2, 2), (2, 4)],  # the first as in X3D's stem: dense, then depthwise
)
@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
def test_thin_pairs_take_one_kernel(
    groups: tuple[int, int], order: str, launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single, "predict", lambda problem: "direct_pair")
    if order == "temporal-first":
        groups = groups[::-1]
    forward(Config(
        channels=4, mid=8, out=8, groups=groups, order=order, norm="frozen", batch=1,
        dtype=torch.bfloat16, size=(2, 3, 4), x_layout="channels_last", kernel=(3, 2, 2),
        residual=True, outer_activation="relu",
    ))  # fmt: skip
    assert launched["direct_pair"] == 1 and not launched["tap_conv"] + launched["direct_conv"]


def described(
    channels: tuple[int, int, int] = (64, 64, 64), size: tuple[int, int, int] = (16, 56, 56),
    kernel: tuple[int, int, int] = (3, 3, 3), groups: int = 1,
    dtype: torch.dtype = torch.bfloat16, **spec: Any,
) -> Problem:  # fmt: skip
    """A call on 8 clips, without its tensors."""
    c, m, k = channels
    order = spec.get("order", "spatial-first")
    first, second = in_execution_order(order, (1, *kernel[1:]), (kernel[0], 1, 1))
    tensors = PairTensors(*(
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((8, c, *size), (m, c // groups, *first), (k, m // groups, *second))
    ))  # fmt: skip
    padding = tuple(k // 2 for k in kernel for _ in range(2))
    return Problem.of(tensors, PairSpec(padding=padding, groups=(groups, groups), **spec))  # type: ignore[arg-type]


STEM = dict(channels=(3, 45, 64), size=(16, 112, 112), kernel=(3, 7, 7), stride=(1, 2, 2))


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        # On tensor cores its loops issue 3 to 13 instructions in the time of the products.
        (dict(norm="frozen"), None),
        (dict(STEM, norm="none"), None),
        (dict(STEM, norm="batch"), None),
        (dict(channels=(64, 144, 64)), None),  # at most 9% faster by the roofline
        (dict(dtype=torch.float32), None),  # bound by products, not by memory
        (dict(dtype=torch.float64), None),
        (dict(channels=(64, 230, 128), stride=(2, 2, 2)), None),
        (dict(channels=(128, 128, 128), norm="none", activation="none"), None),  # a tokenizer
        (dict(channels=(64, 64, 256)), None),  # more sums than registers
        (dict(kernel=(7, 3, 3)), None),
        (dict(order="temporal-first"), None),  # would compute each mid column three times
        (dict(groups=4), None),
        (dict(groups=4, norm="batch"), None),
        (dict(groups=4, dtype=torch.float32), "pair_conv"),
        (dict(groups=4, order="temporal-first"), None),
        (dict(groups=32), "direct_pair"),
        (dict(groups=64), "direct_pair"),
        (dict(groups=64, dtype=torch.float64), "direct_pair"),
        (dict(groups=64, order="temporal-first"), "direct_pair"),
        (dict(groups=64, kernel=(11, 3, 3)), "direct_pair"),
        (dict(groups=64, kernel=(13, 3, 3)), None),
    ],
)
def test_one_kernel_where_it_pays(
    call: dict[str, Any], kernel: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.launch, "allows_tf32", lambda: False)
    monkeypatch.setattr(backend.launch, "capability", lambda device: (9, 0))
    assert single.predict(described(**call)) == kernel


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        (dict(channels=(64, 230, 128)), ["pair_conv"]),
        (dict(channels=(128, 128, 128), padding_mode=("zeros", "replicate")), ["pair_conv"]),
        (dict(channels=(64, 64, 256)), []),
        (dict(STEM, dtype=torch.float32), ["pair_conv"]),  # with TF32 and without
        (dict(channels=(64, 64, 128), dtype=torch.float32), []),
        (dict(kernel=(5, 3, 3)), []),
        (dict(channels=(64, 64, 32), kernel=(5, 3, 3), order="temporal-first"), ["pair_conv"]),
        (dict(groups=64), ["direct_pair", "pair_conv"]),
    ],
)
@pytest.mark.parametrize("tf32", [True, False])
def test_one_kernel_where_registers_allow(
    call: dict[str, Any], kernels: list[str], tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``tune`` may measure; the limits are those of ``configs.pair_fits``."""
    monkeypatch.setattr(backend.launch, "allows_tf32", lambda: tf32)
    assert single.available(described(**call)) == kernels


def test_one_kernel_only_where_nothing_of_the_mid_tensor_is_kept(
    launched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "pair_slots", lambda config: 1.0)
    for recompute in (False, True):
        launched.clear()
        config = Config(dtype=torch.float16, norm="frozen", channels=3, out=4)
        backend.BACKEND.conv2plus1d(*problem_of(config, recompute), save=True)
        assert launched["pair_conv"] == recompute
        assert launched["tap_conv"] == 2 * (not recompute)


@pytest.mark.parametrize("branch", ["none", "gelu"])
@pytest.mark.parametrize("combine", ["add", "cat"])
@pytest.mark.parametrize("groups", [(1, 1), (8, 8), (8, 1), (2, 4)])
def test_parallel(
    combine: str, branch: str, groups: tuple[int, int], launched: Counter[str]
) -> None:
    forward(Config(
        op="parallel_conv2plus1d", combine=combine, branch_activation=branch, groups=groups,
        channels=8, mid=8, out=8, stride=(2, 1, 2), activation="silu", x_layout="channels_last",
    ))  # fmt: skip
    assert launched["tap_conv"] + launched["direct_conv"] == (0 if combine == "add" else 2)
    assert launched["parallel_conv"] == (1 if combine == "add" else 0)


# ---- what backward reads


@pytest.mark.parametrize("norm", ["none", "frozen", "batch"])
@pytest.mark.parametrize("groups", [(1, 1), (3, 1), (1, 3), (9, 9)])
@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
def test_saved_tensors(norm: str, groups: tuple[int, int], order: str) -> None:
    """u with zeros in its padding channels, mean and var, as every backend leaves them."""
    problem, tensors = problem_of(
        Config(channels=9, mid=9, out=9, norm=norm, groups=groups, order=order,
               dtype=torch.float64, size=(3, 4, 4), x_layout="channels_last")
    )  # fmt: skip
    with fuzz.poisoned():
        ours = backend.BACKEND.conv2plus1d(problem, tensors, save=True)
    truth = reference.conv2plus1d(problem, tensors, save=True)
    for got, true in zip(ours[:4], truth[:4], strict=True):
        if true is None:
            assert got is None
            continue
        assert got is not None
        assert (got.shape, got.dtype, got.stride()) == (true.shape, true.dtype, true.stride())
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-10)
    assert ours.u is not None and not ours.u[..., problem.mid_channels :].any()
    again = backend.BACKEND.conv2plus1d(
        *problem_of(Config(mid=9, norm=norm, size=(2, 3, 3)), recompute=True), save=True
    )
    assert again.u is None


def test_training_mixes_with_another_backward() -> None:
    """Forward here, backward on PyTorch's operators: u is the same for all."""
    why_not = backend.BACKEND.why_not
    refusing = lambda problem, phase: why_not(problem, phase) if phase == "forward" else "…"  # noqa: E731
    config = Config(channels=5, mid=9, out=6, norm="batch", dtype=torch.float64)
    tensors, dy = fuzz.make(config, DEVICE)
    truth = fuzz.results(fuzz.call, config, tensors, dy)
    with (
        mock.patch.multiple(
            backend.BACKEND,
            device=None,
            why_not=refusing,
            why_not_auto=no_reason,
            instances=no_instances,
        ),
        dispatch.recording() as calls,
    ):
        got = fuzz.results(fuzz.call, config, tensors, dy)
    assert [call.chosen == "triton" for call in calls] == [True, False]
    for name, true in truth.items():
        torch.testing.assert_close(got[name], true, rtol=1e-9, atol=1e-9, msg=name)


def test_statistics_do_not_cancel() -> None:
    """A mean 10,000 times the deviation leaves the variance its digits."""
    config = Config(channels=3, mid=4, out=4, kernel=(1, 1, 1), padding=0, norm="batch", batch=1)
    problem, t = problem_of(replace(config, size=(4, 9, 9)))
    assert t.first_bias is not None
    t = t._replace(first_bias=t.first_bias + 1e4)
    u = conv_pass.conv_pass(t.x.double(), t.first_weight.double(), None, problem.passes[0])
    ours = backend.BACKEND.conv2plus1d(problem, t, save=False)
    assert ours.var is not None
    true = u.var((0, 2, 3, 4), correction=0)
    # Adding 1e4 in float32 rounds each value by up to 1e4·2⁻²⁴; the mean does not enter.
    assert ((ours.var.double() - true).abs() / true.sqrt()).max() < 4 * 1e4 * 2**-24


def test_many_partials_are_combined_in_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "combine", lambda channels: (2, 4, 3))
    problem, t = problem_of(Config(norm="batch", dtype=torch.float64))
    ours = backend.BACKEND.conv2plus1d(problem, t, save=False)
    truth = reference.conv2plus1d(problem, t, save=False)
    for got, true in zip(ours[:4], truth[:4], strict=True):
        if true is not None:
            torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-10)


# ---- edges


@pytest.mark.parametrize("positions", [63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles_of_positions(positions: int, dtype: torch.dtype) -> None:
    forward(Config(size=(1, positions, 1), batch=1, norm="batch", dtype=dtype, kernel=(1, 3, 1),
                 padding=(0, 1, 0)))  # fmt: skip


@pytest.mark.parametrize("channels", [15, 16, 17, 31, 33, 47, 48, 49, 144, 145, 161, 193])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
def test_tiles_of_channels(channels: int, x_layout: str) -> None:
    forward(Config(
        channels=channels % 50 + 1, mid=channels, out=channels, size=(2, 3, 3), batch=1,
        kernel=(2, 1, 2), padding=(1, 0, 1), norm="frozen", dtype=torch.float16, x_layout=x_layout,
    ))  # fmt: skip


@pytest.mark.parametrize("layout", fuzz.LAYOUTS)
@pytest.mark.parametrize("groups", [1, 8])
def test_layouts(layout: str, groups: int) -> None:
    forward(Config(
        channels=8, mid=8, out=8, groups=(groups, groups), x_layout=layout, weight_layout=layout,
        dtype=torch.bfloat16, norm="batch", batch=2, size=(2, 3, 4),
    ))  # fmt: skip


@pytest.mark.slow
def test_positions_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.arguments, "is_wide", lambda count: True)
    forward(Config(norm="batch"))
    forward(Config(op="parallel_conv2plus1d", mid=5))
    forward(Config(channels=6, groups=(6, 6), out=6))


@pytest.mark.slow
def test_offsets_past_2_to_31() -> None:
    """Strides that no small tensor has: only the offsets are computed."""
    from tests.support.offsets import offsets_kernel

    out = torch.empty(16, dtype=torch.int64, device=DEVICE)
    strides = (3 * 2**33, 1, 2**33, 2**32, 2**31 + 1)
    grid = backend.arguments.grid((2, 2, 2), 1)
    offsets_kernel[(1,)](out, strides, grid)
    n, t, h, w = torch.meshgrid(*(torch.arange(2),) * 4, indexing="ij")
    expected = n * strides[0] + t * strides[2] + h * strides[3] + w * strides[4]
    assert torch.equal(out.cpu(), expected.flatten())


@pytest.mark.parametrize("groups", [1, 3])
def test_nothing_is_written_outside(groups: int) -> None:
    """Bands around y, u and the statistics keep what they held; u's padding channels are zeros."""
    band, held = 4096, -77.0
    made = []

    plain = torch.empty_strided

    def guarded(shape: Any, stride: Any, *, dtype: torch.dtype, device: Any) -> Tensor:
        if torch.device(device).type == "meta":
            return plain(shape, stride, dtype=dtype, device=device)
        size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        flat = torch.full((size + 2 * band,), held, dtype=dtype, device=device)
        flat[band:-band] = math.nan
        made.append(flat)
        return flat.as_strided(shape, stride, band)

    problem, tensors = problem_of(
        Config(channels=9, mid=9, out=9, norm="batch", groups=(groups, groups))
    )
    with mock.patch.object(torch, "empty_strided", guarded):
        result = backend.BACKEND.conv2plus1d(problem, tensors, save=True)
    assert len(made) >= 6
    for flat in made:
        assert (flat[:band] == held).all() and (flat[-band:] == held).all()
        assert flat.isfinite().all()
    assert result.u is not None and not result.u[..., problem.mid_channels :].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("activation", fuzz.ACTIVATIONS)
@pytest.mark.parametrize("groups", [1, 4])
def test_no_number_passes_through(bad: float, activation: str, groups: int) -> None:
    x = torch.randn(1, 4, 3, 5, 5, device=DEVICE)
    x[0, 1, 1, 2, 2] = bad
    weights = (torch.rand(4, 4 // groups, 1, 3, 3), torch.rand(4, 4 // groups, 3, 1, 1))
    arguments = (x, *(w.to(DEVICE) for w in weights))
    options = {"padding": 1, "activation": activation, "groups": groups}
    y = {}
    for name in ("triton", "reference"):
        with fastst.use_backend(name):
            y[name] = conv2plus1d(*arguments, **options)
    assert torch.equal(y["triton"].isfinite(), y["reference"].isfinite())
    assert torch.equal(y["triton"].isnan(), y["reference"].isnan())


@pytest.mark.parametrize("columns", [2, 3, 5, 7])
@pytest.mark.parametrize("channels", [1, 3, 4, 8])
def test_no_number_beside_a_row_is_read(channels: int, columns: int) -> None:
    """Few channels are convolved by rows of the kernel, which end where it ends."""
    x = torch.randn(1, channels, 1, 4, 12, device=DEVICE)
    x[..., 8] = math.nan
    weights = torch.rand(4, channels, 1, 1, columns), torch.rand(4, 4, 1, 1, 1)
    y = {}
    for name in ("triton", "reference"):
        with fastst.use_backend(name):
            y[name] = conv2plus1d(x, *(w.to(DEVICE) for w in weights))
    assert torch.equal(y["triton"].isnan(), y["reference"].isnan())


@pytest.mark.slow
def test_two_threads() -> None:
    config = Config(channels=5)
    problem, t = problem_of(config)
    true = backend.BACKEND.conv2plus1d(problem, t, save=False).y
    wrong = []

    def run() -> None:
        for _ in range(3):
            if not torch.equal(backend.BACKEND.conv2plus1d(problem, t, save=False).y, true):
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- choosing


@pytest.mark.skipif(DEVICE == "cuda", reason="about CPU tensors")
def test_auto_never_interprets() -> None:
    problem, _ = problem_of(Config())
    assert backend.BACKEND.why_not(problem, "forward") is None
    assert dispatch.choose(problem, "forward", "auto") is not backend
    assert "by name" in (dispatch.reasons(problem)["triton"] or "")


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = problem_of(Config())
    assert "meta" in (
        backend.BACKEND.why_not(replace(problem, device=torch.device("meta")), "forward") or ""
    )
    monkeypatch.setattr(backend.launch, "is_interpreted", lambda: False)
    monkeypatch.setattr(backend.launch, "capability", lambda device: (7, 5))
    on_gpu = replace(problem, device=torch.device("cuda", 0))
    assert "8.0" in (backend.BACKEND.why_not(on_gpu, "forward") or "")
    for has, version, told in (
        ((10, 0), (3, 6, 0), "needs Triton 3.7.1"), ((10, 0), (3, 7, 1), None),
        ((9, 0), (3, 6, 0), None), (gpu.amd("gfx942:sramecc+:xnack-"), (3, 6, 0), None),
        (gpu.amd("gfx906"), (3, 8, 0), "is gfx906"),
    ):  # fmt: skip
        monkeypatch.setattr(backend.launch, "capability", lambda device, has=has: has)
        monkeypatch.setattr(backend.launch, "triton_version", lambda version=version: version)
        why = backend.BACKEND.why_not(on_gpu, "forward")
        assert why is None if told is None else told in (why or "")
    for has, version, told in (
        ((9, 0), (3, 7, 1), "#11366"), ((9, 0), (3, 8, 0), None), ((8, 0), (3, 6, 0), None),
        ((10, 0), (3, 8, 0), "#10821"),
    ):  # fmt: skip
        monkeypatch.setattr(backend.launch, "capability", lambda device, has=has: has)
        monkeypatch.setattr(backend.launch, "triton_version", lambda version=version: version)
        assert ("pair_conv" in single.available(on_gpu)) is (told is None)
        why = backend.BACKEND.avoids(on_gpu, "forward")
        assert why is None if told is None else told in (why or "")
    if DEVICE == "cpu":
        assert "TRITON_INTERPRET" in (backend.BACKEND.why_not(problem, "forward") or "")
    monkeypatch.setattr(backend.launch, "load_kernels", lambda: (None, "needs a working Triton: …"))
    assert "needs a working Triton" in (backend.BACKEND.why_not(on_gpu, "forward") or "")


@pytest.mark.slow
@pytest.mark.parametrize("config", [
    Config(mid=40, dtype=torch.float16, norm="frozen", batch=1, size=(2, 4, 3)),
    Config(mid=40, norm="batch", batch=1, size=(2, 3, 4)),
    Config(groups=(3, 3), channels=3, out=3, batch=1, size=(2, 4, 3)),
    Config(channels=6, out=6, groups=(6, 6), batch=1, x_layout="channels_last"),
])  # fmt: skip
def test_every_way_is_right(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = problem_of(config)
    names = backend.BACKEND.candidates(problem, "forward")
    assert 1 <= len(names) <= 12
    backend.BACKEND.candidate(problem, "forward", names[-1], True)()
    for way in names:
        monkeypatch.setattr(choices, "choice", lambda *key, way=way: way)
        forward(config)


# ---- bugs that these tests must see

MUTANTS = {
    "a tap that reads beyond the end": (
        "common", "< size.to(tl.uint32)", "<= size.to(tl.uint32)"),
    "statistics count rows that are not there": (
        "common", "away = tl.where(ok, x - mean, 0.0)", "away = x - mean"),
    "statistics merged without their distance": (
        "common", "m2 + other_m2 + step * step * (n * share)", "m2 + other_m2"),
    "one row too many": (
        "tap_conv", "tl.minimum(count - start, BLOCK_P)", "tl.minimum(count - start + 1, BLOCK_P)"),
    "rows one after another that are not": ("common", "if DENSE:", "if True:"),
    "padding channels stay unwritten": (
        "tap_conv", "channels if stored is None else stored", "channels"),
    "second column block repeats the first": (
        "tap_conv", "n = BLOCK_N + tl.arange", "n = tl.arange"),
    "kernel height and width change places": (
        "tap_conv", "index // lanes % rows, index % lanes", "index % rows, index // rows % lanes"),
    "relu loses NaN": (
        "common", "tl.where(v < 0, 0.0, v)", "tl.where(v > 0, v, 0.0)"),
    "reflection repeats the border": ("common", "2 * (size - 1) - i", "2 * size - 1 - i"),
    "gelu by tanh without its cubic term": ("common", "0.044715 * v", "0.0 * v"),
    "partials combined without their distance": (
        "statistics", "m2_block + step * step * (n_all * (n_block / n_new))", "m2_block"),
    "unbiased variance": ("statistics", "var = m2 / total", "var = m2 / (total - 1)"),
    "temporal padding adds act(shift)": (
        "depthwise", "mid_per_group * ACROSS if there else 0", "mid_per_group * ACROSS"),
    "column padding adds act(shift)": (
        "depthwise", "tl.where(ok, activate(z, ACTIVATION, SLOPE), 0.0)",
        "activate(z, ACTIVATION, SLOPE)"),
    "frames in the wrong order": (
        "pair", "rows = ((TAPS - 1 - age) * ACROSS", "rows = (age * ACROSS"),
    "a frame is kept too long": ("pair", "tl.static_range(1, TAPS)", "tl.static_range(TAPS - 1)"),
    "taps in the wrong order": (
        "depthwise", "tap = ((TAPS - 1 - age) * ACROSS", "tap = (age * ACROSS"),
    "the second part of a walk starts late": (
        "rolling_window", "first = tl.minimum(piece * share, outputs)",
        "first = tl.minimum(piece * share + piece, outputs)"),
    "a walk keeps every frame": ("rolling_window", "index % STRIDE == 0", "index >= 0"),
    "a walk forgets dilation": ("rolling_window", "across * SECOND.dilation[2]", "across"),
    "residual after the activation": (
        "tap_conv", "acc = activate(acc, ACTIVATION, SLOPE)\n    if stored", "if stored"),
    "weights packed with rows and columns exchanged": (
        "pack", "tap // kw % kh,\n        tap % kw,", "tap % kh,\n        tap // kh % kw,"),
}  # fmt: skip


def check_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    test_nothing_is_written_outside(1)
    base = Config(size=(3, 5, 4), batch=1)
    wide = replace(base, mid=72, channels=17)
    forward(replace(wide, norm="batch", kernel=(3, 3, 2), padding=(1, 1, 1)))
    forward(replace(base, padding_mode=("reflect", "reflect"), activation="gelu_tanh"))
    forward(replace(base, dtype=torch.float16, norm="frozen"))
    test_no_number_passes_through(math.nan, "relu", 1)
    test_many_partials_are_combined_in_two_steps(monkeypatch)


def check_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "predict", lambda problem: single.available(problem)[0])
    monkeypatch.setattr(tiles, "pieces", lambda *sizes: 2)
    one = Config(
        size=(3, 5, 4), batch=1, channels=4, mid=4, out=4, stride=(2, 2, 1), dilation=(1, 1, 2),
        padding=2, norm="frozen", dtype=torch.float16, residual=True, outer_activation="relu",
        x_layout="channels_last",
    )  # fmt: skip
    for order in ("temporal-first", "spatial-first"):
        for groups in (4, 1):
            forward(replace(one, order=order, groups=(groups,) * 2))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="one device is enough")
@pytest.mark.parametrize("checks", [check_passes, check_walks])
def test_nothing_is_seen_without_a_bug(
    checks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks(monkeypatch)


def all_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = MUTANTS[name][0] in ("rolling_window", "pair", "depthwise") or "residual" in name
    (check_walks if walks else check_passes)(monkeypatch)


test_planted_bugs_are_seen = planted_bugs(MUTANTS, all_checks)
