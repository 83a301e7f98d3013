"""How many kernels a call launches, and what a copy for inference spares. Nothing ran on a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastst
from fastst.backends.contract import PairBackward
from fastst.backends.cuda import hopper, library
from fastst.backends.cuda.hopper import weights
from fastst.machine import served
from fastst.problem.examples import pair_tensors
from fastst.problem.spec import PairProblem, PairSpec, PairTensors, Problem
from fastst.rewrite.convert import rules

KERNELS = {
    "combine_statistics", "norm_gradient", "pack", "sum_rows", "channel_sums", "hopper_spatial",
    "hopper_temporal", "hopper_stem", "hopper_spatial_gradient", "hopper_temporal_gradient",
    "hopper_weight_gradient",
}  # fmt: skip
# What PyTorch may do on the way: it launches nothing.
FREE = {"empty", "empty_strided", "new_empty", "empty_like", "view", "permute", "slice", "select",
        "as_strided", "unbind", "unsqueeze", "squeeze", "alias", "detach"}  # fmt: skip


class Launched(TorchDispatchMode):
    """Kernels of ours by name, and PyTorch's operations that launch others."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if func.namespace == "aten" and name.rstrip("_") not in FREE:
            self.others[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Launched:
    counts = Launched()

    class Library:
        def __getattr__(self, name: str) -> Any:
            if name in KERNELS:
                counts.ours[name] += 1
            return getattr(emulated, name)

    watched = Library()
    monkeypatch.setattr(library, "library", lambda: watched)
    return counts


def pair(stem: bool = False, **spec: Any) -> tuple[PairProblem, PairTensors]:
    shapes = (1, 8, 3, 4, 5), (16, 8, 1, 3, 3), (8, 16, 3, 1, 1)
    fixed: dict[str, Any] = {"padding": (1,) * 6, "activation": "silu"}
    if stem:
        shapes = (1, 3, 3, 9, 10), (45, 3, 1, 7, 7), (64, 45, 3, 1, 1)
        fixed |= {"padding": (1, 1, 3, 3, 3, 3), "stride": (1, 2, 2)}
    tensors = pair_tensors(torch.bfloat16, *shapes)
    if spec["norm"] == "batch":
        tensors = tensors._replace(mean=None, var=None)
    elif spec["norm"] == "none":
        tensors = tensors._replace(mean=None, var=None, norm_weight=None, norm_bias=None)
    return Problem.of(tensors, PairSpec(**(fixed | spec))), tensors


@pytest.mark.parametrize(
    ("spec", "save", "most"),
    [
        ({"norm": "frozen"}, False, 3), ({"norm": "none"}, False, 3), ({"norm": "frozen"}, True, 3),
        ({"norm": "batch"}, True, 4), ({"norm": "batch", "output_statistics": True}, True, 5),
        ({"norm": "frozen", "stem": True}, False, 2), ({"norm": "batch", "stem": True}, True, 4),
    ],
)  # fmt: skip
def test_forward(launched: Launched, spec: dict[str, Any], save: bool, most: int) -> None:
    """One makes everything ready."""
    problem, tensors = pair(**spec)
    with launched:
        hopper.forward(problem, tensors, save)
    assert launched.ours.total() == most, launched.ours
    assert launched.ours["pack"] == 1 and not launched.others, launched.others


@pytest.mark.parametrize("norm", ["batch", "frozen", "none"])
@pytest.mark.parametrize(("parts", "most"), [(2, 8), (1, 6)])
def test_backward(
    launched: Launched, norm: str, parts: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part of a sum is the sum."""
    tile = weights.weight_gradient
    monkeypatch.setattr(weights, "weight_gradient", lambda *of: replace(tile(*of), splits=parts))
    problem, tensors = pair(norm=norm)
    y, u, mean, var, *_ = hopper.forward(problem, tensors, True)
    needs = [t is not None and n not in ("mean", "var") for n, t in tensors._asdict().items()]
    call = PairBackward(problem, tensors, [torch.randn_like(y)], u, mean, var, needs)
    launched.ours.clear()
    with launched:
        found = hopper.backward(call)
    assert all((g is not None) == n for g, n in zip(found, needs, strict=False))
    assert launched.ours.total() == most, launched.ours
    assert launched.ours["pack"] == 1 and not launched.others, launched.others


def test_a_copy_for_inference_packs_once(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until what it has packed is no longer true."""
    monkeypatch.setattr(rules, "_are_copied", lambda state, norm: state.kind == "cuda")  # as there
    model = nn.Sequential(
        nn.Conv3d(8, 16, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(16), nn.ReLU(),
        nn.Conv3d(16, 8, (3, 1, 1), padding=(1, 0, 0)),
    ).half()  # fmt: skip
    copy = fastst.optimize_for_inference(model, memory_format=torch.channels_last_3d)
    x = torch.randn(1, 8, 3, 4, 5).half().to(memory_format=torch.channels_last_3d)

    def run(m: nn.Module) -> torch.Tensor:
        launched.ours.clear()
        with torch.no_grad(), fastst.use_backend("cuda"):
            return m(x) + 0

    first = run(copy)
    assert launched.ours["pack"] == 1 and launched.ours["hopper_temporal"] == 1
    assert torch.equal(run(copy), first) and launched.ours.total() == 2
    for change in (copy[0].weight, copy[1].running_var, copy[3].bias):
        with torch.no_grad():
            change.mul_(2)
        changed = run(copy)
        assert launched.ours["pack"] == 1 and not torch.equal(changed, first)
        first = changed
    # The same values in memory of their own.
    copy[0].weight.data = copy[0].weight.data.clone(memory_format=torch.channels_last_3d)
    assert torch.equal(run(copy), first) and launched.ours["pack"] == 1


def test_only_served_tensors_are_remembered() -> None:
    made = iter(range(9))
    plain, kept = torch.zeros(2), torch.zeros(2)
    served.serve([kept])
    assert [served.get_or_make([plain], "", lambda: next(made)) for _ in range(2)] == [0, 1]
    assert [served.get_or_make([kept], "", lambda: next(made)) for _ in range(2)] == [2, 2]
    assert served.get_or_make([kept], "other", lambda: next(made)) == 3
    assert served.get_or_make([kept, plain], "", lambda: next(made)) == 4
    plain.add_(1)
    assert served.get_or_make([kept, plain], "", lambda: next(made)) == 5
    with torch.inference_mode():
        odd = torch.zeros(2)
    assert [served.get_or_make([kept, odd], "", lambda: next(made)) for _ in range(2)] == [6, 7]
