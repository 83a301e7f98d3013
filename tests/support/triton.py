"""What tests of the Triton backend share: where they run, and one configuration at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from fastst.problem.spec import PairSpec, PairTensors, Problem, in_execution_order
from tests.support import fuzz
from tests.support.fuzz import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # conftest.py asks for the interpreter


def forward(config: Config) -> None:
    """Hold the forward pass to the rule."""
    fuzz.hold(config, "triton", backward=False, device=DEVICE)


def check(config: Config) -> None:
    """Hold the forward pass and every gradient to the rule."""
    fuzz.hold(config, "triton", device=DEVICE)


def planted_bugs(
    mutants: Mapping[str, tuple[str, str, str]], checks: Callable[[str, pytest.MonkeyPatch], None]
) -> Callable[..., None]:
    """A test that ``checks`` see each bug, or two of a module of kernels unless all are asked for.

    Args:
        mutants: by what is wrong, a module of the kernels, a text in it, and what stands instead.
        checks: called with the name of the bug; an AssertionError tells it.
    """

    of_module: Counter[str] = Counter()
    names: list[Any] = []
    for name, (module, *_) in mutants.items():
        of_module[module] += 1
        names.append(pytest.param(name, marks=[pytest.mark.thorough] * (of_module[module] > 2)))

    @pytest.mark.slow
    @pytest.mark.skipif(DEVICE == "cuda", reason="one device is enough")
    @pytest.mark.parametrize("name", names)
    def test(name: str, mutated: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
        mutated(*mutants[name])
        with pytest.raises(AssertionError):
            checks(name, monkeypatch)

    return test


def problem_of(config: Config, recompute: bool = False) -> tuple[Problem, PairTensors]:
    t, _ = fuzz.make(config, DEVICE)
    norm = {
        "norm_weight": t.get("norm_weight"), "norm_bias": t.get("norm_bias"),
        "mean": t.get("running_mean"), "var": t.get("running_var"),
    }  # fmt: skip
    if config.norm == "batch":
        norm["mean"] = norm["var"] = None
    weights = in_execution_order(config.order, t["spatial_weight"], t["temporal_weight"])
    biases = in_execution_order(config.order, t.get("spatial_bias"), t.get("temporal_bias"))
    tensors = PairTensors(t["x"], *weights, *biases, **(norm if config.norm != "none" else {}))
    padding = tuple(p for pair in config.pads for p in pair)
    spec = PairSpec(
        config.stride, padding, config.dilation, config.groups, config.padding_mode,  # type: ignore[arg-type]
        config.activation, config.slope, config.norm, config.eps, config.order, recompute,
    )  # fmt: skip
    return Problem.of(tensors, spec), tensors
