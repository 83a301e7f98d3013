"""Every line that only a GPU reaches, run with a stand-in for CUDA; and the list of the rest."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fastst
from benchmarks import gpu_run, instances, layers, measure, models, overhead, probe, record, shapes
from fastst import check, demo, dispatch, info
from fastst.backends import cuda, triton
from fastst.backends.cuda import depthwise as cuda_depthwise
from fastst.backends.cuda import examples as cuda_examples
from fastst.backends.cuda import library
from fastst.backends.triton import launch, rehearsal
from fastst.dispatch import quarantine, selection, selfcheck, tune, without_trace
from fastst.machine import devices
from fastst.problem import examples as examples_of_layers
from fastst.problem.examples import of_kind
from fastst.problem.spec import Problem
from fastst.rewrite import optimize
from fastst.rewrite.convert import state
from tests.support import ROOT, gpu_lines
from tests.support.standin import StandIn, kernels

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.device("cuda", 0)

# Those that no stand-in runs, as (file, part of the line): why.
LEFT: dict[tuple[str, str], str] = {}


class Setting:
    """What a scenario gets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.mp, self.folder = monkeypatch, folder
        self.gpus = StandIn(monkeypatch, processors=1)  # few programs of the interpreter


def pair(channels: int, groups: int = 1) -> nn.Module:
    return fastst.Conv2Plus1d(
        channels, channels, 3, padding=1, mid_channels=channels, groups=groups, norm="batch",
        bias=False,
    )  # fmt: skip


def clip(channels: int) -> tuple[int, ...]:
    return 1, channels, 3, 5, 6


def step(model: nn.Module, channels: int, dtype: torch.dtype = torch.float16) -> list[str]:
    """A training step and a call in eval mode on "cuda"; the backends that ran."""
    model = model.to("cuda", dtype)
    x = torch.randn(clip(channels), device="cuda", dtype=dtype)
    x = x.to(memory_format=torch.channels_last_3d).requires_grad_()
    assert x.device == GPU
    with dispatch.recording() as calls:
        torch.autograd.backward(model(x).float().square().sum())
        with torch.no_grad():
            model.eval()(x)
    assert x.grad is not None
    return [call.chosen for call in calls]


def triton_runs(s: Setting) -> None:
    with kernels(s.mp):
        with launch.watch_launches(lambda launch: False):  # the host's part is enough
            assert step(pair(8), 8) == ["triton"] * 3
        ways = triton.BACKEND.candidates
        spec, tensors = of_kind("dense", torch.float16)
        problem = Problem.of(tensors, spec)
        assert problem.device == GPU
        with launch.watch_launches(lambda launch: False):
            for phase in ("forward", "backward"):
                way = ways(problem, phase)[-1]  # type: ignore[arg-type]
                trial = triton.BACKEND.candidate(problem, phase, way, True)  # type: ignore[arg-type]
                assert tune.race_on_gpu({way: trial}, 0.001, GPU).keys() == {way}
            layer = pair(8).to("cuda", torch.float16).eval()
            assert fastst.tune(layer, torch.zeros(clip(8)).to("cuda").half(), seconds=0.001)
        with devices.guard(torch.device("cuda", 2)):
            assert torch.cuda.current_device() == 2
        assert "multiprocessors" in "\n".join(info._devices())
        assert "triton, on cuda in bfloat16: runs" in "\n".join(info._backends())


def one_layer(s: Setting) -> None:
    """Of the networks whose layers are checked."""
    few = examples_of_layers.problems

    def problems(kind: str, *of: Any) -> list[Problem]:
        return few(kind, *of)[:1]

    for module in (rehearsal, cuda_examples):
        s.mp.setattr(module, "problems", problems)


def checks_in_advance(s: Setting) -> None:
    """What ``fastst.check`` runs on a GPU, and how it compiles Triton's part."""
    one_layer(s)
    s.mp.setattr(launch, "_compiling", {})
    s.mp.setattr(cuda_depthwise, "_stages", lambda problem, backward: 2)
    assert triton.BACKEND.kinds(GPU, torch.float16)
    kinds = [(triton.BACKEND, f"{kind} forward") for kind in ("dense", "parallel", "conv3d")]
    for backend, kind in (*kinds, (cuda.BACKEND, "hopper")):
        before = len(s.gpus.compiled)
        found = selfcheck.examples_of(backend, kind, torch.float16, GPU)
        assert any(e.instances for e in found)
        assert len(s.gpus.compiled) == before
        if backend is triton.BACKEND:
            assert found[0].make().instances  # type: ignore[union-attr]
            assert len(s.gpus.compiled) > before
    # In training backward's kernels are compiled while those of the forward pass are checked.
    spec, tensors = of_kind("dense", torch.float16)
    training = Problem.of(tensors._replace(mean=None, var=None), spec._replace(norm="batch"))
    training = replace(training, device=GPU)
    triton.BACKEND.rehearse(training, "forward", None)[0].make()  # type: ignore[union-attr]
    for done in launch._compiling.values():
        done.result()
    needed = triton.BACKEND.instances(training, "backward", None)
    assert {*needed} <= {each.instance for each in s.gpus.compiled}
    launched = s.gpus.compiled[0]
    warm: list[Any] = []
    kernel = SimpleNamespace(warmup=lambda *args, **meta: warm.append(meta))
    StandIn.compile(launched._replace(kernel=kernel), GPU)
    assert warm[0]["grid"] == (1,)
    s.mp.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    devices.capability.cache_clear()
    assert not triton.BACKEND.kinds(GPU, torch.float16)


def promises_of_streams(s: Setting) -> None:
    """A convolution that is computed later is computed on the stream on which it was asked for."""
    with kernels(s.mp):
        then = state.State(GPU)
        other = torch.cuda.Stream(GPU)
        with torch.cuda.stream(other), then.restored():
            assert torch.cuda.current_stream(GPU) == then.stream
        assert other.waited == [then.stream]  # type: ignore[attr-defined]
        assert then.current
        with torch.cuda.stream(other):
            assert not then.current


def random_numbers_of_gpus(s: Setting) -> None:
    put: list[tuple[int, int]] = []
    s.mp.setattr(torch.cuda, "is_initialized", lambda: True)
    s.mp.setattr(torch.cuda, "get_rng_state", lambda device: 7 + device.index)
    s.mp.setattr(torch.cuda, "set_rng_state", lambda state, d: put.append((d.index, state)))
    with without_trace.keep_random_numbers():
        assert not put
    assert put == [(0, 7), (1, 8), (2, 9)]


def hip(s: Setting) -> None:
    s.mp.setattr(torch.version, "hip", "6.4")
    devices.capability.cache_clear()
    assert launch.capability(GPU) == (0, 0x942)
    assert not launch.allows_tf32()
    devices.capability.cache_clear()


def cuda_runs(s: Setting) -> None:
    if isinstance(found := library.load_emulated(), str):
        pytest.skip(found)
    with kernels(s.mp, native=True):
        assert set(step(pair(8, groups=8), 8)) == {"cuda"}  # depthwise
        model = pair(16)
        assert set(step(model, 16)) == {"cuda"}  # Hopper
        s.gpus.capturing = True
        with torch.no_grad():
            x = torch.zeros(clip(16)).half().to("cuda", memory_format=torch.channels_last_3d)
            assert model(x).shape == x.shape
        s.gpus.capturing = False
        spec, tensors, *_ = cuda_examples._depthwise(False, torch.float16)[0]
        nowhere = replace(Problem.of(tensors, spec), device=torch.device("cuda"))
        assert cuda_depthwise.why_not(nowhere) is None
        assert "hopper" in cuda.BACKEND.kinds(GPU, torch.bfloat16)
        one_layer(s)
        names = [u.name for u in instances.units(GPU, [torch.bfloat16], dry=False)]
        assert any("weight gradients 72 × 3" in name for name in names)
        assert any("parallel backward" in name for name in names)


def a_check_in_the_other_process(s: Setting) -> None:
    told: list[dict[str, Any]] = []
    flags: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = flags.fp32_precision  # which that process sets for itself alone
    s.gpus.current = 1
    with kernels(s.mp):
        request = quarantine.Request("aten", GPU, torch.float32, False, kind="dense")
        assert not check.answer(request, lambda **what: told.append(what))
    flags.fp32_precision = before
    assert told[-1] == {"verdict": "", "last": False}
    assert s.gpus.current == 0  # on the device that was asked for, whichever was in use
    assert [d.index for d in check.gpus()] == [2, 0]
    with kernels(s.mp):
        assert any(k == "dense forward" for k in triton.BACKEND.kinds(GPU, torch.float16))


def selfcheck_in_a_capture(s: Setting) -> None:
    s.gpus.capturing = True
    with kernels(s.mp):
        spec, tensors = of_kind("grouped", torch.float16)
        why = selfcheck.why_broken(triton.BACKEND, Problem.of(tensors, spec), "forward")
    assert why == "has not been checked before this graph capture"


def clocks_memory_and_kernel_names(s: Setting) -> None:
    class Profile:
        profiler = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))

        def __init__(self, **kwargs: Any) -> None:
            assert torch.profiler.ProfilerActivity.CUDA in kwargs["activities"]

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def event(name: str, kind: str) -> Any:
        return SimpleNamespace(name=lambda: name, device_type=lambda: f"DeviceType.{kind}")

    events = [
        event("aten::conv3d", "CPU"), event("Memset (Device)", "CUDA"), event("tap_conv", "CUDA"),
        event("vol2col_kernel", "CUDA"),
    ]  # fmt: skip
    s.mp.setattr(measure, "profile", Profile)
    with kernels(s.mp):
        seen = measure.observe(lambda: torch.ones(3, device="cuda"), GPU)
        assert seen == (1 << 20, ("tap_conv", "vol2col_kernel"), "vol2col")
        clock = measure.Clock(GPU)
        x = torch.ones(4, device="cuda")
        calls = {"a": measure.Timed(lambda i: x + i)}
        samples = measure.interleave(clock, calls, 0.0, 2, 0, 3)
        assert len(samples["a"]) == 3 and min(samples["a"]) >= 0
        s.mp.setattr(torch, "mm", lambda a, b: None)  # of sizes that suit a GPU
        s.mp.setattr(torch, "randn", lambda *shape, **how: None)
        s.mp.setattr(time_of := measure.time, "perf_counter", count())
        assert time_of is not None
        found = measure.ceilings(GPU, ["bf16"], dry=True)
    assert found["copy_gbs"] > 0 and set(found["gemm_tflops"]) == {"bf16"}


def count() -> Callable[[], float]:
    state = [0.0]

    def tick() -> float:
        state[0] += 0.001
        return state[0]

    return tick


def benchmarks_of_layers(s: Setting) -> None:
    s.mp.setattr(selection, "AUTO", ("aten",))
    s.mp.setattr(measure, "observe", lambda call, device: measure.Observed(0, (), None))
    small = layers.Options(GPU, rounds=2, seconds=0.0)
    kept = record.Record(s.folder / "record.json", GPU, fresh=True)
    case = next(c for c in shapes.ALL if c.name == "mid-45").tiny()
    with kernels(s.mp):
        assert layers.run(kept, [case], ["inference"], ["fp32"], small) == 0
        row = next(r for r in kept.data["layers"] if r["contender"] == "fastst auto")
        assert row["refused"] is None and row["ms"] > 0
    assert kept.data["machine"]["gpu"] == "NVIDIA H200"
    assert kept.data["place"] == "nvidia-h200"


def benchmarks_of_the_host(s: Setting) -> None:
    graphs: list[Any] = []
    s.mp.setattr(selection, "AUTO", ("aten",))
    capture = torch.cuda.CUDAGraph
    s.mp.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(capture()) or graphs[-1])
    with kernels(s.mp):
        y, x = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")

        def call() -> torch.Tensor:
            if graphs:
                graphs[-1].again = lambda: y.copy_(x)
            return y.copy_(x)

        (row,) = overhead.measure_graphs(GPU, {"eager": call}, 3)
        assert row["us"] >= 0 and graphs[-1].replays == 1 + 3 * overhead.CALLS
        graphs.clear()
        with pytest.raises(RuntimeError, match="gives other results"):
            overhead.measure_graphs(GPU, {"eager": lambda: y.copy_(x)}, 3)
        s.mp.setattr(overhead, "measure_graphs", lambda *_: [])
        s.mp.setattr(overhead, "EVICTION", 64)
        s.mp.setattr(overhead, "_convert", lambda model: model)  # promises need a real device
        s.mp.setattr(overhead, "CALLS", 1)
        assert {r["contender"] for r in overhead.per_call(GPU, 1)} >= {"fastst"}


def benchmarks_of_networks(s: Setting) -> None:
    trained: list[int] = []

    class Step:
        def __init__(self, base: Any, variant: Any, xs: Any, *rest: Any) -> None:
            self.clips = len(xs[0])

        def __call__(self, i: int) -> None:
            trained.append(self.clips)
            if self.clips * 2**30 > s.gpus.fraction * (141 << 30):
                raise torch.OutOfMemoryError("CUDA out of memory")

    s.mp.setattr(models, "ModelStep", Step)
    clip = models.Clip(2, 8, 32, 8, dry=True)
    s.mp.setattr(models.Clip, "network", lambda self: nn.Linear(1, 1))
    with kernels(s.mp):
        rows = models.training_batches(clip, GPU, "bf16", [5.0], 64)
    assert {r["batch"] for r in rows} == {5} and s.gpus.fraction == 1.0


def stress_beside_a_stream(s: Setting) -> None:
    s.mp.setattr(selection, "AUTO", ("aten",))
    s.mp.setattr(probe, "Case", lambda *of: shapes.Case(*of).tiny())
    drawn = torch.randn

    def randn(*shape: Any, **how: Any) -> torch.Tensor:  # what keeps a GPU busy is small here
        return drawn(8, 8, **how) if shape == (2048, 2048) else drawn(*shape, **how)

    s.mp.setattr(torch, "randn", randn)
    with kernels(s.mp):
        assert probe.stress(GPU, 2) == 6  # PyTorch's convolutions, again and again, tell nothing
        s.mp.setattr(probe, "with_kernels", lambda device: ["aten"])
        assert probe.stress(GPU, 2) == 0
    s.mp.setattr(probe, "stress", lambda device, n: 0)
    s.mp.setattr(torch.cuda, "is_available", lambda: False)
    assert probe.main(["--stress", "1"]) == 0


def whole_runs(s: Setting) -> None:
    assert gpu_run.architecture() == "9.0a"
    good = gpu_run.Stage("good", 1, ["true"])
    s.mp.setattr(gpu_run, "stages", lambda *_: [good])
    assert gpu_run.main(["--out", str(s.folder), "--minutes", "1", "--commit", "abc"]) == 0
    data = json.loads((s.folder / "record.json").read_text())
    assert data["machine"]["capability"] == "9.0"
    s.mp.setattr(instances, "units", lambda *_: iter(()))
    units = s.folder / "units.json"
    assert instances.main(["--out", str(units)]) == 1  # no units, and it says why
    told = {row["backend"]: row["why"] for row in json.loads(units.read_text())}
    assert set(told) == {"cuda", "triton"} and all(why.startswith("it ") for why in told.values())
    from benchmarks import coverage, report, tables

    assert coverage.hardware(data) == "9"
    assert "NVIDIA H200" in tables.machine_line(data)
    assert isinstance(report.show(data), str)


def the_rest(s: Setting) -> None:
    from fastst.demo import __main__ as demo_main

    assert demo is not None and demo_main._machine(GPU) == "NVIDIA H200"
    devices.wait_for(GPU)
    s.mp.setattr(selection, "AUTO", ("aten",))
    with kernels(s.mp):
        assert demo_main._options([]).device == torch.device("cuda")
        model = nn.Sequential(pair(8)).to("cuda").eval()
        x = torch.randn(1, 8, 3, 5, 6, device="cuda")
        optimize._fastest_format(model, x, 0.001)
    for parse in (layers, probe):
        with contextlib.suppress(SystemExit):
            parse.main(["--help"])


SCENARIOS = [
    triton_runs, checks_in_advance, promises_of_streams, random_numbers_of_gpus, hip, cuda_runs,
    a_check_in_the_other_process, selfcheck_in_a_capture,
    clocks_memory_and_kernel_names, benchmarks_of_layers, benchmarks_of_the_host,
    benchmarks_of_networks, stress_beside_a_stream, whole_runs, the_rest,
]  # fmt: skip


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTST_CUDA_EMULATE", raising=False)
    yield
    selfcheck.forget()


@pytest.mark.slow
def test_every_line_that_only_a_gpu_reaches_runs(
    fresh: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = gpu_lines.lines()
    with gpu_lines.traced({file for file, _ in wanted}) as ran:
        for scenario in SCENARIOS:
            with pytest.MonkeyPatch.context() as mp:
                for name, empty in (("_verdicts", {}), ("_postponed", {})):
                    mp.setattr(selfcheck, name, empty)
                mp.setattr(quarantine, "ask", lambda request: "")
                folder = tmp_path / scenario.__name__
                folder.mkdir()
                scenario(Setting(mp, folder))
    missing = {
        (str(Path(file).relative_to(ROOT)), text) for (file, n), text in wanted.items()
        if (file, n) not in ran
    }  # fmt: skip
    told = [f"{f}: {t}: {why}" for (f, t), why in LEFT.items()]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} lines ran; not run:", *told, sep="\n  ")
    unknown = {m for m in missing if not any(m[0] == f and t in m[1] for f, t in LEFT)}
    assert not unknown
    assert len(LEFT) <= 10
