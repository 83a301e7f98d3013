"""``python -m fastst.info`` answers on every machine, whatever is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastst
from fastst import info
from fastst.dispatch import selfcheck
from tests.support import ROOT

SECTIONS = (
    "Versions", "Devices", "Native library", "Backends", "Kernels for GPUs", "Cache", "Environment",
)  # fmt: skip


def run(
    *shadows: Path, encoding: str = "utf-8", command: str = "fastst.info", **variables: str
) -> str:
    """Output of the command in a process of its own, with folders put before all packages."""
    path = os.pathsep.join([*map(str, shadows), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", command],
        env={**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": encoding, **variables},
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line in SECTIONS] == list(SECTIONS)
    return done.stdout


def shadow(folder: Path, name: str, source: str) -> Path:
    """A folder with a module that hides the real one."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    return folder


def test_says_what_is_there_on_an_ascii_terminal() -> None:
    text = run(encoding="ascii")
    assert f"fastst {fastst.__version__}" in text
    assert "broken" not in text
    for name in fastst.dispatch.BACKENDS:
        assert f"\n  {name}, on cpu in float32: " in text


@pytest.mark.parametrize("command", ["fastst", "fastst.info"])
def test_survives_a_broken_torch(command: str, tmp_path: Path) -> None:
    message = "libcudart.so.13: cannot open shared object file"
    text = run(shadow(tmp_path, "torch", f"raise OSError({message!r})"), command=command)
    assert f"broken: OSError: {message}" in text


@pytest.mark.slow
def test_survives_much_else_at_once(tmp_path: Path) -> None:
    """Packages that are half installed, that end the process, and an unknown backend."""
    pytest.importorskip("av")
    shadow(tmp_path, "triton", "raise RuntimeError('half installed')")
    text = run(shadow(tmp_path, "av", "raise SystemExit('no FFmpeg')"), FASTST_BACKEND="nonsense")
    assert "broken: RuntimeError: half installed" in text
    assert "broken: SystemExit: no FFmpeg" in text
    assert "unknown backend 'nonsense'" in text


def test_the_package_itself_does_not_hide_a_broken_torch(tmp_path: Path) -> None:
    folder = shadow(tmp_path, "torch", "raise OSError('broken on purpose')")
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "import fastst"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "OSError: broken on purpose" in done.stderr


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (None, "does not exist, nothing was tuned here"),
        ('{"a": "rows", "b": "blocked"}', "2 measured choices"),
        ("half a fi", "broken: JSONDecodeError"),
    ],
)
def test_tells_of_the_cache(
    contents: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTST_CACHE", str(tmp_path))
    if contents is not None:
        (tmp_path / "tuning.json").write_text(contents)
    assert expected in info.report()


def test_tells_what_was_seen_of_kernels_for_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a GPU and without the records that it is from."""
    rows = json.loads((ROOT / "fastst" / "machine" / "status.json").read_text())
    said = [line for line in info.report().splitlines() if "executed on a CPU" in line]
    assert len(said) == sum(bool(row["executed"]) for row in rows) > 0
    assert (
        "  triton, (2+1)D pair, training: compiled code executed on a CPU, for 8.0, 9.0; "
        in (said[next(i for i, line in enumerate(said) if "triton, (2+1)D pair, training" in line)])
    )
    told = {"backend": "cuda", "kernels": "k", "executed": [], "gpus": {"H200": "measured at `a`"}}
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "status.json").write_text(json.dumps([told]))
    monkeypatch.setattr(info, "__file__", str(tmp_path / "info.py"))
    assert "  cuda, k: on H200: measured at `a`\n" in info.report()


def test_tells_of_failed_self_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = {"triton dense": "", "triton grouped": "is off by 0.3 of the largest output"}
    monkeypatch.setattr(selfcheck, "verdicts", lambda: verdicts)
    text = info.report()
    assert "self-checks of kernels: 1 passed, 1 failed" in text
    assert "not chosen, triton grouped: it is off by 0.3" in text


def test_a_section_that_fails_does_not_end_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("this driver is too old\nand more")

    monkeypatch.setattr("torch.cuda.device_count", fail)
    backend = fastst.dispatch.BACKENDS["aten"]
    monkeypatch.setattr(backend, "why_not", fail)
    text = info.report()
    assert text.count("broken: RuntimeError: this driver is too old") == 2
    assert "and more" not in text
    assert "reference, on cpu" in text


def test_a_backend_that_lacks_a_phase_shows_both(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = fastst.dispatch.BACKENDS["aten"]
    why = {"forward": None, "backward": "has no backward"}
    monkeypatch.setattr(backend, "why_not", lambda problem, phase: why[phase])
    text = info.report()
    assert (
        "aten, on cpu in float32: forward runs; backward does not run: it has no backward" in text
    )


def test_a_backend_that_auto_avoids_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = fastst.dispatch.BACKENDS["aten"]
    monkeypatch.setattr(backend, "why_not_auto", lambda *_: "is too slow")
    assert "aten, on cpu in float32: runs by name, but not by auto: it is too slow" in info.report()


def test_arguments_that_do_not_exist_are_an_error() -> None:
    command = [sys.executable, "-m", "fastst", "--chek"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "python -m fastst: error: unrecognized arguments: --chek" in done.stderr
