"""Typed public functions: what they compute, in which shapes, what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import dispatch, ops
from .backends import ranks, reference
from .backends.contract import Backend, Begun
from .backends.cpu.norm import update_running
from .machine import exactness, settings
from .problem import activations, checks, conv3d_checks
from .problem.conv3d import ConvProblem, ConvSpec, ConvTensors
from .problem.norms import Norm, tables
from .problem.spec import (
    BatchNorm,
    PairProblem,
    PairTensors,
    ParallelTensors,
    Problem,
    in_execution_order,
)

IntOrTriple = int | Sequence[int]
PaddingArg = int | Sequence[int | tuple[int, int]] | str
PaddingMode = str | tuple[str, str]
Causal = bool | Literal["strided"]


class Statistics(NamedTuple):
    """Mean and biased variance of each channel over (N, T, H, W), in float32 at least."""

    mean: Tensor
    var: Tensor


def conv2plus1d(
    x: Tensor,
    spatial_weight: Tensor,
    temporal_weight: Tensor,
    spatial_bias: Tensor | None = None,
    temporal_bias: Tensor | None = None,
    *,
    stride: IntOrTriple = 1,
    padding: PaddingArg = 0,
    dilation: IntOrTriple = 1,
    groups: int | tuple[int, int] = 1,
    padding_mode: PaddingMode = "zeros",
    activation: str | None = "relu",
    negative_slope: float = 0.01,
    norm: BatchNorm | None = None,
    order: str = "spatial-first",
    causal: Causal = False,
    recompute: bool | None = None,
    residual: Tensor | None = None,
    outer_activation: str | None = None,
    outer_norm: BatchNorm | None = None,
    begun: Begun | None = None,
) -> Tensor:
    """A spatial and a temporal convolution with norm and activation between them, as one operation.

    The (2+1)D convolution of arXiv 1711.11248::

        u = conv3d(x, spatial_weight, spatial_bias, (1, sh, sw), (0, ph, pw), (1, dh, dw), groups)
        z = activation(norm(u))
        y = conv3d(z, temporal_weight, temporal_bias, (st, 1, 1), (pt, 0, 0), (dt, 1, 1), groups)

    With ``order="temporal-first"`` the two convolutions change places. Each keeps its own
    dimensions of stride, padding and dilation. Triples are in the order time, height, width.

    What ends a residual block comes with it: ``outer_activation(outer_norm(y) + residual)``.
    Without gradients and norms in training they are part of the operation, else PyTorch's own
    operators after it (so is a frozen norm where the backend does not know it); where the backend
    can, the statistics of y that a norm in training needs come with y.

    Args:
        x: (N, C, T, H, W) or (C, T, H, W); float16, bfloat16, float32 or float64; any strides.
        spatial_weight: (M, C/groups, 1, kh, kw); temporal-first (K, M/groups, 1, kh, kw).
        temporal_weight: (K, M/groups, kt, 1, 1); temporal-first (M, C/groups, kt, 1, 1).
        spatial_bias: (M,); temporal-first (K,).
        temporal_bias: (K,); temporal-first (M,).
        stride: int or (st, sh, sw).
        padding: int, (pt, ph, pw), "valid" or "same" (output size = input size; stride 1 only).
            An entry of the triple may be a pair (before, after).
        dilation: int or (dt, dh, dw).
        groups: of both passes, or (spatial, temporal).
        padding_mode: "zeros", "replicate", "reflect" or "circular"; or (spatial, temporal).
            Temporal padding pads what the temporal convolution reads: z when spatial-first.
        activation: "relu", "silu", "gelu", "gelu_tanh", "leaky_relu", "hardswish", "none" or None.
        negative_slope: of leaky_relu, of both activations.
        norm: a ``BatchNorm``, or None.
        order: "spatial-first" or "temporal-first".
        causal: no output frame i depends on an input frame after i·st: dt·(kt−1) frames of padding
            before the first and none after; the temporal padding must then be 0 and its mode
            "zeros" or "replicate". "strided" pads dt·(kt−1) + 1 − st, as NVIDIA's Cosmos tokenizer
            does.
        recompute: keep only x for backward and compute the mid tensor u again there; None for what
            the environment variable ``FASTST_RECOMPUTE`` says, 1 or 0, and where it says nothing
            only without a norm.
        residual: of exactly the shape and the dtype of y, or None; any strides.
        outer_activation: of y, after the residual; names as for ``activation``.
        outer_norm: of y, before the residual; a ``BatchNorm`` over K channels, or None.
        begun: what ``begin`` has returned for this call: only the rest of it is computed.

    Returns:
        (N, K, T', H', W'), or (K, T', H', W'), in the memory format ``nn.Conv3d`` would give.

    Raises:
        TypeError: arguments of a wrong type, or tensors whose dtypes differ.
        ValueError: shapes, sizes or names that do not fit; says what was required and what came.
        BackendError: the backend asked for cannot run this call.
    """
    x, batched = checks.with_batch("conv2plus1d", x)
    if isinstance(residual, Tensor) and not batched:
        residual = residual.unsqueeze(0)
    weights = in_execution_order(order, spatial_weight, temporal_weight)
    biases = in_execution_order(order, spatial_bias, temporal_bias)
    main = (x, *weights, *biases)
    tensors = PairTensors(*main, residual=residual)
    cast = _autocast_dtype(x)
    problem, values = checks.pair(
        tensors, cast, norm, stride, padding, dilation, groups, padding_mode, activation,
        negative_slope, order, causal, recomputes(recompute, norm), outer_activation, batched,
    )  # fmt: skip
    tensors = checks.with_norm(tensors, norm)
    if cast is not None:
        tensors, problem = _cast_pair(tensors, problem, cast)
    if outer_norm is not None:
        checks.outer_norm("conv2plus1d", outer_norm, problem)
        spec = problem.spec
        asking = Problem.of(tensors, spec._replace(outer_norm=True))
        if spec.norm == "batch" or not _is_taken_in(outer_norm, tensors, problem, asking):
            y = _norm_of_pair(tensors, problem, values, norm, outer_norm, begun)
            y = y if residual is None else y + residual
            y = activations.apply(spec.outer_activation, y, spec.slope)
            return y if batched else y.squeeze(0)
        tensors = tensors._replace(outer_table=_table(outer_norm, problem))
        problem = Problem.of(tensors, asking.spec)
    y, _ = _pair(tensors, problem, values, norm, begun=begun)
    return y if batched else y.squeeze(0)


class Checked(NamedTuple):
    """A call of ``conv2plus1d`` whose arguments have been checked."""

    problem: PairProblem
    values: int  # of a channel of the mid tensor
    cast: torch.dtype | None  # what autocast makes of x, weights and biases


def check(
    tensors: PairTensors, norm: BatchNorm | None, *, activation: str, negative_slope: float,
    order: str, recompute: bool = False, **settings: Any,
) -> Checked:  # fmt: skip
    """What ``run`` and ``begin`` take: of the tensors of a ``conv2plus1d`` without an ending, in
    the order of execution, and of its norm.

    The same for all calls under this autocast, of these settings and a norm of the same mode and
    eps, whose tensors have the same shapes, strides, dtypes and devices, and x the same
    ``offset_of``.

    Raises:
        TypeError, ValueError: as ``conv2plus1d``.
    """
    how = [settings[n] for n in ("stride", "padding", "dilation", "groups", "padding_mode")]
    cast = _autocast_dtype(tensors.x)
    more = activation, negative_slope, order, False, recompute
    problem, values = checks.pair(tensors, cast, norm, *how, *more)
    return Checked(problem, values, cast)


def run(
    tensors: PairTensors, call: Checked, norm: BatchNorm | None, begun: Begun | None = None
) -> Tensor:
    """``conv2plus1d`` of what ``check`` has passed, with the tensors of the norm."""
    problem = call.problem
    if call.cast is not None:
        tensors, problem = _cast_pair(tensors, problem, call.cast)
    return _pair(tensors, problem, call.values, norm, begun=begun)[0]


def begin(tensors: PairTensors, call: Checked, norm: BatchNorm) -> Begun | None:
    """The first convolution of what ``check`` has passed, whose norm is in training, and its
    statistics.

    The running statistics of the norm are updated. ``run(..., begun=...)`` does the rest; what is
    given of the second convolution here, its activation and its weight, is a guess, by which the
    kernels are chosen.

    Returns:
        None where the backend computes both convolutions in one call only: nothing has been done.
    """
    if exactness.is_required():
        return None
    problem = call.problem
    if call.cast is not None:
        tensors, problem = _cast_pair(tensors, problem, call.cast)
    try:
        begun = ops.first_pass(tensors, problem, dispatch.requested_backend())
    except dispatch.BackendError:
        if dispatch.strict():
            raise
        return None  # the backend that was asked for refuses the guess
    if begun is not None:
        _update_running(norm, begun.mean, begun.var, call.values)
    return begun


def _pair(
    tensors: PairTensors,
    problem: PairProblem,
    values: int,
    norm: BatchNorm | None,
    forward: str | None = None,
    begun: Begun | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """y and its statistics, if asked for; updates those of the norm, of that many values.

    Args:
        forward: the backend of the forward pass, where that was decided already.
        begun: what ``begin`` has left, which has updated them.
    """
    if _runs_composed("conv2plus1d", tensors.x):
        if begun is not None and norm is not None:
            norm = norm._replace(running_mean=None, running_var=None)
        return reference.compose_pair(tensors, problem.spec, _norm_function(norm)), None
    y, statistics, outer = ops.conv2plus1d(
        tensors, problem, dispatch.requested_backend(), forward, begun
    )
    if statistics is not None and norm is not None and begun is None:
        mean, var, count = statistics
        _update_running(norm, mean, var, count if problem.spec.group else values)
    return y, outer


def _norm_of_pair(
    tensors: PairTensors,
    problem: PairProblem,
    values: int,
    norm: BatchNorm | None,
    outer_norm: BatchNorm,
    begun: Begun | None,
) -> Tensor:
    """outer_norm of the pair alone, with statistics from its kernel if there are some."""
    spec = problem.spec._replace(outer_activation="none")
    tensors = tensors._replace(residual=None)
    problem, backend = Problem.of(tensors, spec), None
    if _takes_statistics(outer_norm, tensors.x):
        asking = Problem.of(tensors, spec._replace(output_statistics=True))
        backend = dispatch.choose_with_statistics(problem, asking, dispatch.requested_backend())
    if backend is None:
        y, _ = _pair(tensors, problem, values, norm, begun=begun)
        return _norm_function(outer_norm)(y)
    y, statistics = _pair(tensors, asking, values, norm, backend.name, begun)
    return _normalise(outer_norm, y, statistics, backend)


def parallel_conv2plus1d(
    x: Tensor,
    spatial_weight: Tensor,
    temporal_weight: Tensor,
    spatial_bias: Tensor | None = None,
    temporal_bias: Tensor | None = None,
    *,
    stride: IntOrTriple = 1,
    padding: PaddingArg = 0,
    dilation: IntOrTriple = 1,
    groups: int | tuple[int, int] = 1,
    padding_mode: PaddingMode = "zeros",
    branch_activation: str | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    combine: str = "add",
    causal: Causal = False,
) -> Tensor:
    """A spatial and a temporal convolution of the same input, added or concatenated.

    The 4D convolution of arXiv 2407.16514::

        a = branch_activation(conv3d(x, spatial_weight, spatial_bias, stride, (0, ph, pw), ...))
        b = branch_activation(conv3d(x, temporal_weight, temporal_bias, stride, (pt, 0, 0), ...))
        y = activation(a + b)  or  activation(cat((a, b), 1))

    Both branches take the whole stride, so the spatial one subsamples time and the temporal one
    subsamples space. (The paper strides the flattened H·W by s², which gives the same number of
    pixels but other ones; here the stride is in two dimensions.)

    Args:
        x: (N, C, T, H, W) or (C, T, H, W); float16, bfloat16, float32 or float64; any strides.
        spatial_weight: (Ks, C/groups, 1, kh, kw).
        temporal_weight: (Kt, C/groups, kt, 1, 1); with ``combine="add"`` Kt = Ks.
        spatial_bias: (Ks,).
        temporal_bias: (Kt,).
        stride, padding, dilation, groups, padding_mode, causal: as in ``conv2plus1d``.
        branch_activation: of each branch before they are combined; names as in ``conv2plus1d``.
        activation: after they are combined.
        negative_slope: of leaky_relu.
        combine: "add" or "cat".

    Returns:
        (N, K, T', H', W') with K = Ks, or Ks + Kt for "cat"; unbatched for an unbatched input.

    Raises:
        TypeError: arguments of a wrong type, or tensors whose dtypes differ.
        ValueError: shapes, sizes or names that do not fit, or branches of different output sizes.
        BackendError: the backend asked for cannot run this call.
    """
    x, batched = checks.with_batch("parallel_conv2plus1d", x)
    tensors = ParallelTensors(x, spatial_weight, temporal_weight, spatial_bias, temporal_bias)
    cast = _autocast_dtype(x)
    spec = checks.parallel(
        tensors, cast, None, stride, padding, dilation, groups, padding_mode, branch_activation,
        activation, negative_slope, combine, causal,
    )  # fmt: skip
    if cast is not None:
        tensors = ParallelTensors(*_cast(tensors, cast))
    if _runs_composed("parallel_conv2plus1d", x):
        y = reference.compose_parallel(tensors, spec)
    else:
        y = ops.parallel_conv2plus1d(tensors, spec, dispatch.requested_backend())
    return y if batched else y.squeeze(0)


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTriple = 1,
    padding: PaddingArg = 0,
    dilation: IntOrTriple = 1,
    groups: int = 1,
    *,
    padding_mode: PaddingMode = "zeros",
    causal: Causal = False,
    input_norm: BatchNorm | Norm | None = None,
    input_activation: str | None = None,
    input_statistics: Statistics | None = None,
    past: Tensor | None = None,
    output_norm: BatchNorm | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    output_statistics: bool = False,
) -> Any:
    """A 3D convolution with what comes before it and what comes after it, as one operation::

        z = input_activation(input_norm(x))
        y = activation(output_norm(conv3d(pad(cat(past, z)), weight) + bias) + residual)

    Padding pads what the convolution reads, z. Triples are in the order time, height, width.
    Neither z nor anything padded or concatenated is kept: backward has x and the statistics of
    its norm.

    Args:
        x: (N, C, T, H, W) or (C, T, H, W); float16, bfloat16, float32 or float64; any strides.
        weight: (K, C/groups, kt, kh, kw).
        bias: (K,).
        stride, dilation: int or triple.
        padding: int, (pt, ph, pw), "valid" or "same" (output size = input size; stride 1 only).
            An entry of the triple may be a pair (before, after).
        groups: of channels.
        padding_mode: "zeros", "replicate", "reflect" or "circular"; or two of them, that of height
            and width and that of time.
        causal: as in ``conv2plus1d``; ``past`` takes the place of frames that were padded.
        input_norm: a ``BatchNorm``, whose running statistics are updated in training; a ``Norm``
            over groups of channels or the channels of each position; or None.
        input_activation: of what the norm gives; names as in ``conv2plus1d``.
        input_statistics: of x, where the convolution before has given them; for a ``BatchNorm`` in
            training.
        past: (N, C, P, H, W): frames of z before the first of x, as in a causal network's cache.
        output_norm: a ``BatchNorm`` of what the convolution gives, or None. A frozen one is part of
            the operation where no gradient is needed and the backend knows it; else it is PyTorch's
            operator, which takes the statistics that come with y where it is in training.
        residual: of exactly the shape and the dtype of y, or None; any strides.
        activation: of y, after the residual.
        negative_slope: of leaky_relu, of both activations.
        output_statistics: also return the ``Statistics`` of y, for a batch norm that follows; y has
            neither residual nor activation then.

    Returns:
        (N, K, T', H', W'), or (K, T', H', W'), in the memory format ``nn.Conv3d`` would give; with
        ``output_statistics`` a pair of it and its ``Statistics``.

    Raises:
        TypeError: arguments of a wrong type, or tensors whose dtypes differ.
        ValueError: shapes, sizes or names that do not fit; says what was required and what came.
        BackendError: the backend asked for cannot run this call.
    """
    x, batched = checks.with_batch("conv3d", x)
    if isinstance(residual, Tensor) and not batched:
        residual = residual.unsqueeze(0)
    if isinstance(past, Tensor) and not batched:
        past = past.unsqueeze(0)
    mean, var = (None, None) if input_statistics is None else input_statistics
    tensors = ConvTensors(x, weight, bias, None, None, mean, var, past, residual)
    cast = _autocast_dtype(x)
    spec = conv3d_checks.conv3d(
        tensors, cast, input_norm, stride, padding, dilation, groups, padding_mode, causal,
        input_activation, activation, negative_slope, output_statistics, batched,
    )  # fmt: skip
    if cast is not None:
        if input_norm is not None and x.dtype not in (cast, torch.float64):
            # Autocast rounds what the convolution reads, and not what a norm reads.
            tensors = tensors._replace(x=_z_of(tensors, spec, input_norm), mean=None, var=None)
            input_norm, spec = None, spec._replace(**_READS_X)
        x, weight, bias, past = _cast((tensors.x, weight, bias, past), cast)
        tensors = tensors._replace(x=x, weight=weight, bias=bias, past=past)
    batch = input_norm if isinstance(input_norm, BatchNorm) else None
    if input_norm is not None:
        tensors = tensors._replace(norm_weight=input_norm.weight, norm_bias=input_norm.bias)
    if batch is not None and not batch.training:
        tensors = tensors._replace(mean=batch.running_mean, var=batch.running_var)
    if output_norm is not None:
        if output_statistics:
            raise ValueError("conv3d: output_statistics requires a y without output_norm")
        problem, asks = ConvProblem.of(tensors, spec), spec._replace(output_norm=True)
        checks.outer_norm("conv3d", output_norm, problem, "output_norm")
        if not _is_taken_in(output_norm, tensors, problem, ConvProblem.of(tensors, asks)):
            y = _norm_of_conv3d(tensors, spec, batch, output_norm)
            y = y if residual is None else y + residual
            y = activations.apply(spec.activation, y, spec.slope)
            return y if batched else y.squeeze(0)
        spec, tensors = asks, tensors._replace(output_table=_table(output_norm, problem))
    y, found = _conv3d(tensors, spec, batch)
    y = y if batched else y.squeeze(0)
    return y if found is None else (y, Statistics(*found))


def _conv3d(
    tensors: ConvTensors, spec: ConvSpec, norm: BatchNorm | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """y and its statistics, if asked for; updates those of a batch norm of x."""
    x = tensors.x
    if _runs_composed("conv3d", x):
        function = None if norm is None else _norm_function(norm)
        y = reference.compose_conv3d(tensors, spec, function)
        if not spec.output_statistics:
            return y, None
        wide = y.to(torch.promote_types(y.dtype, torch.float32))
        return y, torch.var_mean(wide, (0, 2, 3, 4), correction=0)[::-1]
    y, taken, found = ops.conv3d(tensors, spec, dispatch.requested_backend())
    known: Any = taken or (tensors.mean, tensors.var)
    if norm is not None and norm.training:
        mean, var = known
        _update_running(norm, mean, var, x.numel() // x.shape[1])
    return y, found


# Of a specification whose convolution reads x as it is.
_READS_X: dict[str, Any] = {
    name: ConvSpec._field_defaults[name]
    for name in ("input_activation", "norm", "eps", "norm_groups", "per_frame")
}


def _z_of(tensors: ConvTensors, spec: ConvSpec, norm: BatchNorm | Norm) -> Tensor:
    """Norm and activation of x by operators of their own, in the dtype of x."""
    x = tensors.x
    if isinstance(norm, Norm):
        affine = tensors._replace(norm_weight=norm.weight, norm_bias=norm.bias)
        v = reference.normalise(x, affine, spec)
    elif tensors.var is not None:
        moments, backend = (tensors.mean, tensors.var), reference.BACKEND
        v = _normalise(norm, x, moments, backend)  # type: ignore[arg-type]  # both are given
    else:
        v = _norm_function(norm)(x)
    return activations.apply(spec.input_activation, v, spec.slope)


def _norm_of_conv3d(
    tensors: ConvTensors, spec: ConvSpec, norm: BatchNorm | None, output_norm: BatchNorm
) -> Tensor:
    """output_norm of the convolution alone, with statistics from its kernel if there are some."""
    tensors, spec = tensors._replace(residual=None), spec._replace(activation="none")
    backend = None
    if _takes_statistics(output_norm, tensors.x):
        backend = dispatch.choose_unrecorded(
            ConvProblem.of(tensors, spec), "forward", dispatch.requested_backend()
        )
    if backend is None or not backend.forms_statistics:
        y, _ = _conv3d(tensors, spec, norm)
        return _norm_function(output_norm)(y)
    y, statistics = _conv3d(tensors, spec._replace(output_statistics=True), norm)
    return _normalise(output_norm, y, statistics, backend)


def recomputes(recompute: bool | None, norm: BatchNorm | None) -> bool:
    """What holds where nobody says: without a norm u serves nothing but backward."""
    if recompute is not None:
        return recompute
    said = settings.value("FASTST_RECOMPUTE")
    return norm is None if said == "" else settings.flag("FASTST_RECOMPUTE")


def _composes(x: Tensor) -> bool:
    """Whether PyTorch's own operators must be seen: functorch, forward-mode AD, empty tensors,
    where their very bits are asked for, and where their FLOPs are counted."""
    return (
        exactness.is_required()
        or _is_counted()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or x.numel() == 0
    )


def _runs_composed(op: str, x: Tensor) -> bool:
    """Whether the call made now composes; ``explain`` is told why where the caller asked for it."""
    if exactness.is_required():
        dispatch.record_composed(op, exactness.WHY)
    return _composes(x)


def _is_counted() -> bool:
    """Whether PyTorch's counter of FLOPs watches, which knows PyTorch's operators alone."""
    if torch.compiler.is_compiling() or not (modes := torch._C._len_torch_dispatch_stack()):
        return False
    watching = map(torch._C._get_dispatch_stack_at, range(modes))
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in watching)


def result_dtype(x: Tensor) -> torch.dtype:
    """That of a convolution of x, by autocast as well."""
    return x.dtype if x.dtype == torch.float64 else _autocast_dtype(x) or x.dtype


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts the arguments of ``nn.Conv3d`` to, or None where it is off."""
    device = x.device.type
    # Not torch.amp.is_autocast_available, which torch.compile of PyTorch 2.11 cannot trace.
    if x.is_meta or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensors: Sequence[Any], dtype: torch.dtype) -> tuple[Any, ...]:
    """x, weights and biases as autocast leaves them; the norm's stay as they are."""
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _cast_pair(
    tensors: PairTensors, problem: PairProblem, dtype: torch.dtype
) -> tuple[PairTensors, PairProblem]:
    cast: Any = (*_cast(tensors[:5], dtype), *tensors[5:])
    tensors = PairTensors._make(cast)
    return tensors, Problem.of(tensors, problem.spec)


def _norm_function(norm: BatchNorm | None) -> Callable[[Tensor], Tensor]:
    if norm is None:
        return lambda u: u
    if not norm.training or not norm.group:
        return lambda u: reference.normalise_batch(u, *norm[:-1])

    def pool(u: Tensor) -> Tensor:
        group = ranks.resolve(norm.group)
        v, mean, var, count = ranks.SyncedNorm.apply(
            u, norm.weight, norm.bias, norm.eps, group
        )  # fmt: skip
        _update_running(norm, mean, var, count)
        return v

    return pool


def _is_taken_in(
    norm: BatchNorm, tensors: PairTensors | ConvTensors, problem: Problem, asking: Problem
) -> bool:
    """Whether a frozen norm of y is part of the operation: as its residual, without gradients, and
    where the backend knows it."""
    if norm.training or torch.compiler.is_compiling() or _composes(tensors.x):
        return False
    if ops.needs_grad((*tensors, *norm[:4])):
        return False
    return dispatch.takes_in(problem, asking, dispatch.requested_backend())


def _table(norm: BatchNorm, problem: Problem) -> Tensor:
    """(5, K) of a frozen norm of y."""
    assert norm.running_var is not None
    frozen, k = Norm("frozen", norm.weight, norm.bias, eps=norm.eps), problem.out_channels
    return tables(frozen, k, norm.running_mean, norm.running_var, problem.accumulate_dtype)[0]


def _takes_statistics(norm: BatchNorm, x: Tensor) -> bool:
    """Whether a norm of y wants those of a kernel; the compiler fuses a norm with what follows."""
    return norm.training and not (norm.group or torch.compiler.is_compiling() or _composes(x))


def _normalise(
    norm: BatchNorm, y: Tensor, moments: tuple[Tensor, Tensor] | None, backend: Backend
) -> Tensor:
    """The norm of y by its mean and variance, which update those of the norm."""
    assert moments is not None
    _update_running(norm, *moments, y.numel() // y.shape[1])
    return ops.batch_norm(y, *moments, norm.weight, norm.bias, norm.eps, backend)


def _update_running(norm: BatchNorm, mean: Tensor, var: Tensor, n: int | Tensor) -> None:
    """Running statistics as ``torch.nn.functional.batch_norm`` leaves them, of n values."""
    given = norm.running_mean, norm.running_var, mean, var, n, norm.momentum
    if not update_running(*given):
        ranks.update_running(*given)
