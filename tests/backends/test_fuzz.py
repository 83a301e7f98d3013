"""Random configurations on every backend that runs here, and proof that the fuzzer can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastst import functional
from fastst.backends import aten, conv_pass, reference
from fastst.problem.spec import Pass
from tests.support import fuzz
from tests.support.fuzz import Config, Limits

CHUNKS = range(8)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_aten(chunk: int) -> None:
    fuzz.fuzz("aten", 60, first=fuzz.SEED + 1000 * chunk, least=1.0)


@pytest.mark.parametrize("chunk", CHUNKS[:2])
def test_reference(chunk: int) -> None:
    fuzz.fuzz("reference", 40, first=fuzz.SEED + 1000 * chunk, least=1.0)


@pytest.mark.parametrize(
    "fixed",
    [
        dict(norm="batch", activation="relu", op="conv2plus1d"),
        dict(norm="frozen", recompute=True, op="conv2plus1d"),
        dict(causal=True, op="conv2plus1d", padding=0),
        dict(x_layout="channels_last", grad_layout="channels_last"),
        dict(x_layout="expanded", grad_layout="expanded"),
        dict(x_layout="sliced_channels_last", weight_layout="channels_last"),
        dict(dtype=torch.bfloat16),
        dict(dtype=torch.float64),
        dict(op="parallel_conv2plus1d", norm="none"),
        dict(size=(1, 7, 5)),
        dict(batch=1, size=(4, 1, 1)),
    ],
    ids=lambda fixed: ",".join(fixed),
)
def test_auto_where_trouble_is(fixed: dict[str, Any]) -> None:
    fuzz.fuzz("auto", 15, Limits(fixed=fixed), least=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_gpu(backend: str) -> None:
    fuzz.fuzz(backend, 200, device="cuda", least=1.0)


def test_draws_everything() -> None:
    configs = [fuzz.random_config(seed) for seed in range(400)]
    for field, values in {
        "op": {"conv2plus1d", "parallel_conv2plus1d"},
        "norm": {"none", "batch", "frozen"},
        "activation": set(fuzz.ACTIVATIONS),
        "branch_activation": set(fuzz.ACTIVATIONS),
        "order": {"spatial-first", "temporal-first"},
        "causal": {False, True, "strided"},
        "combine": {"add", "cat"},
        "dtype": set(fuzz.DTYPES),
        "x_layout": set(fuzz.LAYOUTS),
        "weight_layout": set(fuzz.LAYOUTS),
        "grad_layout": set(fuzz.LAYOUTS),
        "batch": {1, 2, 3},
    }.items():
        assert {getattr(c, field) for c in configs} == values, field
    modes = {m for c in configs for m in c.padding_mode}
    assert modes == {"zeros", "replicate", "reflect", "circular"}
    assert any(c.padding == "same" and c.pads[0][0] != c.pads[0][1] for c in configs)
    assert any(1 < c.groups[0] == c.channels == c.mid == c.out for c in configs)
    assert any(c.groups[0] == 1 < c.groups[1] for c in configs)
    assert {c.size[0] for c in configs} >= {1, 2, 9}
    assert any(c.kernel[1:] == (1, 1) and c.stride[1] != c.stride[2] for c in configs)
    assert any(c.kernel[0] == 1 < c.stride[0] for c in configs)


@pytest.mark.parametrize("layout", fuzz.LAYOUTS)
def test_layouts_are_what_they_say(layout: str) -> None:
    t = torch.randn(2, 3, 4, 5, 6)
    laid = fuzz.lay_out(t, layout)
    assert laid.shape == t.shape
    if layout != "expanded":
        torch.testing.assert_close(laid, t, rtol=0, atol=0)
    assert laid.is_contiguous() == (layout in ("contiguous", "offset"))
    assert (0 in laid.stride()) == (layout == "expanded")
    assert (laid.storage_offset() > 0) == (layout == "offset" or layout.startswith("sliced"))
    if "channels_last" in layout:
        assert laid.stride(1) < laid.stride(4)


def test_same_seed_same_case() -> None:
    config = fuzz.random_config(11)
    assert config == fuzz.random_config(11) == eval(repr(config), vars(fuzz) | {"torch": torch})
    first, second = fuzz.make(config)[0], fuzz.make(config)[0]
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_value_near_a_kink(dtype: torch.dtype) -> None:
    """Else a rounding error would move gradients by whole terms, in PyTorch as well as here."""
    fixed = dict(activation="relu", branch_activation="none", outer_activation="none")
    limits = Limits(dtypes=(dtype,), fixed=fixed)
    configs = [fuzz.random_config(seed, limits) for seed in range(60)]
    clear = [fuzz.clear_of_kinks(c, fuzz.make(c)[0]) for c in configs]
    assert sum(clear) >= 58


# ---- planted bugs

Planted = Callable[[pytest.MonkeyPatch], None]


def _pads_before_norm(patch: pytest.MonkeyPatch) -> None:
    """Zeros of the temporal padding go through norm and activation."""

    def compose(t: Any, spec: Any, norm: Any = None) -> torch.Tensor:
        first, second = reference.Problem.of(t, spec).passes
        u = conv_pass.conv_pass(t.x, t.first_weight, t.first_bias, first)
        u = conv_pass.pad(u, second.padding, second.padding_mode)
        v = (norm or reference.batch_norm(t, spec))(u)
        z = reference.activations.apply(spec.activation, v, spec.slope)
        bare = second._replace(padding=(0,) * 6)
        return conv_pass.conv_pass(z, t.second_weight, t.second_bias, bare)

    patch.setattr(reference, "compose_pair", compose)


def _swaps_asymmetric_padding(patch: pytest.MonkeyPatch) -> None:
    def pad(x: torch.Tensor, padding: Any, mode: str) -> torch.Tensor:
        t0, t1, h0, h1, w0, w1 = padding
        return F.pad(x, (w1, w0, h1, h0, t1, t0), "constant" if mode == "zeros" else mode)

    patch.setattr(conv_pass, "pad", pad)


def _pads_one_less_and_more(patch: pytest.MonkeyPatch) -> None:
    real = aten.conv

    def conv(rows: torch.Tensor, weight: torch.Tensor, bias: Any, p: Pass) -> torch.Tensor:
        if p.kind == "temporal" and p.padding[0]:
            p = p._replace(padding=(p.padding[0] - 1, p.padding[1] + 1, *p.padding[2:]))
        return real(rows, weight, bias, p)

    patch.setattr(aten, "conv", conv)


def _loses_bias_gradient(patch: pytest.MonkeyPatch) -> None:
    real = aten.conv_backward

    def backward(*args: Any) -> Any:
        dx, dw, db = real(*args)
        return dx, dw, None if db is None else torch.zeros_like(db)

    patch.setattr(aten, "conv_backward", backward)


def _leaves_a_column_unwritten(patch: pytest.MonkeyPatch) -> None:
    def leave(rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        out[..., :-1] = rows.permute(0, 4, 1, 2, 3)[..., :-1]
        return out

    patch.setattr(aten, "leave", leave)


def _running_variance_is_biased(patch: pytest.MonkeyPatch) -> None:
    def update(norm: Any, mean: torch.Tensor, var: torch.Tensor, problem: Any) -> None:
        norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
        norm.running_var.lerp_(var.to(norm.running_var), norm.momentum)

    patch.setattr(functional, "_update_running", update)


def _forgets_the_slope(patch: pytest.MonkeyPatch) -> None:
    real = aten.activations.grad
    patch.setattr(aten.activations, "grad", lambda name, dz, v, slope: real(name, dz, v, 0.01))


def _overwrites_its_input(patch: pytest.MonkeyPatch) -> None:
    real = aten.as_rows

    def rows(x: torch.Tensor) -> torch.Tensor:
        out = real(x).clone()
        x.detach().view(x.shape).narrow(1, 0, 1).zero_()
        return out

    patch.setattr(aten, "as_rows", rows)


def _takes_default_eps(patch: pytest.MonkeyPatch) -> None:
    real = aten._affine

    def affine(problem: Any, *rest: Any) -> torch.Tensor:
        return real(replace(problem, spec=problem.spec._replace(eps=1e-5)), *rest)

    patch.setattr(aten, "_affine", affine)


def _mixes_groups(patch: pytest.MonkeyPatch) -> None:
    real = aten.as_rows

    def rows(x: torch.Tensor) -> torch.Tensor:
        return real(x.flip(1)) if x.shape[1] > 1 else real(x)

    patch.setattr(aten, "as_rows", rows)


@pytest.mark.parametrize(
    ("plant", "backend"),
    [
        (_pads_before_norm, "reference"),
        (_swaps_asymmetric_padding, "reference"),
        (_pads_one_less_and_more, "aten"),
        (_loses_bias_gradient, "aten"),
        (_leaves_a_column_unwritten, "aten"),
        (_running_variance_is_biased, "aten"),
        (_forgets_the_slope, "aten"),
        (_overwrites_its_input, "aten"),
        (_takes_default_eps, "aten"),
        (_mixes_groups, "aten"),
    ],
)
def test_planted_bug_is_caught(plant: Planted, backend: str, monkeypatch: Any) -> None:
    fuzz.fuzz(backend, 1)
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"FASTST_SEED=\d+ .*Config\("):
        fuzz.fuzz(backend, 60, fuzz.SMALL)


def test_reports_what_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    _loses_bias_gradient(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        fuzz.check(Config(), "aten")
    text = str(caught.value)
    assert "backend 'aten', Config(seed=0" in text
    assert "grad of temporal_bias: error" in text
    assert "grad of x" not in text


def test_a_refusal_is_not_a_pass() -> None:
    limits = Limits(fixed=dict(op="conv2plus1d"))
    refuse = pytest.MonkeyPatch()
    refuse.setattr(aten.BACKEND, "why_not", lambda problem, phase: "is made to refuse")
    with refuse.context() as patch:
        patch.setattr(aten.BACKEND, "why_not", lambda problem, phase: "is made to refuse")
        assert "made to refuse" in str(fuzz.check(Config(), "aten"))
        with pytest.raises(AssertionError, match="refused 3 of 3"):
            fuzz.fuzz("aten", 3, limits)
    refuse.undo()
