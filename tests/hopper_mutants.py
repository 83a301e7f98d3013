"""Emulated libraries with a bug planted in one of the forward Hopper kernels."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import planted

# Left out of the mutants to compile them quickly, as (file, pattern).
UNUSED = (
    ("hopper_spatial.cu", r" *if \(is\((?!64).*\n"),
    ("hopper_temporal.cu", r" *if \(is\((?!64).*\n"),
    ("hopper_spatial.cu", r" *if \(dtype == Dtype::bf16\).*\n"),
    ("hopper_temporal.cu", r" *if \(dtype == Dtype::bf16\).*\n"),
    ("hopper_stem.cu", r" *if \(dtype == Dtype::bf16\).*\n"),
)
HEADERS = ("hopper_spatial", "hopper_temporal", "pipeline", "accumulators")


def plant(file: str, right: str, wrong: str, folder: Path) -> ModuleType:
    """The library whose ``file``, headers included, has ``wrong`` for ``right``.

    It has the 64-column kernels in float16 alone.
    """
    return planted.library(folder, file, right, wrong, UNUSED, HEADERS)
