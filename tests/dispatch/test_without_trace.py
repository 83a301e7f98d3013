"""What runs a model to look at it leaves the model, its input and random numbers as they were."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastst
from fastst.backends import aten
from fastst.dispatch.without_trace import copied_arguments, without_trace


class Writes(nn.Module):
    """A forward that writes to its input, keeps what it makes, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Sequential(
            nn.Conv3d(4, 5, (1, 3, 3)), nn.BatchNorm3d(5), nn.ReLU(), nn.Conv3d(5, 4, (3, 1, 1)),
            fastst.Conv2Plus1d(4, 4, 3, padding=1, norm="batch"),
        )  # fmt: skip
        self.calls, self.kept = 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x.mul_(2).add_(random.random() + np.random.rand() + torch.rand(1))
        y: Tensor = self.pair(x)
        self.kept.append(y)
        return y


def tune(model: nn.Module, x: Tensor) -> Any:
    return fastst.tune(model, x, seconds=0.001)


def optimize(model: nn.Module, x: Tensor) -> Any:
    return fastst.optimize_for_inference(model, sample=x, seconds=0.001)


def budget(model: nn.Module, x: Tensor) -> Any:
    return fastst.set_memory_budget(model, 0.5, x)


def states() -> list[Any]:
    numpy: Any = np.random.get_state()
    return [random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()]


@pytest.mark.parametrize("call", [fastst.explain, fastst.convert, tune, optimize, budget])
def test_nothing_is_left_behind(call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten.BACKEND, "candidates", lambda problem, phase: ("one", "another"))
    monkeypatch.setattr(aten.BACKEND, "candidate", lambda *call: lambda: torch.randn(1))
    model, x = Writes(), torch.ones(2, 4, 4, 6, 6)
    fastst.convert(model)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    before = states()
    call(model, x)
    assert states() == before
    assert torch.equal(x, torch.ones_like(x))
    assert (model.calls, model.kept) == (0, [])
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


def test_inputs_are_copied_as_they_lie() -> None:
    base = torch.randn(3, 4, 5, requires_grad=True)
    turned, expanded = base.detach().transpose(0, 2)[1:], base.detach()[:1].expand(3, 4, 5)
    inputs = (base, {"turned": turned}, [expanded, 7])
    made = copied_arguments(inputs)
    for t, other in ((base, made[0]), (turned, made[1]["turned"]), (expanded, made[2][0])):
        assert torch.equal(t, other)
        assert (t.stride(), t.requires_grad) == (other.stride(), other.requires_grad)
        assert t.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
        assert other.is_leaf and not other._is_view()
        assert (t.data_ptr() - other.data_ptr()) % 16 == 0
    assert made[2][1] == 7


def test_what_comes_twice_stays_one() -> None:
    x = torch.zeros(2)
    with without_trace(nn.Identity(), x, [x]) as run:
        assert run.args[0] is run.args[1][0]


def test_what_cannot_be_copied_runs_on_other_parameters_and_buffers() -> None:
    model = nn.BatchNorm3d(2)
    model.lock = threading.Lock()  # type: ignore[assignment]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with without_trace(model, torch.randn(2, 2, 3, 4, 4)) as run:
        run()
        assert run.buffers["num_batches_tracked"] == 1
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
