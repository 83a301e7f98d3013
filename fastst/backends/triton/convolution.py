"""``conv3d``: the pass of a pair by itself.

A dense convolution reads z in each of its taps: z is written once, by ``kernels.norm``, and x is
read as it is where there is neither norm nor activation. Thin groups normalise, by channels, and
activate as they load. Frames before x are read where they lie. Backward makes z again, with these
frames before it; the gradient of z takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...machine import choices
from ...machine.gpu import round_up
from ...problem.conv3d import ConvProblem, ConvTensors
from ...problem.examples import example
from ..contract import ConvBackward, ConvResult, Gradients, Phase
from . import arguments, plans, tiles
from .backward import count_ways, pass_gradients
from .gradients import channel_sums
from .norm import gradients, moments, write_z
from .passes import PassConfig, candidates, coefficients, conv_pass
from .passes import moments as combined


def conv3d(problem: ConvProblem, tensors: ConvTensors, train: bool = False) -> ConvResult:
    return run(problem, tensors, problem, choices.choice("triton", problem, "forward"))


def ways(problem: ConvProblem, phase: Phase) -> list[str]:
    """What ``tune`` may choose from: tiles."""
    several = count_ways(problem.conv) if phase == "backward" else len(_configs(problem, True))
    return [f"tiles {i}" for i in range(several)][:12]


def trial(problem: ConvProblem, phase: Phase, way: str) -> Callable[[], object]:
    """Run a phase of the problem once in one of its ways, on random tensors."""
    tensors = example(problem)
    if phase == "forward":
        return lambda: run(problem, tensors, problem, way)
    result = run(problem, tensors, problem)
    call = ConvBackward.of(problem, tensors, result, torch.randn_like(result.y))
    return lambda: run_backward(call, way)


def _rank(problem: ConvProblem, phase: Phase, way: str | None) -> int:
    return int(way.removeprefix("tiles ")) if way and way in ways(problem, phase) else 0


def run(
    problem: ConvProblem, tensors: ConvTensors, like: ConvProblem, way: str | None = None
) -> ConvResult:
    """The call in one of its ``ways`` (None: the best guess), as a problem ``like`` it is run."""
    rank = _rank(like, "forward", way)
    return ConvResult(*plans.run(_run, problem.device, [*tensors], problem, like, rank))


def _run(given: Sequence[Any], problem: ConvProblem, like: ConvProblem, rank: int) -> ConvResult:
    t, spec = ConvTensors(*given), problem.spec
    prologue: dict[str, Any] = {}
    z, mean, var = t.x, t.mean, t.var
    if _reads_x(problem):
        if spec.norm != "none":
            if var is None:
                mean, var = moments(problem, t.x)
            c = problem.in_channels
            scale, shift = coefficients(problem, t, mean, var, c, c)
            prologue = {"in_scale": scale, "in_shift": shift}
        prologue["in_activation"] = spec.input_activation
    else:
        z = _empty_z(problem, t.x, problem.size[0])
        mean, var = write_z(problem, t, mean, var, z)
    y = problem.empty_output(t.x)
    partial, rows = conv_pass(
        problem.conv, z, t.weight, y, past=t.past, **prologue, shift=t.bias, residual=t.residual,
        activation=spec.activation, slope=spec.slope, statistics=spec.output_statistics,
        config=_configs(like, z.stride(1) == 1)[rank],
    )  # fmt: skip
    taken = (mean, var) if t.var is None else (None, None)
    out: tuple[Tensor, ...] = ()
    if partial is not None:
        out = combined(partial, rows, problem.batch * math.prod(problem.out_size))
    return ConvResult(y, *taken, *out)


def _is_thin(problem: ConvProblem) -> bool:
    return tiles.is_thin(problem.in_channels // problem.conv.groups, problem.conv.groups)


def _is_plain(problem: ConvProblem) -> bool:
    """Whether z is x."""
    return problem.spec.norm == problem.spec.input_activation == "none"


def _reads_x(problem: ConvProblem) -> bool:
    """Whether the convolution forms z as it loads x."""
    by_channel = problem.spec.norm in ("none", "batch", "frozen")
    return _is_plain(problem) or (_is_thin(problem) and by_channel)


def _z_channels(problem: ConvProblem) -> int:
    """Channels of z in memory: rows of whole vectors, but for groups and beside a past."""
    c = problem.in_channels
    padded = problem.conv.groups == 1 and c >= tiles.LEAST_K and not problem.past
    return round_up(c, 8) if padded else c


def _empty_z(problem: ConvProblem, x: Tensor, frames: int) -> Tensor:
    rows = x.new_empty((problem.batch, frames, *problem.size[1:], _z_channels(problem)))
    return rows.permute(0, 4, 1, 2, 3)


def _configs(like: ConvProblem, channels_last: bool) -> Sequence[PassConfig]:
    """Of the convolution, the best guess first."""
    count = like.batch * math.prod(like.out_size)
    channels = like.in_channels if _reads_x(like) else _z_channels(like)
    return candidates(like.conv, channels, count, like.dtype, like.device, channels_last)


def conv3d_backward(call: ConvBackward) -> Gradients:
    return run_backward(call, choices.choice("triton", call.problem, "backward"))


def run_backward(call: ConvBackward, way: str | None) -> Gradients:
    """Gradients in one of the ``ways``; None: the best guess."""
    given = [*call.tensors, call.mean, call.var, call.dy]
    rank = _rank(call.problem, "backward", way)
    return plans.run(_backward, call.problem.device, given, call.problem, tuple(call.needs), rank)


def _backward(
    given: Sequence[Any], problem: ConvProblem, needs: Sequence[bool], rank: int
) -> Gradients:
    *tensors, mean, var, dy = given
    t = ConvTensors(*tensors)
    need = ConvBackward(problem, t, dy, mean, var, needs).need
    of_norm = (need.x, need.norm_weight, need.norm_bias)
    thin, frames = _is_thin(problem), problem.read_size[0]
    dx = dw = db = dgamma = dbeta = dpast = dz = None
    if not thin:
        dy = arguments.channels_last(dy)  # read in all taps
    if need.bias:
        assert t.bias is not None
        db = channel_sums(dy, t.bias)
    z = _z(problem, t, mean, var) if need.weight else None
    if any(of_norm) or need.past:
        if _is_plain(problem) and t.past is None:
            dz = torch.empty_like(t.x)
        elif z is None or thin:
            dz = _empty_z(problem, t.x, frames)
        else:
            dz = z
    if need.weight or dz is not None:
        _, dw = pass_gradients(problem.conv, z, dy, t.weight, dz, need.weight, rank=rank)
    if dz is not None:
        if need.past:
            dpast = dz[:, : problem.in_channels, : problem.past]
        dz = dz[:, : problem.in_channels, problem.past :]
        if _is_plain(problem):
            dx = dz
        elif any(of_norm):
            dx, dgamma, dbeta = gradients(problem, t, mean, var, dz, of_norm)
    return dx, dw, db, dgamma, dbeta, None, None, dpast


def _z(problem: ConvProblem, t: ConvTensors, mean: Tensor | None, var: Tensor | None) -> Tensor:
    """All that the convolution has read."""
    if t.past is None and _is_plain(problem):
        return t.x
    z, past = _empty_z(problem, t.x, problem.read_size[0]), problem.past
    if t.past is not None:
        z[:, :, :past].copy_(t.past)
    if _is_plain(problem):
        z[:, :, past:].copy_(t.x)
    else:
        write_z(problem, t, mean, var, z[:, :, past:])
    return z
