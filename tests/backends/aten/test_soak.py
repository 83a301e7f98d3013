"""A short run of the soak on every path, and proof that it sees what it is there for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import fuzz, soak

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="guard.c needs Linux and cc"
)


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return soak.build_guard(tmp_path_factory.mktemp("guard"))


@pytest.mark.slow
def test_nothing_is_touched_out_of_bounds(guard: Path) -> None:
    """Some of each kind; others, and many more: make soak."""
    runs = [
        ("passes", "float32", "channels_last"), ("passes", "bfloat16", "contiguous"),
        ("conv3d", "float32", "contiguous"), ("aten", "float32", "channels_last"),
    ]  # fmt: skip
    found = soak.soak(runs, "", fuzz.SEED, 12, guard)
    assert not any(o.trouble for o in found), found
    assert [o.counts["right"] for o in found] == [12] * 4


def test_a_planted_write_is_seen_and_named(guard: Path) -> None:
    (found,) = soak.soak([(soak.PLANTED, "float32", "contiguous")], "", fuzz.SEED, 2, guard)
    assert found.counts == {"crash": 2}
    for seed, line in enumerate(found.trouble, fuzz.SEED):
        assert f"crash seed {seed}: SIG" in line and f"Config(seed={seed}" in line


@pytest.mark.parametrize(
    ("offset", "written"),
    [(0, False), (99, False), (100, True), (127, True), (128, True), (-1, True)],
)
def test_guard_sees_every_byte(offset: int, written: bool, guard: Path) -> None:
    """Beside 100 bytes of its own and among them."""
    program = (
        "import ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.aligned_alloc.restype = libc.free.restype = ctypes.c_void_p\n"
        "libc.aligned_alloc.argtypes = [ctypes.c_size_t] * 2\n"
        "libc.free.argtypes = [ctypes.c_void_p]\n"
        "for _ in range(4):\n"
        "    p = libc.aligned_alloc(64, 100)\n"
        "    assert p % 64 == 0 and ctypes.string_at(p, 100) == b'\\xff' * 100\n"
        f"    ctypes.memset(p + {offset}, 0, 1)\n"
        "    libc.free(p)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"LD_PRELOAD": str(guard)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode < 0) == written, done.stderr


def test_what_does_not_end_in_time_is_no_crash(guard: Path) -> None:
    """It runs once more before it is told."""
    run = "passes", "float32", "contiguous"
    (found,) = soak.soak([run], "", fuzz.SEED, 2, guard, seconds=0.0)
    assert found.counts == {"late": 2}
    assert all("did not end within 0 s" in line for line in found.trouble)


def test_what_a_time_limit_ends_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = tmp_path / "child"
    child.write_text("#!/bin/sh\nyes right\n")
    child.chmod(0o755)
    note = soak.Outcome.note

    def limited(outcome: soak.Outcome, line: str) -> None:
        note(outcome, line)
        if outcome.counts["right"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(soak.Outcome, "note", limited)
    monkeypatch.setattr(sys, "executable", str(child))
    one = ["--paths", "passes", "--dtypes", "float32", "--layouts", "contiguous", "--isas", ""]
    monkeypatch.setattr(sys, "argv", ["soak", *one])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="ended before all were run"):
            soak.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "passes float32 contiguous best, seeds from 0: {'right': 3}" in capsys.readouterr().out
