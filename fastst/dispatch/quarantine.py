"""Checks of GPU kernels in a process of their own: a kernel that faults or hangs ends only that.

One process serves all checks of its parent, one after the other, and ends when none has come for a
while: starting it takes seconds, a check milliseconds beside what the call compiles anyway.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from ..backends.contract import Phase
from ..machine import settings
from ..problem.spec import Problem

# What a process that is about to be checked may be ended by without having done anything wrong.
_ENDED_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_START_SECONDS, _END_SECONDS = 180.0, 10.0
_log = logging.getLogger("fastst")


class Request(NamedTuple):
    """What is to be checked: examples of a kind, or the kernels of a problem."""

    backend: str
    device: torch.device
    dtype: torch.dtype
    tf32: bool
    kind: str = ""
    only: int | None = None  # of the examples of a kind, the one that is to be run
    like: Problem | None = None
    phase: Phase = "forward"
    way: str | None = None  # of the problem's, the one that is to be run


class Postponed(Exception):
    """A check could not be made; nothing is known of the kernels."""


def limit_s() -> float:
    """Seconds that one example of a check may take."""
    return settings.number("FASTST_CHECK_SECONDS")


def ask(request: Request) -> str:
    """The verdict: empty where the kernels passed, else what is wrong as the end of "it …".

    Raises:
        Postponed: the check could not be made, and why.
    """
    with _lock:
        while True:
            process = _current()
            try:
                return process.ask(request)
            except _Idle:
                continue
            except Postponed:  # by an answer, or it has ended
                raise
            except BaseException:  # it may be in any state: also where a user interrupts
                process.end()
                raise


@functools.cache  # once, however many processes this one has check for it
def _say_cost() -> None:
    _log.warning(
        "fastst checks GPU kernels in a process of its own before their first use on this "
        "machine: seconds to start, about one for each kernel that is to be compiled, and no "
        "time from then on; python -m fastst.check does it in advance"
    )


class _Idle(Exception):
    """The process had ended by itself just before it was asked."""


class _Process:
    """The process that checks, seen from its parent."""

    def __init__(self) -> None:
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        if not sys.executable:
            raise Postponed("there is no Python interpreter to check it in a process of its own")
        try:
            self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 -- as long as it
            self.child = subprocess.Popen(
                [sys.executable, "-m", "fastst.check", "--serve"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                start_new_session=True,  # a Ctrl-C is its parent's to handle
                # Files beside the caller's must not hide modules that it has found elsewhere.
                env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
            )  # fmt: skip
        except OSError as error:
            raise Postponed(f"no process could be started to check it: {error}") from error
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.doing, self.answered, self.gone = "", False, False
        threading.Thread(target=self._read, daemon=True).start()
        _say_cost()
        try:
            ready = "ready" in self._next(_START_SECONDS)
        except BaseException:  # of a user who interrupts
            self.end()
            raise
        if not ready:
            told = self._last_error()
            self.end()
            raise Postponed(f"the process that was to check it did not start{told}")

    def _read(self) -> None:
        assert self.child.stdout is not None
        with self.child.stdout as answers:
            for line in answers:
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                self.lines.put(found if isinstance(found, dict) else {})
        self.lines.put(None)

    def _next(self, seconds: float) -> dict[str, Any]:
        try:
            found = self.lines.get(timeout=seconds)
        except queue.Empty:
            found = {"hang": seconds}
        return {"gone": True} if found is None else found

    def ask(self, request: Request) -> str:
        assert self.child.stdin is not None
        data = base64.b64encode(pickle.dumps(request)) + b"\n"
        with suppress(OSError):  # where it is gone, what follows says how
            self.child.stdin.write(data)
            self.child.stdin.flush()
        self.doing = ""
        while True:
            # Before it begins its kernels are compiled.
            found = self._next(limit_s() if self.doing else max(limit_s(), _START_SECONDS))
            if "doing" in found:
                self.doing = str(found["doing"])
            elif "verdict" in found:
                if found.get("last"):  # a device that faulted runs nothing any more
                    self.end()
                self.answered = True
                return str(found["verdict"])
            elif "postponed" in found:
                raise Postponed(str(found["postponed"]))
            elif "hang" in found:
                self.end()
                if not self.doing:
                    raise Postponed(f"its check did not begin within {found['hang']:g} s")
                return (
                    f"hangs: {self.doing} did not end within {found['hang']:g} s in its self-check"
                )
            elif "gone" in found:
                return self._verdict_on_end()

    def _verdict_on_end(self) -> str:
        """The verdict on what ended the process, if anything did but somebody else."""
        status = self.child.wait()
        told = self._last_error()
        self.end()
        if status == 0 and not self.doing and self.answered:
            raise _Idle
        name = signal.Signals(-status).name if status < 0 else f"status {status}"
        if not self.doing or status >= 0 or -status in _ENDED_FROM_OUTSIDE:
            raise Postponed(f"its check was ended ({name}){told}")
        return f"ended the process of its self-check with {name} in {self.doing}{told}"

    def _last_error(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read()[-4000:].decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def alive(self) -> bool:
        return not self.gone and self.child.poll() is None

    def end(self) -> None:
        """End it with all that it started."""
        self.gone = True
        with suppress(OSError):
            os.killpg(self.child.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that a driver holds may stay for ever
            self.child.wait(_END_SECONDS)
        for stream in (self.child.stdin, self.errors):
            with suppress(OSError):
                if stream is not None:
                    stream.close()


_lock = threading.RLock()
_process: _Process | None = None
_owner = 0


def _current() -> _Process:
    global _process, _owner
    if _process is None or _owner != os.getpid() or not _process.alive():
        _process, _owner = None, os.getpid()  # a fork has its parent's, and must not use it
        _process = _Process()
    return _process
