"""The native CPU backend: what it computes, what it refuses, and how it is built and found."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from fuzz import Limits
from test_cuda import script

import fastst
from fastst.backends import cpu
from fastst.backends.cpu import library
from fastst.functional import BatchNorm, conv2plus1d
from fastst.shapes import PairSpec, PairTensors, Problem

ROOT = Path(__file__).parents[1]
PAIRS = dict(op="conv2plus1d", branch_activation="none")

built = pytest.mark.skipif(
    isinstance(cpu.load(), str) and os.environ.get("FASTST_BUILD_CPU") != "1",
    reason=f"the backend {cpu.load()}",
)


def limits(**fixed: Any) -> Limits:
    return Limits(dtypes=(torch.float32,), fixed=PAIRS | fixed)


def problem(**changes: Any) -> Problem:
    x, dtype = changes.pop("x", (1, 4, 3, 5, 5)), changes.pop("dtype", torch.float32)
    sizes = (x, (6, 4, 1, 3, 3), (5, 6, 3, 1, 1))
    tensors = PairTensors(*(torch.empty(s, dtype=dtype) for s in sizes))
    return Problem.of(tensors, PairSpec(padding=(1,) * 6, **changes))


# ---- results


@built
@pytest.mark.parametrize("chunk", range(4))
def test_forward(chunk: int) -> None:
    fuzz.fuzz("cpu", 60, limits(), first=fuzz.SEED + 1000 * chunk, backward=False, least=1.0)


@built
@pytest.mark.parametrize("norm", ["none", "batch", "frozen"])
def test_forward_and_backward(norm: str) -> None:
    fuzz.fuzz("cpu", 40, limits(norm=norm, padding_mode=("zeros", "zeros")), least=1.0)


@built
@pytest.mark.parametrize(
    "fixed",
    [
        dict(channels=70, mid=130, out=100, size=(2, 5, 6), groups=(1, 1)),  # several blocks
        dict(channels=600, mid=9, out=520, size=(2, 3, 3), batch=1, groups=(1, 1)),  # and chunks
        dict(channels=3, mid=45, out=64, size=(3, 40, 37), batch=1, groups=(1, 1)),  # and tiles
        dict(channels=24, mid=24, out=36, groups=(3, 4)),
        dict(size=(1, 7, 5)),
        dict(size=(6, 1, 1)),
    ],
    ids=["blocks", "chunks", "tiles", "groups", "one-frame", "one-pixel"],
)
def test_sizes(fixed: dict[str, Any]) -> None:
    several = Limits(work=60_000_000, dtypes=(torch.float32,), fixed=PAIRS | fixed)
    fuzz.fuzz("cpu", 6, several, backward=False, least=1.0)


@built
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("channels", [5, 40])
def test_any_number_of_threads_gives_the_same(channels: int, threads: int) -> None:
    """To the last bit, statistics and their running averages included."""
    torch.manual_seed(1)
    layer = fastst.Conv2Plus1d(channels, 40, 3, (2, 1, 1), 1, norm="batch")
    x = torch.randn(2, channels, 6, 21, 19, requires_grad=True)
    found = []
    for n in (1, threads):
        torch.set_num_threads(n)
        try:
            with fastst.use_backend("cpu"):
                layer.norm.reset_running_stats()
                y = layer(x)
                (dx,) = torch.autograd.grad(y.square().sum(), x)
                found.append((y, dx, layer.norm.running_var.clone()))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@built
def test_python_threads_do_not_share_buffers() -> None:
    torch.manual_seed(2)
    weights = torch.randn(24, 8, 1, 3, 3), torch.randn(8, 24, 3, 1, 1)
    clips = [torch.randn(1, 8, 4, 12, 12) for _ in range(4)]

    def run(x: torch.Tensor) -> torch.Tensor:
        return conv2plus1d(x, *weights, padding=1)

    wrong: list[int] = []
    with fastst.use_backend("cpu"):
        expected = [run(x) for x in clips]

        def repeat(i: int) -> None:
            if any(not torch.equal(run(clips[i]), expected[i]) for _ in range(20)):
                wrong.append(i)

        workers = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []


@built
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", [False, True])
def test_nan_and_infinity_reach_what_pytorch_lets_them(bad: float, norm: bool) -> None:
    torch.manual_seed(3)
    x = torch.randn(1, 16, 4, 12, 12)
    x[0, 3, 1, 5, 6] = bad
    weights = torch.randn(20, 16, 1, 3, 3), torch.randn(9, 20, 3, 1, 1)
    statistics = BatchNorm(torch.randn(20), torch.rand(20) + 0.5) if norm else None
    results = []
    for backend in ("cpu", "reference"):
        with fastst.use_backend(backend):
            results.append(conv2plus1d(x, *weights, padding=1, norm=statistics))
    ours, truth = results
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(ours), kind(truth))
    # What nobody reads of u is zero even then: backward on another backend relies on it.
    with fastst.use_backend("cpu"):
        leaf = weights[0].requires_grad_()
        y = conv2plus1d(x, leaf, weights[1], padding=1)
    u = next(t for t in y.grad_fn.saved_tensors if t.shape[-1] == 24)  # type: ignore[union-attr]
    assert not u[..., 20:].any()


# ---- Winograd's sums


# Enough of everything that the transforms pay; nothing a multiple of what is computed together.
WIDE = dict(
    channels=40, mid=50, out=41, batch=2, kernel=(3, 3, 3), dilation=(1, 1, 1), groups=(1, 1),
    padding_mode=("zeros", "zeros"),
)  # fmt: skip
STRIDES = [(1, 1, 1), (1, 2, 2), (2, 1, 1)]


@built
@pytest.mark.parametrize("stride", STRIDES, ids=str)
def test_winograd(stride: tuple[int, int, int]) -> None:
    """Forward, statistics and every gradient, by the same rule as without."""
    fixed = WIDE | dict(stride=stride, size=(7, 23, 17))
    several = Limits(
        work=10**9, dtypes=(torch.float32,), fixed=PAIRS | fixed,
        accept=lambda c: c.padding != "same",  # which strides cannot have
    )  # fmt: skip
    fuzz.fuzz("cpu", 4, several, least=1.0)


def wide(x: torch.Tensor, weight: torch.Tensor, stride: int = 1) -> tuple[Any, torch.Tensor, Any]:
    """A spatial pass that Winograd's sums pay for: its call, memory for its result, its shape."""
    t = PairTensors(x, weight, torch.empty(41, weight.shape[0], 1, 1, 1))
    call = library.Call(
        Problem.of(t, PairSpec(stride=(1, stride, stride), padding=(0, 0, 1, 1, 1, 1)))
    )
    return call, call.rows(), call.problem.passes[0]


@built
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e37, 3e38])
@pytest.mark.parametrize("stride", [1, 2])
def test_where_winograd_would_overflow_it_is_not_used(bad: float, stride: int) -> None:
    torch.manual_seed(4)
    x, weight = torch.randn(1, 40, 3, 24, 24), torch.randn(50, 40, 1, 3, 3) / 20
    call, u, p = wide(x, weight, stride)
    assert call.tap_conv(call.plain(x), weight, p, u, call.epilogue()) == 1
    x[0, 3, 1, 9, 9] = bad
    assert call.tap_conv(call.plain(x), weight, p, u, call.epilogue()) == 0
    truth = torch.nn.functional.conv3d(x, weight, None, p.stride, (0, 1, 1))
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(u[:, :50]), kind(truth))
    torch.testing.assert_close(u[:, :50], truth, equal_nan=True, rtol=1e-4, atol=1e-4)
    x[0, 3, 1, 9, 9] = 1.0
    weight[7, 3, 0, 1, 1] = bad
    assert call.tap_conv(call.plain(x), weight, p, u, call.epilogue()) == 0


@built
def test_statistics_are_not_counted_twice_where_winograd_was_given_up() -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(1, 40, 3, 24, 24), torch.randn(50, 40, 1, 3, 3)
    weight[:, 3] = 0.0  # so that what makes it give up changes nothing else
    call, u, p = wide(x, weight)
    found = []
    for large in (1.0, 1e37):
        x[0, 3, 1, 9, 9] = large
        statistics = torch.full((2, 50), math.nan)
        epilogue = call.epilogue(reductions=statistics)
        found.append((call.tap_conv(call.plain(x), weight, p, u, epilogue), statistics))
    (by_winograd, ours), (direct, again) = found
    assert (by_winograd, direct) == (1, 0)
    torch.testing.assert_close(ours, again, rtol=1e-5, atol=1e-5)


@built
def test_an_error_of_winograd_stays_where_its_taps_are() -> None:
    """A large value changes, to the last bit, no output that does not read it."""
    torch.manual_seed(6)
    x, weight = torch.randn(1, 40, 3, 24, 24), torch.randn(50, 40, 1, 3, 3)
    for stride in (1, 2):
        call, u, p = wide(x, weight, stride)
        found = []
        for value in (1.0, 1e20):
            x[0, 3, 1, 9, 9] = value
            assert call.tap_conv(call.plain(x), weight, p, u, call.epilogue()) == 1
            found.append(u[:, :50].clone())
        reads = torch.zeros(1, 1, 3, 24, 24)
        reads[0, 0, 1, 9, 9] = 1.0
        taps = torch.ones(1, 1, 1, 3, 3)
        reach = torch.nn.functional.conv3d(reads, taps, None, p.stride, (0, 1, 1)) > 0
        assert torch.equal((found[0] != found[1]).any(1, keepdim=True), reach)


# ---- choice


@built
def test_auto_takes_it_and_explain_says_so() -> None:
    layer = fastst.Conv2Plus1d(4, 8, 3, padding=1)
    assert fastst.explain(layer, torch.randn(1, 4, 3, 5, 5)).backend == "cpu"
    depthwise = fastst.Conv2Plus1d(8, 8, 3, padding=1, groups=8, mid_channels=8)
    found = fastst.explain(depthwise, torch.randn(1, 8, 3, 5, 5))
    assert found.backend == "aten" and "output channels per group" in found.reasons["cpu"]


def test_refusals_have_reasons() -> None:
    assert "float32 only, not in float64" in str(
        cpu.why_not(problem(dtype=torch.float64), "forward")
    )
    mirrored = problem(padding_mode=("reflect", "zeros"))
    assert "reflect" in str(cpu.why_not(mirrored, "backward"))


@pytest.mark.parametrize(
    ("machine", "capability", "told"),
    [
        ("aarch64", "DEFAULT", "needs an x86-64 processor, this is aarch64"),
        ("x86_64", "DEFAULT", "needs a processor with AVX2 or AVX-512, PyTorch finds DEFAULT"),
    ],
)
def test_other_processors_are_told(
    machine: str, capability: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert library.load.__wrapped__() == told


def test_a_missing_or_broken_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "FASTST_BUILD_CPU=1" in library.load.__wrapped__()

    def broken(name: str) -> None:
        raise ImportError("file too short")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr("importlib.import_module", broken)
    assert "cannot be loaded (file too short): install fastst again" in library.load.__wrapped__()


@built
def test_avx2_library_gives_the_same_numbers() -> None:
    """In a process of its own, which is told to be an older processor."""
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import torch, fuzz\n"
        "from fastst.backends import cpu\n"
        "assert cpu.load().__name__.endswith('_cpu_avx2'), cpu.load()\n"
        "limits = fuzz.Limits(dtypes=(torch.float32,), fixed=dict(\n"
        "    op='conv2plus1d', branch_activation='none', padding_mode=('zeros', 'zeros')))\n"
        "fuzz.fuzz('cpu', 40, limits, least=1.0)\n"
        "import test_cpu\n"
        "for stride in test_cpu.STRIDES:\n"
        "    test_cpu.test_winograd(stride)\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@built
def test_threads_are_those_of_pytorch() -> None:
    """The very runtime: its address is that of the file which PyTorch has loaded."""
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("PyTorch without OpenMP")
    address = library._gomp_parallel()
    (path,) = list(library._loaded_runtimes())[:1]
    runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    assert address == ctypes.cast(runtime.GOMP_parallel, ctypes.c_void_p).value


@built
def test_without_openmp_it_starts_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = cpu.load()
    torch.set_num_threads(2)
    module.use_openmp(0)
    try:
        fuzz.fuzz("cpu", 5, limits(), backward=False, least=1.0)
    finally:
        torch.set_num_threads(1)
        module.use_openmp(library._gomp_parallel())


# ---- build


def test_build_may_be_required_or_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")

    def names(compiler: str | None, **environment: str) -> list[str]:
        settings = {"FASTST_BUILD_CUDA": "0", "FASTST_BUILD_CPU": "auto", **environment}
        called: Any = script(monkeypatch, compiler, **settings)["called"]
        return [e.name for e in called["ext_modules"]]

    both = ["fastst._cpu_avx2", "fastst._cpu_avx512"]
    assert names("/usr/bin/g++") == both
    assert names("/usr/bin/g++", FASTST_BUILD_CPU="0") == []
    assert names(None) == []
    assert "installed without its CPU library" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"FASTST_BUILD_CPU=1 requires g\+\+"):
        names(None, FASTST_BUILD_CPU="1")
    with pytest.raises(SystemExit, match="FASTST_BUILD_CPU must be auto, 0 or 1, got 'yes'"):
        names("/usr/bin/g++", FASTST_BUILD_CPU="yes")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert names("/usr/bin/g++") == []
