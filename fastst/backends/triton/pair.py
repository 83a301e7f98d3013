"""``conv2plus1d``: in one kernel where that is possible and pays, else in two passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...machine import choices
from ...problem.examples import example
from ...problem.spec import PairProblem, PairTensors
from .. import ranks
from ..contract import Begun, PairResult
from . import plans, single
from . import tiles as configs
from .passes import PassConfig, affine, candidates, conv_pass, finish_norm, moments


def conv2plus1d(problem: PairProblem, tensors: PairTensors, save: bool) -> PairResult:
    return run(problem, tensors, save, choices.choice("triton", problem, "forward"))


def ways(problem: PairProblem) -> list[str]:
    """What ``tune`` may choose from: single kernels, and tiles for two passes."""
    tiles = max(len(_pass_candidates(problem, i, True)) for i in (0, 1))
    return (single.available(problem) + [f"tiles {i}" for i in range(tiles)])[:12]


def trial(problem: PairProblem, way: str, save: bool) -> Callable[[], object]:
    """Run the problem once in one of its ways, on random tensors."""
    tensors = example(problem)
    return lambda: run(problem, tensors, save, way)


def run(
    problem: PairProblem,
    tensors: PairTensors,
    save: bool,
    way: str | None = None,
    like: PairProblem | None = None,
) -> PairResult:
    """The pair in one of its ``ways`` (None: the best guess), as a problem ``like`` it is run."""
    return PairResult(
        *plans.run(_run, problem.device, [*tensors], problem, save, way, like or problem)
    )


def _run(
    given: Sequence[Tensor], problem: PairProblem, save: bool, way: str | None, like: PairProblem
) -> PairResult:
    tensors, spec = PairTensors(*given), like.spec
    if not (save and not spec.recompute) and not spec.output_statistics:
        kernel = way if way in single.available(like) else None if way else single.predict(like)
        if kernel is not None:
            return _one_kernel(kernel, problem, tensors, like)
    rank = int(way.removeprefix("tiles ")) if way and way.startswith("tiles ") else 0
    return _two_passes(problem, tensors, save, rank, like)


def _pass_candidates(problem: PairProblem, index: int, channels_last: bool) -> Sequence[PassConfig]:
    channels = (problem.passes[0].in_channels, problem.mid_shape[-1])[index]
    count = problem.batch * math.prod((problem.mid_size, problem.out_size)[index])
    return candidates(
        problem.passes[index], channels, count, problem.dtype, problem.device, channels_last
    )


def _one_kernel(
    kernel: str, problem: PairProblem, tensors: PairTensors, like: PairProblem
) -> PairResult:
    """Where the norm is one of this batch, a pass before it finds the statistics of u."""
    first, x, y = problem.passes[0], tensors.x, problem.empty_output(tensors.x)
    weight, bias = tensors.first_weight, tensors.first_bias
    scale, shift, mean, var, count = None, bias, None, None, None
    norm = problem.spec.norm
    if norm == "frozen":
        scale, shift = finish_norm(problem, tensors, bias=bias)
    elif norm == "batch":
        u = x.new_empty(1).expand(problem.batch, problem.mid_channels, *problem.mid_size)
        config = _pass_candidates(like, 0, x.stride(1) == 1)[0]
        partial, rows = conv_pass(
            first, x, weight, u, shift=bias, statistics=True, store=False, config=config
        )
        scale, shift, mean, var, count = _batch_norm(problem, tensors, partial, rows, bias)
    single.run(kernel, problem, tensors, y, scale, shift, like)
    return PairResult(y, None, mean, var, count, outer=True)


def _batch_norm(
    problem: PairProblem,
    tensors: PairTensors,
    partial: Tensor | None,
    rows: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(scale, shift, mean, var, count) from partials of u, of this rank or of a group of them."""
    assert partial is not None
    mean, var = (partial.new_empty(problem.mid_channels) for _ in range(2))
    norm = finish_norm(problem, tensors, mean, var, partial, rows, bias)
    group = problem.spec.group
    if not group:
        return *norm, mean, var, None
    count = problem.batch * math.prod(problem.mid_size)
    pooled = mean.new_empty(mean.shape), var.new_empty(var.shape), mean.new_empty(())
    plans.run_aside(
        lambda mean, var: ranks.pool_statistics(mean, var, count, ranks.resolve(group)),
        (mean, var), pooled,
    )  # fmt: skip
    mean, var, _ = pooled
    return *finish_norm(problem, tensors._replace(mean=mean, var=var), bias=bias), *pooled


def first_pass(problem: PairProblem, tensors: PairTensors) -> Begun:
    """u and its statistics, of a norm over the batch."""
    return Begun(*plans.run(_first_pass, problem.device, [*tensors], problem))


def _first_pass(given: Sequence[Tensor], problem: PairProblem) -> Begun:
    tensors = PairTensors(*given)
    first, x, m = problem.passes[0], tensors.x, problem.mid_channels
    mid_rows = x.new_empty(problem.mid_shape)
    if first.groups > 1 and problem.mid_shape[-1] > m:
        mid_rows[..., m:].zero_()  # channels that belong to no group
    partial, rows = conv_pass(
        first, x, tensors.first_weight, mid_rows.permute(0, 4, 1, 2, 3), shift=tensors.first_bias,
        statistics=True, config=_pass_candidates(problem, 0, x.stride(1) == 1)[0],
    )  # fmt: skip
    return Begun(mid_rows, *_batch_norm(problem, tensors, partial, rows)[2:])


def second_pass(problem: PairProblem, tensors: PairTensors, begun: Begun) -> PairResult:
    """y of a pair that ``first_pass`` has begun."""
    given = [*tensors, *begun]
    return PairResult(*plans.run(_second_pass, problem.device, given, problem))


def _second_pass(given: Sequence[Tensor], problem: PairProblem) -> PairResult:
    count = len(PairTensors._fields)
    tensors, begun = PairTensors(*given[:count]), Begun(*given[count:])
    spec = problem.spec
    y = problem.empty_output(tensors.x)
    scale, shift = finish_norm(problem, tensors._replace(mean=begun.mean, var=begun.var))
    config = _pass_candidates(problem, 1, True)[0]
    after: dict[str, Any] = {
        "in_scale": scale, "in_shift": shift, "in_activation": spec.activation,
        "shift": tensors.second_bias, "slope": spec.slope, "residual": tensors.residual,
        "activation": spec.outer_activation, "config": config,
    }  # fmt: skip
    mid = begun.u.permute(0, 4, 1, 2, 3)
    if isinstance(config, configs.TapConfig):
        mid = _activate(begun.u, after, spec.slope, begun.u.new_empty)
    partial, rows = conv_pass(
        problem.passes[1], mid, tensors.second_weight, y, statistics=spec.output_statistics, **after
    )
    last: tuple[Any, ...] = ()
    if partial is not None:
        last = moments(partial, rows, problem.batch * math.prod(problem.out_size))
    return PairResult(y, *begun, True, *last)


def _two_passes(
    problem: PairProblem, tensors: PairTensors, save: bool, rank: int, like: PairProblem
) -> PairResult:
    spec = problem.spec
    first, second = problem.passes
    x, w1, w2, b1, b2, *_ = tensors
    m, padded = problem.mid_channels, problem.mid_shape[-1]
    mid_rows = x.new_empty(problem.mid_shape)
    mid = mid_rows.permute(0, 4, 1, 2, 3)
    if first.groups > 1 and padded > m:
        mid_rows[..., m:].zero_()  # channels that belong to no group
    keep = save and not spec.recompute
    found = (_pass_candidates(like, 0, x.stride(1) == 1), _pass_candidates(like, 1, True))
    one, two = (f[min(rank, len(f) - 1)] for f in found)
    before: dict[str, Any] = {"shift": b1, "slope": spec.slope, "config": one}
    after: dict[str, Any] = {
        "shift": b2, "slope": spec.slope, "config": two, "residual": tensors.residual,
        "activation": spec.outer_activation,
    }  # fmt: skip
    mean = var = count = None
    if spec.norm == "frozen":
        scale, shift = finish_norm(problem, tensors, bias=None if keep else b1)
        if keep:
            after |= {"in_scale": scale, "in_shift": shift}
        else:
            before |= {"scale": scale, "shift": shift}
    if keep or spec.norm == "batch":
        after["in_activation"] = spec.activation
    else:
        before["activation"] = spec.activation
    if spec.norm == "batch":
        partial, rows = conv_pass(first, x, w1, mid, statistics=True, **before)
        scale, shift, mean, var, count = _batch_norm(problem, tensors, partial, rows)
        after.update(in_scale=scale, in_shift=shift)
    else:
        conv_pass(first, x, w1, mid, **before)
    if isinstance(two, configs.TapConfig):
        mid = _activate(mid_rows, after, spec.slope, mid_rows.new_empty if keep else None)
    y = problem.empty_output(x)  # only now: the first pass may have read a copy of x
    partial, rows = conv_pass(second, mid, w2, y, statistics=spec.output_statistics, **after)
    out_mean = out_var = None
    if partial is not None:
        out_mean, out_var = moments(partial, rows, problem.batch * math.prod(problem.out_size))
    return PairResult(y, mid_rows if keep else None, mean, var, count, True, out_mean, out_var)


def _activate(
    u: Tensor, after: dict[str, Any], slope: float, empty: Callable[..., Tensor] | None
) -> Tensor:
    """What a dense second pass reads, for what ``after`` asks of it; into u without ``empty``."""
    scale, shift = after.pop("in_scale", None), after.pop("in_shift", None)
    activation = after.pop("in_activation", "none")
    if scale is not None or activation != "none":
        z = u if empty is None else empty(u.shape)
        u = affine(u, z, scale=scale, shift=shift, activation=activation, slope=slope)
    return u.permute(0, 4, 1, 2, 3)
