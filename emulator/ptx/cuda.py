"""The CUDA library with its compiled kernels executed: host code of the emulator, PTX of nvcc.

``executing`` hands the launches of the emulated library to the machine of this folder. Kernels are
found by their symbol, so what runs is the instance that the host code asked for.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import gc
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import build
from .executed import Executed
from .machine import Error, Memory, Module

FLAGS = ("-std=c++20", "-O3", "-DFASTST_EMULATED=false", "-DFASTST_MODULE=_C")
_ENTRY = re.compile(r"^(?:\.visible |\.weak )?\.entry (\w+)", re.MULTILINE)
_ANONYMOUS = re.compile(r"(\d+)_GLOBAL__N__")
Executor = ctypes.CFUNCTYPE(
    ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_uint64),
    ctypes.c_int,
)  # fmt: skip


def architecture(source: Path) -> str:
    """What a source of csrc/cuda is compiled for here."""
    return "sm_90a" if source.parent.name == "hopper" else "sm_80"


def ptx(source: Path, csrc: Path = build.CSRC) -> str:
    """What nvcc makes of one source, from the cache where it is there.

    Raises:
        RuntimeError: there is no nvcc, or it refused the source.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise RuntimeError("executing CUDA kernels needs nvcc, found none")
    folders = (csrc / "cuda", csrc, build.instances())
    flags = (*FLAGS, "-ptx", f"-arch={architecture(source)}")
    key = build.digest(nvcc, *(f.read_text() for f in _sources(source, csrc)), *flags)
    target = build.cache() / key / f"{source.stem}.ptx"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(".tmp")
        command = [nvcc, *flags, *(f"-I{f}" for f in folders), str(source), "-o", str(made)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
        made.replace(target)
    return target.read_text()


def _sources(source: Path, csrc: Path) -> list[Path]:
    headers = sorted(f for f in csrc.glob("**/*") if f.suffix in (".h", ".cuh"))
    return [source, *headers]


def host_name(symbol: str) -> str:
    """The symbol that g++ gives what nvcc calls this: anonymous namespaces differ."""
    while found := _ANONYMOUS.search(symbol):
        start = found.end(1)
        symbol = symbol[: found.start()] + "12_GLOBAL__N_1" + symbol[start + int(found[1]) :]
    return symbol


class Kernels:
    """Kernels of the CUDA sources by the symbol that g++ gives them."""

    def __init__(self, executed: Executed, csrc: Path = build.CSRC) -> None:
        self.executed, self.csrc = executed, csrc
        self.texts: dict[str, tuple[str, str]] = {}  # host's symbol: PTX symbol and text
        self.left = sorted((csrc / "cuda").glob("**/*.cu"))

    @functools.cache  # noqa: B019  # lives as long as the process
    def module(self, symbol: str) -> tuple[Module, str]:
        """
        Raises:
            Error: no source has this kernel, or the machine does not know an instruction of it.
        """
        while symbol not in self.texts:
            if not self.left:
                raise Error(f"no compiled kernel is called {symbol}")
            # Most kernels are in the source of their name.
            self.left.sort(key=lambda source: source.stem in symbol)
            self._split(ptx(self.left.pop(), self.csrc))
        name, text = self.texts[symbol]
        return Module(self.executed.plant(text)), name

    def _split(self, text: str) -> None:
        """Keep each kernel of a text apart, so that only what runs is decoded."""
        entries = list(_ENTRY.finditer(text))
        head = text[: entries[0].start()] if entries else ""
        ends = [e.start() for e in entries[1:]] + [len(text)]
        for entry, end in zip(entries, ends, strict=True):
            self.texts[host_name(entry[1])] = entry[1], head + text[entry.start() : end]


class Symbols:
    """Functions of a loaded library by their address."""

    def __init__(self, path: Path) -> None:
        run = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True)
        found = (line.split() for line in run.stdout.splitlines())
        self.table = sorted((int(at, 16), name) for at, kind, name in found if kind in "tTwWuVv")
        anchor = next(at for at, name in self.table if name == "emulator_execute_with")
        library = ctypes.CDLL(str(path))
        here = ctypes.cast(library.emulator_execute_with, ctypes.c_void_p).value
        assert here is not None
        self.base = here - anchor

    def __getitem__(self, address: int) -> str:
        at = address - self.base
        n = bisect.bisect_left(self.table, (at, ""))
        if n == len(self.table) or self.table[n][0] != at:
            raise Error("the launched kernel has no symbol")
        return self.table[n][1]


def _tensors() -> list[Memory]:
    """The memory of every tensor that lives; the launches get plain addresses."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = Memory(storage.data_ptr(), storage.nbytes())
    return list(found.values())


@contextlib.contextmanager
def executing(csrc: Path = build.CSRC) -> Iterator[Executed]:
    """Within, launches of the emulated CUDA library execute what nvcc made of the kernels."""
    executed = Executed()
    path = build.module(csrc)
    symbols, kernels = Symbols(path), Kernels(executed, csrc)
    said = b""

    def launch(
        name: bytes, kernel: int, dims: list[int], shared: int, values: list[int],
        sizes: list[int], count: int,
    ) -> bytes | None:  # fmt: skip
        nonlocal said
        try:
            arguments = [ctypes.string_at(values[n], sizes[n]) for n in range(count)]
            module, entry = kernels.module(symbols[kernel])
            executed.run(
                module, entry, dims[0:3], dims[3:6], arguments, _tensors(), shared=shared,
                cluster=dims[6:9], label=name.decode(),
            )  # fmt: skip
        except Exception as error:
            said = f"{type(error).__name__}: {error}".encode()
            return said
        return None

    library = ctypes.CDLL(str(path))
    callback = Executor(launch)
    library.emulator_execute_with(callback)
    try:
        yield executed
    finally:
        library.emulator_execute_with(None)
