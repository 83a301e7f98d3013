"""The CUDA library on the machine of this folder: what setup.py has built, with another runtime.

The objects are those of ``fastst._C``, and the PTX is what their machine code was made from, which
setup.py keeps beside them. ``runtime/cudart.cpp`` stands for the CUDA runtime and hands every
launch to ``executing``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from .. import build
from .executed import Executed, live_tensors, young_objects
from .machine import Module

BUILT = build.HERE.parent / "build" / "_C"
RUNTIME = Path(__file__).parent / "runtime" / "cudart.cpp"
_ENTRY = re.compile(r"^(?:\.visible |\.weak )*\.entry (\w+)", re.MULTILINE)
Executor = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


def nvcc() -> str:
    """
    Raises:
        RuntimeError: there is none.
    """
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise RuntimeError("executing CUDA kernels needs nvcc, found none")
    return found


def objects() -> list[Path]:
    """The objects of ``fastst._C``.

    Raises:
        RuntimeError: setup.py has not built them, or from sources that have changed since.
    """
    found, stale = sorted(BUILT.glob("cuda/**/*.o")), []
    for made in found:
        place = build.CSRC / made.relative_to(BUILT)
        source = next(f for s in (".cu", ".cpp") if (f := place.with_suffix(s)).exists())
        headers = (h for h in build.own_headers(source) if h.is_relative_to(build.CSRC))
        if made.stat().st_mtime < max(f.stat().st_mtime for f in (source, *headers)):
            stale.append(source.name)
    if stale or not found:
        raise RuntimeError(
            f"executing CUDA kernels needs the objects of fastst._C in {BUILT}, "
            f"{'older than ' + ', '.join(stale) if stale else 'found none'}: "
            "python setup.py build_ext --inplace makes them"
        )
    return found


@functools.cache
def library() -> ModuleType:
    """``fastst._C``, with the runtime of this folder.

    Raises:
        RuntimeError: there is no nvcc, or ``objects`` has none.
    """
    parts = [*objects(), RUNTIME, RUNTIME.parents[1] / "tensor_map.h"]
    key = build.digest(nvcc(), *(hashlib.sha256(p.read_bytes()).hexdigest() for p in parts))
    target = build.cache() / key / "_C.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(".part.so")
        run = subprocess.run(
            [
                nvcc(), "-std=c++20", "-O2", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-shared",
                "-cudart", "none", *map(str, parts[:-1]), "-o", str(made),
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode:
            raise RuntimeError(f"{' '.join(run.args)}\n{run.stderr}")
        made.replace(target)
    spec = importlib.util.spec_from_file_location("fastst_executed._C", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def kernels(number: str) -> dict[str, tuple[Path, int, int, int]]:
    """Where each kernel's PTX for a virtual architecture is: the file, and in it the end of what
    comes before all kernels, and the kernel's own start and end."""
    found = {}
    for file in BUILT.glob("cuda/**/*.ptx/*.ptx"):
        text = file.read_text()
        if f"\n.target sm_{number}\n" not in text[:1000]:
            continue
        entries = list(_ENTRY.finditer(text))
        ends = [*(e.start() for e in entries[1:]), len(text)]
        for entry, end in zip(entries, ends, strict=True):
            found[entry[1]] = file, entries[0].start(), entry.start(), end
    return found


def text(kernel: str, number: str) -> str:
    """A module with this kernel alone, so that only what runs is decoded.

    Raises:
        RuntimeError: it is not compiled for this virtual architecture.
    """
    if kernel not in kernels(number):
        raise RuntimeError(f"no PTX of {kernel} for compute_{number} in {BUILT}")
    file, head, start, end = kernels(number)[kernel]
    whole = file.read_text()
    return whole[:head] + whole[start:end]


@contextlib.contextmanager
def executing(number: str, readable: Callable[[str], str]) -> Iterator[tuple[ModuleType, Executed]]:
    """Within, the library's launches run on the machine.

    Args:
        number: the virtual architecture whose PTX runs, where a kernel has several.
        readable: makes of a mangled name what ``Executed.kernels`` has.
    """
    module, executed = library(), Executed()
    modules: dict[str, Module] = {}
    said = ctypes.create_string_buffer(b"")

    def launch(name: bytes, dims: list[int], shared: int, values: list[int]) -> int | None:
        nonlocal said
        kernel = name.decode()
        try:
            if kernel not in modules:
                modules[kernel] = Module(executed.plant(text(kernel, number)))
            sizes = modules[kernel].parameters(kernel)
            arguments = [ctypes.string_at(values[n], size) for n, (_, size) in enumerate(sizes)]
            executed.run(
                modules[kernel], kernel, dims[0:3], dims[3:6], arguments, live_tensors(),
                label=readable(kernel), shared=shared, cluster=dims[6:9],
            )  # fmt: skip
        except Exception as error:
            said = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
            return ctypes.addressof(said)
        return None

    callback = Executor(launch)
    runtime = ctypes.CDLL(str(module.__file__))
    runtime.executed_by(callback)
    try:
        with young_objects():
            yield module, executed
    finally:
        runtime.executed_by(None)
