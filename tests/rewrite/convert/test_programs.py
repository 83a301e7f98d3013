"""Random forwards do converted what they do plain.

FASTST_SEED: the first program; FASTST_FUZZ: how many.

``python -m tests.rewrite.convert.programs`` runs thousands and makes failures smaller.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastst.rewrite.convert import begins, endings, kept, link, promise, rules, state

from .programs.judge import judge, run, shrink
from .programs.source import Program, random_program

SEED = int(os.environ.get("FASTST_SEED", "0"))
COUNT = int(os.environ.get("FASTST_FUZZ", "160"))
PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_random_forwards(part: int) -> None:
    for seed in range(SEED + part, SEED + COUNT, PARTS):
        program = random_program(seed)
        if judge(program) is not None:
            small = shrink(program, lambda p: judge(p) is not None)
            pytest.fail(f"{judge(small)}\n{small}")


def test_many_programs_run_and_many_pairs_fuse() -> None:
    """Programs that all raise, or whose pairs are all torn apart, would prove little."""
    fused, raised = 0, 0
    for seed in range(60):
        with begins.listening() as events:
            raised += run(random_program(seed), converted=True).error is not None
        fused += any(event.why is None for event in events)
    assert fused >= 12, fused
    assert raised <= 25, raised


# ---- planted faults


def lost(function: Any) -> Callable[[], Any]:
    """A function that does nothing to a promise."""
    return lambda: mock.patch.dict(promise.RULES, {function: lambda x, *args, **kwargs: x})


def relu_for(function: Any) -> Callable[[], Any]:
    return lambda: mock.patch.dict(
        promise.RULES, {function: lambda x, *_, **__: promise.RULES[F.relu](x)}
    )


@contextlib.contextmanager
def statistics_twice() -> Iterator[None]:
    once = nn.BatchNorm3d.forward

    def twice(self: nn.BatchNorm3d, x: Tensor) -> Tensor:
        if self.training:
            once(self, x)
        return once(self, x)

    with mock.patch.object(nn.BatchNorm3d, "forward", twice):
        yield


@contextlib.contextmanager
def random_numbers() -> Iterator[None]:
    before = rules.begin

    def begin(*args: Any) -> Any:
        torch.rand(1)
        return before(*args)

    with mock.patch.object(rules, "begin", begin):
        yield


@contextlib.contextmanager
def versions_ignored() -> Iterator[None]:
    with (
        mock.patch.object(kept.Kept, "same", property(lambda self: True)),
        mock.patch.object(kept.Kept, "get", lambda self, *_: self.tensor),
    ):
        yield


@contextlib.contextmanager
def state_ignored() -> Iterator[None]:
    with (
        mock.patch.object(state.State, "current", property(lambda self: True)),
        mock.patch.object(state.State, "restored", lambda self: contextlib.nullcontext()),
    ):
        yield


@contextlib.contextmanager
def other_weights() -> Iterator[None]:
    before = link.Link.compute

    def compute(self: link.Link, *args: Any) -> Tensor:
        return before(self, *args) * (1 + 1e-6)

    with mock.patch.object(link.Link, "compute", compute):
        yield


# The fault, and a pattern of what a program has to have for it to show.
PLANTS: dict[str, tuple[Callable[[], Any], str]] = {
    "detach is lost": (lost(Tensor.detach), r"x = x\.detach\(\)"),
    "clamp is lost": (lost(Tensor.clamp_), r"x\.clamp_\(0, 3\)"),
    "relu6 is relu": (relu_for(F.relu6), r"elu6\("),
    "dropout is lost": (lost(F.dropout), r"ropout\("),
    "statistics twice": (statistics_twice, r"nn\.BatchNorm3d\(4\)"),
    "random numbers": (random_numbers, "dropout"),
    "versions ignored": (versions_ignored, r"k\d+(\.add_\(1\)|\[:, 0\] = 0)"),
    "state ignored": (state_ignored, r"with torch\.no_grad\(\):\n            x = self\.m"),
    "strides of its own": (
        lambda: mock.patch.object(endings, "as_separate", lambda y, *_: y),
        r"nn\.Conv3d\(4, 4, \(3, 1, 1\)",
    ),
    "a millionth more": (other_weights, r"nn\.GroupNorm"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_faults_are_seen(name: str) -> None:
    plant, pattern = PLANTS[name]
    tried = 0
    for seed in range(20000):
        program = random_program(seed)
        if not re.search(pattern, program.source()):
            continue
        tried += 1
        if judge(program, plant) is not None and judge(program) is None:
            return
        assert tried < 40, f"{tried} programs with {pattern!r} saw nothing"


def test_failures_are_made_smaller() -> None:
    """A program of many statements shrinks to the one that matters."""

    def fails(program: Program) -> bool:
        return judge(program, statistics_twice) is not None

    program = next(
        p for p in map(random_program, range(200))
        if len(p.body) > 6 and p.how["mode"] == "" and fails(p)
    )  # fmt: skip
    small = shrink(program, fails)
    assert len(small.body) <= 2 and "BatchNorm3d" in small.source()
