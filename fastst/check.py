"""Check the GPU kernels of this machine before they are used.

``python -m fastst.check [--all]``: images and clusters run it once; verdicts are kept where
docs/first-contact.md says. Ends with 0 where all kernels passed, with 1 where one did not, with 2
where nothing could be checked.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch

from .backends.contract import Backend, Example, Later
from .dispatch import quarantine, selfcheck
from .dispatch.selection import BACKENDS
from .machine import devices, settings
from .problem.examples import of_kind
from .problem.spec import Problem


class Check(NamedTuple):
    backend: Backend
    kind: str
    dtype: torch.dtype


_IDLE_SECONDS = 20.0  # after which the process that checks for another ends: it holds memory
_USUAL = (torch.bfloat16, torch.float16)
_ALL = (*_USUAL, torch.float32, torch.float64)


def gpus() -> list[torch.device]:
    """One GPU of each model here; the CPU where it stands in for one."""
    if settings.flag("FASTST_CUDA_EMULATE"):
        return [torch.device("cpu")]
    found = reversed(devices.present())
    return list({devices.runtime(d).get_device_name(d): d for d in found}.values())


def checks(device: torch.device, dtypes: Sequence[torch.dtype]) -> Iterator[Check]:
    """Everything that can be checked on a device without a call."""
    for backend in BACKENDS.values():
        if backend.device != "gpu" or backend.why_not(problem_for(device), "forward") is not None:
            continue
        for dtype in dtypes:
            for kind in backend.kinds(device, dtype):
                yield Check(backend, kind, dtype)


def problem_for(device: torch.device) -> Problem:
    """One that every backend with kernels takes, if it takes any."""
    spec, tensors = of_kind("dense", torch.float16)
    return replace(Problem.of(tensors, spec), device=device)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m fastst.check", description=__doc__)
    parser.add_argument("--all", action="store_true", help="float32 and float64 as well")
    parser.add_argument("--again", action="store_true", help="without the verdicts so far")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        _serve()
    states = set()
    print(_row("device", "backend", "kernels", "dtype", "state"))
    for device in gpus():
        if options.again:
            selfcheck.discard(device)
        for backend, kind, dtype in checks(device, _ALL if options.all else _USUAL):
            state, why = selfcheck.verdict(backend, kind, device, dtype)
            name = str(dtype).removeprefix("torch.")
            print(_row(str(device), backend.name, kind, name, state, why), flush=True)
            states.add(state)
    if not states:
        print("nothing to check: no GPU, or no kernels for it (python -m fastst.info says why)")
    return 1 if states - {"passed", "unknown"} else 2 if states != {"passed"} else 0


def _row(*cells: str) -> str:
    widths = (8, 8, 24, 9, 8, 0)
    return "  ".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=False)).rstrip()


def _examples(request: quarantine.Request) -> Sequence[Example | Later]:
    backend = BACKENDS[request.backend]
    if request.like is not None:
        return backend.rehearse(request.like, request.phase, request.way)
    found = selfcheck.examples_of(backend, request.kind, request.dtype, request.device)
    return found if request.only is None else [found[request.only]]


def answer(request: quarantine.Request, say: Callable[..., object]) -> bool:
    """Check what is asked for; whether nothing runs any more on the device after it.

    Args:
        say: is told "doing" before each example and, at the end, "verdict" or "postponed".
    """
    try:
        if devices.is_gpu(request.device):
            devices.runtime(request.device).set_device(request.device)
            devices.set_tf32(request.tf32)
        verdict = selfcheck.check(
            BACKENDS[request.backend], _examples(request), request.device, request.dtype,
            begin=lambda name: say(doing=name),
        )  # fmt: skip
    except quarantine.Postponed as why:
        say(postponed=str(why))
        return False
    except Exception as error:  # of what stands around the kernels: it says nothing of them
        say(postponed=f"{type(error).__name__}: {error}")
        return False
    finally:
        if devices.is_gpu(request.device):
            _let_go(request.device)
    lost = verdict is not None and selfcheck.state(verdict) == "fault"
    say(verdict=verdict or "", last=lost)
    return lost


def _let_go(device: torch.device) -> None:
    """Leave the memory of the GPU to who asked; a device that is lost has none to leave."""
    with suppress(RuntimeError):
        devices.runtime(device).empty_cache()


def _serve() -> NoReturn:
    """Answer what is asked on stdin, a line each, until nothing is."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, the answers stay clean
    asked: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        left = b""
        # Not from sys.stdin: a process that ends wants its lock, and aborts where a thread has it.
        while data := os.read(0, 1 << 16):
            *lines, left = (left + data).split(b"\n")
            for line in lines:
                asked.put(line)
        os._exit(0)  # the parent is gone

    def say(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    threading.Thread(target=read, daemon=True).start()
    try:
        say(ready=True)
        while not answer(pickle.loads(base64.b64decode(asked.get(timeout=_IDLE_SECONDS))), say):
            pass
    except (queue.Empty, BrokenPipeError):
        pass
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
