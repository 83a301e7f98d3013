"""What the self-check runs: the kernels of the call, compiled once for both, and little of them."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import shapes
from fastst import dispatch
from fastst.backends import triton as backend
from fastst.backends.triton import rehearsal
from fastst.dispatch import quarantine, selfcheck
from fastst.machine import gpu
from fastst.problem.examples import kind_of
from fastst.problem.spec import PairProblem, Problem

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {f"{case.family} {case.name}": case for case in shapes.ALL}


def variant(kernel: Any, config: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Any:
    """What Triton compiles a kernel for: constants, tensors there are, and what integers are."""
    names = list(inspect.signature(kernel.fn).parameters)
    unseen = kernel.kwargs["do_not_specialize"] or ()

    def known(name: str, value: Any) -> Any:
        if isinstance(value, tuple) and name not in unseen:
            return tuple(known(name, v) for v in value)
        if isinstance(value, torch.Tensor):
            return value.dtype
        if isinstance(value, int):
            return "integer" if name in unseen else (value == 1, value % 16 == 0)
        return value if value is None else type(value)

    found = {n: known(n, v) for n, v in zip(names, args, strict=False)}
    return kernel.__name__, config, repr(found), repr(sorted(meta.items()))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """Variants of kernels that would run; nothing does."""
    seen: Counter[Any] = Counter()

    def launch(kernel: Any, grid: Any, config: Any, *args: Any, **meta: Any) -> None:
        seen[variant(kernel, config, args, meta)] += 1

    monkeypatch.setattr(backend.launch, "run", launch)
    monkeypatch.setattr(backend.launch, "capability", lambda device: (9, 0))
    return seen


@pytest.mark.skipif(DEVICE.type == "cuda", reason="looks into the interpreter's functions")
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("name", CASES)
def test_compiles_what_the_call_compiles(
    name: str, norm: str, layout: str, launched: Counter[Any]
) -> None:
    problem = of(name, norm, layout)
    if problem is None:
        pytest.skip("no norm in this layer")
    small = rehearsal.rehearse(problem)
    small.run(Problem.of(small.tensors, small.spec), small.tensors)
    check = Counter(launched)
    launched.clear()
    tensors, spec = rehearsal._tensors(problem, problem.passes, problem.batch, problem.size)
    if isinstance(problem, PairProblem):
        backend.BACKEND.conv2plus1d(problem, tensors, spec.norm == "batch")
    else:
        backend.parallel_conv2plus1d(problem, tensors)
    assert set(check) <= set(launched), "the self-check compiles what the call does not need"
    assert len({k for k, *_ in check}) >= 2


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("name", CASES)
def test_is_little_work(name: str, layout: str, launched: Counter[Any]) -> None:
    """Under 50 ms on a GPU: launches of microseconds, and float64 on one core of a CPU."""
    problem = of(name, "batch", layout) or of(name, "frozen", layout)
    assert problem is not None
    small = rehearsal.rehearse(problem)
    described = Problem.of(small.tensors, small.spec)
    small.run(described, small.tensors)
    assert sum(launched.values()) <= 7
    assert described.flops() <= 0.4e9, described.flops()
    assert sum(t.numel() for t in small.tensors if t is not None) < 3_000_000


def of(name: str, norm: str, layout: str) -> Problem | None:
    case = CASES[name]
    problem = case.problem(torch.bfloat16)
    if isinstance(problem, PairProblem):
        if norm == "batch" and problem.spec.norm == "none":
            return None
        if problem.spec.norm != "none":
            problem = replace(problem, spec=problem.spec._replace(norm=norm))
    elif norm == "batch":
        return None
    strides = torch.empty(problem.batch, case.channels[0], *problem.size, device="meta").stride()
    if layout == "channels_last":
        return replace(problem, channels_last=True, x_stride=(strides[0], 1, *strides[2:]))
    return replace(problem, channels_last=False, x_stride=strides)


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
    case = replace(CASES["odd mid-45"], channels=(6, 12, 6), size=(3, 4, 4), order=order)
    problem = case.problem(torch.float16)
    spec = problem.spec._replace(
        norm=norm, groups=(groups, groups), outer_activation="relu", stride=(2, 1, 2)
    )
    passes = tuple(p._replace(groups=groups) for p in problem.passes)
    problem = replace(
        problem, spec=spec, passes=passes, batch=1, channels_last=True, x_stride=(288, 1, 96, 24, 6)
    )
    kind = kind_of(problem)
    assert selfcheck.check(backend.BACKEND, kind, DEVICE, torch.float16, problem) is None
    taps = backend.arguments.taps
    monkeypatch.setattr(backend.arguments, "taps", lambda p: taps(p)._replace(before=(1, 1, 0)))
    why = selfcheck.check(backend.BACKEND, kind, DEVICE, torch.float16, problem)
    assert why is not None and "is off by" in why


def test_auto_checks_the_problem_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTST_CACHE", str(tmp_path))
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    problem = CASES["odd mid-45"].problem(torch.float16)
    seen = []
    monkeypatch.setattr(quarantine, "checked", lambda r: seen.append(r.like) or "")
    for phase in ("forward", "backward"):
        kind = backend.BACKEND.check_kind(problem, phase)
        assert selfcheck.why_broken(backend.BACKEND, problem, kind) is None
    assert seen == [problem, problem]
    assert math.prod(problem.size) > 1000 and dispatch.BACKENDS["triton"] is backend.BACKEND
