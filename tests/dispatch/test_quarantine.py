"""Planted faults of kernels: each ends in the right verdict, with the process that asked alive."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from fastst import check
from fastst.backends import aten, cuda, triton
from fastst.backends.cuda import examples, library
from fastst.dispatch import quarantine, selfcheck
from fastst.machine import cache
from fastst.problem.examples import of_kind
from fastst.problem.spec import Problem
from tests.support import ROOT

CPU = torch.device("cpu")
PLANTS = str(ROOT / "tests" / "support" / "plants")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", PLANTS)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("FASTST_CHECK_SECONDS", "300")
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(selfcheck, "_postponed", {})
    yield
    if quarantine._process is not None:
        quarantine._process.end()


def problem(kind: str = "dense") -> Problem:
    spec, tensors = of_kind(kind, torch.float16)
    return Problem.of(tensors, spec)


def depthwise() -> Problem:
    """One that the CUDA kernels take."""
    spec, tensors, *_ = examples._depthwise(False, torch.float16)[0]
    return Problem.of(tensors, spec)


# plant: what the verdict or the reason says, and the state that is kept
TOLD = {
    "wrong": ("is off by 0.5 of the largest output", "wrong"),
    "nan": ("is off by nan", "wrong"),
    "unequal": ("gave another output when it ran again", "wrong"),
    "compile": ("failed its self-check with ValueError: PTXAS error", "failed"),
    "oom": ("could not be checked: OutOfMemoryError: CUDA out of memory", None),
    "disk": ("could not be checked: OSError: .*No space left", None),
    "no gcc": ("could not be checked: RuntimeError: Failed to find C compiler", None),
    "gcc": ("could not be checked: CalledProcessError: .*gcc.* exit status 1", None),
    "busy": ("could not be checked: RuntimeError: .*busy or unavailable", None),
    "around": ("could not be checked: RuntimeError: nothing of a kernel", None),
    # What ends the process:
    "hang": ("hangs: .* did not end within 6 s", "hang"),
    "SIGSEGV": ("ended the process of its self-check with SIGSEGV in ", "fault"),
    "fault": ("faulted in .* with RuntimeError: CUDA error: an illegal memory access", "fault"),
    "SIGTERM": ("could not be checked: its check was ended .SIGTERM.", None),
    "exit": ("could not be checked: its check was ended .status 3.", None),
    "ends": ("could not be checked: its check was ended .(SIGINT|status 1).: Keyboard", None),
}


def planted(backend: Any, plant: str, mp: pytest.MonkeyPatch) -> None:
    """Ask for a check in which it comes up."""
    text, state = TOLD[plant]
    call = problem() if backend is triton.BACKEND else depthwise()
    with pytest.warns(selfcheck.SelfCheckWarning, match=text):
        why = selfcheck.why_broken(backend, call, "forward")
    assert why is not None
    kept = cache.read(selfcheck._file())
    if state is None:
        assert kept == {} and list(selfcheck.postponed_checks().values()) == [why]
        with warnings.catch_warnings():  # not at once again, and said once
            warnings.simplefilter("error")
            assert selfcheck.why_broken(backend, call, "forward") == why
        return
    assert list(kept.values()) == [why]
    assert selfcheck.state(why) == state
    # Another process reads it and starts nothing.
    selfcheck.forget()
    with warnings.catch_warnings(), mp.context() as other:
        warnings.simplefilter("ignore")
        other.setattr(quarantine, "ask", lambda request: pytest.fail("checked again"))
        assert selfcheck.why_broken(backend, call, "forward") == why


def one_after_the_other(
    backend: Any, plants: Sequence[str], last: str, folder: Path, mp: pytest.MonkeyPatch
) -> None:
    """The process that checks survives each, as the next is asked of the same; the last ends it."""
    file = folder / "plant"
    mp.setenv("FASTST_TEST_PLANT", f"@{file}")
    seen = set()
    for plant in (*plants, last):
        file.write_text(plant)
        mp.setenv("FASTST_CACHE", str(folder / plant))
        if plant == "hang":  # of a process that has answered: its start is no part of the time
            mp.setenv("FASTST_CHECK_SECONDS", "6")
        selfcheck.forget()
        planted(backend, plant, mp)
        seen.add(quarantine._process)
    (process,) = seen
    assert process is not None and not process.alive()


@pytest.mark.slow
def test_planted_in_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plants = (
        "wrong", "nan", "unequal", "compile", "oom", "no gcc", "gcc", "disk", "busy", "around",
    )  # fmt: skip
    one_after_the_other(triton.BACKEND, plants, "hang", tmp_path, monkeypatch)


def test_planted_in_emulated_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emulating(monkeypatch)
    plants = "wrong", "oom", "unequal"
    one_after_the_other(cuda.BACKEND, plants, "fault", tmp_path, monkeypatch)


def emulating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTST_CUDA_EMULATE", "1")
    if isinstance(found := library.load_emulated(), str):
        pytest.skip(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "plant"),
    [
        (triton.BACKEND, "SIGSEGV"), (cuda.BACKEND, "SIGTERM"),
        *(pytest.param(triton.BACKEND, p, marks=pytest.mark.thorough) for p in ("exit", "ends")),
    ],
)  # fmt: skip
def test_what_ends_the_other_process(
    backend: Any, plant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend is cuda.BACKEND:
        emulating(monkeypatch)
    monkeypatch.setenv("FASTST_TEST_PLANT", plant)
    planted(backend, plant, monkeypatch)
    assert quarantine._process is not None and not quarantine._process.alive()


@pytest.mark.slow
def test_right_kernels_pass_whatever_the_modes_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Several at once: a check costs seconds, and one mode that comes through is wrong enough.
    modes = [
        (torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode()),
        (FakeTensorMode(), torch.no_grad()),
    ]

    def call(eps: int) -> Problem:  # each with kernels of its own
        spec, tensors = of_kind("dense", torch.float16)
        return Problem.of(tensors, spec._replace(eps=1e-5 * (1 + eps)))

    for i, together in enumerate(modes):
        monkeypatch.setenv("FASTST_CACHE", str(tmp_path / str(i)))
        selfcheck.forget()
        with ExitStack() as stack:
            for mode in together:
                stack.enter_context(mode)  # type: ignore[arg-type]
            assert selfcheck.why_broken(triton.BACKEND, call(i), "forward") is None
            # In this process, as for PyTorch's own convolutions.
            assert selfcheck.why_broken(aten.BACKEND, call(i), "forward") is None
    one = quarantine._process
    assert one is not None and one.alive()  # that served all of them

    found: list[str | None] = []  # in a thread of the autograd engine
    thread = threading.Thread(
        target=lambda: found.append(
            selfcheck.why_broken(triton.BACKEND, problem("parallel"), "backward")
        )
    )
    thread.start()
    thread.join()
    assert found == [None]
    assert quarantine._process is one
    one.end()  # as after a while without a question
    assert selfcheck.why_broken(triton.BACKEND, problem("grouped"), "forward") is None
    told = [r for r in caplog.records if "checks GPU kernels in a process" in r.message]
    assert len(told) <= 1  # of all of these processes, and of earlier tests


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH needs Python 3.11")
def test_files_where_the_caller_is_hide_no_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("queue", "triton"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    assert selfcheck.why_broken(triton.BACKEND, problem(), "forward") is None


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use CUDA")
def test_ranks_share_one_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes at once: one check, one verdict."""
    ask = quarantine.ask

    def counted(request: quarantine.Request) -> str:
        with (tmp_path / "asked").open("a") as file:
            file.write("x")
        return ask(request)

    monkeypatch.setattr(quarantine, "ask", counted)
    fork = multiprocessing.get_context("fork")
    verdicts = fork.Queue()

    def rank() -> None:
        verdicts.put(selfcheck.why_broken(triton.BACKEND, problem(), "forward"))
        if quarantine._process is not None:
            quarantine._process.end()

    ranks = [fork.Process(target=rank) for _ in range(3)]
    for process in ranks:
        process.start()
    assert [verdicts.get(timeout=550) for _ in ranks] == [None] * 3
    for process in ranks:
        process.join()
    assert (tmp_path / "asked").read_text() == "x"


def test_many_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    threads = [
        threading.Thread(target=lambda i=i: cache.add(path, {str(i): "x"})) for i in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(path.read_text())) == 24
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".json" and p != path]


@pytest.mark.parametrize("home", [None, "/proc"])
def test_without_a_place_for_files(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME and no such user, or a disk that takes nothing: verdicts are of this process."""
    for name in ("FASTST_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("FASTST_CACHE", home)
    else:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(quarantine, "ask", lambda request: "")
    call = problem()
    with pytest.warns(UserWarning, match="for this process only"):
        assert selfcheck.why_broken(triton.BACKEND, call, "forward") is None
    assert selfcheck.why_broken(triton.BACKEND, call, "forward") is None


@pytest.mark.parametrize("when", ["it starts", "it checks"])
def test_a_user_who_interrupts_leaves_no_verdict_and_no_process(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "it checks":
        quarantine._current()
    ended: list[quarantine._Process] = []
    end = quarantine._Process.end

    def interrupt(self: Any, seconds: float) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(quarantine._Process, "_next", interrupt)
    monkeypatch.setattr(quarantine._Process, "end", lambda self: (ended.append(self), end(self)))
    with pytest.raises(KeyboardInterrupt):
        selfcheck.why_broken(triton.BACKEND, problem(), "forward")
    assert len(ended) == 1 and not ended[0].alive()
    assert cache.read(selfcheck._file()) == {} and selfcheck.postponed_checks() == {}


def test_a_full_disk_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process that checks cannot even have a file for its messages."""

    def full() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quarantine.tempfile, "TemporaryFile", full)
    with pytest.warns(selfcheck.SelfCheckWarning, match="could not be checked: .*No space left"):
        assert selfcheck.why_broken(triton.BACKEND, problem(), "forward")


def test_a_process_that_cannot_be_ended_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that waits in a driver for a kernel that never ends."""
    process = quarantine._current()
    monkeypatch.setattr(quarantine, "_END_SECONDS", 0.1)
    with monkeypatch.context() as held:
        held.setattr(os, "killpg", lambda *_: None)
        process.end()
    assert process.child.poll() is None and not process.alive()


def test_a_backend_that_hangs_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hang has cost a minute."""
    asked: list[quarantine.Request] = []
    answer = "hangs: dense forward did not end within 60 s in its self-check"
    monkeypatch.setattr(quarantine, "ask", lambda request: asked.append(request) or answer)

    def ask(eps: int) -> str | None:
        spec, tensors = of_kind("dense", torch.float16)
        call = Problem.of(tensors, spec._replace(eps=float(eps)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return selfcheck.why_broken(triton.BACKEND, call, "forward")

    found = [ask(i) for i in range(1, 6)]
    assert len(asked) == 3
    assert "3 of its self-checks ended in a hang or a fault" in str(found[-1])
    selfcheck.discard(CPU)  # as python -m fastst.check --again
    answer = ""
    assert ask(5) is None


def test_what_cannot_start_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "_process", None)
    for executable in ("", "/nowhere/python", "/bin/true"):
        monkeypatch.setattr(sys, "executable", executable)
        monkeypatch.setattr(selfcheck, "_postponed", {})
        with pytest.warns(selfcheck.SelfCheckWarning, match="could not be checked"):
            assert selfcheck.why_broken(triton.BACKEND, problem(), "forward")
    assert cache.read(selfcheck._file()) == {}


def test_it_is_tried_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(triton.BACKEND.instances(problem(), "forward", None))
    keys = selfcheck._keys("triton", names, CPU, torch.float16, False)
    selfcheck._postponed[keys.together] = time.monotonic() - 61, "could not be checked: memory"
    monkeypatch.setattr(quarantine, "ask", lambda request: "")
    assert selfcheck.why_broken(triton.BACKEND, problem(), "forward") is None


# ---- python -m fastst.check


def test_the_command_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[quarantine.Request] = []
    answers = {"hopper": "is off by 1", "depthwise backward": "hangs: x"}

    def checked(request: quarantine.Request) -> str:
        asked.append(request)
        if request.kind == "depthwise":
            raise quarantine.Postponed("OutOfMemoryError")
        return answers.get(request.kind, "")

    monkeypatch.setattr(quarantine, "ask", checked)
    monkeypatch.setenv("FASTST_CUDA_EMULATE", "1")
    if isinstance(found := library.load_emulated(), str):
        pytest.skip(found)
    assert check.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["device", "backend", "kernels", "dtype", "state"]
    assert any("hopper " in s and "wrong" in s and "is off by 1" in s for s in lines)
    assert any("depthwise backward" in s and "hang" in s for s in lines)
    assert any("depthwise " in s and "unknown" in s and "OutOfMemory" in s for s in lines)
    count = len(asked)
    assert check.main([]) == 1
    assert all(r.kind == "depthwise" for r in asked[count:])  # all others are on the disk
    answers.clear()
    assert check.main(["--again"]) == 2  # depthwise is unknown, nothing is wrong


def test_the_command_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "gpus", list)
    assert check.main(["--all"]) == 2
    assert "nothing to check" in capsys.readouterr().out
