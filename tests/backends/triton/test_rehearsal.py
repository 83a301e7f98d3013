"""What the self-check runs: the kernels of the call, compiled once for both, and little of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import fastst
from benchmarks import shapes
from fastst import dispatch
from fastst.backends import reference
from fastst.backends import triton as backend
from fastst.backends.contract import Later
from fastst.backends.triton import rehearsal
from fastst.dispatch import quarantine, selfcheck
from fastst.machine import gpu
from fastst.problem import examples
from fastst.problem.conv3d import problem_of
from fastst.problem.examples import of_kind, off_kinks, resemble
from fastst.problem.spec import PairProblem, PairSpec, PairTensors, Problem
from tests.support import fuzz
from tests.support.fuzz import ConvLimits, Limits

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {f"{case.family} {case.name}": case for case in shapes.ALL}


MODES = [*product(("channels_last", "contiguous"), ("frozen", "batch"))]


@pytest.mark.parametrize(
    ("name", "layout", "norm"), [(name, *MODES[i % 4]) for i, name in enumerate(CASES)]
)
def test_runs_what_the_call_launches(
    name: str, layout: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that convolve: a check launches less than a hundred kernels, of few positions.

    Each layer in one layout and with one norm, which neighbours of its family have in turn. No
    numbers are drawn: what is launched depends on none.
    """
    monkeypatch.setattr(examples, "_draw_storage", lambda t, _: storage_of(t))
    problem = of(name, norm, layout) or of(name, "frozen", layout)
    assert problem is not None
    for phase in ("forward", "backward"):
        needed = set(rehearsal.instances(problem, phase))  # type: ignore[arg-type]
        assert len({n.split()[0] for n in needed}) >= 2
        ran = [n for e in rehearsal.rehearse(problem, phase) for n in launched(e)]  # type: ignore[arg-type]
        assert needed <= set(ran)
        assert len(ran) < 100


@pytest.mark.parametrize(
    ("limits", "seed"),
    [
        *((Limits(batch=5), seed) for seed in (4, 16, 18, 35)),  # dy in another layout than y
        *((ConvLimits(), seed) for seed in (6, 19, 106)),
        (ConvLimits(), 23), (ConvLimits(), 132),  # past frames, and weights, with gaps
    ],
)  # fmt: skip
def test_calls_launch_nothing_that_was_not_rehearsed(
    limits: Limits | ConvLimits, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies how in memory: each of these did once."""
    draw: Any = fuzz.random_conv if isinstance(limits, ConvLimits) else fuzz.random_config
    config = draw(seed, limits)
    kit, names = fuzz.KITS[type(config)], set()
    tensors, dy = kit.make(config, DEVICE)
    for name, t in tensors.items():
        t.requires_grad_(not name.startswith("running") and name not in config.constant)

    def note(launch: backend.launch.Launch) -> bool:
        names.add(launch.instance)
        return False

    with (
        fastst.use_backend("triton"), dispatch.recording() as calls,
        backend.launch.watch_launches(note),
    ):  # fmt: skip
        torch.autograd.backward(kit.call(config, tensors), dy)
    known = {n for c in calls for n in rehearsal.instances(c.problem, c.phase)}  # type: ignore[arg-type]
    assert names and names <= known


@pytest.mark.parametrize("layout", ["expanded", "sliced"])
def test_checks_have_the_gradient_of_the_call(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a mean over positions, and behind a concatenation of channels."""
    monkeypatch.setattr(gpu, "processors", lambda capability: 1)
    spec, tensors = of_kind("dense", torch.float16)
    call = Problem.of(tensors, spec)
    n, k, *size = call.out_shape
    dy = torch.zeros(n, k, 1, 1, 1, dtype=torch.float16).expand(n, k, *size)
    if layout == "sliced":
        dy = torch.zeros(n, *size, k + 3, dtype=torch.float16).permute(0, 4, 1, 2, 3)[:, 1:-2]
    assert call.with_gradient(call.empty_output(tensors.x)) is call
    other = call.with_gradient(dy)
    assert other is call.with_gradient(dy) is not call
    few = rehearsal.rehearse(other, "backward")
    assert {*rehearsal.instances(other, "backward")} <= {n for e in few for n in launched(e)}
    assert selfcheck.check(backend.BACKEND, few[-1:], torch.device("cpu"), torch.float16) is None


def storage_of(t: torch.Tensor) -> torch.Tensor:
    """All that t lies in, without values."""
    return t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)


def launched(example: Later) -> list[str]:
    """Instances that an example launches."""
    e = example.make()
    there = type(e.tensors)(*(None if t is None else t.to("meta") for t in e.tensors))
    run = functools.partial(e.run, problem_of(there, e.spec), there)
    return [each.instance for each in backend.launch.list_launches(DEVICE, run)]


def test_other_sizes_need_no_other_check() -> None:
    """Nor another batch; another tile, activation, layout or dtype does."""
    first = set(instances_of())
    assert first == set(instances_of(size=(9, 30, 45)))
    assert first == set(instances_of(size=(8, 28, 41), batch=5))
    for other in (
        instances_of(channels=(64, 230, 64)), instances_of(activation="gelu"),
        instances_of(layout=torch.contiguous_format), instances_of(dtype=torch.float16),
        instances_of(bias=True),
    ):  # fmt: skip
        assert not first >= set(other)


def instances_of(
    channels: tuple[int, int, int] = (64, 144, 64), size: tuple[int, int, int] = (8, 28, 28),
    batch: int = 8, layout: torch.memory_format = torch.channels_last_3d,
    dtype: torch.dtype = torch.bfloat16, bias: bool = False, **spec: object,
) -> Sequence[str]:  # fmt: skip
    c, m, k = channels
    x, ws, wt = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((batch, c, *size), (m, c, 1, 3, 3), (k, m, 3, 1, 1))
    )
    tensors = PairTensors(x.contiguous(memory_format=layout), ws, wt)
    if bias:
        tensors = tensors._replace(first_bias=torch.empty(m, dtype=dtype, device="meta"))
    problem = Problem.of(tensors, PairSpec(padding=(1,) * 6)._replace(**spec))  # type: ignore[arg-type]
    return rehearsal.instances(problem, "forward")


@pytest.mark.parametrize("norm", ["none", "frozen", "batch"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_gradients_are_compared_far_from_kinks(norm: str, activation: str) -> None:
    """With and without biases, or else right kernels would be called wrong."""
    spec, tensors = of_kind("dense", torch.float16)
    spec = spec._replace(norm=norm, activation=activation)
    names = [n for n, t in tensors._asdict().items() if t is not None and n not in ("mean", "var")]
    if norm != "frozen":
        tensors = tensors._replace(mean=None, var=None)
    if norm == "none":
        tensors = tensors._replace(norm_weight=None, norm_bias=None)
    for left_out in (names[3:], ["first_bias"]):
        few = tensors._replace(**dict.fromkeys(left_out))
        moved = off_kinks(spec, few)
        double = type(few)(*(None if t is None else t.double() for t in moved))
        first = Problem.of(few, spec).passes[0]
        u = reference.conv_pass(double.x, double.first_weight, double.first_bias, first)
        v = reference.batch_norm(double, spec)(u) if norm != "none" else u
        kinks = torch.tensor([0.0, 6.0] if activation == "relu6" else [-3.0, 0.0, 3.0])
        gaps = (v.reshape(-1, 1) - kinks).abs()
        assert gaps[gaps > 1e-12].min() > 0.01


def of(name: str, norm: str, layout: str) -> Problem | None:
    case = CASES[name]
    problem = case.problem(torch.bfloat16)
    pair = isinstance(problem, PairProblem)
    if norm == "batch" and not (isinstance(problem, PairProblem) and problem.spec.norm != "none"):
        return None
    tensors, spec = resemble(problem, problem.batch, problem.size)
    x = torch.empty(tensors.x.shape, dtype=torch.bfloat16, device="meta")
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    tensors = tensors._replace(x=x)
    if pair and problem.spec.norm != "none":
        tensors, spec = normed(tensors, spec, norm)
    return Problem.of(tensors, spec)


def normed(tensors: PairTensors, spec: PairSpec, norm: str) -> tuple[PairTensors, PairSpec]:
    """With the tensors of a norm."""
    one = torch.empty(len(tensors.first_weight), device="meta")
    names = ("norm_weight", "norm_bias", "mean", "var")
    there = {"none": 0, "batch": 2, "frozen": 4}[norm]
    of = {n: one if i < there else None for i, n in enumerate(names)}
    return tensors._replace(**of), spec._replace(norm=norm)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "norm", "groups"),
    [
        ("spatial-first", "frozen", 1), ("temporal-first", "batch", 1),
        ("spatial-first", "none", 6), ("temporal-first", "frozen", 2),
    ],
)  # fmt: skip
def test_finds_right_kernels_right_and_wrong_ones_wrong(
    order: str, norm: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "processors", lambda capability: 1)
    x, ws, wt = (
        torch.empty(shape, dtype=torch.float16, device="meta")
        for shape in ((1, 6, 3, 4, 4), (12, 6 // groups, 1, 3, 3), (6, 12 // groups, 3, 1, 1))
    )
    if order == "temporal-first":
        ws, wt = (
            torch.empty(shape, dtype=torch.float16, device="meta")
            for shape in ((12, 6 // groups, 3, 1, 1), (6, 12 // groups, 1, 3, 3))
        )
    spec = PairSpec(
        (2, 1, 2), (1,) * 6, groups=(groups, groups), order=order, outer_activation="relu"
    )
    x = x.contiguous(memory_format=torch.channels_last_3d)
    problem = Problem.of(*normed(PairTensors(x, ws, wt), spec, norm))
    few = rehearsal.rehearse(problem, "forward")
    assert selfcheck.check(backend.BACKEND, few, DEVICE, torch.float16) is None
    taps = backend.arguments.taps
    monkeypatch.setattr(backend.arguments, "taps", lambda p: taps(p)._replace(before=(1, 1, 0)))
    why = selfcheck.check(backend.BACKEND, few, DEVICE, torch.float16)
    assert why is not None and "is off by" in why


def test_auto_checks_the_problem_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTST_CACHE", str(tmp_path))
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    problem = CASES["odd mid-45"].problem(torch.float16)
    seen = []
    monkeypatch.setattr(quarantine, "ask", lambda r: seen.append((r.like, r.phase)) or "")
    for phase in ("forward", "backward"):
        assert selfcheck.why_broken(backend.BACKEND, problem, phase) is None  # type: ignore[arg-type]
        more = replace(problem, batch=3 * problem.batch)  # tiles are as whole as before
        assert selfcheck.why_broken(backend.BACKEND, more, phase) is None  # type: ignore[arg-type]
    assert seen == [(problem, "forward"), (problem, "backward")]
