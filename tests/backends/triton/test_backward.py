"""Backward on the Triton backend: every gradient, and what is launched and allocated for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastst
from fastst.backends import triton as backend
from fastst.backends.contract import PairBackward
from fastst.backends.triton import gradient_tiles, tiles
from fastst.functional import BatchNorm, conv2plus1d
from fastst.machine import choices
from tests.support import fuzz
from tests.support.fuzz import Config, Limits
from tests.support.triton import DEVICE, check, planted_bugs, problem_of

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("few_programs")


def dense(config: Config) -> bool:
    """Whether no pass has so few channels of a group that it runs on ordinary cores."""
    channels = (config.channels, config.mid)
    groups = config.groups if config.order == "spatial-first" else config.groups[::-1]
    return not any(tiles.is_thin(c // g, g) for c, g in zip(channels, groups, strict=True))


TINY = Limits(
    batch=2, channels=20, frames=5, space=7, work=30_000, fixed=dict(op="conv2plus1d"),
    accept=dense,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("part", range(6))
def test_random_gradients_are_right(part: int) -> None:
    fuzz.fuzz("triton", 4, TINY, first=fuzz.SEED + 1000 * part, device=DEVICE, least=1.0)


# ---- edges


@pytest.mark.parametrize("stride", [(2, 2, 2), (3, 2, 3)])
@pytest.mark.parametrize("dilation", [(1, 1, 1), (2, 3, 2)])
def test_residue_classes(stride: fuzz.config.Triple, dilation: fuzz.config.Triple) -> None:
    """Also those that no tap reads: of dilation 2 under stride 2 half of the positions."""
    check(Config(
        stride=stride, dilation=dilation, size=(7, 11, 9), padding=(2, 3, 1), batch=1,
        x_layout="channels_last", norm="batch",
    ))  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular"])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 1, 2)])
def test_images_in_the_padding(mode: str, stride: fuzz.config.Triple) -> None:
    check(Config(
        padding_mode=(mode, mode), stride=stride, size=(3, 4, 3), kernel=(3, 5, 3),
        padding=(2, 3, 2), batch=1, norm="frozen",
    ))  # fmt: skip


@pytest.mark.parametrize("channels", [15, 17, 48, 144, 145])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles_of_channels(channels: int, dtype: torch.dtype) -> None:
    check(Config(
        channels=channels % 50 + 1, mid=channels, out=channels % 20 + 1, size=(2, 3, 3), batch=1,
        kernel=(2, 1, 2), padding=(1, 0, 1), norm="batch", dtype=dtype, activation="silu",
        order="temporal-first" if channels % 2 else "spatial-first",
    ))  # fmt: skip


@pytest.mark.parametrize("positions", [127, 129])
def test_tiles_of_positions(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients of several parts, sums in two steps."""
    monkeypatch.setattr(tiles, "combine", lambda channels: (2, 4, 3))
    monkeypatch.setattr(gradient_tiles, "boxes_per_split", lambda *sizes: 1)
    check(Config(
        size=(1, positions, 3), batch=1, norm="batch", kernel=(1, 3, 1), padding=(0, 1, 0),
        channels=2, mid=3, out=2,
    ))  # fmt: skip


@pytest.mark.parametrize("layout", fuzz.LAYOUTS)
def test_layouts(layout: str) -> None:
    check(Config(
        channels=8, mid=8, out=8, x_layout=layout, weight_layout=layout, grad_layout=layout,
        dtype=torch.bfloat16, norm="batch", size=(3, 4, 5), activation="silu",
    ))  # fmt: skip


def test_positions_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.arguments, "is_wide", lambda count: True)
    check(Config(norm="batch", size=(2, 4, 5), stride=(1, 2, 2)))


@pytest.mark.parametrize("norm", ["none", "batch", "frozen"])
@pytest.mark.parametrize("needed", fuzz.NAMES)
def test_each_gradient_by_itself(norm: str, needed: str) -> None:
    if norm == "none" and needed.startswith("norm"):
        return
    constant = tuple(n for n in fuzz.NAMES if n != needed)
    check(Config(
        size=(2, 3, 4), norm=norm, constant=constant, recompute=norm == "batch", kernel=(2, 2, 1),
        activation="none" if norm == "none" else "relu",
    ))  # fmt: skip


def arguments_of(norm: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, 3, 3, 4, 3), (5, 3, 1, 3, 2), (4, 5, 2, 1, 1), (5,), (4,)]
    shapes += [(5,), (5,)] if norm == "batch" else []
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return tuple(t.to(DEVICE).requires_grad_() for t in drawn)


def call(norm: str, *tensors: Tensor) -> Tensor:
    batch = BatchNorm(*tensors[5:], training=True) if norm == "batch" else None
    return conv2plus1d(
        *tensors[:5], norm=batch, stride=(1, 2, 1), padding=1, activation="gelu_tanh",
        padding_mode=("zeros", "replicate"),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_gradcheck(norm: str) -> None:
    with fastst.use_backend("triton"):
        assert torch.autograd.gradcheck(
            lambda *t: call(norm, *t), arguments_of(norm), fast_mode=True
        )


@pytest.mark.slow
def test_second_derivatives_compose() -> None:
    found = {}
    for name in ("triton", "reference"):
        tensors = arguments_of("batch")
        with fastst.use_backend(name):
            first = torch.autograd.grad(call("batch", *tensors).square().sum(), tensors[:3],
                                        create_graph=True)  # fmt: skip
            found[name] = torch.autograd.grad(sum(g.square().sum() for g in first), tensors[:3])
    for ours, true in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_same_bits_every_time() -> None:
    config = Config(norm="batch", channels=5, size=(3, 9, 9))
    tensors, dy = fuzz.make(config, DEVICE)
    with fastst.use_backend("triton"):
        one, two = (fuzz.results(fuzz.call, config, tensors, dy) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_nothing_is_needed() -> None:
    problem, tensors = problem_of(Config())
    y = backend.BACKEND.conv2plus1d(problem, tensors, True)
    call = PairBackward(problem, tensors, [y.y], y.u, None, None, [False] * 10)
    assert not any(g is not None for g in backend.BACKEND.conv2plus1d_backward(call))


@pytest.mark.slow
@pytest.mark.parametrize("config", [
    Config(mid=40, dtype=torch.float16, norm="batch"), Config(groups=(2, 1), channels=10, mid=12),
])  # fmt: skip
def test_every_way_is_right(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, _ = problem_of(config)
    names = backend.BACKEND.candidates(problem, "backward")
    assert 2 <= len(names) <= 12
    backend.BACKEND.candidate(problem, "backward", names[-1], True)()
    for way in names[:: len(names) - 1]:
        monkeypatch.setattr(
            choices, "choice", lambda b, p, phase, way=way: way if phase == "backward" else None
        )
        check(config)


# ---- what a training step launches and writes


class Allocations(TorchDispatchMode):
    """Every storage that an operator makes, by address: shape of the first tensor on it, bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[tuple[int, ...], int]] = {}
        self.kept: list[Any] = []  # alive, so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if t.device.type == "meta":
                continue  # of a plan that is being made
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                storage = t.untyped_storage()
                self.made.setdefault(storage.data_ptr(), (tuple(t.shape), storage.nbytes()))
                self.kept.append(t)
        return out

    def large(self, least: int) -> list[tuple[int, ...]]:
        return [shape for shape, size in self.made.values() if size >= least]


@contextmanager
def watched() -> Iterator[tuple[list[str], Allocations]]:
    """Names of launches, which do not happen, and what is allocated meanwhile."""
    names: list[str] = []

    def note(name: str) -> Callable[..., None]:
        names.append(name)
        return lambda *args: None

    with pytest.MonkeyPatch.context() as patch, Allocations() as made:
        patch.setattr(backend.launch, "start", lambda kernel, *_: note(kernel.__name__))
        yield names, made


# M is far over C and K: what has the size of u, or even half of it, is a mid tensor.
STEP = Config(
    channels=16, mid=64, out=16, size=(4, 40, 40), norm="batch", bias=(False, False),
    x_layout="channels_last", grad_layout="channels_last", dtype=torch.bfloat16,
)  # fmt: skip


def step(config: Config, *, recompute: bool = False) -> list[tuple[list[str], Allocations]]:
    """Launches and allocations of the forward and of the backward pass."""
    problem, tensors = problem_of(config, recompute)
    dy = torch.empty_like(problem.empty_output(tensors.x))
    with watched() as forward:
        result = backend.BACKEND.conv2plus1d(problem, tensors, save=True)
    needs = [t is not None for t in tensors[:7]] + [False] * (len(tensors) - 7)
    with watched() as backward:
        backend.BACKEND.conv2plus1d_backward(
            PairBackward(problem, tensors, [dy], result.u, result.mean, result.var, needs)
        )
    return [forward, backward]


def mid_tensors(config: Config, recompute: bool = False) -> list[list[tuple[int, ...]]]:
    problem, _ = problem_of(config)
    u = problem.dtype.itemsize
    for n in problem.mid_shape:
        u *= n
    return [made.large(u // 2) for _, made in step(config, recompute=recompute)]


def test_launches_of_a_training_step() -> None:
    (_, _), (backward, _) = step(STEP)
    assert [n for n in backward if n not in ("pack", "sum_rows", "finish_weight")] == [
        "finish_norm",  # scale and shift, again
        "affine",  # z
        "weight_gradient",  # of the second pass
        "input_gradient",  # dv and its sums
        "norm_gradient",
        "affine",  # du
        "weight_gradient",
        "input_gradient",
    ]


@pytest.mark.parametrize("norm", ["none", "batch", "frozen"])
@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
def test_mid_tensors_that_are_written(norm: str, order: str) -> None:
    config = replace(STEP, norm=norm, order=order)
    problem, _ = problem_of(config)
    # u, and z which the second pass reads; z again and, in the same memory, dv and du.
    assert mid_tensors(config) == [[problem.mid_shape] * 2, [problem.mid_shape]]


def test_recompute_writes_u_again() -> None:
    problem, _ = problem_of(STEP)
    assert mid_tensors(STEP, recompute=True)[1] == [problem.mid_shape] * 2


def test_bytes_of_a_training_step() -> None:
    """Beside u and z, or dv, and y or dx: weights, and per-tile sums."""
    (_, forward), (_, backward) = step(STEP)
    problem, tensors = problem_of(STEP)
    u = 2 * torch.Size(problem.mid_shape).numel()
    x = 2 * tensors.x.numel()
    for made, least in ((forward, 2 * u + x), (backward, u + x)):
        assert least <= sum(size for _, size in made.made.values()) <= 1.25 * least


def test_a_mid_tensor_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant: du as a tensor of its own."""
    real = backend.backward.affine

    def wasteful(v: torch.Tensor, out: torch.Tensor, **options: Any) -> Any:
        return real(v, torch.empty_like(out) if out is v else out, **options)

    monkeypatch.setattr(backend.backward, "affine", wasteful)
    with pytest.raises(AssertionError):
        test_mid_tensors_that_are_written("batch", "spatial-first")


# ---- bugs that these tests must see

MUTANTS = {
    "tap off by one": ("common", "i = i - shift", "i = i - shift - 1"),
    "relu lets everything through": (
        "common", "dz = tl.where(v <= 0, 0.0, dz)", "dz = dz"),
    "an image twice": ("common", "ok = (m == 0) | (i != tl.where(m == 1, 0, size - 1))",
                       "ok = i >= 0"),
    "p without its count": ("statistics", "((var + EPS) * total.to(ACCUMULATE))", "(var + EPS)"),
    "r without the mean": ("statistics", " - p * mean", ""),
    "sums over rows that are not there": (
        "input_gradient", "(row_ok, -1), acc, 0.0)", "(row_ok, -1), acc, 1.0)"),
    "sums of half of the rows": ("common", "both = a + b", "both = a"),
    "sums not about the mean": ("input_gradient", "acc * (u - mean)", "acc * u"),
    "the wrong residue": ("input_gradient", "(residue + TAPS.before[AXIS]", "(residue"),
    "classes share their taps": (
        "tap_conv", "kh = subset[1] + kh * TAPS.step[1]", "kh = subset[1] + kh"),
    "parts of the positions come twice": (
        "weight_gradient", "first = split * per_split", "first = split // 2 * per_split"),
    "weights of another tap": (
        "weight_gradient", "place = tap * channels + c", "place = c * TAPS.kernel[2] + tap"),
    "only the first part is added": (
        "weight_gradient", "for split in range(splits)", "for split in range(1)"),
}  # fmt: skip


def all_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_tiles, "boxes_per_split", lambda *sizes: 1)
    base = Config(size=(3, 5, 4), batch=1, channels=17, out=17)
    check(replace(base, norm="batch", mid=72, stride=(1, 2, 1)))
    check(replace(base, padding_mode=("reflect", "reflect"), mid=3, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="one device is enough")
def test_nothing_is_seen_without_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    all_checks(monkeypatch)


test_planted_bugs_are_seen = planted_bugs(MUTANTS, lambda name, patch: all_checks(patch))
