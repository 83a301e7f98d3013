"""Builds the kernels' sources with the host compiler against the emulator's headers.

The module has the functions of ``fastst._C`` and runs the same host and kernel code on CPU memory.
Objects are kept by the hash of everything they are made from (FASTST_EMULATOR_CACHE, else a folder
in the user's cache), so that a change recompiles what it touches and test workers share the rest.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import runpy
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
INSTANCES = HERE.parent / "fastst" / "backends" / "cuda" / "hopper" / "instances.py"
EMULATOR = [HERE / name for name in ("cluster.cpp", "emulator.cpp", "tma.cpp", "wgmma.cpp")]
MODULE = "fastst_emulated"
# Hidden: of several libraries in one process, what is inline in one must not stand for another's.
FLAGS = (
    "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas",
)  # fmt: skip


# Kernels compile for longer than they run. Unoptimised, a bug planted in a header would not be
# inlined, and the linker would take the function from another source, where it is right.
KERNEL = ("-O1",)
# Of the emulator, included by all kernels: compiled once, which halves what a small kernel takes.
PRELUDE = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "wgmma.h")


def cache() -> Path:
    folder = os.environ.get("FASTST_EMULATOR_CACHE")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fastst-emulator"


def compiler() -> str:
    """
    Raises:
        RuntimeError: there is no C++ compiler.
    """
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not found:
        raise RuntimeError("the emulator needs a C++20 compiler (g++ 12 or newer), found none")
    return found


def module(csrc: Path = CSRC, changed: str | None = None) -> Path:
    """Path of the Python module made from the sources in ``csrc``, built if need be.

    Args:
        changed: the one source below csrc/cuda that is compiled from there. The others are those of
            this checkout, and what is inline in both is of the changed one.

    Raises:
        RuntimeError: the compiler's messages.
    """
    import pybind11

    python = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    names = (f"-DFASTST_MODULE={MODULE}", "-DFASTST_EMULATED=true")
    cuda = (csrc if changed is None else CSRC) / "cuda"
    sources = sorted(cuda.glob("**/*.cu")) + sorted(cuda.glob("*.cpp")) + EMULATOR
    if changed is not None:  # the linker takes the first of what is inline
        sources = [csrc / "cuda" / changed] + [s for s in sources if s != cuda / changed]

    def make(source: Path) -> Path:
        own = csrc if source.is_relative_to(csrc) else CSRC
        # Binding code is slow to optimise and its speed does not matter.
        binding = source.name == "bindings.cpp"
        return _object(source, own, ("-O0", *python, *names) if binding else _flags(source))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(make, sources))
    return _make(digest(*(str(o) for o in objects)), f"{MODULE}.so", "-shared", *map(str, objects))


def program(source: Path) -> Path:
    """Path of the executable made from one source file and the emulator."""
    sources = (source, *EMULATOR, CSRC / "cuda" / "tensor_map.cpp")
    objects = [_object(s, CSRC, _flags(s)) for s in sources]
    return _make(digest(*(str(o) for o in objects)), source.stem, *map(str, objects))


def shared_library(name: str, sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """Path of the library made from sources that need nothing of csrc, built if need be."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda s: _object(s, CSRC, flags), sources))
    return _make(digest(*(str(o) for o in objects)), f"{name}.so", "-shared", *map(str, objects))


def _flags(source: Path) -> tuple[str, ...]:
    return ("-O3",) if source in EMULATOR else (*KERNEL, *_prelude())


@functools.cache
def _prelude() -> tuple[str, ...]:
    """What includes the prelude, as the compiler has stored it."""
    text = "".join(f"#include <{name}>\n" for name in PRELUDE)
    files = (f for name in PRELUDE for f in (HERE / name, *own_headers(HERE / name)))
    flags = (*FLAGS, *KERNEL, f"-I{HERE}")
    key = digest(compiler(), text, *(f.read_text() for f in files), *flags)
    header = _write(cache() / key / "prelude.h", text)
    _make(key, "prelude.h.gch", *flags, "-x", "c++-header", str(header))
    return f"-I{header.parent}", "-include", header.name


def _folders(csrc: Path) -> tuple[Path, ...]:
    """Where headers are: the emulator's stand before those of the same name."""
    return HERE, csrc / "cuda", csrc, instances()


@functools.cache
def instances() -> Path:
    """The folder of the generated header of the Hopper kernels' tiles."""
    text = runpy.run_path(str(INSTANCES))["header"]()
    return _write(cache() / digest(text) / "hopper_instances.h", text).parent


def _write(file: Path, text: str) -> Path:
    """The file with this text; other processes may be writing the same."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as made:
            made.write(text)
        os.replace(made.name, file)
    return file


def own_headers(source: Path, csrc: Path = CSRC) -> list[Path]:
    """The headers of ours that a source may include, and those that they may, in a fixed order."""
    found: set[Path] = set()
    left = [source]
    while left:
        text = (file := left.pop()).read_text()
        for name in re.findall(r'^#include ["<](.+)[">]', text, re.MULTILINE):
            for folder in (file.parent, *_folders(csrc)):
                header = Path(os.path.normpath(folder / name))
                if header not in found and header.exists():
                    found.add(header)
                    left.append(header)
    # Not by folder: a copy of the sources has the same objects.
    return sorted(found, key=lambda f: (f.name, f.read_text()))


def _object(source: Path, csrc: Path, flags: Sequence[str]) -> Path:
    includes = [f"-I{folder}" for folder in _folders(csrc)]
    texts = [f.read_text() for f in (source, *own_headers(source, csrc))]
    key = digest(compiler(), *texts, *FLAGS, *flags)
    return _make(key, f"{source.stem}.o", *FLAGS, *flags, *includes, "-x", "c++", "-c", str(source))


def _make(key: str, name: str, *arguments: str) -> Path:
    """The compiler's output for these arguments, from the cache where it is there."""
    target = cache() / key / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what another process is building is not built again
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / name
            run = subprocess.run(
                [compiler(), *arguments, "-o", str(made)], capture_output=True, text=True
            )
            if run.returncode:
                raise RuntimeError(f"{' '.join(run.args)}\n{run.stderr}")
            os.replace(made, target)
    return target


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


if __name__ == "__main__":
    print(module())
