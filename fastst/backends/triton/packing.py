"""Weights as the kernels read them: packed before a call's other launches, two in one of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...machine import gpu
from . import arguments, launch, tiles

ROWS, COLUMNS = 16, 64  # of a tile: 8 elements of each of 128 threads, as 16 spilled


@dataclass
class Weight:
    """A weight by what a kernel makes of its axes, as a view (g, n, n', c, c', kt, kh, kw).

    Columns of a group are (n, n'), rows are (tap, c, c'). ``lanes`` and ``parts`` are what n' and
    c' count as, with the zeros behind them.
    """

    view: Tensor
    lanes: int = 1
    parts: int = 1

    @classmethod
    def of(cls, w: Tensor, groups: int) -> Weight:
        """(K, C/g, kt, kh, kw) as columns of output channels, rows of (tap, input channel)."""
        return cls(w.unflatten(0, (groups, -1)).unsqueeze(2).unsqueeze(4))

    @classmethod
    def transposed(cls, w: Tensor, groups: int) -> Weight:
        """The same with input and output channels exchanged."""
        return cls(w.unflatten(0, (groups, -1)).transpose(1, 2).unsqueeze(2).unsqueeze(4))

    @classmethod
    def of_inputs(cls, w: Tensor, groups: int) -> Weight:
        """Columns of the input channels of all groups, rows of (tap, output channel of a group)."""
        each = w.unflatten(0, (groups, -1)).transpose(1, 2)
        return cls(each.unsqueeze(0).unsqueeze(4), lanes=each.shape[1])

    def rows(self, depth: int) -> int:
        """Rows, with so many for a tap."""
        return depth * math.prod(self.view.shape[5:])


def pack(
    weight: Weight, channels: int, config: tiles.TapConfig, width: int | None = None
) -> Tensor:
    """(groups, reduction, width): see ``kernels.tap_conv``.

    ``width`` is that of whole tiles unless it is given.
    """
    out_channels = weight.view.shape[1] * weight.lanes
    width = width or gpu.round_up(out_channels, config.columns)
    depth = channels if config.flat else gpu.round_up(channels, config.block_k)
    rows = gpu.round_up(weight.rows(depth), config.block_k)
    return pack_weight(weight, depth, rows, width, turned=arguments.turned())


def pack_direct(weight: Weight) -> Tensor:
    """(taps · channels, columns) of a weight whose groups are one."""
    _, n, _, c, *_ = weight.view.shape
    depth = c * weight.parts
    return pack_weight(weight, depth, weight.rows(depth), n * weight.lanes, products=False)[0]


def pack_weight(
    weight: Weight,
    depth: int,
    rows: int,
    width: int,
    *,
    products: bool = True,
    turned: bool = False,
) -> Tensor:
    """(groups, rows, width) with ``depth`` rows of each tap; for tensor cores or ordinary ones.

    Turned, the rows of a column are neighbours in memory.

    On every call: what was changed through ``weight.data`` leaves no trace by which a cache could
    know, and a captured graph must see it, too.
    """
    groups = weight.view.shape[0]
    out = weight.view.new_empty(groups, *((width, rows) if turned else (rows, width)))
    layout = arguments.hide(rows, width, depth, weight.parts, weight.lanes)
    count = -(-rows // ROWS) * -(-width // COLUMNS) * groups
    view = weight.view
    args = view, arguments.hide(*view.shape), arguments.hide(*view.stride()), out, layout
    launch_all = _launcher(products and arguments.rounds(view.dtype), turned)
    launch.recorder().first(launch_all, view, (count, args))
    return out.mT if turned else out


Job = tuple[int, tuple[Any, ...]]  # tiles and arguments of one weight


@functools.cache
def _launcher(rounded: bool, turned: bool) -> Callable[[list[Job]], None]:
    return functools.partial(_launch, rounded=rounded, turned=turned)


def _launch(jobs: list[Job], rounded: bool, turned: bool) -> None:
    """Weights of a call, packed two at a time."""
    for i in range(0, len(jobs), 2):
        (count, one), *others = jobs[i : i + 2]
        more, other = others[0] if others else (0, (None,) * 5)
        launch.run(
            launch.kernels().pack.pack, (count + more,), None, *one, count, *other,
            ROUND=rounded, TURNED=turned, BLOCK_R=ROWS, BLOCK_N=COLUMNS,
        )  # fmt: skip
