"""Threads and memory of the native CPU kernels."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import fastst
from fastst.backends import cpu
from fastst.backends.cpu import library
from fastst.functional import conv2plus1d
from tests.support import ROOT

pytestmark = pytest.mark.skipif(
    isinstance(cpu.load(), str) and os.environ.get("FASTST_BUILD_CPU") != "1",
    reason=f"the backend {cpu.load()}",
)


def call(x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    weights = (
        torch.randn(24, 8, 1, 3, 3, generator=generator),
        torch.randn(8, 24, 3, 1, 1, generator=generator),
    )
    with fastst.use_backend("cpu"):
        return conv2plus1d(x, *weights, padding=1)


def test_buffers_of_all_threads_are_given_back() -> None:
    x = torch.randn(2, 8, 4, 12, 12)
    expected = call(x)
    done, more = threading.Event(), threading.Event()

    def other() -> None:
        call(x.clone().requires_grad_()).sum().backward()
        done.set()
        more.wait()  # a thread that ends gives its buffers back by itself

    thread = threading.Thread(target=other)
    thread.start()
    assert done.wait(60)
    native = cpu.load()
    assert not isinstance(native, str)
    rows = [b.rows for b in library._buffers if b.rows is not None]
    kept = native.kept_bytes() + sum(r.nbytes for r in rows)
    assert native.kept_bytes() > 0 and rows
    del rows
    assert fastst.release_buffers() == kept
    assert native.kept_bytes() == 0 and fastst.release_buffers() == 0
    more.set()
    thread.join()
    assert torch.equal(call(x), expected)


def test_a_thread_that_ends_keeps_nothing() -> None:
    native = cpu.load()
    assert not isinstance(native, str)
    fastst.release_buffers()
    thread = threading.Thread(target=call, args=(torch.randn(1, 8, 4, 12, 12),))
    thread.start()
    thread.join()
    gc.collect()
    assert native.kept_bytes() == 0


def test_buffers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_LARGEST_BUFFER", 1 << 10)
    fastst.release_buffers()
    x = torch.randn(2, 8, 4, 12, 12, requires_grad=True)
    call(x).sum().backward()
    assert all(b.rows is None for b in library._buffers)


COUNT = """
import os, torch
from fastst.backends.cpu import library
from tests.backends.cpu.test_threads import call
assert library._gomp_parallel()
x = torch.randn(2, 8, 4, 24, 24)
def threads():
    return len(os.listdir("/proc/self/task"))
for n in (1, 2):
    torch.set_num_threads(n)
    before = threads()
    call(x)
    print(threads() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_as_many_threads_as_pytorch_is_told() -> None:
    """In a process of its own, whose threads nobody else has started."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]


def test_a_call_from_a_parallel_region_computes_on_its_own_thread() -> None:
    address = library._gomp_parallel()
    if not address:
        pytest.skip("PyTorch without OpenMP")
    x = torch.randn(2, 8, 4, 12, 12)
    expected, found = call(x), []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    body = kind(lambda _: found.append(call(x)))
    parallel = ctypes.CFUNCTYPE(None, kind, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(address)
    torch.set_num_threads(2)
    try:
        parallel(body, None, 2, 0)
    finally:
        torch.set_num_threads(1)
    assert len(found) == 2 and all(torch.equal(y, expected) for y in found)
