"""On PYTHONPATH of a process that checks kernels: plants what FASTST_TEST_PLANT names in them.

The first example is run by the real kernels (emulated or interpreted), and then goes wrong; where
FASTST_TEST_PLANT_KIND names a kind, only in that.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from typing import Any

PLANT = os.environ.get("FASTST_TEST_PLANT")
KIND = os.environ.get("FASTST_TEST_PLANT_KIND", "")


def _spoil(results: list[Any]) -> list[Any]:
    import torch

    if PLANT == "wrong":
        return [t * 1.5 for t in results]
    if PLANT == "unequal":
        return [t + torch.randn_like(t) * 1e-6 for t in results]
    if PLANT == "nan":
        return [t * float("nan") for t in results]
    if PLANT == "hang":
        time.sleep(3600)
    if PLANT in ("SIGSEGV", "SIGABRT", "SIGKILL", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, PLANT))
        time.sleep(10)
    if PLANT == "exit":
        os._exit(3)
    raised = {
        "fault": RuntimeError("CUDA error: an illegal memory access was encountered"),
        "oom": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        "compile": ValueError("PTXAS error: no such instruction"),
        "disk": OSError(errno.ENOSPC, "No space left on device"),
        "busy": RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    }
    if PLANT in raised:
        raise raised[PLANT]
    return results


def _plant() -> None:
    from fastst.dispatch import selection

    for backend in selection.BACKENDS.values():
        if backend.device != "cuda":
            continue
        original = backend.examples or backend.usual_examples

        def examples(kind: str, dtype: Any, like: Any = None, original: Any = original) -> Any:
            first, *others = original(kind, dtype, None)
            if not kind.startswith(KIND):
                return [first, *others]
            return [first._replace(run=lambda p, t: _spoil(list(first.run(p, t))))]

        backend.examples = examples


if PLANT and "fastst.check" in sys.orig_argv:
    _plant()
