"""Emulated libraries with a bug planted in a copy of the kernels' sources."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastst.backends.cuda import library as native
from fastst.backends.cuda.hopper import instances
from tests.support import ROOT

CSRC = ROOT / "csrc"
Plant = Callable[..., ModuleType]  # file, right, wrong, and options of ``library``

# Left out of mutants of Hopper kernels to compile them quickly, as (file, pattern, replacement).
NO_BF16 = (("hopper/instances.cuh", r" *if \(dtype == Dtype::bf16\).*\n", ""),)
# Of generic and depthwise ones, likewise: they are for float32, 3×3×3 and stride 1 then.
_ONE_OF_A_KIND = (
    ("device/math.cuh", r"return f\((__half|__nv_bfloat16|double)\{\}\);", "break;"),
    ("depthwise/slab.cuh", r" *if \((kernel == \d && temporal_kernel == 5|kernel == 5).*\n", ""),
    ("depthwise/slab.cuh", r" *if \(stride == 2\).*\n", ""),
)
# Options of ``library`` for bugs in the headers of kernels, too.
HOPPER: dict[str, Any] = dict(
    unused=NO_BF16,
    headers=("hopper/accumulators.cuh", "hopper/pipeline.cuh", "hopper/temporal.cuh"),
)
GENERIC: dict[str, Any] = dict(unused=_ONE_OF_A_KIND, headers=("device/source.cuh",))


# What mutants of Hopper kernels are compiled for: small tiles, one of a kind and stride.
_TILES = {
    "SPATIAL": ((64, 1, 2),), "TEMPORAL": ((64, 4, 1), (128, 1, 2)),
    "SPATIAL_GRADIENT": ((64, 4),), "TEMPORAL_GRADIENT": ((64, 4, 1), (120, 2, 2)),
    "WEIGHT_GRADIENT": ((48, 3),),
}  # fmt: skip


def few_tiles(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Lets the instances of one file be few."""
    name = Path(file).stem.upper()
    if file.startswith("hopper/") and name in _TILES:
        monkeypatch.setattr(instances, name, _TILES[name])


def more(*values: object) -> Any:
    """A bug of a kind that another stands for, or a case of the emulator's: ``--thorough``."""
    return pytest.param(*values, marks=pytest.mark.thorough)


TOLD = r"^emulator: |could not be launched: emulator: |error \S+ > |of Case\("


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Around what must tell the bug: by a result that is wrong or by a check of the emulator."""
    with pytest.raises((AssertionError, RuntimeError), match=TOLD):
        yield


def library(
    folder: Path,
    file: str,
    right: str,
    wrong: str,
    unused: Sequence[tuple[str, str, str]] = (),
    headers: Sequence[str] = (),
) -> ModuleType:
    """The emulated library in which ``file`` has ``wrong`` for ``right``.

    It alone is compiled again; its Hopper kernels have the tiles that ``instances`` lists now.

    Args:
        folder: for the copy.
        unused: (file, pattern, replacement) of what the test does not need and takes long to
            compile.
        file: below csrc/cuda.
        headers: below csrc/cuda, where the bug may be as well if ``file`` includes them, from the
            innermost.
    """
    shutil.copytree(CSRC, folder / "csrc")
    changed = folder / "csrc" / "cuda"
    builder = native.import_file("fastst_emulator_build", native._EMULATOR)
    for name, pattern, instead in unused:
        text, times = re.subn(pattern, instead, (changed / name).read_text())
        assert times, f"{name} no longer has {pattern}"
        (changed / name).write_text(text)
    (changed / "hopper_instances.h").write_text(instances.header())
    included = builder.own_headers(changed / file, changed.parent)
    places = [p for h in headers if (p := changed / h) in included] + [changed / file]
    place = next((p for p in places if right in p.read_text()), None)
    assert place, f"{file} no longer has {right!r}: plant the bug elsewhere"
    place.write_text(place.read_text().replace(right, wrong, 1))
    built = builder.module(changed.parent, file)
    # A module of its own name: pybind11 hands out the first module of a name again.
    found = native.import_file(f"mutant_{built.parent.name}.{builder.MODULE}", built)
    assert Path(found.__file__ or "") == built
    return found
