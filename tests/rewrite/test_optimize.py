"""Inference copies: same outputs, the original untouched, one memory format."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastst
from fastst.backends.cpu.library import load
from fastst.dispatch import tune
from fastst.models import r2plus1d_18
from fastst.rewrite.convert import endings, rules
from tests.rewrite.convert.test_converter import small


def settle(model: nn.Module) -> nn.Module:
    """Norms as after training: no statistic or parameter is 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t in (m.running_mean, m.running_var, m.weight, m.bias):
                if t is not None:
                    t.data.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    return model.eval()


@pytest.mark.parametrize("converted", [False, True])
def test_same_outputs(converted):
    model = settle(small().double()).train()
    if converted:
        fastst.convert(model)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    x = torch.randn(2, 3, 5, 8, 7, dtype=torch.float64)
    optimised = fastst.optimize_for_inference(model)
    assert model.training
    assert not optimised.training
    assert not any(p.requires_grad for p in optimised.parameters())
    with torch.inference_mode(), fastst.dispatch.recording() as calls:
        found = optimised(x).detach()
    assert len(calls) == 2
    torch.testing.assert_close(found, model.eval()(x), rtol=1e-10, atol=1e-10)
    for k, t in model.state_dict().items():
        assert torch.equal(t, before[k])


def test_r2plus1d_18():
    model = settle(r2plus1d_18(5, width=16))
    optimised = fastst.optimize_for_inference(model)
    x = torch.randn(1, 3, 4, 24, 24)
    report = fastst.convert(optimised, x)
    assert (len(report.already), report.replaced, report.left) == (17, [], [])
    with torch.no_grad():
        torch.testing.assert_close(optimised(x), model(x), rtol=1e-3, atol=1e-3)


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
    model = settle(small())
    x = torch.randn(2, 3, 5, 8, 7)
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
    model = settle(small())
    x = torch.randn(2, 3, 5, 8, 7)
    assert len(formats(fastst.optimize_for_inference(model, sample=x, seconds=0.01))) == 1


def test_weights_stay_as_they_lie():
    for fmt in (torch.channels_last_3d, torch.contiguous_format):
        model = settle(small()).to(memory_format=fmt)
        assert formats(fastst.optimize_for_inference(model)) == {fmt}
    assert fastst.optimize_for_inference(nn.ReLU())(torch.ones(1)) == 1


class Flattened(nn.Module):
    """As C3D: a view of what convolutions write."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1)
        self.pool, self.fc = nn.MaxPool3d(2), nn.Linear(32, 5)

    def forward(self, x):
        h = self.pool(torch.relu(self.two(self.pool(torch.relu(self.one(x))))))
        return self.fc(h.view(h.size(0), -1))


class FramesAsChannels(nn.Module):
    """A view of what a pair writes."""

    def __init__(self):
        super().__init__()
        self.space, self.time = nn.Conv3d(3, 8, (1, 3, 3)), nn.Conv3d(8, 8, (3, 1, 1))
        self.norm, self.flat = nn.BatchNorm3d(8), nn.Conv2d(16, 4, 3)

    def forward(self, x):
        y = self.norm(self.time(torch.relu(self.space(x)))).relu()
        return self.flat(y.view(y.shape[0], -1, *y.shape[3:]))


class Standardised(nn.Conv3d):
    """Standardises its weight, by a view."""

    def forward(self, x):
        w = self.weight
        mean = w.view(w.size(0), -1).mean(1).view(-1, 1, 1, 1, 1)
        return self._conv_forward(x, w - mean, self.bias)


class Positions(nn.Module):
    """A 5-D table that is no weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1))
        self.table = nn.Parameter(torch.randn(1, 8, 4, 8, 8))

    def forward(self, x):
        return self.conv(x).flatten(1) + self.table.view(1, -1)


def tied():
    """A table that is the weight of a convolution."""
    model = Positions()
    model.other = nn.Conv3d(8, 1, (4, 8, 8))
    model.other.weight = model.table
    return model


VIEWED = {
    "an output": Flattened,
    "an output of a pair": FramesAsChannels,
    "a weight": lambda: nn.Sequential(Standardised(3, 8, (1, 3, 3)), Standardised(8, 8, (3, 1, 1))),
    "a table": Positions,
    "a tied weight": tied,
}


@pytest.mark.parametrize("options", [{}, {"sample": torch.ones(1, 3, 4, 8, 8), "seconds": 0.01}])
@pytest.mark.parametrize("name", VIEWED)
def test_views_are_what_they_were(name, options):
    torch.manual_seed(0)
    model, x = settle(VIEWED[name]()), torch.randn(1, 3, 4, 8, 8)
    served = fastst.optimize_for_inference(model, **options)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(served(x), model(x), rtol=1e-4, atol=1e-4)


def test_only_weights_that_convolutions_read_are_laid_out():
    for make in (VIEWED["a weight"], Positions, tied):
        model = make()
        last = fastst.optimize_for_inference(model, memory_format=torch.channels_last_3d)
        for (name, p), q in zip(model.named_parameters(), last.parameters(), strict=True):
            assert (p.stride() == q.stride()) == (name != "conv.weight"), name


@pytest.mark.parametrize("channels_last", [False, True])
def test_strides_of_outputs_are_those_of_the_model(channels_last):
    model, x = settle(small()), torch.randn(2, 3, 5, 8, 7)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        assert fastst.optimize_for_inference(model)(x).stride() == model(x).stride()


def test_samples_that_do_not_run_say_why():
    with pytest.raises(RuntimeError, match="channels"):
        fastst.optimize_for_inference(small(), sample=torch.randn(1, 4, 5, 8, 7), seconds=0.01)


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


class Shortcut(nn.Module):
    """A convolution and its norm, called as a test says."""

    def __init__(self, body):
        super().__init__()
        self.conv, self.norm, self.body = nn.Conv3d(8, 8, 1, 2, bias=False), nn.BatchNorm3d(8), body

    def forward(self, x):
        return self.body(self, x)


NORMED = {  # and whether the norm is part of the convolution
    "as usual": (lambda m, x: m.norm(m.conv(x)), True),
    "without the norm": (lambda m, x: m.conv(x), False),
    "read between": (lambda m, x: m.norm(m.conv(x).relu()), False),
    "norm switched off": (lambda m, x: m.norm(m.conv(x)) if x.shape[2] < 4 else m.conv(x), False),
    "twice": (lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(2 * x)), True),
    "both": (lambda m, x: (lambda u: m.norm(u) + u)(m.conv(x)), True),
}


def fold(monkeypatch):
    """Norms are multiplied into weights, as on devices where kernels do not know them."""
    for module in (endings, rules):
        monkeypatch.setattr(module, "folds", lambda weight: True)


@pytest.mark.parametrize("way", ["kernels", "folded", "without kernels"])
@pytest.mark.parametrize("name", NORMED)
def test_norms_behind_convolutions(name, way, monkeypatch):
    """Part of them when they are called so, and when weights or statistics change."""
    if way == "kernels" and isinstance(load(), str):
        pytest.skip("no native library")
    if way == "folded":
        fold(monkeypatch)
    body, taken = NORMED[name]
    dtype = torch.float32 if way == "kernels" else torch.float64
    model = settle(Shortcut(body).to(dtype))
    optimised = fastst.optimize_for_inference(model)
    x = torch.randn(2, 8, 5, 7, 6, dtype=dtype)
    close = {"rtol": 1e-5, "atol": 1e-4} if way == "kernels" else {"rtol": 1e-12, "atol": 1e-12}
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(optimised(x), model(x), **close)
            for m in (model, optimised):
                m.norm.running_var.mul_(1.3), m.conv.weight.add_(0.1), m.norm.bias.mul_(2)
        with torch.profiler.profile() as seen:
            optimised(x)
    norms = [event for event in seen.events() if event.name == "aten::batch_norm"]
    none = name in ("without the norm", "norm switched off")
    assert (not norms) == ((taken and way != "without kernels") or none)


def test_norms_of_copies_that_are_trained_after_all():
    """A copy whose norm is put into training counts, and one whose weights learn has gradients."""
    model = settle(Shortcut(NORMED["as usual"][0]).double())
    optimised = fastst.optimize_for_inference(model)
    x = torch.randn(2, 8, 5, 7, 6, dtype=torch.float64)
    for m in (model.train(), optimised.train()):
        m.requires_grad_()
        m(x).square().sum().backward()
        m.eval()(x).square().sum().backward()
    torch.testing.assert_close(optimised.state_dict(), model.state_dict())
    for p, q in zip(optimised.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def ending_in_a_norm(name):
    """A pair, or a convolution of another kind, with a norm behind it."""
    torch.manual_seed(0)
    first = [nn.Conv3d(8, 6, (1, 3, 3)), nn.ReLU()] if name == "pair" else []
    channels = 6 if name == "pair" else 8
    last = nn.Conv3d(channels, 4, (3, 1, 1) if name == "pair" else 1)
    return settle(nn.Sequential(*first, last, nn.BatchNorm3d(4)))


UNCOUNTED = {  # writes that no version counter tells of
    "data": lambda t: t.data.copy_(torch.rand(t.shape) + 1),
    "data in place": lambda t: t.data.mul_(2),
    "by NumPy": lambda t: t.detach().numpy().__imul__(2),
}


@pytest.mark.parametrize("write", UNCOUNTED)
@pytest.mark.parametrize("name", ["pair", "alone"])
def test_writes_that_are_not_counted(name, write):
    """To the norm behind a convolution, or to the weights before it."""
    model = ending_in_a_norm(name)
    optimised = fastst.optimize_for_inference(model)
    x = torch.randn(2, 8, 5, 7, 6)
    with torch.no_grad():
        for attribute in ("running_mean", "running_var", "weight", "bias"):
            for at in (-1, -2):
                if attribute.startswith("running") and at == -2:
                    continue
                torch.testing.assert_close(optimised(x) + 0, model(x))
                torch.testing.assert_close(optimised(x) + 0, model(x))
                for m in (model, optimised):
                    torch.manual_seed(1)
                    UNCOUNTED[write](getattr(m[at], attribute))
        torch.testing.assert_close(optimised(x) + 0, model(x))


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", ["pair", "alone"])
def test_gradients_after_inference_mode(name, folded, monkeypatch):
    """Nothing that is saved for backward was made in inference mode, remembered or not."""
    if folded:
        fold(monkeypatch)
    model = ending_in_a_norm(name).requires_grad_(False)
    optimised = fastst.optimize_for_inference(model)
    x, grads = torch.randn(2, 8, 5, 7, 6), []
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(optimised(x) + 0, model(x))
    for m in (model, optimised):
        leaf = x.clone().requires_grad_()
        m(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_planted_bugs_are_caught(monkeypatch):
    """What is folded is remembered by version counters alone, or made in inference mode."""
    fold(monkeypatch)
    with pytest.raises(AssertionError):
        test_writes_that_are_not_counted("pair", "data")
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: Unless(mode))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        test_gradients_after_inference_mode("alone", True, monkeypatch)


class Unless(torch.autograd.grad_mode.inference_mode):
    """Inference mode that is not left for a block."""

    def __enter__(self):
        if self.mode:
            super().__enter__()

    def __exit__(self, *exc):
        if self.mode:
            super().__exit__(*exc)
