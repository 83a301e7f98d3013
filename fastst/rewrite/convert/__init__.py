"""Pairs in models that somebody else wrote, run as one operation: in place and reversibly."""

from __future__ import annotations

from .converter import convert, revert
from .report import Alone, Left, Replaced, Report

__all__ = ["Alone", "Left", "Replaced", "Report", "convert", "revert"]
