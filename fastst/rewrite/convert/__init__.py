"""Pairs in models that somebody else wrote, run as one operation: in place and reversibly."""

from __future__ import annotations

from .converter import convert, revert
from .report import Left, Replaced, Report

__all__ = ["Left", "Replaced", "Report", "convert", "revert"]
