"""Fused space-time convolutions: (2+1)D pairs and the parallel 4D path as single operations."""

import importlib as _importlib
import sys as _sys
from itertools import pairwise as _pairwise
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

try:
    from . import functional
    from .backends.cpu.library import release_buffers
    from .dispatch.explain import Explanation, explain
    from .dispatch.selection import BackendError, FallbackWarning, use_backend
    from .dispatch.selfcheck import SelfCheckWarning
    from .dispatch.tune import Measurement, tune
    from .machine.exactness import exact
    from .nn.conv3d import Conv3d
    from .nn.layers import Conv2Plus1d, ParallelConv2Plus1d
except Exception:
    # ``python -m fastst`` and ``-m fastst.info`` run this file first, and say what is broken.
    if not {("-m", "fastst"), ("-m", "fastst.info")} & set(_pairwise(_sys.orig_argv)):
        raise

if _TYPE_CHECKING:
    from .rewrite.convert import convert, revert
    from .rewrite.factorize import factorize
    from .rewrite.inflate import inflate
    from .rewrite.memory_budget import MemoryPlan, set_memory_budget
    from .rewrite.optimize import optimize_for_inference

__version__ = "0.1.0"

# What is done to whole models is imported when somebody asks for it.
_LATER = {
    "convert": "rewrite.convert",
    "revert": "rewrite.convert",
    "factorize": "rewrite.factorize",
    "inflate": "rewrite.inflate",
    "MemoryPlan": "rewrite.memory_budget",
    "set_memory_budget": "rewrite.memory_budget",
    "optimize_for_inference": "rewrite.optimize",
}


def __getattr__(name: str) -> _Any:
    if name in ("distributed", "models"):
        return _importlib.import_module(f"{__name__}.{name}")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(_importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


__all__ = [
    "BackendError",
    "Conv2Plus1d",
    "Conv3d",
    "Explanation",
    "FallbackWarning",
    "Measurement",
    "MemoryPlan",
    "ParallelConv2Plus1d",
    "SelfCheckWarning",
    "convert",
    "exact",
    "explain",
    "factorize",
    "functional",
    "inflate",
    "optimize_for_inference",
    "release_buffers",
    "revert",
    "set_memory_budget",
    "tune",
    "use_backend",
]
