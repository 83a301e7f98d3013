"""Calls by a plan that another call has made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fastst.backends import triton as backend
from fastst.backends.triton import plans
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support.fuzz import Config
from tests.support.triton import DEVICE, check

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("few_programs")

TINY = Config(size=(2, 3, 3), batch=1, channels=17, mid=20, out=5, norm="batch")
CALLS = {
    "dense": TINY,
    "of few channels": replace(TINY, channels=3, kernel=(3, 5, 5), padding=(1, 2, 2)),
    "depthwise": replace(TINY, channels=8, mid=8, out=8, groups=(8, 8), recompute=True),
    "grouped": replace(TINY, channels=32, mid=32, out=32, groups=(2, 2), norm="frozen"),
    "channels that belong to no group": replace(TINY, channels=6, mid=6, out=6, groups=(1, 6)),
    "parallel": Config(
        op="parallel_conv2plus1d", size=(2, 3, 3), batch=1, channels=16, out=16, combine="cat",
        branch_activation="relu",
    ),
}  # fmt: skip


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[plans.LaunchPlan]]:
    """Plans that are made, and kept also where the interpreter stands in."""
    found: list[plans.LaunchPlan] = []
    record = plans.record

    def noted(*args: object) -> plans.LaunchPlan:
        found.append(record(*args))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(plans, "record", noted)
    monkeypatch.setattr(backend.launch, "keeps_plans", lambda device: True)
    plans.forget()
    yield found
    plans.forget()


@pytest.mark.parametrize("name", CALLS)
def test_later_calls_are_right(name: str, made: list[plans.LaunchPlan]) -> None:
    """Other values at other addresses; one plan forward, one backward."""
    check(CALLS[name])
    first = len(made)
    check(replace(CALLS[name], seed=1))
    assert len(made) == first == 2


def test_a_wrong_plan_is_seen(
    made: list[plans.LaunchPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant: views that begin where their memory does."""
    real = plans.Recorder.place
    monkeypatch.setattr(plans.Recorder, "place", lambda self, t: real(self, t)._replace(offset=0))
    with pytest.raises(AssertionError, match="grad of"):
        check(CALLS["parallel"])


def call(**changes: torch.Tensor) -> None:
    vector = torch.ones(4, device=DEVICE)
    x, w = torch.ones(1, 16, 2, 3, 4, device=DEVICE), torch.ones(4, 16, 1, 1, 1, device=DEVICE)
    tensors = PairTensors(
        x, w, torch.ones(16, 4, 1, 1, 1, device=DEVICE), None, None, *[vector] * 4
    )._replace(**changes)
    spec = PairSpec(norm="frozen")
    backend.BACKEND.conv2plus1d(Problem.of(tensors, spec), tensors, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.ones(1, 16, 2, 3, 5)[..., 1:]},  # other strides
        {"x": torch.ones(1, 16, 2, 3, 4).to(memory_format=torch.channels_last_3d)},
        {"mean": torch.ones(5)[1:]},  # another alignment
        {"mean": torch.ones(4, dtype=torch.float64)},
        {"norm_weight": None},
        {"second_weight": torch.ones(65)[1:].view(16, 4, 1, 1, 1)},
    ],
)
def test_what_the_compiler_knows_makes_a_plan(
    changes: dict[str, torch.Tensor | None], made: list[plans.LaunchPlan]
) -> None:
    call()
    call()
    assert len(made) == 1
    for _ in range(2):
        call(**{n: None if t is None else t.to(DEVICE) for n, t in changes.items()})  # type: ignore[misc]
        assert len(made) == 2


def test_plans_do_not_grow_without_end(
    made: list[plans.LaunchPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "_MOST", 2)
    for t in (1, 2, 3, 1):
        call(x=torch.ones(1, 16, t, 3, 4, device=DEVICE))
        assert len(plans._plans) <= 2
    assert len(made) == 4


def test_dy_is_held_no_longer_than_it_is_read(made: list[plans.LaunchPlan]) -> None:
    check(CALLS["dense"])
    steps = made[1].steps
    given = len(PairTensors._fields) + 5  # u, mean, var, and nothing of a slice
    (dropped,) = [i for i, s in enumerate(steps) if s == plans.Drop(given)]
    written = [
        i for i, s in enumerate(steps)
        if isinstance(s, plans.Allocation) and s.shape == (1, 17, 2, 3, 3)
    ]  # fmt: skip
    assert written and dropped < max(written)
