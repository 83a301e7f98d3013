"""How the arguments of the functions become those of the operators, and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..problem.conv3d import ConvProblem, ConvSpec, ConvTensors
from ..problem.spec import (
    PairProblem,
    PairSpec,
    PairTensors,
    ParallelProblem,
    ParallelSpec,
    ParallelTensors,
    Problem,
    memoize,
)

PAIR_TENSORS = (
    "Tensor x, Tensor first_weight, Tensor second_weight, Tensor? first_bias, "
    "Tensor? second_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var, "
    "Tensor? residual, Tensor? outer_table"
)
# Few arguments: each costs the host about a tenth of what dispatching an op does.
PAIR_SPEC = (
    "int[] geometry, str names, float slope, float eps, bool recompute, bool output_statistics, "
    "bool outer_norm"
)
PARALLEL_TENSORS = (
    "Tensor x, Tensor spatial_weight, Tensor temporal_weight, Tensor? spatial_bias, "
    "Tensor? temporal_bias"
)
PARALLEL_SPEC = "int[] geometry, str names, float slope"
CONV_TENSORS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? mean, Tensor? var, Tensor? past, Tensor? residual, Tensor? output_table"
)
CONV_SPEC = (
    "int[] geometry, str names, float slope, float eps, int norm_groups, bool per_frame, "
    "bool output_statistics, bool output_norm"
)
PAIR, PARALLEL = len(PairTensors._fields), len(ParallelTensors._fields)
CONV = len(ConvTensors._fields)


@memoize
def encode_spec(spec: PairSpec | ParallelSpec | ConvSpec) -> tuple[Any, ...]:
    """A specification as the ops take it: all ints, all names, then what is left, in its order."""
    stride, padding, dilation, groups, modes, *rest = spec
    names = ",".join([*modes, *[v for v in rest if isinstance(v, str)]])
    numbers = [v for v in rest if not isinstance(v, str)]
    return (*stride, *padding, *dilation, *groups), names, *numbers


@lru_cache(maxsize=4096)
def _pair_spec(
    geometry: tuple[int, ...],
    names: str,
    slope: float,
    eps: float,
    *flags: bool,
) -> PairSpec:
    *modes, activation, norm, order, outer, group = names.split(",", 6)
    return PairSpec._make((
        *_geometry(geometry, modes), activation, slope, norm, eps, order, flags[0], outer, group,
        *flags[1:],
    ))  # fmt: skip


@lru_cache(maxsize=4096)
def _parallel_spec(geometry: tuple[int, ...], names: str, slope: float) -> ParallelSpec:
    *modes, branch, activation, combine = names.split(",")
    return ParallelSpec._make((*_geometry(geometry, modes), branch, activation, slope, combine))


@lru_cache(maxsize=4096)
def _conv_spec(geometry: tuple[int, ...], names: str, *numbers: Any) -> ConvSpec:
    *modes, before, norm, after = names.split(",")
    return ConvSpec._make((*_geometry(geometry, modes), before, norm, after, *numbers))


def _geometry(ints: tuple[int, ...], modes: Sequence[str]) -> tuple[tuple[Any, ...], ...]:
    """The first five fields of all specifications."""
    return ints[:3], ints[3:9], ints[9:12], ints[12:], tuple(modes)


def pair_arguments(args: Sequence[Any]) -> tuple[PairTensors, PairSpec, PairProblem, str]:
    """What the arguments of an op of ``conv2plus1d`` describe, and its backend."""
    geometry, *rest, backend = args[PAIR:]
    tensors, spec = PairTensors(*args[:PAIR]), _pair_spec(tuple(geometry), *rest)
    return tensors, spec, Problem.of(tensors, spec), backend


def parallel_arguments(
    args: Sequence[Any],
) -> tuple[ParallelTensors, ParallelSpec, ParallelProblem, str]:
    """What the arguments of an op of ``parallel_conv2plus1d`` describe, and its backend."""
    geometry, names, slope, backend = args[PARALLEL:]
    tensors = ParallelTensors(*args[:PARALLEL])
    spec = _parallel_spec(tuple(geometry), names, slope)
    return tensors, spec, Problem.of(tensors, spec), backend


def conv_arguments(args: Sequence[Any]) -> tuple[ConvTensors, ConvSpec, ConvProblem, str]:
    """What the arguments of an op of ``conv3d`` describe, and its backend."""
    geometry, *rest, backend = args[CONV:]
    tensors, spec = ConvTensors(*args[:CONV]), _conv_spec(tuple(geometry), *rest)
    return tensors, spec, ConvProblem.of(tensors, spec), backend
