"""Warnings that stand at the line of the caller's which led to them."""

from __future__ import annotations

import sys
import warnings

_INSIDE = ("fastst", "torch")


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the nearest frame that is neither this library's nor PyTorch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
