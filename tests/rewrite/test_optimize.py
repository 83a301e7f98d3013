"""Inference copies: folded norms, same outputs, the original untouched."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import fastst
from fastst.dispatch import tune
from fastst.models import r2plus1d_18
from fastst.rewrite.optimize import fold_norms
from tests.rewrite.convert.test_forms import FORMS


def settle(model: nn.Module) -> nn.Module:
    """Norms as after training: no statistic or parameter is 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t in (m.running_mean, m.running_var, m.weight, m.bias):
                if t is not None:
                    t.data.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    return model.eval()


@pytest.mark.parametrize("form", FORMS)
def test_form(form):
    model = settle(FORMS[form][0]().double())
    before = {k: t.clone() for k, t in model.state_dict().items()}
    x = torch.randn(2, 4, 5, 8, 7, dtype=torch.float64)
    wanted = model(x)
    optimised = fastst.optimize_for_inference(model)
    torch.testing.assert_close(optimised(x), wanted, rtol=1e-10, atol=1e-10)
    assert not any(p.requires_grad for p in optimised.parameters())
    for k, t in model.state_dict().items():
        assert torch.equal(t, before[k])
    assert torch.equal(model(x), wanted)


def test_r2plus1d_18():
    model = settle(r2plus1d_18(5))
    model.train()
    optimised = fastst.optimize_for_inference(model)
    assert model.training
    assert not optimised.training
    assert not [m for m in optimised.modules() if isinstance(m, nn.BatchNorm3d)]
    report = fastst.convert(optimised)
    assert (len(report.already), report.replaced, report.left) == (17, [], [])
    x = torch.randn(1, 3, 4, 24, 24)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", fastst.FallbackWarning)
        torch.testing.assert_close(optimised(x), model.eval()(x), rtol=1e-3, atol=1e-3)


def test_converted_model_as_input():
    model = settle(FORMS["flat"][0]().double())
    x = torch.randn(1, 4, 3, 6, 6, dtype=torch.float64)
    wanted = model(x)
    fastst.convert(model)
    torch.testing.assert_close(
        fastst.optimize_for_inference(model)(x), wanted, rtol=1e-10, atol=1e-10
    )


class Traps(nn.Module):
    """Norms that must not be folded, and one that may."""

    def __init__(self):
        super().__init__()
        self.used = nn.Conv3d(2, 2, 1)
        self.used_bn = nn.BatchNorm3d(2)
        self.twice = nn.Conv3d(2, 2, 1)
        self.twice_bn = nn.BatchNorm3d(2)
        self.hooked = nn.Conv3d(2, 2, 1)
        self.hooked_bn = nn.BatchNorm3d(2)
        self.untracked = nn.Conv3d(2, 2, 1)
        self.untracked_bn = nn.BatchNorm3d(2, track_running_stats=False)
        self.shared_bn = self.shared_bn_too = nn.BatchNorm3d(2)
        self.shared = nn.Conv3d(2, 2, 1)
        self.fine = nn.Conv3d(2, 2, 1, bias=False)
        self.fine_bn = nn.BatchNorm3d(2, affine=False)

    def forward(self, x):
        u = self.used(x)
        x = self.used_bn(u) + u
        x = self.twice_bn(self.twice(self.twice_bn(self.twice(x))))
        x = self.hooked_bn(self.hooked(x))
        x = self.untracked_bn(self.untracked(x))
        x = self.shared_bn(self.shared(x))
        return self.fine_bn(self.fine(x))


def test_fold_traps():
    model = Traps().double()
    model.hooked.register_forward_hook(lambda m, a, out: out * 2)
    model = settle(model)
    x = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    wanted = model(x)
    folded = copy.deepcopy(model)
    assert fold_norms(folded) == [("fine", "fine_bn")]
    torch.testing.assert_close(folded(x), wanted, rtol=1e-10, atol=1e-10)


def test_bad_argument():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        fastst.optimize_for_inference(3)
    with pytest.raises(ValueError, match=r"0\.weight is lazy: it has no values"):
        fastst.optimize_for_inference(nn.Sequential(nn.LazyConv3d(4, 3)))


def formats(model: nn.Module) -> set[torch.memory_format]:
    """In which the 5-D weights with more than one tap and channel are."""
    last = torch.channels_last_3d
    return {
        last if p.is_contiguous(memory_format=last) else torch.contiguous_format
        for p in model.parameters()
        if p.dim() == 5 and min(p.shape[1], p[0, 0].numel()) > 1
    }


@pytest.mark.parametrize("fmt", [torch.channels_last_3d, torch.contiguous_format])
def test_memory_format(fmt, monkeypatch):
    """The one that is given, or that is faster on the sample."""
    model = settle(FORMS["flat"][0]())
    x = torch.randn(2, 4, 5, 8, 7)
    assert formats(fastst.optimize_for_inference(model, memory_format=fmt)) == {fmt}
    raced = []

    def race(trials, seconds):
        for trial in trials.values():
            trial()
        raced.append(seconds)
        return {f: 1.0 if f is fmt else 2.0 for f in trials}

    monkeypatch.setattr(tune, "race", race)
    optimised = fastst.optimize_for_inference(model, sample=x, seconds=0.1)
    assert formats(optimised) == {fmt}
    assert raced == [0.1]
    torch.testing.assert_close(optimised(x), model(x), rtol=1e-4, atol=1e-4)


def test_measured_memory_format():
    model = settle(FORMS["flat"][0]())
    x = torch.randn(2, 4, 5, 8, 7)
    assert len(formats(fastst.optimize_for_inference(model, sample=x, seconds=0.01))) == 1


def test_memory_format_by_rule():
    for dtype, fmt in (
        (torch.float32, torch.channels_last_3d),
        (torch.bfloat16, torch.channels_last_3d),
        (torch.float64, torch.contiguous_format),
    ):
        model = settle(FORMS["flat"][0]()).to(dtype)
        assert formats(fastst.optimize_for_inference(model)) == {fmt}
    assert fastst.optimize_for_inference(nn.ReLU())(torch.ones(1)) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "told"),
    [
        ({"memory_format": torch.channels_last}, ValueError, r"one of torch\.channels_last_3d"),
        ({"sample": (2, 3)}, TypeError, "sample must be a tensor, got tuple"),
        ({"sample": torch.ones(1), "seconds": 0.0}, ValueError, "seconds must be positive, got 0"),
        ({"sample": torch.ones(1), "memory_format": torch.contiguous_format}, ValueError, "not bo"),
    ],
)  # fmt: skip
def test_bad_choices(arguments, error, told):
    with pytest.raises(error, match=told):
        fastst.optimize_for_inference(nn.ReLU(), **arguments)
