"""Fused space-time convolutions: (2+1)D pairs and the parallel 4D path as single operations."""

import sys
from itertools import pairwise

try:
    from . import functional
    from .dispatch.explain import Explanation, explain
    from .dispatch.selection import BackendError, FallbackWarning, use_backend
    from .dispatch.tune import Measurement, tune
    from .nn.layers import Conv2Plus1d, ParallelConv2Plus1d
    from .rewrite.convert import convert, revert
    from .rewrite.factorize import factorize
    from .rewrite.inflate import inflate
    from .rewrite.memory_budget import MemoryPlan, set_memory_budget
    from .rewrite.optimize import optimize_for_inference
except Exception:
    # ``python -m fastst`` and ``-m fastst.info`` run this file first, and say what is broken.
    if not {("-m", "fastst"), ("-m", "fastst.info")} & set(pairwise(sys.orig_argv)):
        raise

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Conv2Plus1d",
    "Explanation",
    "FallbackWarning",
    "Measurement",
    "MemoryPlan",
    "ParallelConv2Plus1d",
    "convert",
    "explain",
    "factorize",
    "functional",
    "inflate",
    "optimize_for_inference",
    "revert",
    "set_memory_budget",
    "tune",
    "use_backend",
]
