"""The self-check on first use: kinds, verdicts on disk, what a failure does."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastst
from fastst import dispatch
from fastst.backends import aten
from fastst.backends import triton as backend
from fastst.backends.contract import Backend, Example
from fastst.dispatch import quarantine, selection, selfcheck
from fastst.machine import gpu
from fastst.problem.examples import of_kind
from fastst.problem.spec import Problem

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = ("dense", "grouped", "depthwise", "parallel")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTST_CACHE", str(tmp_path))
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(gpu, "processors", lambda capability: 1)


def usual(some: Backend, kind: str, dtype: torch.dtype) -> list[Example]:
    """A call of the kind."""
    return some.usual_examples(kind, dtype)


def dense() -> Problem:
    spec, tensors = of_kind("dense", torch.float32)
    return Problem.of(tensors, spec)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("dense", torch.float16), ("dense", torch.bfloat16), ("dense", torch.float32),
        *zip(KINDS[1:], (torch.float16, torch.bfloat16, torch.float32), strict=True),
    ],
)  # fmt: skip
def test_kernels_pass(kind: str, dtype: torch.dtype) -> None:
    for some in (backend.BACKEND, aten.BACKEND):
        assert selfcheck.check(some, usual(some, kind, dtype), DEVICE, dtype) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_tap_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taps = backend.arguments.taps
    monkeypatch.setattr(backend.arguments, "taps", lambda p: taps(p)._replace(before=(1, 1, 0)))
    few = usual(backend.BACKEND, kind, torch.bfloat16)
    why = selfcheck.check(backend.BACKEND, few, DEVICE, torch.bfloat16)
    assert why is not None and "is off by" in why


CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorchs_convolutions_pass_on_this_cpu(dtype: torch.dtype) -> None:
    for kind in (*KINDS, "conv3d"):
        for phase in ("", " backward"):
            few = usual(aten.BACKEND, kind + phase, dtype)
            assert selfcheck.check(aten.BACKEND, few, CPU, dtype) is None


@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
@pytest.mark.parametrize("broken", ["conv", "conv_backward"])
def test_wrong_convolutions_of_pytorch_are_not_used(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a processor for which they have a bug: an error, and no result."""
    right = getattr(aten, broken)

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        y = found if broken == "conv" else found[1]
        y[(0,) * y.dim()] += 100
        return found

    layer = fastst.Conv2Plus1d(4, 4, 3, padding=1).double()
    x = torch.randn(1, 4, 3, 6, 6, dtype=torch.float64)
    y = layer(x)
    selfcheck.forget()
    monkeypatch.setenv("FASTST_CACHE", os.environ["FASTST_CACHE"] + "/other")
    monkeypatch.setattr(aten, broken, wrong)
    call = (lambda: layer(x)) if broken == "conv" else y.sum().backward
    with (
        pytest.warns(selfcheck.SelfCheckWarning, match="no longer chooses backend 'aten'"),
        pytest.raises(fastst.BackendError, match=r"'aten' is off by .* in its self-check"),
    ):
        call()


@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
def test_a_wrong_conv3d_of_pytorch_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = aten.BACKEND.conv3d
    assert right is not None
    monkeypatch.setenv("FASTST_CACHE", os.environ["FASTST_CACHE"] + "/other")
    monkeypatch.setattr(aten.BACKEND, "conv3d", lambda *call: right(*call)._replace(y=call[1].x))
    selfcheck.forget()
    x = torch.randn(1, 4, 3, 6, 6, dtype=torch.float64)
    with (
        pytest.warns(selfcheck.SelfCheckWarning, match="conv3d layers such as this one, forward"),
        pytest.raises(fastst.BackendError, match=r"'aten' is off by .* in its self-check"),
    ):
        fastst.functional.conv3d(x, x.new_ones(4, 4, 3, 3, 3), padding=1)


def test_verdict_is_kept_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dense()
    runs: list[str] = []

    def checked(request: quarantine.Request) -> str:
        runs.append(request.phase)
        return "is off by 1"

    monkeypatch.setattr(quarantine, "ask", checked)
    with pytest.warns(selfcheck.SelfCheckWarning, match="no longer chooses backend 'triton'"):
        assert selfcheck.why_broken(backend.BACKEND, problem, "forward") == "is off by 1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert selfcheck.why_broken(backend.BACKEND, problem, "forward") == "is off by 1"
        selfcheck.forget()  # another process
        assert selfcheck.why_broken(backend.BACKEND, problem, "forward") == "is off by 1"
    assert runs == ["forward"]
    assert list(selfcheck.verdicts().values()) == ["is off by 1"]


def test_a_broken_file_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "selfcheck.json").write_text("{")
    problem = dense()
    monkeypatch.setattr(quarantine, "ask", lambda request: "")
    assert selfcheck.why_broken(backend.BACKEND, problem, "forward") is None
    assert set(selfcheck.verdicts().values()) == {""}


def test_auto_avoids_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dense()
    problem = replace(problem, device=torch.device("cuda", 0))
    monkeypatch.setattr(backend.BACKEND, "why_not", lambda problem, phase: None)
    only = lambda some, *call: "is off by 1" if some is backend.BACKEND else None  # noqa: E731
    monkeypatch.setattr(selfcheck, "why_broken", only)
    monkeypatch.setattr(selection, "AUTO", ("triton", "aten"))
    monkeypatch.setattr(selection, "_warned", set())
    with pytest.warns(dispatch.FallbackWarning, match="is off by 1"):
        assert dispatch.choose(problem, "forward", "auto") is aten.BACKEND
    assert dispatch.reasons(problem)["triton"] == "is off by 1"
    assert dispatch.choose(problem, "forward", "triton") is backend.BACKEND


def test_failing_to_run_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **meta: Any) -> None:
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(backend.launch, "run", broken)
    few = usual(backend.BACKEND, "dense", torch.float32)
    why = selfcheck.check(backend.BACKEND, few, DEVICE, torch.float32)
    assert why is not None and "no ptxas" in why


def test_failing_to_compute_the_right_result_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where PyTorch's float64 convolutions find no memory beside a model."""

    def broken(*args: Any) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    few = usual(backend.BACKEND, "dense", torch.float32)
    monkeypatch.setattr(selfcheck.reference, "compose_pair", broken)
    with pytest.raises(quarantine.Postponed, match=r"no right result .* CUDNN_STATUS_ALLOC_FAILED"):
        selfcheck.check(backend.BACKEND, few, DEVICE, torch.float32)
