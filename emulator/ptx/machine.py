"""Runs PTX on memory of this process: the machine of this folder, built and called.

``load`` takes a text, ``Module.launch`` runs a kernel of it. Whatever the machine finds wrong, from
an access out of bounds to a register that a product under way will still write, is an ``Error``
that names the instruction, the line of its source, the block and the warp.
"""

from __future__ import annotations

import ctypes
import functools
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import build

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("*.cpp"))
FLAGS = ("-O2", "-ftree-vectorize", "-mavx2", "-mfma", "-mf16c")


class Error(RuntimeError):
    """What is wrong with a program, or what the machine does not know."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a kernel may touch; ``written``: whether they have values yet."""

    address: int
    size: int
    written: bool = True


@functools.cache
def library() -> ctypes.CDLL:
    """The machine, compiled if need be.

    Raises:
        RuntimeError: there is no C++ compiler, or it refused the sources.
    """
    found = ctypes.CDLL(str(build.shared_library("ptx", SOURCES, FLAGS)))
    found.ptx_said.restype = ctypes.c_char_p
    found.ptx_load.restype = ctypes.c_void_p
    found.ptx_load.argtypes = [ctypes.c_char_p]
    found.ptx_free.argtypes = [ctypes.c_void_p]
    found.ptx_parameter.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_uint32),
        ctypes.POINTER(ctypes.c_uint32),
    ]  # fmt: skip
    found.ptx_parameter_bytes.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    found.ptx_parameter_bytes.restype = ctypes.c_int64
    found.ptx_launch.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_uint32,
        ctypes.c_char_p, ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64), ctypes.c_char_p,
        ctypes.c_int, ctypes.c_uint64, ctypes.c_int,
    ]  # fmt: skip
    return found


class Module:
    """The kernels of a PTX text."""

    def __init__(self, text: str) -> None:
        self._handle = library().ptx_load(text.encode())
        if not self._handle:
            raise Error(library().ptx_said().decode())

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            library().ptx_free(self._handle)

    @functools.cache  # noqa: B019  # a module lives as long as the process that runs it
    def parameters(self, kernel: str) -> tuple[tuple[int, int], ...]:
        """Offset and bytes of each parameter of a kernel."""
        if library().ptx_parameter_bytes(self._handle, kernel.encode()) < 0:
            raise Error(f"no kernel {kernel}")
        found = []
        offset, size = ctypes.c_uint32(), ctypes.c_uint32()
        while library().ptx_parameter(
            self._handle, kernel.encode(), len(found), ctypes.byref(offset), ctypes.byref(size)
        ):
            found.append((offset.value, size.value))
        return tuple(found)

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[int | float | bytes],
        memory: Iterable[Memory],
        *,
        shared: int = 0,
        cluster: Sequence[int] = (1, 1, 1),
        seed: int = 0,
        count: bool = False,
    ) -> dict[str, Any]:
        """Run a kernel to its end.

        Args:
            arguments: a number or bytes for each parameter, in order; a float is one of 4 bytes,
                or of 8 where the parameter has them.
            shared: bytes of dynamic shared memory.
            seed: of the order in which warps run and copies arrive.
            count: whether to count instructions and accesses.

        Returns:
            What was counted.

        Raises:
            Error: what went wrong, and where.
        """
        places = self.parameters(kernel)
        if len(places) != len(arguments):
            raise Error(f"{kernel} takes {len(places)} parameters, got {len(arguments)}")
        size = library().ptx_parameter_bytes(self._handle, kernel.encode())
        given = bytearray(size)
        for (offset, bytes_), argument in zip(places, arguments, strict=True):
            given[offset : offset + bytes_] = _pack(argument, bytes_)
        regions = list(memory)
        ranges = [n for m in regions for n in (m.address, m.size)]
        dims = [*_three(grid), *_three(block), *_three(cluster)]
        failed = library().ptx_launch(
            self._handle, kernel.encode(), (ctypes.c_uint32 * 9)(*dims), shared, bytes(given), size,
            (ctypes.c_uint64 * len(ranges))(*ranges), bytes(m.written for m in regions),
            len(regions), seed, count,
        )  # fmt: skip
        said = library().ptx_said().decode()
        if failed:
            raise Error(said)
        return json.loads(said) if count else {}


def _three(dims: Sequence[int]) -> tuple[int, ...]:
    return (*dims, 1, 1)[:3]


def _pack(argument: int | float | bytes, size: int) -> bytes:
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, float):
        return struct.pack("<d" if size == 8 else "<f", argument)
    return (argument & ((1 << 8 * size) - 1)).to_bytes(size, "little")
