"""Dense pairs on Hopper's matrix units: which problems the kernels fit, and their launches.

Two for a pair, one for the stem of a video network (two in training with batch norm or u kept).

Everything is channels-last. x that is not, or whose rows are not whole 16-byte vectors, is copied
once on the way in (``cuda_depthwise.channels_last``). Weights are packed for every call: rows of 64
elements of the reduction, one for each output channel of a tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import configs_hopper
from ..configs_hopper import HopperTile
from ..shapes import PairSpec, PairTensors, Problem
from . import PairResult
from .cuda_depthwise import channels_last
from .native import Call, call, emulating

ROW = 8  # channels that are a multiple of it fill the 16-byte rows that the copy engine needs
STRIDES = (1, 2)
TAPS = 3  # temporal ones, unrolled
STEM = (4, 48, 64)  # most channels C, M and K of the stem: columns of its two products
# What the epilogues know; the temporal prologue knows them all.
EPILOGUES = ("none", "relu", "leaky_relu")
_EMULATED_PROCESSORS = 2  # so that blocks walk over several tiles


def why_not(problem: Problem) -> str | None:
    found = _why_neither(problem)
    if found is None and stem_why_not(problem) is not None:
        found = _why_not_dense(problem)
    return found


def _why_neither(problem: Problem) -> str | None:
    """What both the stem's and the other kernels need."""
    spec = problem.spec
    if not isinstance(spec, PairSpec) or spec.order != "spatial-first":
        return "run a spatial and then a temporal convolution"
    device = problem.device
    if not emulating():
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            return f"need compute capability 9.0 (Hopper), but {device} has {major}.{minor}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"are for float16 and bfloat16, not {problem.dtype}"
    if not problem.channels_last:
        return "need channels_last_3d, not contiguous tensors"
    spatial, temporal = problem.passes
    if spatial.groups != 1 or temporal.groups != 1:
        return f"have no groups, not {spec.groups}"
    if temporal.out_channels % ROW:
        return f"need output channels that are a multiple of {ROW}, not {temporal.out_channels}"
    if spatial.padding_mode != "zeros" and any(spatial.padding):
        return f"pad the plane with zeros, not {spatial.padding_mode!r}"
    if temporal.padding_mode not in ("zeros", "replicate") and any(temporal.padding):
        return f"pad time with zeros or copies of its ends, not {temporal.padding_mode!r}"
    if temporal.kernel[0] != TAPS or temporal.dilation[0] != 1:
        return (
            f"have {TAPS} temporal taps without dilation, not {temporal.kernel[0]} with "
            f"{temporal.dilation[0]}"
        )
    return None


def _why_not_dense(problem: Problem) -> str | None:
    spatial, temporal = problem.passes
    if spatial.in_channels % ROW:
        return (
            f"need input channels that are a multiple of {ROW}, not {spatial.in_channels}, or "
            f"a stem, but {stem_why_not(problem)}"
        )
    for stride in (*spatial.stride[1:], temporal.stride[0]):
        if stride not in STRIDES:
            return f"have strides {STRIDES}, not {stride}"
    return None


def stem_why_not(problem: Problem) -> str | None:
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


def spatial_tile(problem: Problem) -> HopperTile:
    """Tile of the spatial pass."""
    p = problem.passes[0]
    return configs_hopper.spatial(
        problem.batch * problem.size[0], problem.mid_size[1:], p.in_channels,
        problem.mid_shape[-1], p.kernel[1:], p.stride[1:], p.dilation[1],
        _processors(problem.device),
    )  # fmt: skip


def temporal_tile(problem: Problem) -> HopperTile:
    """Tile of the temporal pass."""
    p = problem.passes[1]
    return configs_hopper.temporal(
        problem.batch, math.prod(problem.out_size[1:]), problem.out_size[0], p.in_channels,
        p.out_channels, p.stride[0], _processors(problem.device),
    )  # fmt: skip


def pack(weight: Tensor, columns: int) -> Tensor:
    """(O, I, a, b) as (tiles of columns, ⌈I/64⌉, a, b, columns, 64), zeros where there is none."""
    o, i, a, b = weight.shape
    tiles, chunks = -(-o // columns), -(-i // 64)
    padded = F.pad(weight, (0, 0, 0, 0, 0, chunks * 64 - i, 0, tiles * columns - o))
    return padded.view(tiles, columns, chunks, 64, a, b).permute(0, 2, 4, 5, 1, 3).contiguous()


def _rows(t: Tensor) -> Tensor:
    """t with strides of axes of size 1 that fit the others, as tensor maps want them."""
    strides = list(t.stride())
    inner = max(ROW, t.shape[1])
    for d in (4, 3, 2, 0):
        if t.shape[d] == 1:
            strides[d] = inner
        inner = max(inner, strides[d] * t.shape[d])
    return t.as_strided(t.shape, strides)


class _Launches:
    def __init__(self, k: Call) -> None:
        self.k, self.problem = k, k.problem

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
            t.columns, t.groups, t.blocks, t.box, t.share, t.stages, t.grid
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
    ) -> None:
        """Fills y from z = prologue(scale·u + shift), or from u where ``affine`` is None."""
        k, p = self.k, self.problem.passes[1]
        columns = tile.column_tiles(y.shape[1]) * tile.columns
        output, _ = self._output(y, p.out_channels, columns, 0, **epilogue)
        coefficients = None
        if affine is not None:
            coefficients = self.coefficients(*affine, columns=-(-p.in_channels // 64) * 64)
        packed = self._packed(weight.flatten(3), tile.columns)
        argument = k.lib.HopperTemporal(
            k.view(u), packed, k.conv(p), k.array(coefficients), k.act(prologue), k.slope, output,
            self._tile(tile),
        )  # fmt: skip
        k.lib.hopper_temporal(k.dtype, argument, k.stream)

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
        ws, wt = tensors.spatial_weight[:, :, 0], tensors.temporal_weight.flatten(3)
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


def _affine(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, shift) of v = scale·u + shift."""
    mean, scale, shift = coefficients[:3]
    return scale, shift - mean * scale


def _outer(spec: PairSpec, tensors: PairTensors) -> tuple[bool, dict[str, Any]]:
    """Whether the last epilogue takes in what ends a residual block, and its arguments."""
    r, arguments = tensors.residual, {"shift": tensors.temporal_bias}
    fits = spec.outer_activation in EPILOGUES
    if r is not None:  # read in pairs of channels, from pixels evenly apart
        even = all(s % 2 == 0 for s in (*r.stride()[2:], r.stride(0))) and r.data_ptr() % 4 == 0
        fits = fits and even and r.stride(1) == 1 and r.stride(3) == r.stride(4) * r.shape[4]
    if fits:
        arguments |= {"residual": r, "activation": spec.outer_activation}  # type: ignore[dict-item]
    return fits, arguments


def forward(problem: Problem, tensors: PairTensors, save: bool) -> PairResult:
    if stem_why_not(problem) is None:
        return _stem(problem, tensors, save)
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    keep = save and not spec.recompute
    m = problem.mid_channels
    bs = tensors.spatial_bias
    with call(problem) as k:
        launches = _Launches(k)
        x = _rows(_frames(channels_last(tensors.x)))
        rows = x.new_empty(problem.mid_shape)
        u = rows.permute(0, 4, 1, 2, 3)
        mean, var = tensors.mean, tensors.var
        affine: tuple[Tensor | None, Tensor | None] | None = None
        epilogue: dict[str, Any] = {"scale": None, "shift": bs}
        prologue = spec.activation
        if spec.norm == "frozen":
            assert mean is not None and var is not None
            affine = _affine(k.norm_coefficients(tensors, mean, var))
        if spec.norm != "batch" and not keep:  # what is stored is nearer to z
            if affine is not None:
                scale, shift = affine
                assert scale is not None and shift is not None
                epilogue = {"scale": scale, "shift": shift if bs is None else shift + bs * scale}
                affine = None
            if prologue in EPILOGUES:
                epilogue["activation"], prologue = prologue, "none"
        tile = spatial_tile(problem)
        partials = launches.spatial(
            x, tensors.spatial_weight, u, tile, statistics=spec.norm == "batch", **epilogue
        )
        if partials is not None:
            mean, var = k.combine_statistics(partials)
            affine = _affine(k.norm_coefficients(tensors, mean, var))
        if affine is None and prologue != "none":
            affine = (None, None)
        y = problem.empty_output(x)
        outer, epilogue = _outer(spec, tensors)
        launches.temporal(
            u[:, :m], tensors.temporal_weight, y, temporal_tile(problem), affine, prologue,
            **epilogue,
        )  # fmt: skip
    if spec.norm != "batch":
        mean = var = None
    return PairResult(y, rows if keep else None, mean, var, k.total, outer)


def _frames(x: Tensor) -> Tensor:
    """x, or a copy, in which the frames of all clips are evenly apart."""
    if x.shape[0] == 1 or x.shape[2] == 1 or x.stride(0) == x.stride(2) * x.shape[2]:
        return x
    return x.clone(memory_format=torch.channels_last_3d)


def _stem(problem: Problem, tensors: PairTensors, save: bool) -> PairResult:
    """u stays in registers; where it is kept, or counted, another launch computes it first."""
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    keep, batch = save and not spec.recompute, spec.norm == "batch"
    mean, var, rows = tensors.mean, tensors.var, None
    bias = tensors.spatial_bias
    with call(problem) as k:
        launches = _Launches(k)
        if keep or batch:
            rows = tensors.x.new_empty(problem.mid_shape)
            u = rows.permute(0, 4, 1, 2, 3)
            partials = launches.stem(tensors, u, None, shift=bias, statistics=batch)
            if partials is not None:
                mean, var = k.combine_statistics(partials)
        scale: Tensor | None = None
        shift = bias
        if mean is not None and var is not None:
            scale, shift = _affine(k.norm_coefficients(tensors, mean, var))
            shift = shift if bias is None else shift + bias * scale
        y = problem.empty_output(tensors.x)
        outer, epilogue = _outer(spec, tensors)
        launches.stem(tensors, y, (scale, shift), **epilogue)
    kept = rows if keep else None
    return PairResult(y, kept, mean if batch else None, var if batch else None, k.total, outer)
