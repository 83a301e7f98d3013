"""The CUDA library on the machine of this folder: what nvcc makes of it, with another runtime.

Host code and PTX are nvcc's; ``runtime/cudart.cpp`` stands for the CUDA runtime and hands every
launch, with the PTX that the kernel lies in, to ``executing``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from .. import build
from .executed import Executed, live_tensors
from .machine import Module

MODULE = "fastst_executed"
FLAGS = (
    "-std=c++20", "-O3", "-no-compress", "-cudart", "none", f"-DFASTST_MODULE={MODULE}",
    "-DFASTST_EMULATED=true", "-Xcompiler", "-fPIC,-fvisibility=hidden",
)  # fmt: skip
RUNTIME = Path(__file__).parent / "runtime" / "cudart.cpp"
_ENTRY = re.compile(r"^(?:\.visible |\.weak )*\.entry (\w+)", re.MULTILINE)
Executor = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p),
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


def architecture(source: Path) -> str:
    """nvcc's options for the PTX of a source: what it is compiled for where it ships."""
    number = "90a" if source.parent.name == "hopper" else "80"
    return f"arch=compute_{number},code=compute_{number}"


@functools.cache
def library(csrc: Path = build.CSRC) -> Path:
    """Path of the Python module, built if need be: minutes where nothing of it is there yet.

    Raises:
        RuntimeError: there is no nvcc, or it refused a source.
    """
    import pybind11

    headers = [f for f in sorted(csrc.glob("**/*")) if f.suffix in (".h", ".cuh")]
    texts = [f.read_text() for f in headers]
    folders = (csrc / "cuda", csrc, build.instances())
    python = (pybind11.get_include(), sysconfig.get_path("include"))
    includes = [f"-I{f}" for f in (*folders, *python)]

    def made(source: Path) -> Path:
        flags = (*FLAGS, "-gencode", architecture(source))
        key = build.digest(nvcc(), source.read_text(), *texts, *flags)
        return _made(key, f"{source.stem}.o", *flags, *includes, "-c", str(source))

    sources = [*(csrc / "cuda").glob("**/*.cu"), *(csrc / "cuda").glob("*.cpp"), RUNTIME]
    with ThreadPoolExecutor(2) as pool:
        objects = [str(o) for o in pool.map(made, sorted(sources))]
    return _made(build.digest(*objects), f"{MODULE}.so", "-shared", "-cudart", "none", *objects)


def _made(key: str, name: str, *arguments: str) -> Path:
    target = build.cache() / key / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(".part" + target.suffix)
        run = subprocess.run([nvcc(), *arguments, "-o", str(made)], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{' '.join(run.args)}\n{run.stderr}")
        made.replace(target)
    return target


@functools.cache
def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def alone(text: str, kernel: str) -> str:
    """A module's text with one of its kernels, so that only what runs is decoded."""
    entries = list(_ENTRY.finditer(text))
    n = next(n for n, entry in enumerate(entries) if entry[1] == kernel)
    end = entries[n + 1].start() if n + 1 < len(entries) else len(text)
    return text[: entries[0].start()] + text[entries[n].start() : end]


@contextlib.contextmanager
def executing(path: Path | None = None) -> Iterator[tuple[ModuleType, Executed]]:
    """The library, for tensors on the CPU; within, its launches are executed.

    Args:
        path: of a library that ``library`` has built.
    """
    path = path or library()
    module, executed = loaded(path), Executed()
    modules: dict[str, Module] = {}
    said = ctypes.create_string_buffer(b"")

    def launch(
        name: bytes, text: int, dims: list[int], shared: int, values: list[int]
    ) -> int | None:
        nonlocal said
        kernel = name.decode()
        try:
            if kernel not in modules:
                ptx = executed.plant(alone(ctypes.string_at(text).decode(), kernel))
                modules[kernel] = Module(ptx)
            sizes = modules[kernel].parameters(kernel)
            arguments = [ctypes.string_at(values[n], size) for n, (_, size) in enumerate(sizes)]
            executed.run(
                modules[kernel], kernel, dims[0:3], dims[3:6], arguments, live_tensors(),
                shared=shared, cluster=dims[6:9],
            )  # fmt: skip
        except Exception as error:
            said = ctypes.create_string_buffer(f"{type(error).__name__}: {error}".encode())
            return ctypes.addressof(said)
        return None

    callback = Executor(launch)
    runtime = ctypes.CDLL(str(path))
    runtime.executed_by(callback)
    try:
        yield module, executed
    finally:
        runtime.executed_by(None)
