"""Products of bfloat16 by AMX: what is its own beside other pairs (test_pairs.py)."""

from __future__ import annotations

import math
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from fastst.backends.cpu import library
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import ROOT

from .test_pairs import why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def has_amx() -> bool:
    return why_not() is None and bool(library.library().multiplies_by_amx())


needs_amx = pytest.mark.skipif(not has_amx(), reason="needs a processor with AMX")


@pytest.fixture(autouse=True)
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.Launcher, "sums", "amx")


def whole(*shape: int) -> Tensor:
    """Whole numbers, whose sums are exact."""
    return torch.randint(-3, 4, shape).bfloat16()


def call_of(x: Tensor, weight: Tensor, **fields: object) -> tuple[library.Launcher, Problem]:
    """Launches of one pass: the other one of the pair has a tap alone."""
    out = weight.shape[0]
    tensors = PairTensors(x, weight, torch.empty(1, out, 1, 1, 1, dtype=torch.bfloat16))
    problem = Problem.of(tensors, PairSpec(**fields))  # type: ignore[arg-type]
    return library.Launcher(problem), problem


def forward(x: Tensor, weight: Tensor, **fields: object) -> Tensor:
    call, problem = call_of(x, weight, **fields)
    u = library.rows(problem).fill_(math.nan).permute(0, 4, 1, 2, 3)
    call.tap_conv(call.plain(x), weight, problem.passes[0], u, call.epilogue())
    return u[:, : weight.shape[0]]


def weight_gradient(x: Tensor, weight: Tensor, dy: Tensor, **fields: object) -> Tensor:
    call, problem = call_of(x, weight, **fields)
    return call.weight_gradient(call.plain(x), call.plain(dy), weight, problem.passes[0])


@pytest.mark.parametrize("width", [*range(1, 20), 28, 33, 49, 56])
def test_rows_of_every_width(width: int) -> None:
    """Parts of a row overlap where they do not divide it; short rows go several at a time."""
    torch.manual_seed(width)
    x, weight = whole(1, 34, 2, 5, width), whole(49, 34, 1, 3, 3)
    fields = dict(padding=(0, 0, 1, 1, 1, 1))
    truth = torch.nn.functional.conv3d(x.double(), weight.double(), padding=(0, 1, 1))
    assert torch.equal(forward(x, weight, **fields).double(), truth.bfloat16().double())


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 31, 32, 33, 48, 63, 65, 97])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last_3d])
def test_channels_fill_stretches(channels: int, memory: torch.memory_format) -> None:
    """Zeros fill the last one: what an earlier call left there would make NaN of the sums."""
    torch.manual_seed(channels)
    forward(torch.full((1, 97, 2, 8, 30), math.nan).bfloat16(), whole(97, 97, 1, 3, 3))
    x = whole(1, channels, 2, 6, 19).contiguous(memory_format=memory)
    weight = whole(channels, channels, 1, 3, 2).contiguous(memory_format=memory)
    for stride in ((1, 1, 1), (1, 2, 3)):
        fields = dict(stride=stride, padding=(0, 0, 1, 1, 1, 1))
        truth = torch.nn.functional.conv3d(
            x.double(), weight.double(), stride=stride, padding=(0, 1, 1)
        )
        assert torch.equal(forward(x, weight, **fields).double(), truth.bfloat16().double())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 7, 14, 15, 16, 17, 28, 40])
def test_weight_gradients_of_every_width(width: int, stride: int) -> None:
    """Rows of outputs in one stretch with those of x, or in stretches of their own."""
    torch.manual_seed(width)
    x, weight = whole(2, 35, 5, 6, width), whole(50, 35, 1, 3, 3)
    out = [5, *((n + 2 - 3) // stride + 1 for n in (6, width))]
    dy = whole(2, 50, *out)
    fields = dict(stride=(1, stride, stride), padding=(0, 0, 1, 1, 1, 1))
    of_x, of_weight = x.double(), weight.double().requires_grad_()
    y = torch.nn.functional.conv3d(of_x, of_weight, stride=(1, stride, stride), padding=(0, 1, 1))
    (truth,) = torch.autograd.grad(y, of_weight, dy.double())
    found = weight_gradient(x, weight, dy, **fields)
    assert torch.equal(found.double(), truth.bfloat16().double())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("which", ["x", "dy"])
def test_what_is_not_finite_meets_no_zeros(
    which: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros that fill stretches would make NaN of infinity: the gradient is summed another way."""
    torch.manual_seed(5)
    x, weight, dy = whole(1, 20, 4, 6, 9), whole(18, 20, 1, 3, 3), whole(1, 18, 4, 6, 9)
    x[x == 0], dy[dy == 0] = 1, 1
    (x if which == "x" else dy)[0, 3, 1, 0, 8] = bad
    found = weight_gradient(x, weight, dy, padding=(0, 0, 1, 1, 1, 1))
    monkeypatch.setattr(library.Launcher, "sums", "pairs")
    expected = weight_gradient(x, weight, dy, padding=(0, 0, 1, 1, 1, 1))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert not found.isfinite().all() and found.isfinite().any()


@needs_amx
def test_beside_the_amx_of_others() -> None:
    """Products of PyTorch's own, which configure the registers as well, in the same threads."""
    torch.manual_seed(6)
    x, weight = whole(1, 40, 4, 12, 30), whole(70, 40, 1, 3, 3)
    fields = dict(padding=(0, 0, 1, 1, 1, 1))
    a, b = torch.randn(130, 200).bfloat16(), torch.randn(200, 90).bfloat16()
    expected, product = forward(x, weight, **fields).clone(), a @ b
    found: list[bool] = []

    def both() -> None:
        for _ in range(20):
            found.append(torch.equal(forward(x, weight, **fields), expected))
            found.append(torch.equal(a @ b, product))

    threads = [threading.Thread(target=both) for _ in range(3)]
    for t in threads:
        t.start()
    both()
    for t in threads:
        t.join()
    assert len(found) == 160 and all(found)


REFUSED = """
import ctypes, sys
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)  # too small for what a signal saves of AMX
small = Stack(ctypes.addressof(memory), 0, 4096)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.sigaltstack(ctypes.byref(small), None) == 0
import torch, fastst, fastst.info
from fastst.backends.cpu import library
assert not library.library().multiplies_by_amx()
layer = fastst.Conv2Plus1d(8, 16, 3, padding=1).bfloat16()
x = torch.randn(1, 8, 3, 5, 5).bfloat16()
assert fastst.explain(layer, x).backend == "cpu"
layer(x).sum().backward()
print(fastst.info.report())
"""


@needs_amx
def test_without_permission() -> None:
    """The system refuses AMX to a process whose stack for signals is too small for it."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "multiplies bfloat16 by AVX512_BF16 (the system refuses AMX)" in done.stdout


@needs_amx
def test_info_tells_what_multiplies() -> None:
    from fastst import info

    assert "multiplies bfloat16 by AMX" in info.report()


def test_long_sums_are_sums_of_short_ones() -> None:
    """Equal products, whose rounding goes one way, of many boxes; dw in float32 hides nothing."""
    frames = 512
    x, dy = (
        torch.full((1, 1, 56, 56, 16), value).bfloat16().permute(0, 4, 1, 2, 3)
        .expand(-1, -1, frames, -1, -1)
        for value in (1.1, 0.3)
    )  # fmt: skip
    weight = torch.empty(16, 16, 1, 1, 1)
    call, problem = call_of(x, weight.bfloat16())
    call.threads = 1
    dw = call.weight_gradient(call.plain(x), call.plain(dy), weight, problem.passes[0])
    truth = x[0, 0, 0, 0, 0].double() * dy[0, 0, 0, 0, 0].double() * frames * 56 * 56
    assert float((dw.double() / truth - 1).abs().max()) < 1e-4  # one after the other: 2.4e-4
