"""What the Hopper kernels read besides tensors, made ready by one launch: weights and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....machine import served
from ....machine.gpu import round_up
from ....problem.spec import PairProblem, PairTensors
from ..library import Launcher, Tables

# Rows of tables: of an epilogue of sums, and of z = act(scale·u + shift).
AFFINE, PROLOGUE = ("scale", "biased"), ("scale", "shift")
CHUNK = 64  # elements of the reduction in a row of packed weights
_STEM_CHUNKS = 4  # of 8 × 8 × 4 (kh, kw, C)


class Table(NamedTuple):
    """(rows, columns) float: zeros from the channels on."""

    values: Tensor

    def array(self, lib: Any, first: int = 0) -> Any:
        """From a row on, for the library."""
        rows, columns = self.values.shape
        return lib.Array(self.values.data_ptr() + 4 * first * columns, (rows - first) * columns)


class Packing:
    """Collects what one launch is to make; what it hands out is there after ``launch``."""

    def __init__(self, k: Launcher) -> None:
        self._k = k
        self._weights: list[Any] = []
        self._tables: list[Any] = []

    def weight(self, weight: Tensor, columns: int, order: str = "forward") -> Tensor:
        """
        Args:
            weight: (O, I, kt, kh, kw), of any strides.
            columns: of a tile of the product.
            order: of the library's ``Order``: which tells what the rows of 64 elements are.
        """
        k = self._k
        o, i, *taps = weight.shape
        tiles, chunks, count = math.ceil(o / columns), math.ceil(i / CHUNK), math.prod(taps)
        if order == "mirrored":
            tiles, chunks = math.ceil(i / columns), math.ceil(o / CHUNK)
        elif order == "stem":
            chunks, count = _STEM_CHUNKS, 1
        packed = torch.empty(
            tiles * chunks * count * columns * CHUNK, dtype=weight.dtype, device=weight.device
        )
        array = k.lib.Array(packed.data_ptr(), packed.numel())
        kind = getattr(k.lib.Order, order)
        self._weights.append(k.lib.Packing(k.view(weight), array, columns, kind))
        return packed

    def table(self, norm: Any, columns: int, rows: Sequence[str]) -> Table:
        """
        Args:
            norm: as of ``Launcher.norm``.
            rows: names of the library's ``Row``.
        """
        values = self._k.empty(len(rows), columns)
        self._tables.append(self._k.table(norm, values, rows))
        return Table(values)

    def launch(self) -> None:
        k = self._k
        k.lib.pack(k.dtype, self._weights, self._tables, k.stream)


def round_to_chunk(channels: int) -> int:
    """Columns of a table that is read in whole chunks."""
    return round_up(channels, CHUNK)


class Ready(NamedTuple):
    """What the kernels of a forward pass read; what a kernel that is not launched reads is None."""

    first: Tensor | None = None  # packed weights
    first_affine: Table | None = None  # of the first epilogue
    second: Tensor | None = None
    second_affine: Table | None = None
    prologue: Table | None = None  # z = act(scale·u + shift)


def ready(
    k: Launcher, problem: PairProblem, tensors: PairTensors, key: Any, make: Callable[[], Ready]
) -> Ready:
    """What ``make`` packs; of a copy for inference, what it has packed before.

    Args:
        key: what it depends on besides the problem's norm.
    """
    on_gpu = problem.device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return make()  # so that a graph reads weights as they are when it is replayed
    norm = problem.spec.norm, problem.spec.eps
    return served.get_or_make(tensors[1:9], (key, norm, k.stream), make)


def from_statistics(
    k: Launcher,
    t: PairTensors,
    columns: int,
    rows: Sequence[str],
    bias: Tensor | None = None,
) -> tuple[Table, Tables]:
    """A table of the norm of a batch, and what has the statistics fill it."""
    values = k.empty(len(rows), columns)

    def tables(mean: Tensor, var: Tensor) -> Sequence[Any]:
        return [k.table(k.norm(mean.shape[0], bias, t, mean, var), values, rows)]

    return Table(values), tables
