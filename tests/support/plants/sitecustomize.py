"""On PYTHONPATH of a process that checks kernels: plants what FASTST_TEST_PLANT names in them.

The first example is run by the real kernels (emulated or interpreted), and then goes wrong.
"plant:kind,plant:kind" plants in the first example of these kinds; "@path" stands for what the file
holds just then. Triton's interpreter is made quicker.
"""

from __future__ import annotations

import errno
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PLANTED = os.environ.get("FASTST_TEST_PLANT", "")
BY_KIND = {k: plant for plant, _, k in (one.partition(":") for one in PLANTED.split(",")) if k}

_runs: list[str] = []


def _plant_now() -> str:
    return Path(PLANTED[1:]).read_text() if PLANTED.startswith("@") else PLANTED


def _spoil(results: list[Any], plant: str) -> list[Any]:
    import torch

    if plant == "wrong":
        return [t * 1.5 for t in results]
    if plant == "unequal":  # every second time by an ulp or two
        _runs.append(plant)
        return [t * (1 + 2.0**-9 * (len(_runs) % 2)) for t in results]
    if plant == "nan":
        return [t * float("nan") for t in results]
    if plant == "hang":
        time.sleep(3600)
    if plant in ("SIGSEGV", "SIGABRT", "SIGKILL", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, plant))
        time.sleep(10)
    if plant == "exit":
        os._exit(3)
    raised = {
        "fault": RuntimeError("CUDA error: an illegal memory access was encountered"),
        "oom": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        "compile": ValueError("PTXAS error: no such instruction"),
        "no gcc": RuntimeError("Failed to find C compiler. Please specify via CC"),
        "gcc": subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c"]),  # no Python.h
        "disk": OSError(errno.ENOSPC, "No space left on device"),
        "busy": RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
        "ends": KeyboardInterrupt("in the thread that checks"),
    }
    if plant in raised:
        raise raised[plant]
    return results


def _plant() -> None:
    from fastst.dispatch import selection

    for backend in selection.BACKENDS.values():
        if backend.device != "gpu":
            continue
        first, kinds = backend.rehearse, backend.examples

        def spoilt(example: Any, plant: str = "") -> Any:
            return example._replace(
                run=lambda p, t: _spoil(list(example.run(p, t)), plant or _plant_now())
            )

        def rehearse(*call: Any, original: Any = first) -> Any:
            if _plant_now() == "around":
                raise RuntimeError("nothing of a kernel")
            example = original(*call)[0]
            return [spoilt(example.make() if hasattr(example, "make") else example)]

        def examples(kind: str, *rest: Any, original: Any = kinds) -> Any:
            one, *others = original(kind, *rest)
            if kind not in BY_KIND:
                return [one, *others]
            return [spoilt(one.make() if hasattr(one, "make") else one, BY_KIND[kind]), *others]

        backend.rehearse, backend.examples = rehearse, examples


if "fastst.check" in sys.orig_argv:
    if os.environ.get("TRITON_INTERPRET") == "1":
        runpy.run_path(str(Path(__file__).parents[1] / "interpreter.py"))["prepare_child"]()
    if PLANTED:
        _plant()
