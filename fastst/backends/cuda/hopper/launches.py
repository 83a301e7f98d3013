"""Launches of the Hopper kernels, as functions of tensors.

Everything is channels-last, and x is read as it lies: ``why_not`` refuses what would have to be
copied first. Weights are packed for every call: rows of 64 elements of the reduction, one for each
output channel of a tile.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ....machine.gpu import round_up
from ....problem.spec import PairProblem, PairTensors
from ..depthwise import channels_last
from ..library import Launcher, emulating
from . import gradient_tiles
from . import tiles as configs_hopper
from .gradient_tiles import Axis, GradientTile
from .tiles import HopperTile

ROW = 8  # channels that are a multiple of it fill the 16-byte rows that the copy engine needs
STEM = (4, 48, 64)  # most channels C, M and K of the stem: columns of its two products
_EMULATED_PROCESSORS = 2  # so that blocks walk over several tiles


class Mid(NamedTuple):
    """z = activation(scale·u + shift), the input of the temporal pass."""

    u: Tensor  # (N, M, T, H, W), channels-last
    affine: Tensor | None  # (2, ⌈M/64⌉·64): scale, shift; none: 1, 0
    activation: str


class Gradient(NamedTuple):
    """du = g + p·u + r inside of the frame, the gradient of the spatial pass's output."""

    g: Tensor  # (N, M, T, H, W), channels-last
    u: Tensor | None = None  # laid out as g; none: du = g
    affine: Tensor | None = None  # (2, ⌈M/64⌉·64): p, r


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
    if emulating():
        return _EMULATED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def spatial_tile(problem: PairProblem) -> HopperTile:
    """Tile of the spatial pass."""
    p = problem.passes[0]
    return configs_hopper.spatial(
        problem.batch * problem.size[0], problem.mid_size[1:], p.in_channels,
        problem.mid_shape[-1], p.kernel[1:], p.stride[1:], p.dilation[1],
        _processors(problem.device),
    )  # fmt: skip


def temporal_tile(problem: PairProblem) -> HopperTile:
    """Tile of the temporal pass."""
    p = problem.passes[1]
    return configs_hopper.temporal(
        problem.batch, math.prod(problem.out_size[1:]), problem.out_size[0], p.in_channels,
        p.out_channels, p.stride[0], _processors(problem.device),
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


def pack(weight: Tensor, columns: int) -> Tensor:
    """(O, I, a, b) as (tiles of columns, ⌈I/64⌉, a, b, columns, 64), zeros where there is none."""
    o, i, a, b = weight.shape
    tiles, chunks = -(-o // columns), -(-i // 64)
    padded = F.pad(weight, (0, 0, 0, 0, 0, chunks * 64 - i, 0, tiles * columns - o))
    return padded.view(tiles, columns, chunks, 64, a, b).permute(0, 2, 4, 5, 1, 3).contiguous()


def rows_of(t: Tensor) -> Tensor:
    """t with strides of axes of size 1 that fit the others, as tensor maps want them."""
    strides = list(t.stride())
    inner = max(ROW, t.shape[1])
    for d in (4, 3, 2, 0):
        if t.shape[d] == 1:
            strides[d] = inner
        inner = max(inner, strides[d] * t.shape[d])
    return t.as_strided(t.shape, strides)


def evenly_placed(t: Tensor) -> Tensor:
    """t in channels-last rows with the pixels of a frame evenly apart, or a copy that is so."""
    t = channels_last(t)
    apart = [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]
    even = t.shape[3] == 1 or t.shape[4] == 1 or t.stride(3) == t.stride(4) * t.shape[4]
    return rows_of(t if even and 0 not in apart else t.clone(memory_format=torch.channels_last_3d))


def evenly_framed(x: Tensor) -> Tensor:
    """x, or a copy, in which the frames of all clips are evenly apart."""
    if x.shape[0] == 1 or x.shape[2] == 1 or x.stride(0) == x.stride(2) * x.shape[2]:
        return x
    return x.clone(memory_format=torch.channels_last_3d)


def affine_of(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) of v = scale·u + shift."""
    mean, scale, beta = coefficients[:3]
    return scale, beta - mean * scale


class Launches:
    def __init__(self, k: Launcher, problem: PairProblem) -> None:
        self.k, self.problem = k, problem

    def coefficients(self, scale: Tensor | None, shift: Tensor | None, columns: int) -> Tensor:
        """(2, columns): scale and shift, 1 and 0 where there is none; 0 for columns of padding."""
        m = self.problem.mid_channels
        both = self.k.empty(2, columns).zero_()
        both[0, :m] = 1 if scale is None else scale
        if shift is not None:
            both[1, :m] = shift
        return both

    def _tile(self, t: HopperTile) -> Any:
        return self.k.lib.HopperTile(
            t.columns, t.groups, t.blocks, t.box, t.share, t.stages, t.grid, t.cluster
        )

    def _packed(self, weight: Tensor, columns: int) -> Any:
        packed = pack(weight, columns)
        self.k.kept.append(packed)
        return self.k.lib.Array(packed.data_ptr(), packed.numel())

    def _output(
        self,
        out: Tensor,
        channels: int,
        columns: int,  # of whole tiles
        warps: int,  # that write partials
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: str = "none",
        residual: Tensor | None = None,
        statistics: bool = False,
    ) -> tuple[Any, Tensor | None]:
        """The library's description, and the partials that will be written."""
        k = self.k
        affine = k.empty(2, columns).zero_()
        affine[0, :channels] = 1 if scale is None else scale
        if shift is not None:
            affine[1, :channels] = shift
        partials = k.empty(warps, 3, channels) if statistics else None
        output = k.lib.HopperOutput(
            k.view(out), None if residual is None else k.view(residual), k.array(affine[0]),
            k.array(affine[1]), k.array(partials), channels, k.act(activation), k.slope,
        )  # fmt: skip
        return output, partials

    def spatial(
        self, x: Tensor, weight: Tensor, u: Tensor, tile: HopperTile, **epilogue: Any
    ) -> Tensor | None:
        """Fills u (N, stored channels, T, H, W); partial statistics where asked for."""
        k, p = self.k, self.problem.passes[0]
        columns = tile.column_tiles(u.shape[1]) * tile.columns
        warps = tile.grid * 4 * tile.groups
        output, partials = self._output(u, p.out_channels, columns, warps, **epilogue)
        packed = self._packed(weight.flatten(2, 3).transpose(2, 3), tile.columns)
        argument = k.lib.HopperSpatial(k.view(x), packed, k.conv(p), output, self._tile(tile))
        k.lib.hopper_spatial(k.dtype, argument, k.stream)
        return partials

    def temporal(
        self,
        u: Tensor,
        weight: Tensor,
        y: Tensor,
        tile: HopperTile,
        affine: tuple[Tensor | None, Tensor | None] | None,
        prologue: str,
        **epilogue: Any,
    ) -> Tensor | None:
        """Fills y from z = prologue(scale·u + shift), or from u where ``affine`` is None; partial
        statistics where asked for."""
        k, p = self.k, self.problem.passes[1]
        columns = tile.column_tiles(y.shape[1]) * tile.columns
        warps = tile.grid * 4 * tile.groups
        output, partials = self._output(y, p.out_channels, columns, warps, **epilogue)
        coefficients = None
        if affine is not None:
            coefficients = self.coefficients(*affine, columns=-(-p.in_channels // 64) * 64)
        packed = self._packed(weight.flatten(3), tile.columns)
        argument = k.lib.HopperTemporal(
            k.view(u), packed, k.conv(p), k.array(coefficients), k.act(prologue), k.slope, output,
            self._tile(tile),
        )  # fmt: skip
        k.lib.hopper_temporal(k.dtype, argument, k.stream)
        return partials

    def temporal_gradient(
        self,
        dy: Tensor,
        weight: Tensor,
        g: Tensor,
        tile: HopperTile,
        u: Tensor | None,
        coefficients: Tensor | None,  # (5, M), as of Launcher.norm_coefficients
        statistics: bool,
    ) -> Tensor | None:
        """Fills g, dv times the norm's scale; (2, M), Σdv and Σdv·(u − mean), where asked for."""
        k, p = self.k, self.problem.passes[1]
        m = p.in_channels
        columns = tile.column_tiles(g.shape[1]) * tile.columns
        rows = k.empty(4, columns).zero_()  # mean, scale, beta and what dv is multiplied by
        rows[1::2, :m] = 1
        if coefficients is not None:
            rows[:3, :m] = coefficients[:3]
            rows[3, :m] = coefficients[1]
        partials = k.empty(tile.grid * 4 * tile.groups, 2, m) if statistics else None
        packed = self._packed(weight.flatten(3).flip(2).transpose(0, 1), tile.columns)
        argument = k.lib.HopperTemporalGradient(
            k.view(dy), packed, k.conv(p), k.view(g), None if u is None else k.view(u),
            k.array(rows), k.array(partials), m, k.act(self.problem.spec.activation), k.slope,
            self._tile(tile),
        )  # fmt: skip
        k.lib.hopper_temporal_gradient(k.dtype, argument, k.stream)
        return None if partials is None else k.sum_rows(partials)

    def spatial_gradient(
        self, du: Gradient, weight: Tensor, dx: Tensor, tile: GradientTile
    ) -> None:
        """Fills dx (N, stored channels, T, H, W)."""
        k = self.k
        mirrored = weight.flatten(2, 3).flip(2, 3).permute(1, 0, 3, 2)
        argument = k.lib.HopperSpatialGradient(
            k.view(du.g), None if du.u is None else k.view(du.u), k.array(du.affine),
            self._packed(mirrored, tile.columns), k.conv(self.problem.passes[0]), k.view(dx),
            k.lib.HopperGradientTile(
                tile.columns, tile.blocks, tile.box, tile.stages, tile.grid, tile.cluster
            ),
        )  # fmt: skip
        k.lib.hopper_spatial_gradient(k.dtype, argument, k.stream)

    def stem(
        self,
        tensors: PairTensors,
        out: Tensor,
        affine: tuple[Tensor | None, Tensor | None] | None,
        **epilogue: Any,
    ) -> Tensor | None:
        """Fills u, or y where ``affine`` says what goes through the activation."""
        k, problem, spec = self.k, self.problem, self.problem.spec
        _, mid, most = STEM
        ws, wt = tensors.first_weight[:, :, 0], tensors.second_weight.flatten(3)
        # (M, C, 7, 7) as (M, kh, kw, c) of 8 × 8 × 4
        rows = F.pad(ws, (0, 1, 0, 1, 0, 4 - ws.shape[1])).permute(0, 2, 3, 1)
        spatial = self._packed(rows.reshape(len(rows), -1, 1, 1), mid)
        pair = affine is not None
        temporal = self._packed(wt, most) if pair else k.lib.Array()
        coefficients = None if affine is None else self.coefficients(*affine, columns=mid)
        processors = _processors(problem.device)
        grid, piece = configs_hopper.stem(problem.batch, out.shape[2:], processors)
        warps = grid * 4 * configs_hopper.STEM_GROUPS
        channels = problem.out_channels if pair else problem.mid_channels
        output, partials = self._output(out, channels, most if pair else mid, warps, **epilogue)
        argument = k.lib.HopperStem(
            k.view(tensors.x), spatial, temporal, spec.padding, k.array(coefficients),
            k.act(spec.activation), k.slope, output, piece, grid,
        )  # fmt: skip
        k.lib.hopper_stem(k.dtype, argument, k.stream)
        return partials
