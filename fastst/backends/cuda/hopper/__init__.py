"""Dense pairs on Hopper's matrix units: which problems the kernels fit, and their launches.

Two for a pair, one for the stem of a video network (two in training with batch norm or u kept).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....problem.memory import read_address
from ....problem.spec import PairProblem, PairSpec, PairTensors
from ...contract import Begun, PairResult
from ..library import Launcher, is_emulated, launching
from . import weights
from .backward import backward
from .launches import (
    ROW,
    STEM,
    Launches,
    rows_of,
    spatial_gradient_tile,
    spatial_tile,
    stem_why_not,
    temporal_gradient_tile,
    temporal_tile,
)
from .packing import AFFINE, PROLOGUE, Packing, Ready, Table, from_statistics, ready, round_to_chunk
from .tiles import HopperTile

__all__ = [
    "backward", "backward_why_not", "first_pass", "forward", "kernel_names", "second_pass",
    "why_not",
]  # fmt: skip

STRIDES = (1, 2)
TAPS = 3  # temporal ones, unrolled
# What the epilogues know; the temporal prologue knows them all.
EPILOGUES = ("none", "relu", "leaky_relu")
DERIVATIVES = (*EPILOGUES, "silu")  # those that the epilogue of a gradient knows


def why_not(problem: PairProblem) -> str | None:
    found = _why_neither(problem)
    if found is None and stem_why_not(problem) is not None:
        found = _why_not_dense(problem)
    return found


def backward_why_not(problem: PairProblem) -> str | None:
    found = why_not(problem)
    if found is not None:
        return found
    spec = problem.spec
    spatial, temporal = problem.passes
    if spec.activation not in DERIVATIVES:
        return f"have the derivatives of {', '.join(DERIVATIVES)}, not of {spec.activation}"
    if temporal.padding_mode != "zeros" and any(temporal.padding):
        return f"have gradients through zeros around time, not {temporal.padding_mode!r}"
    found = weights.why_not(problem)
    if found is None and spatial_gradient_tile(problem) is None:
        found = (
            f"have no shared memory for du as far apart as {spatial.kernel[1:]} taps and a "
            f"dilation of {spatial.dilation[1:]} lead"
        )
    return found


def _why_neither(problem: PairProblem) -> str | None:
    """What both the stem's and the other kernels need."""
    spec = problem.spec
    if spec.order != "spatial-first":
        return "run a spatial and then a temporal convolution"
    device = problem.device
    if not is_emulated():
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            return f"need compute capability 9.0 (Hopper), but {device} has {major}.{minor}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"are for float16 and bfloat16, not {problem.dtype}"
    if not problem.channels_last:
        return "write channels_last_3d, not contiguous tensors"
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


def _why_not_dense(problem: PairProblem) -> str | None:
    spatial, temporal = problem.passes
    if spatial.in_channels % ROW:
        return (
            f"need input channels that are a multiple of {ROW}, not {spatial.in_channels}, or "
            f"a stem, but {stem_why_not(problem)}"
        )
    for stride in (*spatial.stride[1:], temporal.stride[0]):
        if stride not in STRIDES:
            return f"have strides {STRIDES}, not {stride}"
    return _why_no_boxes(problem)


def _why_no_boxes(problem: PairProblem) -> str | None:
    """Why the copy engine cannot cut boxes out of x as it lies, or None: x is never copied."""
    n, c, *others = problem.x_stride
    t = others[0]
    sizes = (problem.batch, *problem.size)
    rows = [s for s, size in zip((n, *others), sizes, strict=True) if size > 1]
    if problem.x_offset or c != 1 or any(s <= 0 or s % ROW for s in rows):
        return (
            "read channels of x as whole 16-byte vectors (channels_last_3d), not with strides "
            f"{problem.x_stride} from {problem.x_offset} bytes past such a vector's start"
        )
    if problem.batch > 1 and problem.size[0] > 1 and n != t * problem.size[0]:
        return f"need the frames of all clips evenly apart, not with strides {problem.x_stride}"
    return None


def output_statistics(problem: PairProblem) -> bool:
    """Whether y comes with its statistics: from the temporal kernel, not from that of the stem."""
    return why_not(problem) is None and stem_why_not(problem) is not None


def kernel_names(problem: PairProblem, phase: str) -> list[str]:
    """Names of the kernels of a phase, with what their tiles are compiled for and copy at once."""
    stem = stem_why_not(problem) is None
    spatial, temporal = problem.passes
    strides = f"strides {temporal.stride[0]} and {spatial.stride[1:]}"

    def of(name: str, tile: Any) -> str:
        parts = [f"{k} {v}" for k, v in vars(tile).items() if k not in ("box", "grid", "splits")]
        return f"hopper {name}, {strides}, {', '.join(parts)}"

    forward = [f"hopper stem, {strides}"]
    if not stem:
        forward = [of("spatial", spatial_tile(problem)), of("temporal", temporal_tile(problem))]
    if phase == "forward":
        return forward
    sources = 2 if problem.spec.norm == "batch" else 0
    straight = problem.spec.norm == "none" and problem.spec.activation == "none"
    found = [
        ("temporal gradient", temporal_gradient_tile(problem)),
        ("spatial gradient", spatial_gradient_tile(problem)),
        ("spatial weights", weights.spatial_tile(problem, sources)),
        ("temporal weights", weights.temporal_tile(problem, 0 if straight else 1)),
    ]
    again = forward[:1] if problem.spec.recompute else []
    return [*again, *(of(name, tile) for name, tile in found)]


def _outer(spec: PairSpec, tensors: PairTensors) -> tuple[bool, dict[str, Any]]:
    """Whether the last epilogue takes in what ends a residual block, and its arguments."""
    r = tensors.residual
    arguments: dict[str, Any] = {}
    fits = spec.outer_activation in EPILOGUES
    if r is not None:  # read in pairs of channels, from pixels evenly apart
        even = all(s % 2 == 0 for s in (*r.stride()[2:], r.stride(0))) and read_address(r) % 4 == 0
        fits = fits and even and r.stride(1) == 1 and r.stride(3) == r.stride(4) * r.shape[4]
    if fits:
        arguments = {"residual": r, "activation": spec.outer_activation}
    return fits, arguments


def forward(
    problem: PairProblem,
    tensors: PairTensors,
    save: bool,
    tiles: tuple[HopperTile, HopperTile] | None = None,
) -> PairResult:
    """The pair, by tiles of the spatial and the temporal pass that fit it or that are given."""
    if stem_why_not(problem) is None:
        return _stem(problem, tensors, save)
    tile, temporal = tiles or (spatial_tile(problem), temporal_tile(problem))
    spec, m = problem.spec, problem.mid_channels
    keep, batch = save and not spec.recompute, spec.norm == "batch"
    folded = not batch and not keep  # what is stored is nearer to z
    activation, prologue = "none", spec.activation
    if folded and prologue in EPILOGUES:
        activation, prologue = prologue, "none"
    mean, var = tensors.mean, tensors.var
    with launching(problem) as k:
        launches = Launches(k, problem)

        def make() -> Ready:
            packing = Packing(k)
            bias = k.norm(m, tensors.first_bias)
            norm = k.norm(m, tensors.first_bias, tensors, mean, var)
            ready = Ready(
                packing.weight(tensors.first_weight, tile.columns),
                packing.table(norm if folded else bias, tile.whole(problem.mid_shape[-1]), AFFINE),
                *_second(k, packing, problem, tensors, temporal),
            )
            if not batch and (prologue != "none" or (spec.norm == "frozen" and not folded)):
                table = packing.table(bias if folded else norm, round_to_chunk(m), PROLOGUE)
                ready = ready._replace(prologue=table)
            packing.launch()
            return ready

        r = ready(k, problem, tensors, (tile.columns, temporal.columns, folded, prologue), make)
        x = rows_of(tensors.x)
        rows = x.new_empty(problem.mid_shape)
        u = rows.permute(0, 4, 1, 2, 3)
        assert r.first is not None and r.first_affine is not None
        partials = launches.spatial(
            x, r.first, r.first_affine, u, tile, statistics=batch, activation=activation
        )
        table = r.prologue
        if partials is not None:
            table, tables = from_statistics(k, tensors, round_to_chunk(m), PROLOGUE)
            mean, var = k.combine_statistics(partials, tables)
        y, outer, last = _temporal(launches, tensors, u, r, temporal, table, prologue)
    if not batch:
        mean = var = None
    return PairResult(y, rows if keep else None, mean, var, k.total, outer, *last)


def _second(
    k: Launcher, packing: Packing, problem: PairProblem, tensors: PairTensors, tile: HopperTile
) -> tuple[Tensor, Table]:
    """Weight of the second pass, and the table of its epilogue."""
    channels = problem.out_channels
    table = packing.table(k.norm(channels, tensors.second_bias), tile.whole(channels), AFFINE)
    return packing.weight(tensors.second_weight, tile.columns), table


def _temporal(
    launches: Launches,
    tensors: PairTensors,
    u: Tensor,
    r: Ready,
    tile: HopperTile,
    table: Table | None,
    prologue: str,
) -> tuple[Tensor, bool, tuple[Tensor | None, Tensor | None]]:
    """y, whether its ending is in it, and its statistics where they are asked for."""
    problem, k = launches.problem, launches.k
    y = problem.empty_output(tensors.x)
    outer, epilogue = _outer(problem.spec, tensors)
    assert r.second is not None and r.second_affine is not None
    partials = launches.temporal(
        u[:, : problem.mid_channels], r.second, r.second_affine, y, tile, table, prologue,
        statistics=problem.spec.output_statistics, **epilogue,
    )  # fmt: skip
    return y, outer, (None, None) if partials is None else k.moments(partials)


def first_pass(problem: PairProblem, tensors: PairTensors) -> Begun:
    """u and its statistics, of a norm over the batch."""
    rows = tensors.x.new_empty(problem.mid_shape)
    u, m = rows.permute(0, 4, 1, 2, 3), problem.mid_channels
    stem = stem_why_not(problem) is None
    with launching(problem) as k:
        launches, packing = Launches(k, problem), Packing(k)
        bias = k.norm(m, tensors.first_bias)
        if stem:
            packed = packing.weight(tensors.first_weight, STEM[1], "stem")
            affine = packing.table(bias, STEM[1], AFFINE)
            packing.launch()
            partials = launches.stem(tensors.x, packed, affine, u, statistics=True)
        else:
            tile = spatial_tile(problem)
            packed = packing.weight(tensors.first_weight, tile.columns)
            affine = packing.table(bias, tile.whole(problem.mid_shape[-1]), AFFINE)
            packing.launch()
            x = rows_of(tensors.x)
            partials = launches.spatial(x, packed, affine, u, tile, statistics=True)
        assert partials is not None
        mean, var = k.combine_statistics(partials)
    return Begun(rows, mean, var, k.total)


def second_pass(problem: PairProblem, tensors: PairTensors, begun: Begun) -> PairResult:
    """y of a pair that ``first_pass`` has begun."""
    if stem_why_not(problem) is None:  # which computes u again
        return _stem(problem, tensors, False, begun)
    tile, m = temporal_tile(problem), problem.mid_channels
    with launching(problem) as k:
        launches, packing = Launches(k, problem), Packing(k)
        norm = k.norm(m, None, tensors, begun.mean, begun.var)
        r = Ready(None, None, *_second(k, packing, problem, tensors, tile))
        table = packing.table(norm, round_to_chunk(m), PROLOGUE)
        packing.launch()
        u = begun.u.permute(0, 4, 1, 2, 3)
        y, outer, last = _temporal(launches, tensors, u, r, tile, table, problem.spec.activation)
    return PairResult(y, *begun, outer, *last)


def _stem(
    problem: PairProblem, tensors: PairTensors, save: bool, begun: Begun | None = None
) -> PairResult:
    """u stays in registers; where it is kept, or counted, another launch computes it first."""
    spec, m = problem.spec, problem.mid_channels
    batch = spec.norm == "batch"
    keep, counts = save and not spec.recompute, batch and begun is None
    mean, var, rows = tensors.mean, tensors.var, None
    if begun is not None:
        mean, var = begun.mean, begun.var
    bias, (_, mid, most) = tensors.first_bias, STEM
    with launching(problem) as k:
        launches = Launches(k, problem)

        def make() -> Ready:
            packing = Packing(k)
            ready = Ready(
                packing.weight(tensors.first_weight, mid, "stem"),
                packing.table(k.norm(m, bias), mid, AFFINE),
                packing.weight(tensors.second_weight, most),
                packing.table(k.norm(problem.out_channels, tensors.second_bias), most, AFFINE),
                None if counts
                else packing.table(k.norm(m, bias, tensors, mean, var), mid, AFFINE),
            )  # fmt: skip
            packing.launch()
            return ready

        r = make() if batch else ready(k, problem, tensors, "stem", make)
        assert r.first is not None and r.first_affine is not None
        assert r.second is not None and r.second_affine is not None
        table = r.prologue
        if keep or counts:
            rows = tensors.x.new_empty(problem.mid_shape)
            u = rows.permute(0, 4, 1, 2, 3)
            partials = launches.stem(tensors.x, r.first, r.first_affine, u, statistics=counts)
            if partials is not None:
                table, tables = from_statistics(k, tensors, mid, AFFINE, bias)
                mean, var = k.combine_statistics(partials, tables)
        y = problem.empty_output(tensors.x)
        outer, epilogue = _outer(spec, tensors)
        assert table is not None
        launches.stem(tensors.x, r.first, r.second_affine, y, (r.second, table), **epilogue)
    if begun is not None:
        return PairResult(y, *begun, outer)
    kept = rows if keep else None
    return PairResult(y, kept, mean if batch else None, var if batch else None, k.total, outer)
