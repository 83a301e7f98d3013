"""Fused space-time convolutions: (2+1)D pairs and the parallel 4D path as single operations."""

import sys

try:
    from . import functional
    from .convert import convert, revert
    from .dispatch import BackendError, FallbackWarning, use_backend
    from .explaining import Explanation, explain
    from .factorize import factorize
    from .inference import optimize_for_inference
    from .inflate import inflate
    from .layers import Conv2Plus1d, ParallelConv2Plus1d
    from .memory import MemoryPlan, set_memory_budget
    from .tuning import Measurement, tune
except Exception:
    # ``python -m fastst.info`` runs this file first, and is there to say what is broken.
    if "fastst.info" not in sys.orig_argv:
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
