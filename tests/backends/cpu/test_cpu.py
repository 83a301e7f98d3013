"""The native CPU backend: what it computes, what it refuses, and how it is built and found."""

from __future__ import annotations

import ctypes
import importlib
import math
import os
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastst
from fastst.backends import cpu
from fastst.backends.cpu import library
from fastst.functional import BatchNorm, conv2plus1d, conv3d
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import ROOT, fuzz
from tests.support.fuzz import Limits

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
@pytest.mark.parametrize("sums", ["direct", "winograd"])
@pytest.mark.parametrize("stride", [(2, 1, 1), (1, 2, 2)])
def test_any_number_of_threads_gives_the_same(
    stride: tuple[int, int, int], sums: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, statistics and their running averages included."""
    monkeypatch.setattr(library.Launcher, "sums", sums)
    torch.manual_seed(1)
    layer = fastst.Conv2Plus1d(15, 40, 3, stride, 1, norm="batch")
    x = torch.randn(2, 15, 6, 21, 19, requires_grad=True)
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
        y = conv2plus1d(x, leaf, weights[1], padding=1, recompute=False)
    u = next(t for t in y.grad_fn.saved_tensors if t.shape[-1] == 24)  # type: ignore[union-attr]
    assert not u[..., 20:].any()


@built
@pytest.mark.parametrize("activation", ["relu", "hardswish"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_no_gradient_comes_through_where_an_activation_is_flat(bad: float, activation: str) -> None:
    """PyTorch chooses 0 there, and does not multiply by 0, which would make NaN of infinity."""
    torch.manual_seed(4)
    tensors = torch.randn(1, 16, 4, 9, 9), torch.randn(20, 16, 1, 3, 3), torch.randn(9, 20, 3, 1, 1)
    dy = torch.randn(1, 9, 4, 9, 9)
    dy[0, 3, 1, 5, 6] = bad
    for call in (
        lambda x, ws, wt: conv2plus1d(x, ws, wt, padding=1, activation=activation),
        lambda x, ws, wt: conv3d(x, ws[:9], padding=(0, 1, 1), input_activation=activation),
    ):
        found = []
        for backend in ("cpu", "reference"):
            leaves = [t.clone().requires_grad_() for t in tensors]
            with fastst.use_backend(backend):
                y = call(*leaves)
            grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
            found.append([g for g in grads if g is not None])
        for ours, truth in zip(*found, strict=True):
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(ours), kind(truth))


@built
@pytest.mark.parametrize("channels", [8, 3, 45])
def test_depthwise(channels: int) -> None:
    """One vector of channels, a part of one, and several blocks of them."""
    same = dict(channels=channels, mid=channels, out=channels, groups=(channels, channels))
    fuzz.fuzz("cpu", 20, limits(**same), first=fuzz.SEED + 8000, backward=False, least=1.0)
    zeros = limits(**same, padding_mode=("zeros", "zeros"))
    fuzz.fuzz("cpu", 20, zeros, first=fuzz.SEED + 9000, least=1.0)


@built
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_depthwise_rows(taps: int, stride: int, dilation: int) -> None:
    """Rows of every length, whose taps share what they read or do not."""
    w = torch.randn(20, 1, 1, 2, taps)
    settings = dict(stride=(1, 1, stride), dilation=(1, 1, dilation), groups=20)
    for width in (*range(dilation * (taps - 1) + 1, 36), 70):
        x = torch.randn(1, 20, 2, 3, width, requires_grad=True)
        exact = x.detach().double().requires_grad_()
        true = F.conv3d(exact, w.double(), **settings)
        with fastst.use_backend("cpu"):
            y = fastst.functional.conv3d(x, w, **settings)
            (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        (dtrue,) = torch.autograd.grad(true, exact, torch.ones_like(true))
        torch.testing.assert_close(y.double(), true, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx.double(), dtrue, rtol=1e-5, atol=1e-5)


# ---- strips of the mid tensor


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Cuts mid tensors that are small, too; in how many strips each call did."""
    counts: list[int] = []
    pair = library.pair

    def counted(*args: Any) -> int:
        counts.append(pair(*args))
        return counts[-1]

    monkeypatch.setattr(library, "pair", counted)
    monkeypatch.setattr(library.Launcher, "strip", 2000)
    monkeypatch.setattr(library.Launcher, "large", 0)
    return counts


@built
@pytest.mark.parametrize("norm", ["none", "frozen"])
def test_strips(norm: str, strips: list[int]) -> None:
    cases = limits(norm=norm, groups=(1, 1))
    fuzz.fuzz("cpu", 40, cases, first=fuzz.SEED + 7000, backward=False, least=1.0)
    assert sum(n > 2 for n in strips) > 10


@built
@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_strips_change_nothing(
    channels_last: bool, order: str, strips: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, on any number of threads, in whole lines of y and beside; NaN included."""
    monkeypatch.setattr(library.Launcher, "sums", "direct")
    torch.manual_seed(7)
    x = torch.randn(2, 3, 6, 32, 24)
    x[1, 2, 3, 17, 5], x[0, 1, 0, 0, 9] = math.nan, math.inf
    ws, wt = torch.randn(20, 3, 1, 5, 5), torch.randn(33, 20, 3, 1, 1)
    if order == "temporal-first":
        ws, wt = torch.randn(33, 20, 1, 5, 5), torch.randn(20, 3, 3, 1, 1)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    found = []
    for strip, threads in ((0, 1), (24_000, 1), (24_000, 2)):
        monkeypatch.setattr(library.Launcher, "strip", strip)
        torch.set_num_threads(threads)
        try:
            with fastst.use_backend("cpu"):
                found.append(conv2plus1d(x, ws, wt, padding=(1, 2, 2), order=order))
        finally:
            torch.set_num_threads(1)
    assert strips[0] == 1 and strips[1] == strips[2] > 4
    for y in found[1:]:
        torch.testing.assert_close(y, found[0], rtol=0, atol=0, equal_nan=True)
    assert found[0].isnan().any() and not found[0].isnan().all()


# ---- what earlier calls have left in memory

SUBNORMAL_READ = 2  # a flag of MXCSR, which stays set


class Flags:
    """Of this thread's vector arithmetic since it was made."""

    def __init__(self) -> None:
        self._libm = ctypes.CDLL("libm.so.6")
        words = self._environment()
        words[7] &= ~0x3F
        self._libm.fesetenv(words)

    def _environment(self) -> ctypes.Array[ctypes.c_uint32]:
        words = (ctypes.c_uint32 * 8)()  # fenv_t, at whose end MXCSR lies
        self._libm.fegetenv(words)
        return words

    @property
    def subnormals_were_read(self) -> bool:
        return bool(self._environment()[7] & SUBNORMAL_READ)


@built
@pytest.mark.skipif(sys.platform != "linux", reason="fegetenv of glibc")
@pytest.mark.parametrize("sums", ["best", "direct", "winograd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [(3, 45, 20), (20, 45, 33), (45, 45, 45)])
def test_what_lies_beside_the_channels_is_not_multiplied(
    channels: tuple[int, int, int], dtype: torch.dtype, sums: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call of whole vectors leaves subnormal numbers in the memory that the next one packs into.

    Intel's processors take a hundred times as long for each; training of a stem took five times as
    long, by chance.
    """
    monkeypatch.setattr(library.Launcher, "sums", sums)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def read(channels: tuple[int, int, int], dtype: torch.dtype, value: float | None) -> list[bool]:
        generator = torch.Generator().manual_seed(0)

        def some(*shape: int) -> torch.Tensor:
            t = torch.randn(shape, generator=generator)
            return (t if value is None else t.fill_(value)).to(dtype).requires_grad_()

        c, m, k = channels
        groups = c if c == m == k and dtype == torch.float32 else 1
        found = []
        x = some(2, c, 3, 9, 10)
        weights = some(m, c // groups, 1, 3, 3), some(k, m // groups, 3, 1, 1)
        dy = some(2, k, 3, 9, 10).detach()
        with fastst.use_backend("cpu"):
            flags = Flags()
            y = conv2plus1d(x, *weights, padding=1, groups=groups)
            found.append(flags.subnormals_were_read)
            flags = Flags()
            torch.autograd.grad(y, [x, *weights], dy)
            found.append(flags.subnormals_were_read)
        return found

    try:
        whole = tuple(-(-n // 16) * 16 for n in channels)
        assert read(whole, torch.float32, 1e-40) == [True, True]  # type: ignore[arg-type]
        assert read(channels, dtype, None) == [False, False]
    finally:
        torch.set_num_threads(threads)


# ---- Winograd's sums


FITTING = dict(
    kernel=(3, 3, 3), dilation=(1, 1, 1), padding_mode=("zeros", "zeros"), causal=False
)  # fmt: skip


def winograd_fuzz(cases: int) -> None:
    """Forward, statistics and every gradient, by the same rule as without."""
    for stride in ((1, 1, 1), (1, 2, 2), (2, 1, 1)):
        usual = dict(stride=stride, padding=1)
        fuzz.fuzz("cpu", cases, limits(**FITTING, **usual), first=fuzz.SEED + 5000, least=1.0)
    large = FITTING | dict(channels=70, mid=130, out=100, size=(3, 15, 14), groups=(1, 1))
    several = Limits(
        work=10**9, dtypes=(torch.float32,), fixed=PAIRS | large,
        accept=lambda c: c.padding != "same",  # not with a stride
    )  # fmt: skip
    fuzz.fuzz("cpu", 2, several, least=1.0)


@built
def test_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.Launcher, "sums", "winograd")
    winograd_fuzz(15)


class Spatial:
    """A 3×3 pass from 40 to 50 channels, by Winograd's sums unless they would overflow."""

    def __init__(self, seed: int, stride: int = 1) -> None:
        torch.manual_seed(seed)
        self.x, self.weight = torch.randn(1, 40, 3, 23, 18), torch.randn(50, 40, 1, 3, 3) / 20
        t = PairTensors(self.x, self.weight, torch.empty(41, 50, 1, 1, 1))
        spec = PairSpec(stride=(1, stride, stride), padding=(0, 0, 1, 1, 1, 1))
        self.problem = Problem.of(t, spec)
        self.call = library.Launcher(self.problem)
        self.call.way = self.call.lib.Sums.winograd
        self.taps = self.problem.passes[0]

    def __call__(self, **epilogue: Any) -> tuple[int, torch.Tensor]:
        """Whether it stayed with them, and u."""
        u = library.rows(self.problem).permute(0, 4, 1, 2, 3)
        source, how = self.call.plain(self.x), self.call.epilogue(**epilogue)
        return self.call.tap_conv(source, self.weight, self.taps, u, how), u[:, :50]


@built
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e37, 3e38])
@pytest.mark.parametrize("stride", [1, 2])
def test_where_winograd_would_overflow_it_is_not_used(bad: float, stride: int) -> None:
    run = Spatial(4, stride)
    assert run()[0] == 1
    run.x[0, 3, 1, 9, 9] = bad
    by_winograd, u = run()
    truth = torch.nn.functional.conv3d(run.x, run.weight, None, run.taps.stride, (0, 1, 1))
    assert by_winograd == 0
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(u), kind(truth))
    torch.testing.assert_close(u, truth, equal_nan=True, rtol=1e-4, atol=1e-4)
    run.x[0, 3, 1, 9, 9] = 1.0
    run.weight[7, 3, 0, 1, 1] = bad
    assert run()[0] == 0


@built
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])  # one by one and Winograd's way
def test_channels_of_one_value_do_not_deviate(kernel: tuple[int, int]) -> None:
    """Else γ of such a channel had a gradient, of nothing but rounding."""
    tensors = PairTensors(
        torch.zeros(2, 16, 5, 11, 13), torch.zeros(50, 16, 1, *kernel), torch.zeros(8, 50, 1, 1, 1),
        first_bias=torch.randn(50),
    )  # fmt: skip
    begun = cpu.first_pass(Problem.of(tensors, PairSpec(norm="batch")), tensors)
    assert torch.equal(begun.mean, tensors.first_bias)
    assert not begun.var.any()


@built
@pytest.mark.parametrize("write", ["forward", "norm_gradient"])
def test_reductions_are_not_counted_twice_where_winograd_was_given_up(write: str) -> None:
    run = Spatial(5)
    run.weight[:, 3] = 0.0  # so that what makes it give up changes nothing else
    aux = torch.randn(1, 50, 3, 23, 18) if write == "norm_gradient" else None
    found = []
    for large in (1.0, 1e37):
        run.x[0, 3, 1, 9, 9] = large
        found.append(torch.full((2, 50), math.nan))
        assert run(write=write, aux=aux, reductions=found[-1])[0] == (large == 1.0)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@built
@pytest.mark.parametrize("stride", [1, 2])
def test_an_error_of_winograd_stays_where_its_taps_are(stride: int) -> None:
    """A large value changes, to the last bit, no output that does not read it."""
    run = Spatial(6, stride)
    found = []
    for value in (1.0, 1e20):
        run.x[0, 3, 1, 9, 9] = value
        by_winograd, u = run()
        assert by_winograd == 1
        found.append(u)
    reads = torch.zeros(1, 1, 3, 23, 18)
    reads[0, 0, 1, 9, 9] = 1.0
    taps = torch.ones(1, 1, 1, 3, 3)
    reach = torch.nn.functional.conv3d(reads, taps, None, run.taps.stride, (0, 1, 1)) > 0
    assert torch.equal((found[0] != found[1]).any(1, keepdim=True), reach)


@built
def test_winograd_is_chosen_where_it_pays() -> None:
    """Not for weights that are used for a few positions only, nor without padding by zeros."""

    def taken(x: tuple[int, ...], m: int, stride: int = 1) -> int:
        weight = torch.zeros(m, x[1], 1, 3, 3)
        t = PairTensors(torch.zeros(x), weight, torch.empty(1, m, 1, 1, 1))
        spec = PairSpec(stride=(1, stride, stride), padding=(0, 0, 1, 1, 1, 1))
        of_zeros = Problem.of(t, spec)
        call, u = library.Launcher(of_zeros), library.rows(of_zeros).permute(0, 4, 1, 2, 3)
        taps = of_zeros.passes[0]
        return call.tap_conv(call.plain(t.x), weight, taps, u, call.epilogue())

    assert taken((1, 64, 2, 56, 56), 64)
    assert taken((1, 64, 16, 56, 56), 64, stride=2)
    assert not taken((1, 256, 2, 7, 7), 256)
    assert not taken((1, 3, 2, 56, 56), 64)


# ---- choice


@built
def test_auto_takes_it_and_explain_says_so() -> None:
    layer = fastst.Conv2Plus1d(4, 8, 3, padding=1)
    assert fastst.explain(layer, torch.randn(1, 4, 3, 5, 5)).backend == "cpu"
    depthwise = fastst.Conv2Plus1d(8, 8, 3, padding=1, groups=8, mid_channels=8)
    assert fastst.explain(depthwise, torch.randn(1, 8, 3, 5, 5)).backend == "cpu"
    grouped = fastst.Conv2Plus1d(8, 8, 3, padding=1, groups=4, mid_channels=8)
    found = fastst.explain(grouped, torch.randn(1, 8, 3, 5, 5))
    assert found.backend == "aten" and "output channels per group" in found.reasons["cpu"]


def test_refusals_have_reasons() -> None:
    assert "the tensors are in float64" in str(
        cpu.BACKEND.why_not(problem(dtype=torch.float64), "forward")
    )
    mirrored = problem(padding_mode=("reflect", "zeros"))
    assert "reflect" in str(cpu.BACKEND.why_not(mirrored, "backward"))


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
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(INTERFACE=1))
    assert "of these sources, it is of others: build" in library.load.__wrapped__()


@pytest.mark.slow
@built
def test_avx2_library_gives_the_same_numbers() -> None:
    """In a process of its own, which is told to be an older processor."""
    code = (
        "import torch\n"
        "from fastst.backends import cpu\n"
        "from tests.backends.cpu import test_cpu\n"
        "from tests.support import fuzz\n"
        "assert cpu.load().__name__.endswith('_cpu_avx2'), cpu.load()\n"
        "limits = fuzz.Limits(dtypes=(torch.float32,), fixed=dict(\n"
        "    op='conv2plus1d', branch_activation='none', padding_mode=('zeros', 'zeros')))\n"
        "fuzz.fuzz('cpu', 15, limits, least=1.0)\n"
        "from fastst.backends.cpu import library\n"
        "library.Launcher.sums = 'winograd'\n"
        "test_cpu.winograd_fuzz(6)\n"
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
