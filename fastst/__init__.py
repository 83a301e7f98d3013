"""Fused space-time convolutions: (2+1)D pairs and the parallel 4D path as single operations."""

from . import functional
from .dispatch import BackendError, FallbackWarning, use_backend

__all__ = ["BackendError", "FallbackWarning", "functional", "use_backend"]
