"""Which backend runs: requests, environment, reasons, warnings, strictness."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastst
from fastst import dispatch
from fastst.backends import aten, cpu
from fastst.dispatch import selection
from fastst.functional import conv2plus1d


def call(**settings: Any) -> Tensor:
    x = torch.randn(1, 2, 3, 4, 4)
    return conv2plus1d(x, torch.randn(3, 2, 1, 3, 3), torch.randn(2, 3, 3, 1, 1), **settings)


def ran(**settings: Any) -> list[str]:
    with dispatch.recording() as calls:
        call(padding=1, **settings)
    return [c.chosen for c in calls]


# What auto takes on the CPU, where the native library was built and where it was not.
FIRST = "aten" if isinstance(cpu.load(), str) else "cpu"


def foreign() -> fastst.Conv2Plus1d:
    """A layer that must be composed, for a reason of its own each time."""
    layer = fastst.Conv2Plus1d(2, 2, 3, padding=1, activation=nn.Tanh())
    return layer


@pytest.fixture(autouse=True)
def _unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_warned", set())


def test_use_backend_within_a_block() -> None:
    fastst.use_backend("auto")
    with fastst.use_backend("reference"):
        assert ran() == ["reference"]
        with fastst.use_backend("aten"):
            assert ran() == ["aten"]
        assert ran() == ["reference"]
    assert dispatch.requested_backend() == "auto"
    with pytest.raises(KeyError), fastst.use_backend("reference"):
        raise KeyError
    assert dispatch.requested_backend() == "auto"


def test_use_backend_from_here_on() -> None:
    fastst.use_backend("reference")
    assert ran() == ["reference"]
    fastst.use_backend("auto")
    assert ran() == [FIRST]


def test_backward_keeps_the_backend_of_its_forward() -> None:
    x = torch.randn(1, 2, 3, 4, 4, requires_grad=True)
    with fastst.use_backend("reference"):
        y = conv2plus1d(x, torch.randn(3, 2, 1, 3, 3), torch.randn(2, 3, 3, 1, 1))
    with dispatch.recording() as calls:
        y.sum().backward()
    assert [(c.phase, c.chosen) for c in calls] == [("backward", "reference")]


def test_a_request_reaches_other_threads() -> None:
    found: list[list[str]] = []
    with fastst.use_backend("reference"):
        thread = threading.Thread(target=lambda: found.append(ran()))
        thread.start()
        thread.join()
    assert found == [["reference"]]


@pytest.mark.parametrize("name", ["cudnn", "", "Reference"])
def test_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown backend {name!r}: expected one of 'auto', .*"):
        fastst.use_backend(name)
    assert dispatch.requested_backend() == "auto"


def test_a_named_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten.BACKEND, "why_not", lambda problem, phase: "lacks a limb")
    told = "'aten' cannot run the forward: it lacks a limb"
    with fastst.use_backend("aten"), pytest.raises(fastst.BackendError, match=told):
        call()


def test_named_backend_refuses_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten.BACKEND, "why_not", lambda problem, phase: "lacks a limb")
    monkeypatch.setattr(aten.BACKEND, "conv2plus1d", lambda *_: pytest.fail("it ran"))
    mean, var = torch.zeros(3), torch.ones(3)
    norm = fastst.functional.BatchNorm(mean, var, training=True)
    with fastst.use_backend("aten"), pytest.raises(fastst.BackendError):
        call(norm=norm)
    assert not mean.any()


def test_no_backend_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in dispatch.AUTO:
        monkeypatch.setattr(dispatch.BACKENDS[name], "why_not", lambda problem, phase: "is ill")
    with pytest.raises(fastst.BackendError, match=r"no backend can run the forward: .*is ill"):
        call()


def test_a_missing_backend_says_how_to_get_it() -> None:
    """Whatever is not there gives a reason, and naming it raises with that reason."""
    layer = fastst.Conv2Plus1d(2, 2, 3, padding=1)
    reasons = fastst.explain(layer, torch.randn(1, 2, 3, 4, 4)).reasons
    assert set(reasons) == set(dispatch.BACKENDS) - {FIRST}
    for name, why in reasons.items():
        assert len(why) > 10, name
        if "comes first" not in why and "by name" not in why:
            with fastst.use_backend(name), pytest.raises(fastst.BackendError, match=name):
                layer(torch.randn(1, 2, 3, 4, 4))


# ---- falling back


def test_fallback_warns_once_with_the_reason() -> None:
    layer = foreign()
    x = torch.randn(1, 2, 3, 4, 4)
    with pytest.warns(fastst.FallbackWarning, match="its activation is a Tanh") as caught:
        layer(x)
    assert [w.filename for w in caught] == [__file__]  # where the call stands
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        foreign()(x)  # the same reason


def test_a_call_that_is_slow_warns_where_it_stands() -> None:
    x = torch.randn(1, 2, 3, 4, 4, dtype=torch.float64)
    layer = fastst.Conv2Plus1d(2, 9, 3, padding=1).double()
    with pytest.warns(fastst.FallbackWarning, match="PyTorch's own convolutions") as caught:
        torch.nn.Sequential(layer)(x)
    assert [w.filename for w in caught] == [__file__]


def test_another_reason_warns_again() -> None:
    x = torch.randn(1, 2, 3, 4, 4)
    with pytest.warns(fastst.FallbackWarning, match="Tanh"):
        foreign()(x)
    hooked = fastst.Conv2Plus1d(2, 2, 3, padding=1)
    hooked.temporal.register_forward_hook(lambda *_: None)
    with pytest.warns(fastst.FallbackWarning, match="its temporal convolution has hooks"):
        hooked(x)


def test_strict_makes_falling_back_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTST_STRICT", "1")
    with pytest.raises(fastst.BackendError, match=r"Tanh.*FASTST_STRICT=1"):
        foreign()(torch.randn(1, 2, 3, 4, 4))
    assert ran() == [FIRST]  # what does not fall back is not refused
    monkeypatch.setenv("FASTST_STRICT", "0")
    with pytest.warns(fastst.FallbackWarning):
        foreign()(torch.randn(1, 2, 3, 4, 4))


def test_a_named_backend_is_never_composed_instead() -> None:
    with fastst.use_backend("aten"), pytest.raises(fastst.BackendError, match="'aten' was asked"):
        foreign()(torch.randn(1, 2, 3, 4, 4))


def test_what_works_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for norm in (None, "batch"):
            layer = fastst.Conv2Plus1d(2, 4, 3, padding=1, norm=norm)
            layer(torch.randn(2, 2, 3, 4, 4)).sum().backward()
            layer.eval()(torch.randn(2, 2, 3, 4, 4))


# ---- PyTorch's own convolutions on a CPU

NOT_BUILT = "needs the native library, which was not built (no compiler was found)"


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load", lambda: NOT_BUILT)


@pytest.mark.usefixtures("no_library")
def test_a_cpu_without_its_library_says_so_once() -> None:
    layer = fastst.Conv2Plus1d(2, 4, 3, padding=1, norm="batch")
    x = torch.randn(2, 2, 3, 4, 4, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(x).sum().backward()
        layer.eval()(x)
        fastst.Conv2Plus1d(2, 2, 3, padding=1)(x)
    (warning,) = caught
    assert warning.category is fastst.FallbackWarning
    assert str(warning.message) == (
        "conv2plus1d runs its forward on PyTorch's own convolutions ('aten'): 'cpu' " + NOT_BUILT
    )


@pytest.mark.usefixtures("no_library")
def test_strict_refuses_them_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTST_STRICT", "1")
    with pytest.raises(fastst.BackendError, match=r"no compiler was found.*FASTST_STRICT=1"):
        call()
    with fastst.use_backend("aten"):  # who asks for them gets them
        call()


def test_a_dtype_without_kernels_for_the_cpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fastst.Conv2Plus1d(2, 4, 3, padding=1).double()
    x = torch.randn(1, 2, 3, 4, 4, dtype=torch.float64)
    if FIRST == "cpu":
        told = "computes float32, bfloat16 and float16, the tensors are in float64"
        with pytest.warns(fastst.FallbackWarning, match=f"'cpu' {told}"):
            layer(x)
        assert told in fastst.explain(layer, x).reasons["cpu"]
    monkeypatch.setenv("FASTST_STRICT", "1")
    with pytest.raises(fastst.BackendError, match="FASTST_STRICT=1"):
        layer(x)


def test_an_op_without_kernels_for_the_cpu_is_not_slow_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch's convolutions, seen as 4D ones, are what this library has for it."""
    monkeypatch.setenv("FASTST_STRICT", "1")
    monkeypatch.setattr(cpu.BACKEND, "parallel_conv2plus1d", None)
    # Of a size that no other test asks for: reasons are remembered.
    layer, x = fastst.ParallelConv2Plus1d(2, 4, 3, padding=1), torch.randn(1, 2, 3, 4, 23)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
    assert fastst.explain(layer, x).reasons["cpu"] == "has no parallel_conv2plus1d"


def test_what_is_left_to_them_because_they_are_faster_is_not_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "load", lambda: cpu)
    monkeypatch.setenv("FASTST_STRICT", "1")
    layer = fastst.Conv2Plus1d(4, 4, 3, padding=1, mid_channels=4, groups=(2, 2))
    x = torch.randn(1, 4, 3, 4, 4)
    found = fastst.explain(layer, x)
    assert found.backend == "aten" and "slow with fewer than" in found.reasons["cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


@pytest.mark.usefixtures("no_library")
def test_explain_explains_what_strict_refuses_and_keeps_the_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = fastst.Conv2Plus1d(2, 4, 3, padding=1), torch.randn(1, 2, 3, 4, 4)
    monkeypatch.setenv("FASTST_STRICT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fastst.explain(layer, x)
    assert found.backend == "aten" and found.reasons["cpu"] == NOT_BUILT
    assert "forward: aten, PyTorch's own convolutions" in str(found)
    monkeypatch.setenv("FASTST_STRICT", "0")
    with pytest.warns(fastst.FallbackWarning, match="no compiler was found"):
        layer(x)


# ---- explain


def test_explain_says_what_and_why() -> None:
    layer = fastst.Conv2Plus1d(2, 4, 3, padding=1, norm="batch")
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    found = fastst.explain(layer, torch.randn(2, 2, 3, 4, 4))
    assert found.backend == FIRST and found.why_composed is None
    assert found.reasons["reference"]
    text = str(found)
    assert FIRST in text and "not reference" in text and "(2, 2, 3, 4, 4)" in text
    for k, v in layer.state_dict().items():
        assert torch.equal(v, before[k]), "explain changed the module"


def test_what_a_call_on_the_cpu_asks_of_its_output_is_no_question_to_a_gpu() -> None:
    """As of every converted network in training, where a batch norm follows a pair."""
    with dispatch.recording() as calls:
        call(padding=1)
    problem: Any = calls[0].problem
    asking = dataclasses.replace(problem, spec=problem.spec._replace(output_statistics=True))
    assert dispatch.reasons(asking)["cuda"] == "needs an NVIDIA GPU, the tensors are on cpu"


def test_explain_says_why_composed() -> None:
    found = fastst.explain(foreign(), torch.randn(1, 2, 3, 4, 4))
    assert found.backend == "composed"
    assert "Tanh" in str(found.why_composed) and "Tanh" in str(found)
    with pytest.raises(ValueError, match="requires a module that calls fastst"):
        fastst.explain(nn.Linear(2, 2), torch.randn(1, 2))


# ---- environment, in processes of their own


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_backend_from_the_environment() -> None:
    """Read at import, as a wrong one shows."""
    wrong = python("import fastst", FASTST_BACKEND="nonsense")
    assert wrong.returncode and "unknown backend 'nonsense'" in wrong.stderr


@pytest.mark.slow
def test_import_needs_no_triton_and_no_library() -> None:
    """Nor a GPU, nor a compiler; and it starts no thread, process or GPU context."""
    code = """
import sys, threading
sys.modules["triton"] = None
sys.modules["fastst._C"] = None
import torch, fastst
y = fastst.Conv2Plus1d(2, 2, 3)(torch.randn(1, 2, 3, 4, 4))
assert not torch.cuda.is_initialized() and threading.active_count() == 1
for name in fastst.dispatch.BACKENDS:
    with fastst.use_backend(name):
        try:
            fastst.Conv2Plus1d(2, 2, 3)(torch.randn(1, 2, 3, 4, 4))
        except fastst.BackendError as why:
            print(why)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
