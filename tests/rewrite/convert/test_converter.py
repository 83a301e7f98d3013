"""Conversion in place: the same keys, parameters, buffers, outputs and gradients; and back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastst
from fastst.dispatch import selfcheck
from fastst.models import r2plus1d_18


def small(bias: bool = False) -> nn.Sequential:
    """A pair with norm and activation, an outer norm, and a second pair without."""
    return nn.Sequential(
        nn.Sequential(
            nn.Conv3d(3, 5, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=bias),
            nn.BatchNorm3d(5, eps=1e-3, momentum=0.7),
            nn.ReLU(inplace=True),
            nn.Conv3d(5, 4, (3, 1, 1), (2, 1, 1), (1, 0, 0), bias=bias),
        ),
        nn.BatchNorm3d(4),
        nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0)),
        nn.Conv3d(6, 2, (1, 3, 3), padding=(0, 1, 1)),
    )


def step(model: nn.Module, x: torch.Tensor, training: bool) -> list[torch.Tensor]:
    """Output, gradients of input and parameters, and buffers after one step."""
    model.train(training)
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    return [y.detach(), x.grad, *grads, *(b.clone() for b in model.buffers())]


def assert_same(model: nn.Module, original: nn.Module, x: torch.Tensor) -> None:
    """float64 outputs, gradients and buffers agree in both modes; no part fell back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastst.FallbackWarning)
        for training in (True, False):
            for a, b in zip(step(model, x, training), step(original, x, training), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_convert_keeps_everything(bias):
    torch.manual_seed(0)
    model = small(bias).double()
    original = copy.deepcopy(model)
    state = {k: id(t) for k, t in model.state_dict(keep_vars=True).items()}
    modules = [id(m) for m in model.modules()]
    kinds = [type(m) for m in model.modules()]
    for sample in (None, torch.randn(2, 3, 5, 7, 6, dtype=torch.float64)):
        report = fastst.convert(model, sample)
        assert [(r.first, r.second, r.order) for r in report.replaced or report.already] == [
            ("0.0", "0.3", "spatial-first"),
            ("2", "3", "temporal-first"),
        ]
        assert report.left == []
    assert [type(m) for m in model.modules()] == kinds
    assert {k: id(t) for k, t in model.state_dict(keep_vars=True).items()} == state
    assert [id(m) for m in model.modules()] == modules
    assert isinstance(model, nn.Sequential)
    assert_same(model, original, torch.randn(2, 3, 5, 7, 6, dtype=torch.float64))


@pytest.mark.parametrize("training", [False, True])
def test_the_op_runs(training, monkeypatch):
    model = small().train(training)
    fastst.convert(model)
    calls = []
    original = fastst.functional.ops.conv2plus1d
    monkeypatch.setattr(
        fastst.functional.ops, "conv2plus1d", lambda *a: calls.append(a) or original(*a)
    )
    model(torch.randn(1, 3, 4, 6, 6)).sum()  # who reads the output lets the last pair run
    assert len(calls) == 2


def test_revert_takes_everything_back():
    model = small()
    attributes = [set(vars(m)) for m in model.modules()]
    fastst.convert(model)
    assert [set(vars(m)) for m in model.modules()] != attributes
    assert fastst.revert(model) == ["0.0", "0.3", "2", "3"]
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert fastst.revert(model) == []


def test_converting_twice_changes_nothing():
    model = small()
    first = fastst.convert(model)
    held = [vars(m).get("_conv_forward") for m in model.modules()]
    again = fastst.convert(model)
    assert again.replaced == again.left == []
    assert again.already == first.replaced
    assert [vars(m).get("_conv_forward") for m in model.modules()] == held


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"only": "0"}, ["0.0"]),
        ({"only": ["2", "nothing"]}, ["2"]),
        ({"skip": "0"}, ["2"]),
        ({"skip": "*"}, []),
        ({"only": "0*", "skip": "0.0"}, []),
        ({"only": lambda name, m: isinstance(m, nn.Sequential)}, ["0.0"]),
        ({"skip": lambda name, m: getattr(m, "out_channels", 0) == 2}, ["0.0"]),
    ],
)
def test_filters(options, first):
    model = small().eval()
    x = torch.randn(1, 3, 4, 6, 6)
    report = fastst.convert(model, x, **options)
    assert [r.first for r in report.replaced] == first
    with fastst.dispatch.recording() as calls:
        model(x)
    assert sum(c.problem is not None for c in calls) == len(first)
    assert len({entry.name for entry in report.left}) == 2 * (2 - len(first))
    everything = fastst.convert(model)
    assert [r.first for r in everything.already] == first
    assert len(everything.replaced) == 2 - len(first)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_pair_that_is_begun_for_its_norm_guesses_what_follows(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are chosen, and on a GPU compiled and checked, for the pair itself alone."""
    asked, original = [], selfcheck.why_broken

    def why_broken(backend: Any, problem: Any, *rest: Any) -> str | None:
        asked.append((problem.passes, problem.spec.activation, problem.weight_strides))
        return original(backend, problem, *rest)

    monkeypatch.setattr(selfcheck, "why_broken", why_broken)
    model = small()[0].to(memory_format=layout)
    fastst.convert(model)
    step(model, torch.randn(2, 3, 4, 6, 6), True)
    assert len(set(asked)) == 1


@pytest.mark.parametrize("bad", [3, [3], [None]])
def test_bad_arguments(bad):
    with pytest.raises(TypeError, match="only must be a pattern"):
        fastst.convert(small(), only=bad)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        fastst.convert(bad)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        fastst.revert(bad)


def test_a_sample_leaves_a_model_that_cannot_be_copied_as_it_is() -> None:
    class Clamped(nn.Conv3d):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data.clamp_(-0.01, 0.01)
            return super().forward(x)

    model = nn.Sequential(Clamped(2, 4, (1, 3, 3)), nn.BatchNorm3d(4), nn.Conv3d(4, 2, (3, 1, 1)))
    model.lock = threading.Lock()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    (pair,) = fastst.convert(model, torch.randn(2, 2, 4, 5, 5)).replaced
    assert (pair.first, pair.norm, pair.second) == ("0", "1", "2")
    for n, t in model.state_dict().items():
        assert torch.equal(t, before[n]), n


def test_whole_convolutions_are_told_of_factorize() -> None:
    model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, (3, 1, 3)))
    report = fastst.convert(model)
    assert report.whole == ["0", "2"]
    assert "fastst.factorize makes pairs of 2 k×k×k convolutions" in str(report)


def test_a_model_without_pairs():
    report = fastst.convert(nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU(), nn.Linear(4, 4)))
    assert not (report.replaced or report.left or report.already)
    assert str(report) == "no pair of a spatial and a temporal convolution found"


def test_layers_of_this_library_are_one_operation_already():
    layers = fastst.Conv2Plus1d(3, 4, 3, norm="batch"), fastst.ParallelConv2Plus1d(4, 4, 3)
    report = fastst.convert(nn.Sequential(*layers, nn.Conv3d(4, 4, (1, 3, 3))))
    assert [str(entry) for entry in report.left] == [
        "0: is one operation already, a Conv2Plus1d",
        "1: is one operation already, a ParallelConv2Plus1d",
        "2: the model has no temporal convolution left to pair it with",
    ]
    assert not report.replaced
    assert "the model: is one operation already" in str(fastst.convert(layers[1]))


def test_report_tells_all():
    model = small().eval()
    model.append(nn.Conv3d(2, 2, (1, 3, 3)))
    x = torch.randn(1, 3, 4, 6, 6)
    text = str(fastst.convert(model, x, skip="2"))
    assert "replaced: 1\n  0.0 → 0.3, spatial-first, with 0.1 and relu between" in text
    assert "4: its output goes to " in str(fastst.convert(model, x))


def test_optimizers_created_before_keep_working():
    torch.manual_seed(0)
    model = small().double()
    original = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), 0.1) for m in (model, original)]
    fastst.convert(model)
    x = torch.randn(2, 3, 5, 7, 6, dtype=torch.float64)
    for _ in range(3):
        for m, optimizer in zip((model, original), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model(x), original(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_converted_and_independent(way):
    model = small().eval()
    fastst.convert(model)
    if way == "deepcopy":
        again = copy.deepcopy(model)
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    x = torch.randn(1, 3, 4, 6, 6)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    before = model(x)
    with torch.no_grad():
        for p in again.parameters():
            p.fill_(0.1)
    assert torch.equal(model(x), before)
    assert not torch.equal(again(x), before)
    with fastst.dispatch.recording() as calls:
        again(x)
    assert len(calls) == 2
    assert again[0][0]._conv_forward.conv is again[0][0]
    fastst.revert(again)
    assert not fastst.revert(again)
    assert fastst.revert(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"padding": (0, 0, 0)},
        {"stride": (2, 1, 1), "padding": (0, 0, 0)},
        {"dilation": (2, 1, 1)},
        {"padding_mode": "replicate"},
    ],
    ids=lambda changes: " ".join(changes),
)
@pytest.mark.parametrize("kernel", [(3, 1, 1), (3, 3, 3)], ids=["of a pair", "alone"])
def test_a_shallow_copy_has_settings_of_its_own(kernel, changes):
    def changed(conv):
        again = copy.copy(copy.copy(conv))
        for name, value in changes.items():
            setattr(again, name, value)
        return again

    space = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))
    model = nn.Sequential(space, nn.ReLU(), nn.Conv3d(4, 4, kernel, padding=(1, 0, 0)))
    x = torch.randn(1, 4, 6, 7, 7)
    with torch.no_grad():
        plain, wanted = changed(model[2])(model[:2](x)), model(x)
        fastst.convert(model)
        other = changed(model[2])
        torch.testing.assert_close(other(model[:2](x)), plain)
        torch.testing.assert_close(model(x), wanted)
    assert other.weight is model[2].weight and type(other) is nn.Conv3d
    assert fastst.revert(other) == [""] and len(fastst.revert(model)) == 2
    assert vars(other).keys() == vars(model[2]).keys() == vars(nn.Conv3d(4, 4, 1)).keys()


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(training, dynamic):
    torch.manual_seed(0)
    model = small()[0].train(training)
    original = copy.deepcopy(model)
    fastst.convert(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (6, 8):
        x = torch.randn(2, 3, 4, size, size)
        torch.testing.assert_close(compiled(x), original(x))
    for a, b in zip(model.buffers(), original.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model = small().eval()
    original = copy.deepcopy(model)
    fastst.convert(model)
    x = torch.randn(1, 3, 4, 6, 6)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), original(x))


def test_r2plus1d_18():
    torch.manual_seed(0)
    model = r2plus1d_18(5).eval()
    x = torch.randn(1, 3, 4, 24, 24)
    with torch.no_grad():
        before = model(x)
        report = fastst.convert(model)
        assert len(report.replaced) == 17
        assert report.left == []
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("served", [False, True])
def test_a_model_is_freed_with_its_last_user(served: bool) -> None:
    """No circle of a convolution and what answers for it keeps weights until they are collected."""
    gc.collect()
    gc.disable()
    try:
        model: Any = nn.Sequential(
            nn.Conv3d(2, 3, (1, 3, 3)), nn.ReLU(), nn.Conv3d(3, 2, (3, 1, 1)), nn.Conv3d(2, 2, 3)
        )
        fastst.convert(model)
        if served:
            model = fastst.optimize_for_inference(model)
        for _ in range(3):
            model(torch.randn(1, 2, 8, 8, 8))
        weights = [weakref.ref(p) for p in model.parameters()]
        del model
        assert not any(ref() is not None for ref in weights)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["groups", "stride", "padding", "dilation"])
def test_truth_values_are_no_numbers(name: str) -> None:
    """PyTorch refuses them, also where an equal number has been seen."""
    model = nn.Sequential(nn.Conv3d(2, 3, (1, 3, 3)), nn.Conv3d(3, 2, (3, 1, 1)))
    fastst.convert(model)
    x = torch.randn(1, 2, 4, 6, 6)
    model(x)
    for conv in model:
        old = getattr(conv, name)
        setattr(conv, name, True if name == "groups" else (True, 1, 1))
        with pytest.raises(TypeError):
            model(x) + 0
        setattr(conv, name, old)
    model(x)


def test_parts_that_were_converted_before_have_the_names_of_the_whole() -> None:
    def pair() -> nn.Module:
        return nn.Sequential(
            nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU(),
            nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0)),
        )  # fmt: skip

    whole = nn.Sequential(pair(), pair())
    fastst.convert(whole[0])
    report = fastst.convert(whole, torch.randn(1, 4, 4, 6, 6))
    assert [(e.first, e.second) for e in report.already] == [("0.0", "0.2")]
    assert [(e.first, e.second) for e in report.replaced] == [("1.0", "1.2")]
    assert not report.left
