"""Backward over parts of the batch: into how many, and every gradient of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

import fastst
from fastst.backends import aten
from fastst.backends.contract import BatchSlice, PairBackward
from fastst.backends.cpu import library
from fastst.backends.cuda import depthwise, hopper
from fastst.ops import batch_slices
from fastst.problem import slicing
from fastst.problem.spec import PairSpec, PairTensors, Problem
from fastst.rewrite import memory_budget
from tests.support import fuzz
from tests.support.fuzz import Config, Limits

CUT = Limits(
    batch=4, channels=12, frames=5, space=6, work=60_000,
    fixed=dict(op="conv2plus1d", recompute=True),
    accept=lambda config: config.batch > 1 and not fuzz.jumps_between_roundings(config),
)  # fmt: skip


@pytest.fixture(autouse=True)
def swept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every batch is cut, however small; how many parts each call had."""
    real, seen = batch_slices.gradients, []

    def gradients(choose: Any, count: int, call: PairBackward) -> Any:
        seen.append(count)
        return real(choose, count, call)

    monkeypatch.setattr(slicing, "count", lambda problem, mids: min(3, problem.batch))
    monkeypatch.setattr(batch_slices, "gradients", gradients)
    return seen


def skip_without(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    if backend == "cpu" and isinstance(library.load(), str):
        pytest.skip("the native CPU kernels are not built")


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(
    ("backend", "cases", "fixed"),
    [
        ("aten", 30, {}),
        ("cpu", 30, dict(dtype=torch.float32, padding_mode=("zeros", "zeros"))),
        ("triton", 2, {}),
        ("triton", 3, dict(norm="batch")),
    ],
)
def test_random_gradients_are_right(
    backend: str, cases: int, fixed: dict[str, Any], swept: list[int]
) -> None:
    limits = replace(CUT, fixed=CUT.fixed | fixed)
    skip_without(backend)
    if backend == "triton":
        limits = replace(limits, batch=3, channels=4, frames=2, space=3, work=1500)
    fuzz.fuzz(backend, cases, limits, least=1.0)
    assert set(swept) <= {2, 3}
    assert len(swept) >= 0.9 * cases  # the others have no gradient clear of kinks


def problem_of(config: Config) -> Problem:
    with fastst.dispatch.recording() as calls:
        fuzz.call(config, fuzz.make(config)[0])
    assert calls[0].problem is not None
    return calls[0].problem


def problem(n: int, size: tuple[int, int, int] = (16, 56, 56)) -> Problem:
    empty = torch.empty
    x = empty(n, 64, *size, device="meta", dtype=torch.bfloat16)
    tensors = PairTensors(x, empty(144, 64, 1, 3, 3), empty(64, 144, 3, 1, 1))
    return Problem.of(tensors, PairSpec(padding=(1,) * 6, norm="batch", recompute=True))


def test_what_a_part_makes_is_no_larger_than_x(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert slicing.count(problem(32), 2) == 5  # 7 of 32 clips: 2·144·7 channels, at most 64·32
    assert slicing.count(problem(32), 4) == 11
    assert slicing.count(problem(32), 0) == 1  # nothing is made
    assert slicing.count(problem(1), 2) == 1  # a clip is not cut
    assert slicing.count(problem(4, (4, 14, 14)), 2) == 1  # too small
    assert slicing.count(problem(8), 2) == 4  # x is below what is worth a cut: 64 MiB are 2 clips
    assert slicing.count(problem(0), 2) == 1


@pytest.mark.parametrize(
    ("norm", "made"), [("batch", (2, 3)), ("frozen", (1, 2)), ("none", (1, 2))]
)
def test_launches(norm: str, made: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch norm takes one u and one dv more; every weight gradient is computed once."""
    triton = pytest.importorskip("fastst.backends.triton", reason="Triton is not installed")
    names: list[str] = []
    monkeypatch.setattr(triton.launch, "run", lambda k, *args, **meta: names.append(k.__name__))
    tensors, dy = fuzz.make(config := replace(PAIR, norm=norm, channels=16, mid=24))
    with fastst.use_backend("triton"):
        y = fuzz.call(config, {n: t.requires_grad_(n in fuzz.NAMES) for n, t in tensors.items()})
        names.clear()
        y.backward(dy)
    counts = [names.count(n) for n in ("tap_conv", "input_gradient", "weight_gradient")]
    assert counts == [3 * n for n in (*made, 2)]


def test_what_two_sweeps_cost() -> None:
    """A step takes 3 times both convolutions, u again, and with two sweeps u and dv once more."""
    whole, cut = problem(1), problem(32)
    again = [memory_budget._flops_again(p) / p.flops() for p in (whole, cut)]
    assert (again[1] - again[0]) / (3 + again[0]) == pytest.approx(0.267, abs=0.001)


PAIR = Config(batch=5, norm="batch", recompute=True, size=(2, 3, 3), channels=6, mid=9, out=4)


def test_the_same_bits_every_time() -> None:
    tensors, dy = fuzz.make(PAIR)
    one, two = (fuzz.results(fuzz.call, PAIR, tensors, dy) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_parameters_are_added_up_in_the_accumulation_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a sum of ones stops at 256."""
    dtype = torch.bfloat16
    ones = torch.ones(1, 1, 1, 1, 1, dtype=dtype)
    monkeypatch.setattr(aten.BACKEND, "conv2plus1d_backward", lambda call: [None, ones])
    tensors = PairTensors(torch.zeros(300, 1, 1, 1, 1, dtype=dtype), ones, ones)
    problem = Problem.of(tensors, PairSpec(recompute=True))
    needs = [n == "first_weight" for n in PairTensors._fields]
    call = PairBackward(problem, tensors, [tensors.x], None, None, None, needs)
    found = batch_slices.gradients(lambda problem: aten.BACKEND, 300, call)[1]
    assert found is not None and found.dtype == torch.float32
    assert found.item() == 300


@pytest.mark.parametrize("kind", ["generic", "hopper", "depthwise"])
def test_cuda(
    kind: str, swept: list[int], emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The depthwise kernels make nothing as large as u, and are left whole."""
    monkeypatch.setattr(slicing, "count", lambda problem, mids: min(mids, problem.batch))
    config = PAIR
    if kind != "generic":
        config = replace(
            PAIR, channels=8, mid=8, out=8, dtype=torch.bfloat16, x_layout="channels_last",
            grad_layout="channels_last", activation="silu", kernel=(3, 3, 3), padding=1,
        )  # fmt: skip
    if kind == "depthwise":
        config = replace(config, groups=(8, 8))
    problem = problem_of(config)
    assert depthwise.why_not(problem) is None or kind != "depthwise"
    assert (hopper.backward_why_not(problem) is None) == (kind == "hopper")
    assert fuzz.check(config, "cuda") is None
    assert swept == ([] if kind == "depthwise" else [2])


@pytest.mark.parametrize("groups", [1, 6])
def test_triton_rounds_no_part(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("fastst.backends.triton", reason="Triton is not installed")
    monkeypatch.setattr(triton.launch, "run", lambda *args, **meta: None)
    config = replace(PAIR, dtype=torch.bfloat16, mid=6, out=6, groups=(groups, groups))
    tensors, dy = fuzz.make(config)
    problem = problem_of(config)
    pair = PairTensors(*(tensors.get(n) for n in fuzz.NAMES))  # type: ignore[arg-type]
    mean = torch.zeros(6)
    needs = [t is not None for t in pair]
    whole = BatchSlice(None, torch.zeros(2, 6))
    call = PairBackward(problem, pair, [dy], None, mean, mean, needs, whole)
    grads = [g for g in triton.BACKEND.conv2plus1d_backward(call)[1:] if g is not None]
    assert [g.dtype for g in grads] == [torch.float32] * (sum(needs) - 1)


def own_means(real: Callable[..., Any]) -> Callable[..., Any]:
    def run(call: PairBackward) -> Any:
        alone = None if call.slice is None else call.slice._replace(means=None)
        return real(replace(call, slice=alone))

    return run


def lost_part(real: Callable[..., Any]) -> Callable[..., Any]:
    def run(call: PairBackward) -> Any:
        grads = real(call)
        first = call.tensors.x.storage_offset() == 0
        return grads if first else [None if g is None else torch.zeros_like(g) for g in grads]

    return run


@pytest.mark.parametrize(
    ("backend", "bug"),
    [("aten", own_means), ("aten", lost_part), ("cpu", own_means), ("triton", own_means)],
)
def test_planted_bugs_are_seen(
    backend: str, bug: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fastst.dispatch.BACKENDS[backend]
    monkeypatch.setattr(module, "conv2plus1d_backward", bug(module.conv2plus1d_backward))
    skip_without(backend)
    with pytest.raises(AssertionError, match="error"):
        fuzz.check(PAIR, backend)
