"""Emulated libraries with a bug planted in one of the Hopper kernels."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import ModuleType

from fastst.backends import native

CSRC = Path(__file__).parents[1] / "csrc"
# Left out of the mutants to compile them quickly, as (file, pattern, replacement).
UNUSED = (
    ("hopper_spatial.cu", r" *if \(is\((?!64).*\n", ""),
    ("hopper_temporal.cu", r" *if \(is\((?!64).*\n", ""),
    ("hopper_spatial.cu", r" *if \(dtype == Dtype::bf16\).*\n", ""),
    ("hopper_temporal.cu", r" *if \(dtype == Dtype::bf16\).*\n", ""),
    ("hopper_stem.cu", r" *if \(dtype == Dtype::bf16\).*\n", ""),
)
# Put into the source, so that only it is compiled again.
HEADERS = ("hopper_spatial", "hopper_temporal", "pipeline", "accumulators")


def plant(file: str, right: str, wrong: str, folder: Path) -> ModuleType:
    """The library whose ``file``, headers included, has ``wrong`` for ``right``.

    It has the 64-column kernels in float16 alone.
    """
    changed = folder / "csrc"
    shutil.copytree(CSRC, changed)
    for name, unused, instead in UNUSED:
        text, times = re.subn(unused, instead, (changed / name).read_text())
        assert times, f"{name} no longer has {unused}"
        (changed / name).write_text(text)
    text = (changed / file).read_text()
    for header in HEADERS:
        inside = (changed / f"device/{header}.cuh").read_text().replace("#pragma once", "")
        text = text.replace(f"#include <device/{header}.cuh>\n", inside, 1)
    assert right in text, f"{file} no longer has {right!r}: plant the bug elsewhere"
    (changed / file).write_text(text.replace(right, wrong, 1))
    builder = native.import_file("fastst_emulator_build", native._EMULATOR)
    built = builder.module(changed)
    # A module of its own name: pybind11 hands out the first module of a name again.
    return native.import_file(f"mutant_{built.parent.name}.{builder.MODULE}", built)
