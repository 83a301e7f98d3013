"""Random calls of ``conv3d`` on every backend, and proof that the fuzzer can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastst import functional
from fastst.backends.aten import convolution as on_aten
from fastst.problem import norms
from tests.support import fuzz
from tests.support.fuzz import ConvConfig, ConvLimits

SMALL = ConvLimits(batch=2, channels=20, frames=5, space=6, work=60_000)


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_backends(backend: str) -> None:
    fuzz.fuzz(backend, 40, ConvLimits(), least=1.0)


def test_frame_by_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed chunk by chunk in large calls, in small ones."""
    monkeypatch.setattr(on_aten, "_CHUNK", 1)
    fuzz.fuzz("aten", 40, SMALL, backward=False, least=1.0)


def test_draws_everything() -> None:
    configs = [fuzz.random_conv(seed, ConvLimits()) for seed in range(400)]
    for field, values in {
        "norm": set(fuzz.CONV_NORMS),
        "input_activation": set(fuzz.ACTIVATIONS),
        "activation": set(fuzz.ACTIVATIONS),
        "causal": {False, True, "strided"},
        "per_frame": {False, True},
        "past": {0, 1, 2, 3},
        "residual": {False, True},
        "dtype": set(fuzz.DTYPES),
    }.items():
        assert {getattr(c, field) for c in configs} == values, field
    modes = {c.padding_mode for c in configs}
    assert len(modes) == 16
    assert any(c.pads[0][0] != c.pads[0][1] and not c.causal for c in configs)
    assert any(c.causal and c.past for c in configs)
    assert any(1 < c.groups == c.channels for c in configs)


# ---- planted bugs

Planted = Callable[[pytest.MonkeyPatch], None]


def _replaced(name: str, wrong: Callable[..., Any], module: Any = norms) -> Planted:
    """Plant a function that is given the right one first."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        real = getattr(module, name)
        patch.setattr(module, name, lambda *args: wrong(real, *args))

    return plant


def _forgets_the_mean(real: Any, norm: Any, dv: Any, x: Any, mean: Any, *rest: Any) -> Any:
    return real(norm, dv, x, None if mean is None else mean * 0, *rest)


def _drops_past(real: Any, problem: Any, t: Any, *rest: Any) -> Any:
    past = None if t.past is None else torch.zeros_like(t.past)
    return real(problem, t._replace(past=past), *rest)


def _pads_x(patch: pytest.MonkeyPatch) -> None:
    """Zeros go through norm and activation."""
    real = on_aten._apply_norm

    def normalised(problem: Any, t: Any, x: torch.Tensor, *statistics: Any) -> torch.Tensor:
        v = real(problem, t, x, *statistics)
        edge = torch.zeros_like(v)
        edge[..., 1:-1] = 1
        return v * edge + (1 - edge) * real(problem, t, x * 0, *statistics)

    patch.setattr(on_aten, "_apply_norm", normalised)


def _running_variance_is_biased(patch: pytest.MonkeyPatch) -> None:
    def update(norm: Any, mean: torch.Tensor, var: torch.Tensor, count: Any) -> None:
        norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
        norm.running_var.lerp_(var.to(norm.running_var), norm.momentum)

    patch.setattr(functional, "_update_running", update)


@pytest.mark.parametrize(
    "plant",
    [
        _pads_x,
        _running_variance_is_biased,
        _replaced("gradient", _forgets_the_mean),
        _replaced("rstd", lambda real, norm, *rest: real(norm._replace(eps=1e-6), *rest)),
        _replaced("_groups_and_axes", lambda real, n, c: real(n._replace(per_frame=False), c)),
        _replaced("is_centred", lambda real, kind: True),
        _replaced("_load_z", _drops_past, on_aten),
        _replaced(
            "_undo_prepare",
            lambda real, g, size, p, pads: real(g, size, p, [pads[i ^ 1] for i in range(6)]),
            on_aten,
        ),
    ],
)
def test_planted_bug_is_caught(plant: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"FASTST_SEED=\d+ .*ConvConfig\("):
        fuzz.fuzz("aten", 60, SMALL)


def test_same_seed_same_case() -> None:
    config = fuzz.random_conv(11, SMALL)
    assert config == eval(repr(config), {"ConvConfig": ConvConfig, "torch": torch})
