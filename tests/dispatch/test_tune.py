"""The ways of inference on the CPU, the rule that picks one, and the measured choices on disk."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastst
from fastst import dispatch
from fastst.backends import aten, cpu, reference
from fastst.backends.aten import onednn
from fastst.dispatch import selection, selfcheck, tune
from fastst.machine import choices
from fastst.problem.examples import of_kind
from fastst.problem.spec import PairSpec, PairTensors, Problem

WAYS = ("blocked", "rows", "winograd")
PAD = (1, 1, 1, 1, 1, 1)

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FASTST_CACHE", str(tmp_path))
    choices.forget()
    fastst.use_backend("aten")  # the one that has a choice
    yield
    choices.forget()


def tensors(
    c: int = 5, m: int = 11, k: int = 6, size: tuple[int, int, int] = (5, 8, 7), norm: bool = True
) -> PairTensors:
    frozen = [torch.rand(m) + 0.5, torch.randn(m), torch.randn(m), torch.rand(m) + 0.5]
    return PairTensors(
        torch.randn(2, c, *size), torch.randn(m, c, 1, 3, 3), torch.randn(k, m, 3, 1, 1),
        torch.randn(m), torch.randn(k), *(frozen if norm else [None] * 4),
    )  # fmt: skip


def spec(norm: bool = True, **changes: Any) -> PairSpec:
    return PairSpec(padding=PAD, norm="frozen" if norm else "none")._replace(**changes)


def agrees(way: str, t: PairTensors, s: PairSpec) -> None:
    """Error at most twice PyTorch's own and a few ulps; strides as ``nn.Conv3d`` leaves them."""
    problem = Problem.of(t, s)
    assert onednn.why_not(problem) is None
    truth = reference.compose_pair(reference._double(t), s)
    y = onednn.run(way, problem, t)
    assert y.stride() == problem.empty_output(t.x).stride()
    own = reference.compose_pair(t, s)
    ulps = 12 * torch.finfo(torch.float32).eps * truth.abs().max()
    worst = (own.double() - truth).abs().max() * 2 + ulps
    assert (y.double() - truth).abs().max() <= worst, way


@needs_onednn
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("activation", ["relu", "silu", "none"])
def test_ways_agree(way: str, norm: bool, layout: Any, activation: str) -> None:
    t = tensors(norm=norm)
    three = (a.contiguous(memory_format=layout) for a in t[:3])
    agrees(
        way,
        t._replace(**dict(zip(t._fields, three, strict=False))),
        spec(norm, activation=activation),
    )


@needs_onednn
@pytest.mark.parametrize("way", WAYS)
def test_strided_input_and_strides(way: str) -> None:
    t = tensors(size=(5, 8, 14))
    agrees(way, t._replace(x=t.x[..., ::2]), spec(stride=(2, 1, 2)))


@needs_onednn
@pytest.mark.parametrize("way", ["blocked", "rows"])
@pytest.mark.parametrize("size", [(1, 8, 8), (2, 2, 2), (4, 9, 7)])
def test_temporal_first_and_narrow(way: str, size: tuple[int, int, int]) -> None:
    t = tensors(c=6, m=6, k=6, size=size)
    agrees(way, t, spec(stride=(2, 2, 2)))
    swapped = t._replace(first_weight=t.second_weight, second_weight=t.first_weight)
    agrees(way, swapped, spec(order="temporal-first", stride=(2, 2, 2)))


@needs_onednn
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_propagate(way: str, bad: float) -> None:
    """oneDNN's fused relu makes 0 of NaN, and Winograd's differences NaN of infinity."""
    t = tensors(c=2, m=32, size=(5, 16, 16))
    t.x[0, 0, 2, 5, 5] = bad
    problem = Problem.of(t, spec())
    expected = reference.compose_pair(t, problem.spec)  # type: ignore[arg-type]
    y = onednn.run(way, problem, t)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@needs_onednn
def test_fused_where_finite_matters() -> None:
    """The shape of the test above is one that fuses relu: without the guard it would fail."""
    t = tensors(c=2, m=32, size=(5, 16, 16))
    assert onednn._stays_finite(t.x, t.first_weight, t.first_bias)
    for i, bad in enumerate((float("nan"), float("inf"), 1e38)):
        t.x.view(-1)[i] = bad
        assert not onednn._stays_finite(t.x, t.first_weight, t.first_bias)
        t.x.view(-1)[i] = 0.0
    assert onednn._mid_elements(Problem.of(t, spec())) > t.x.numel() + t.first_weight.numel()


def test_refusals_have_reasons() -> None:
    t = tensors()
    for changes, word in [
        (dict(norm="batch"), "batch"), (dict(groups=(5, 1)), "groups"),
        (dict(dilation=(1, 2, 2)), "dilation"), (dict(padding=(2, 0, 1, 1, 1, 1)), "alike"),
        (dict(padding_mode=("replicate", "zeros")), "zeros"),
    ]:  # fmt: skip
        why = onednn.why_not(Problem.of(t, spec()._replace(**changes)))
        assert why is not None and word in why
        assert aten.BACKEND.candidates(Problem.of(t, spec()._replace(**changes)), "forward") == ()
    assert onednn.why_not(Problem.of(t._replace(x=t.x.double()), spec())) is not None
    assert aten.BACKEND.candidates(Problem.of(t, spec()), "backward") == ()


def test_rule_is_about_the_problem() -> None:
    def picks(c: int, m: int, size: tuple[int, int, int], last: bool) -> str:
        layout = torch.channels_last_3d if last else torch.contiguous_format
        x = torch.empty(1, c, *size, device="meta").contiguous(memory_format=layout)
        ws = torch.empty(m, c, 1, 3, 3, device="meta")
        wt = torch.empty(c, m, 3, 1, 1, device="meta")
        return onednn.rule(Problem.of(PairTensors(x, ws, wt), PairSpec(padding=PAD)))

    assert picks(64, 144, (16, 56, 56), False) == "blocked"
    assert picks(64, 144, (16, 56, 56), True) == "winograd"
    assert picks(64, 144, (16, 55, 56), True) == "rows"
    assert picks(256, 576, (4, 14, 14), True) == "rows"


def _model() -> tuple[torch.nn.Module, torch.Tensor]:
    layers = [fastst.Conv2Plus1d(4, 4, 3, padding=1, norm="batch") for _ in range(2)]
    return torch.nn.Sequential(*layers).eval(), torch.randn(1, 4, 4, 8, 8)


def _convolutions() -> tuple[torch.nn.Module, torch.Tensor]:
    layers = [fastst.Conv3d(8, 8, 3, padding=1, input_activation="relu") for _ in range(2)]
    return torch.nn.Sequential(*layers).eval(), torch.randn(1, 8, 4, 8, 8)


@needs_onednn
def test_tune_measures_once_and_remembers(tmp_path: Path) -> None:
    model, x = _model()
    before = model(x)
    found = fastst.tune(model, x, seconds=0.01)
    assert len(found) == 1  # the two layers are the same problem
    (m,) = found
    assert set(m.seconds) == set(WAYS) and m.way in WAYS and m.phase == "forward"
    assert list(tmp_path.glob("*.json")) == [tmp_path / "tuning.json"]
    choices.forget()
    assert choices.choice(m.backend, m.problem, m.phase) == m.way
    torch.testing.assert_close(model(x), before)


@needs_onednn
@pytest.mark.parametrize("way", WAYS)
def test_choice_is_obeyed(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _model()
    with dispatch.recording() as calls, torch.no_grad():
        model(x)
    problem = calls[0].problem
    assert problem is not None
    choices.remember({("aten", problem, "forward", torch.get_num_threads()): way})
    seen: list[str] = []
    real = onednn.run
    monkeypatch.setattr(onednn, "run", lambda w, *rest: seen.append(w) or real(w, *rest))  # type: ignore[func-returns-value]
    with torch.no_grad():
        model(x)
    assert seen == [way, way]


@needs_onednn
def test_choices_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text(json.dumps({"another machine": "rows"}))
    model, x = _model()
    fastst.tune(model, x, seconds=0.01)
    stored = json.loads((tmp_path / "tuning.json").read_text())
    assert len(stored) == 2 and stored["another machine"] == "rows"


@needs_onednn
@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', "\x00\xff"])
def test_corrupt_file_is_ignored_with_one_warning(tmp_path: Path, text: str) -> None:
    (tmp_path / "tuning.json").write_text(text)
    model, x = _model()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model(x)
        model(x)
    assert [str(w.message) for w in caught if "ignores the cache" in str(w.message)] != []
    assert len([w for w in caught if "ignores the cache" in str(w.message)]) == 1


@needs_onednn
def test_unknown_way_in_the_file_is_ignored(tmp_path: Path) -> None:
    model, x = _model()
    fastst.tune(model, x, seconds=0.01)
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), "gone")))
    choices.forget()
    with torch.no_grad():
        assert model(x).isfinite().all()


@needs_onednn
@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_warns(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    model, x = _model()
    with pytest.warns(UserWarning, match="this process only"):
        (m,) = fastst.tune(model, x, seconds=0.01)
    assert choices.choice(m.backend, m.problem, m.phase) == m.way


def test_training_is_tuned_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten.BACKEND, "candidates", lambda problem, phase: ("one", "another"))
    monkeypatch.setattr(aten.BACKEND, "candidate", lambda *call: lambda: None)
    model, x = _model()
    found = fastst.tune(model.train(), x, seconds=0.001)
    # Of two equal layers the first one's input needs no gradient: the same problem all the same.
    assert [m.phase for m in found] == ["forward", "backward"]
    assert all(p.grad is None for p in model.parameters())


@needs_onednn
@pytest.mark.parametrize("seen", [partial(fastst.tune, seconds=0.001), fastst.explain])
def test_the_model_and_the_random_state_stay_as_they_were(
    seen: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aten.BACKEND, "candidates", lambda problem, phase: ("one", "another"))
    monkeypatch.setattr(aten.BACKEND, "candidate", lambda *call: lambda: torch.randn(1))
    layer = fastst.Conv2Plus1d(4, 4, 3, padding=1, norm="batch")
    model = torch.nn.Sequential(torch.nn.Dropout(), layer, torch.nn.BatchNorm3d(4))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    seen(model, torch.randn(1, 4, 3, 5, 5, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name]), name


@pytest.mark.skipif(isinstance(cpu.load(), str), reason="the cpu library was not built")
@pytest.mark.parametrize("make", [_model, _convolutions])
def test_backends_are_measured_and_the_faster_one_is_taken(
    make: Callable[[], tuple[torch.nn.Module, torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make()
    fastst.use_backend("auto")
    found = fastst.tune(model.train(), x, seconds=0.001)
    both = [m for m in found if m.backend == "auto"]
    assert [m.phase for m in both] == ["forward", "backward"]
    assert all(set(m.seconds) == {"cpu", "aten"} for m in both)
    model.eval()
    with dispatch.recording() as calls, torch.no_grad():
        model(x)
    problem = calls[0].problem
    assert problem is not None
    for fastest, other in (("aten", "cpu"), ("cpu", "aten")):
        key = ("auto", problem, "forward", torch.get_num_threads())
        choices.remember({key: fastest})
        with dispatch.recording() as calls, torch.no_grad():
            model(x)
        assert {c.chosen for c in calls} == {fastest}
        told = fastst.explain(model, x).reasons[other]
        assert told == f"{fastest!r} was measured to be faster by fastst.tune"
    # What was measured is not taken where it cannot run, and does not bind who asks by name.
    monkeypatch.setattr(cpu.BACKEND, "why_not", lambda problem, phase: "is ill")
    with dispatch.recording() as calls, torch.no_grad():
        model(x)
        fastst.use_backend("reference")
        model(x)
    assert [c.chosen for c in calls] == ["aten", "aten", "reference", "reference"]


class Gpu:
    """A GPU on which time passes only while it works: events and graphs as of ``torch.cuda``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.capturing: list[float] | None = None
        gpu = self

        class Event:
            at = 0.0

            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)

        class CUDAGraph:
            def __init__(self) -> None:
                self.work: list[float] = []

            def replay(self) -> None:
                gpu.now += sum(self.work)

        @contextlib.contextmanager
        def capture(graph: CUDAGraph, pool: object) -> Iterator[None]:
            assert pool == "pool"
            self.capturing = graph.work
            yield
            self.capturing = None

        def synchronize() -> None:
            assert self.capturing is None, "a capture may wait for nothing"

        for name, made in (
            ("Event", Event), ("CUDAGraph", CUDAGraph), ("graph", capture),
            ("graph_pool_handle", lambda: "pool"), ("synchronize", synchronize),
            ("device", lambda device: contextlib.nullcontext()),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, made)

    def kernel(self, seconds: float) -> None:
        if self.capturing is None:
            self.now += seconds
        else:
            self.capturing.append(seconds)


def test_on_a_gpu_its_own_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of a host which is slower for the better way."""
    gpu = Gpu(monkeypatch)

    def way(host: float, *kernels: float) -> Callable[[], None]:
        def run() -> None:
            time.sleep(host)
            for seconds in kernels:
                gpu.kernel(seconds)

        return run

    trials = {"few": way(0.0, 3e-5), "many": way(2e-3, 1e-5, 1e-5)}
    found = tune.race_on_gpu(trials, 0.01, torch.device("cuda", 0))
    assert found == pytest.approx({"few": 3e-5, "many": 2e-5})
    by_host = tune.race(trials, 0.01)
    assert by_host["few"] < by_host["many"]  # what would be chosen by the host's time


def test_training_is_tuned_with_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def candidate(problem: Problem, phase: str, way: str, save: bool) -> Callable[[], object]:
        seen.append((phase, save))
        return lambda: None

    monkeypatch.setattr(aten.BACKEND, "candidates", lambda problem, phase: ("one", "another"))
    monkeypatch.setattr(aten.BACKEND, "candidate", candidate)
    model, x = _model()
    fastst.tune(model.eval(), x, seconds=0.001)
    assert set(seen) == {("forward", False)}
    fastst.tune(model.train(), x, seconds=0.001)
    assert ("forward", True) in seen


def test_a_model_without_a_choice_is_refused() -> None:
    model, x = _model()
    fastst.use_backend("reference")
    with pytest.raises(
        ValueError, match=r"more than one way .* conv2plus1d forward on 'reference'"
    ):
        fastst.tune(model, x)
    with pytest.raises(ValueError, match="got Linear, which made none"):
        fastst.tune(torch.nn.Linear(2, 2), torch.randn(1, 2))


def test_bad_seconds() -> None:
    model, x = _model()
    with pytest.raises(ValueError, match="seconds must be positive, got 0"):
        fastst.tune(model, x, seconds=0)


def test_ways_that_fail_their_self_check_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(backend: Any, problem: Any, phase: Any, way: str | None = None) -> str | None:
        return "is off by 1" if way == "another" else None

    monkeypatch.setattr(selfcheck, "why_broken", why)
    monkeypatch.setattr(aten.BACKEND, "candidates", lambda problem, phase: ("one", "another"))
    spec, tensors = of_kind("dense", torch.float32)
    call = selection.Decision("conv2plus1d", Problem.of(tensors, spec), "forward", "aten", None)
    with fastst.use_backend("auto"):
        assert list(dict(tune._choices(call, False))["aten"]) == ["one"]
