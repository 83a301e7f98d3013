"""Launches of the Hopper kernels, as functions of tensors.

Everything is channels-last, and x is read as it lies: ``why_not`` refuses what would have to be
copied first. Weights come packed, and coefficients in tables (``packing``).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....machine.gpu import round_up
from ....problem.spec import PairProblem
from ..depthwise import channels_last
from ..library import Launcher, is_emulated
from . import gradient_tiles
from . import tiles as configs_hopper
from .gradient_tiles import Axis, GradientTile
from .packing import Table
from .tiles import HopperTile

ROW = 8  # channels that are a multiple of it fill the 16-byte rows that the copy engine needs
STEM = (4, 48, 64)  # most channels C, M and K of the stem: columns of its two products
_EMULATED_PROCESSORS = 2  # so that blocks walk over several tiles


class Mid(NamedTuple):
    """z = activation(scale·u + shift), the input of the temporal pass."""

    u: Tensor  # (N, M, T, H, W), channels-last
    table: Table | None  # (3, ⌈M/64⌉·64): scale, shift, 0; none: 1, 0
    activation: str


class Gradient(NamedTuple):
    """du = g + p·u + r inside of the frame, the gradient of the spatial pass's output."""

    g: Tensor  # (N, M, T, H, W), channels-last
    u: Tensor | None = None  # laid out as g; none: du = g
    table: Table | None = None  # (3, ⌈M/64⌉·64): 1, r, p


def stem_why_not(problem: PairProblem) -> str | None:
    """Why the single kernel of the stem cannot run what the family can, or None."""
    spatial, temporal = problem.passes
    channels = spatial.in_channels, spatial.out_channels, temporal.out_channels
    if any(c > most for c, most in zip(channels, STEM, strict=True)):
        return f"that has at most {STEM} channels, not {channels}"
    geometry = (*spatial.kernel[1:], *spatial.stride[1:], *spatial.dilation[1:], temporal.stride[0])
    if geometry != (7, 7, 2, 2, 1, 1, 1) or temporal.padding_mode != "zeros":
        return "that has 7 × 7 taps of stride 2, and in time stride 1 and zero padding"
    return None


def _processors(device: torch.device) -> int:
    if is_emulated():
        return _EMULATED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def spatial_tile(problem: PairProblem) -> HopperTile:
    """Tile of the spatial pass."""
    p = problem.passes[0]
    return configs_hopper.spatial(
        problem.batch * problem.size[0], problem.mid_size[1:], p.in_channels,
        problem.mid_shape[-1], p.kernel[1:], p.stride[1:], p.dilation[1],
        _processors(problem.device), problem.spec.norm == "batch",
    )  # fmt: skip


def temporal_tile(problem: PairProblem) -> HopperTile:
    """Tile of the temporal pass."""
    p = problem.passes[1]
    return configs_hopper.temporal(
        problem.batch, math.prod(problem.out_size[1:]), problem.out_size[0], p.in_channels,
        p.out_channels, p.stride[0], _processors(problem.device),
        prologue=problem.spec.norm == "batch",
    )  # fmt: skip


def spatial_gradient_tile(problem: PairProblem) -> GradientTile | None:
    """Tile of the input gradient of the spatial pass; None where its taps lie too far apart."""
    p = problem.passes[0]
    h, w = (
        Axis(problem.size[i], problem.mid_size[i], p.kernel[i], p.stride[i], p.dilation[i],
             p.padding[2 * i])
        for i in (1, 2)
    )  # fmt: skip
    return gradient_tiles.spatial_gradient(
        problem.batch * problem.size[0], h, w, problem.mid_shape[-1],
        round_up(p.in_channels, ROW), 2 if problem.spec.norm == "batch" else 1,
        _processors(problem.device),
    )  # fmt: skip


def temporal_gradient_tile(problem: PairProblem) -> HopperTile:
    """Tile of the input gradient of the temporal pass."""
    p = problem.passes[1]
    return configs_hopper.temporal(
        problem.batch, math.prod(problem.mid_size[1:]), problem.mid_size[0], p.out_channels,
        problem.mid_shape[-1], p.stride[0], _processors(problem.device), gradient=True,
    )  # fmt: skip


def rows_of(t: Tensor) -> Tensor:
    """t with strides of axes of size 1 that fit the others, as tensor maps want them."""
    strides = list(t.stride())
    inner = max(ROW, t.shape[1])
    for d in (4, 3, 2, 0):
        if t.shape[d] == 1:
            strides[d] = inner
        inner = max(inner, strides[d] * t.shape[d])
    return t.as_strided(t.shape, strides)


def space_pixels_evenly(t: Tensor) -> Tensor:
    """t in channels-last rows with the pixels of a frame evenly apart, or a copy that is so."""
    t = channels_last(t)
    apart = [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]
    even = t.shape[3] == 1 or t.shape[4] == 1 or t.stride(3) == t.stride(4) * t.shape[4]
    return rows_of(t if even and 0 not in apart else t.clone(memory_format=torch.channels_last_3d))


def space_frames_evenly(x: Tensor) -> Tensor:
    """x, or a copy, in which the frames of all clips are evenly apart."""
    if x.shape[0] == 1 or x.shape[2] == 1 or x.stride(0) == x.stride(2) * x.shape[2]:
        return x
    return x.clone(memory_format=torch.channels_last_3d)


class Launches:
    def __init__(self, k: Launcher, problem: PairProblem) -> None:
        self.k, self.problem = k, problem

    def _tile(self, t: HopperTile) -> Any:
        return self.k.lib.HopperTile(
            t.columns, t.groups, t.blocks, t.box, t.share, t.stages, t.grid, t.cluster
        )

    def _array(self, packed: Tensor) -> Any:
        self.k.kept.append(packed)
        return self.k.lib.Array(packed.data_ptr(), packed.numel())

    def _rows(self, table: Table | None, first: int = 0) -> Any:
        if table is None:
            return self.k.lib.Array()
        self.k.kept.append(table.values)
        return table.array(self.k.lib, first)

    def _output(
        self,
        out: Tensor,
        channels: int,
        affine: Table,  # (2, whole tiles of columns): scale, shift
        warps: int,  # that write partials
        activation: str = "none",
        residual: Tensor | None = None,
        statistics: bool = False,
    ) -> tuple[Any, Tensor | None]:
        """The library's description, and the partials that will be written."""
        k = self.k
        partials = k.empty(warps, 3, channels) if statistics else None
        output = k.lib.HopperOutput(
            k.view(out), None if residual is None else k.view(residual), self._rows(affine),
            k.array(partials), channels, k.act(activation), k.slope,
        )  # fmt: skip
        return output, partials

    def spatial(
        self, x: Tensor, packed: Tensor, affine: Table, u: Tensor, tile: HopperTile, **epilogue: Any
    ) -> Tensor | None:
        """Fills u (N, stored channels, T, H, W); partial statistics where asked for."""
        k, p = self.k, self.problem.passes[0]
        warps = tile.grid * 4 * configs_hopper.GROUPS
        output, partials = self._output(u, p.out_channels, affine, warps, **epilogue)
        argument = k.lib.HopperSpatial(
            k.view(x), self._array(packed), k.conv(p), output, self._tile(tile)
        )
        k.lib.hopper_spatial(k.dtype, argument, k.stream)
        return partials

    def temporal(
        self,
        u: Tensor,
        packed: Tensor,
        affine: Table,
        y: Tensor,
        tile: HopperTile,
        table: Table | None,
        prologue: str,
        **epilogue: Any,
    ) -> Tensor | None:
        """Fills y from z = prologue(scale·u + shift), or from u where ``table`` is None; partial
        statistics where asked for."""
        k, p = self.k, self.problem.passes[1]
        warps = tile.grid * 4 * configs_hopper.GROUPS
        output, partials = self._output(y, p.out_channels, affine, warps, **epilogue)
        argument = k.lib.HopperTemporal(
            k.view(u), self._array(packed), k.conv(p), self._rows(table), k.act(prologue), k.slope,
            output, self._tile(tile),
        )  # fmt: skip
        k.lib.hopper_temporal(k.dtype, argument, k.stream)
        return partials

    def temporal_gradient(
        self,
        dy: Tensor,
        packed: Tensor,
        table: Table,  # (4, whole tiles of columns): mean, scale, beta, what dv is multiplied by
        g: Tensor,
        tile: HopperTile,
        u: Tensor | None,
        statistics: bool,
    ) -> Tensor | None:
        """Fills g, dv times the norm's scale; partials (rows, 2, M) of Σdv and Σdv·(u − mean),
        where asked for."""
        k, p = self.k, self.problem.passes[1]
        m = p.in_channels
        partials = k.empty(tile.grid * 4 * configs_hopper.GROUPS, 2, m) if statistics else None
        argument = k.lib.HopperTemporalGradient(
            k.view(dy), self._array(packed), k.conv(p), k.view(g), None if u is None else k.view(u),
            self._rows(table), k.array(partials), m, k.act(self.problem.spec.activation), k.slope,
            self._tile(tile),
        )  # fmt: skip
        k.lib.hopper_temporal_gradient(k.dtype, argument, k.stream)
        return partials

    def spatial_gradient(
        self, du: Gradient, packed: Tensor, dx: Tensor, tile: GradientTile
    ) -> None:
        """Fills dx (N, stored channels, T, H, W)."""
        k = self.k
        argument = k.lib.HopperSpatialGradient(
            k.view(du.g), None if du.u is None else k.view(du.u), self._rows(du.table, 1),
            self._array(packed), k.conv(self.problem.passes[0]), k.view(dx),
            k.lib.HopperGradientTile(
                tile.columns, tile.blocks, tile.box, tile.stages, tile.grid, tile.cluster
            ),
        )  # fmt: skip
        k.lib.hopper_spatial_gradient(k.dtype, argument, k.stream)

    def stem(
        self,
        x: Tensor,
        packed: Tensor,
        affine: Table,
        out: Tensor,
        pair: tuple[Tensor, Table] | None = None,
        **epilogue: Any,
    ) -> Tensor | None:
        """Fills u; or y, with the second weight and a table (2, 48) of what goes through the
        activation, scale·conv(x) + shift."""
        k, problem, spec = self.k, self.problem, self.problem.spec
        weight, table = (k.lib.Array(), None) if pair is None else (self._array(pair[0]), pair[1])
        processors = _processors(problem.device)
        grid, piece = configs_hopper.stem(problem.batch, out.shape[2:], processors)
        warps = grid * 4 * configs_hopper.STEM_GROUPS
        channels = problem.mid_channels if pair is None else problem.out_channels
        output, partials = self._output(out, channels, affine, warps, **epilogue)
        argument = k.lib.HopperStem(
            k.view(x), self._array(packed), weight, spec.padding, self._rows(table),
            k.act(spec.activation), k.slope, output, piece, grid,
        )  # fmt: skip
        k.lib.hopper_stem(k.dtype, argument, k.stream)
        return partials
