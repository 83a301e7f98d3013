"""Validation of the public functions' arguments: one exception, before any work."""

from __future__ import annotations

import marshal
import re
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import geometry
from .spec import (
    COMBINES,
    ORDERS,
    BatchNorm,
    PairProblem,
    PairSpec,
    PairTensors,
    ParallelSpec,
    ParallelTensors,
    Pass,
    Problem,
    Triple,
    in_execution_order,
    offset_of,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_AXES = ("time", "height", "width")


def with_batch(op: str, x: Tensor) -> tuple[Tensor, bool]:
    """x as (N, C, T, H, W), and whether it came so.

    Raises:
        TypeError: not a dense floating-point tensor.
        ValueError: neither 5-D nor 4-D.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: x must be dense, with strides, got {x.layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() not in (4, 5):
        raise ValueError(f"{op}: x must be (N, C, T, H, W) or (C, T, H, W), got {tuple(x.shape)}")
    return (x, True) if x.dim() == 5 else (x.unsqueeze(0), False)


def layer_input(layer: str, x: Tensor, in_channels: int) -> None:
    """
    Raises:
        TypeError: x is no tensor.
        ValueError: it has not the dimensions or the channels that a layer takes.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{layer}: x must be a tensor, got {type(x).__name__}")
    if x.dim() not in (4, 5):
        raise ValueError(
            f"{layer}: x must be (N, C, T, H, W) or (C, T, H, W), got {tuple(x.shape)}"
        )
    if x.shape[-4] != in_channels:
        raise ValueError(
            f"{layer}: {describe_channels(x)}; this layer has in_channels={in_channels}"
        )


def of_layer(layer: str, error: Exception) -> Exception:
    """A function's error as the caller of a layer reads it: with its name and its modules'."""
    told, of_function = re.subn(r"^(parallel_)?conv2plus1d:", f"{layer}:", str(error))
    if not of_function:
        return error  # of a module of somebody else
    return type(error)(re.sub(r"\b(spatial|temporal)_(weight|bias)\b", r"\1.\2", told))


def describe_channels(x: Tensor) -> str:
    """Which channels x has, and how that is read where it may surprise."""
    shape, channels = tuple(x.shape), x.shape[-4]
    if x.dim() == 5:
        return f"x of shape {shape} has {channels} channels"
    return (
        f"x of shape {shape} is taken as one unbatched clip (C, T, H, W) with {channels} channels"
    )


def same_dtype(
    op: str,
    labels: Sequence[str],
    tensors: Sequence[Tensor | None],
    cast: torch.dtype | None,
    residual: Any = None,
) -> None:
    """
    Raises:
        TypeError: a weight, a bias or the residual in another dtype than x, once autocast has cast
            all but the residual.
    """

    def cast_dtype(t: Tensor) -> torch.dtype:
        return t.dtype if cast is None or t.dtype == torch.float64 else cast

    came = {n: cast_dtype(t) for n, t in zip(labels, tensors, strict=True) if t is not None}
    dtype = came[labels[0]]
    if residual is not None:
        came["residual"] = residual.dtype
    for label, found in came.items():
        if found != dtype:
            raise TypeError(
                f"{op}: {label} must have the dtype of x, {dtype}, got {found}: convert one of "
                f"them with .to(), or run under torch.autocast"
            )


def memoize_check(check: Callable[..., Any]) -> Callable[..., Any]:
    """Check a combination of layouts, dtypes, devices and settings only the first time."""
    passed: dict[Any, Any] = {}

    @wraps(check)
    def check_once(tensors: Any, cast: torch.dtype | None, norm: Any, *settings: Any) -> Any:
        if torch.compiler.is_compiling():
            return check(tensors, cast, norm, *settings)
        try:
            key = _identity(tensors, cast, norm, settings)
            found = passed.get(key)
        except (TypeError, AttributeError, ValueError):  # an odd one: the check says what is wrong
            return check(tensors, cast, norm, *settings)
        if found is None:
            if len(passed) >= 4096:
                passed.clear()
            found = passed[key] = check(tensors, cast, norm, *settings)
        return found

    return check_once


def _identity(tensors: Any, cast: torch.dtype | None, norm: Any, settings: tuple[Any, ...]) -> Any:
    """What a check looks at: of a tensor its layout, dtype and device; of settings their bytes.

    Equal numbers of different types are different: 1, 1.0 and True.

    Raises:
        TypeError, AttributeError, ValueError: other types among them.
    """
    if norm is not None:  # a BatchNorm; its momentum may be another one in every call
        told = norm[4:5] + norm[6:] if isinstance(norm, BatchNorm) else (norm[0], *norm[3:])
        vectors = norm[:4] if isinstance(norm, BatchNorm) else norm[1:3]
        tensors, settings = (*tensors, *vectors), (*settings, *told)
    seen = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]
    return marshal.dumps(settings, 2), cast, type(norm), offset_of(tensors[0]), *seen


@memoize_check
def pair(
    tensors: PairTensors,
    cast: torch.dtype | None,
    norm: BatchNorm | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    padding_mode: Any,
    activation: str | None,
    negative_slope: float,
    order: str,
    causal: Any,
    recompute: bool,
    outer_activation: str | None = None,
    batched: bool = True,
) -> tuple[PairProblem, int]:
    """The problem of the arguments of ``conv2plus1d``, with the tensors of its norm, and the values
    per channel of its mid tensor.

    Args:
        tensors: without those of the norm.
        cast: what autocast will make of them, or None.
        batched: whether x came as a batch.

    Raises:
        TypeError, ValueError: what does not fit.
    """
    op = "conv2plus1d"
    geometry.name(f"{op}: order", order, ORDERS)
    _, w1, w2, b1, b2, *_ = tensors
    ws, wt = in_execution_order(order, w1, w2)  # swapping twice is no swap
    found = _geometry(op, ws, wt, stride, padding, dilation, groups, padding_mode, causal)
    act = geometry.activation_name(f"{op}: activation", activation)
    kind, eps = "none", 0.0
    if norm is not None:
        kind, eps = batch_norm(op, norm)
    outer = geometry.activation_name(f"{op}: outer_activation", outer_activation)
    spec = PairSpec(
        *found, act, float(negative_slope), kind, eps, order, bool(recompute), outer,
        norm.group if norm is not None and norm.training else "",
    )  # fmt: skip
    problem = Problem.of(tensors, spec)
    first, second = problem.passes
    names = ("x", *(f"{p.kind}_{what}" for what in ("weight", "bias") for p in problem.passes))
    _weights_fit(op, names, tensors)
    _channels_chain(op, tensors.x if batched else tensors.x[0], problem)
    sizes_fit(op, first, problem.size, problem.mid_size)
    sizes_fit(op, second, problem.mid_size, problem.out_size)
    if tensors.residual is not None:
        residual_fits(op, tensors.residual, problem)
    if norm is not None:
        labels = ("running_mean", "running_var", "weight", "bias")
        for label, vector in zip(labels, norm[:4], strict=True):
            vector_fits(op, f"norm.{label}", vector, first.out_channels, tensors.x.device)
    t, h, w = problem.mid_size
    values = tensors.x.shape[0] * t * h * w  # math.prod would break a compiled graph
    if kind == "batch" and values == 1 and not spec.group:
        raise ValueError(
            f"{op}: batch norm in training requires more than 1 value per channel, got the mid "
            f"tensor {(tensors.x.shape[0], first.out_channels, *problem.mid_size)}"
        )
    same_dtype(op, names, tensors[:5], cast, tensors.residual)
    return Problem.of(with_norm(tensors, norm), spec), values


def _channels_chain(op: str, x: Tensor, problem: PairProblem) -> None:
    """
    Raises:
        ValueError: a pass does not take the channels that come to it; x is as it came.
    """
    first, second = problem.passes
    if first.in_channels != x.shape[-4] or second.in_channels != first.out_channels:
        raise ValueError(
            f"{op}: channels must chain: {describe_channels(x)}; the {first.kind} weight takes "
            f"{first.in_channels} (groups {first.groups}) and gives {first.out_channels}; the "
            f"{second.kind} weight takes {second.in_channels} (groups {second.groups})"
        )


def with_norm(tensors: PairTensors, norm: BatchNorm | None) -> PairTensors:
    """The tensors of a call with those of its norm."""
    if norm is None:
        return tensors
    mean, var = (None, None) if norm.training else norm[:2]
    return PairTensors(*tensors[:5], norm.weight, norm.bias, mean, var, tensors.residual)


def outer_norm(op: str, norm: Any, problem: Problem, what: str = "outer_norm") -> None:
    """
    Raises:
        TypeError, ValueError: a norm of the output, an argument of this name, that is none, or does
            not fit it.
    """
    batch_norm(op, norm, what)
    labels = ("running_mean", "running_var", "weight", "bias")
    for label, t in zip(labels, norm[:4], strict=True):
        vector_fits(op, f"{what}.{label}", t, problem.out_channels, problem.device)
    n, _, t_, h, w = problem.out_shape
    if norm.training and not norm.group and n * t_ * h * w == 1:
        raise ValueError(
            f"{op}: batch norm in training requires more than 1 value per channel, got the output "
            f"{problem.out_shape}"
        )


def residual_fits(op: str, residual: Any, problem: Problem) -> None:
    """
    Raises:
        TypeError: the residual is no tensor.
        ValueError: it has not the shape of y, or is on another device.
    """
    if not isinstance(residual, Tensor):
        raise TypeError(f"{op}: residual must be a tensor, got {type(residual).__name__}")
    if residual.shape != problem.out_shape:
        raise ValueError(
            f"{op}: residual must have the shape of the output, {problem.out_shape}, got "
            f"{tuple(residual.shape)}"
        )
    if residual.device != problem.device:
        raise ValueError(
            f"{op}: residual must be on the device of x, {problem.device}, got {residual.device}"
        )


@memoize_check
def parallel(
    tensors: ParallelTensors,
    cast: torch.dtype | None,
    norm: None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    padding_mode: Any,
    branch_activation: str | None,
    activation: str | None,
    negative_slope: float,
    combine: str,
    causal: Any,
) -> ParallelSpec:
    """Validated arguments of ``parallel_conv2plus1d``.

    Raises:
        TypeError, ValueError: what does not fit.
    """
    op = "parallel_conv2plus1d"
    geometry.name(f"{op}: combine", combine, COMBINES)
    _, ws, wt, _, _ = tensors
    found = _geometry(op, ws, wt, stride, padding, dilation, groups, padding_mode, causal)
    spec = ParallelSpec(
        *found, geometry.activation_name(f"{op}: branch_activation", branch_activation),
        geometry.activation_name(f"{op}: activation", activation), float(negative_slope), combine,
    )  # fmt: skip
    _weights_fit(op, ParallelTensors._fields, tensors)
    problem = Problem.of(tensors, spec)
    spatial, temporal = problem.passes
    for p in problem.passes:
        if p.in_channels != tensors.x.shape[1]:
            raise ValueError(
                f"{op}: the {p.kind} weight takes {p.in_channels} channels (groups {p.groups}), "
                f"but x has {tensors.x.shape[1]}"
            )
        sizes_fit(op, p, problem.size, p.out_size(problem.size))
    sizes = spatial.out_size(problem.size), temporal.out_size(problem.size)
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{op}: both branches must have the same output size (T, H, W), got {sizes[0]} from "
            f"the spatial and {sizes[1]} from the temporal one; pad each by dilation·(kernel−1)/2"
        )
    if combine == "add" and spatial.out_channels != temporal.out_channels:
        raise ValueError(
            f"{op}: combine='add' requires branches of equal channels, got "
            f"{spatial.out_channels} (spatial) and {temporal.out_channels} (temporal)"
        )
    same_dtype(op, ParallelTensors._fields, tensors, cast)
    return spec


def _geometry(
    op: str,
    spatial_weight: Any,
    temporal_weight: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    padding_mode: Any,
    causal: Any,
) -> geometry.Geometry:
    """The first five fields of both specs, of weights that fit them."""
    for label, w in (("spatial_weight", spatial_weight), ("temporal_weight", temporal_weight)):
        if not isinstance(w, Tensor):
            raise TypeError(f"{op}: {label} must be a tensor, got {type(w).__name__}")
    ws, wt = spatial_weight.shape, temporal_weight.shape
    if len(ws) != 5 or ws[2] != 1 or 0 in ws:
        raise ValueError(
            f"{op}: spatial_weight must be (out, in/groups, 1, kh, kw), got {tuple(ws)}"
        )
    if len(wt) != 5 or wt[3:] != (1, 1) or 0 in wt:
        raise ValueError(
            f"{op}: temporal_weight must be (out, in/groups, kt, 1, 1), got {tuple(wt)}"
        )
    found = geometry.resolve(
        op, (wt[2], ws[3], ws[4]), stride, padding, dilation, groups, padding_mode, causal
    )
    for g, w, kind in zip(found.groups, (ws, wt), ("spatial", "temporal"), strict=True):
        if g < 1 or w[0] % g:
            raise ValueError(
                f"{op}: groups must be at least 1 and divide the {w[0]} output channels of the "
                f"{kind} weight, got {g}"
            )
    return found


def _weights_fit(op: str, labels: Sequence[str], tensors: PairTensors | ParallelTensors) -> None:
    """Devices of weights, and shapes and devices of biases."""
    x, *weights = tensors[:3]
    for label, w in zip(labels[1:3], weights, strict=True):
        if w.device != x.device:
            raise ValueError(
                f"{op}: {label} must be on the device of x, {x.device}, got {w.device}"
            )
    for label, w, bias in zip(labels[3:5], weights, tensors[3:5], strict=True):
        vector_fits(op, label, bias, w.shape[0], x.device)


def vector_fits(op: str, label: str, t: Tensor | None, channels: int, device: torch.device) -> None:
    if t is None:
        return
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {label} must be a tensor or None, got {type(t).__name__}")
    if tuple(t.shape) != (channels,):
        raise ValueError(f"{op}: {label} must be ({channels},), got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{op}: {label} must be on the device of x, {device}, got {t.device}")


def batch_norm(op: str, norm: Any, label: str = "norm") -> tuple[str, float]:
    if not isinstance(norm, BatchNorm):
        raise TypeError(
            f"{op}: {label} must be a fastst.functional.BatchNorm or None, got "
            f"{type(norm).__name__}"
        )
    if not norm.training and (norm.running_mean is None or norm.running_var is None):
        raise ValueError(
            f"{op}: {label} requires running_mean and running_var unless {label}.training, got None"
        )
    return ("batch" if norm.training else "frozen"), float(norm.eps)


def sizes_fit(op: str, p: Pass, size: Triple, out_size: Triple) -> None:
    """Kernel within the padded input, padding within what its mode can read."""
    for i, axis in enumerate(_AXES):
        before, after = p.padding[2 * i : 2 * i + 2]
        extent = p.dilation[i] * (p.kernel[i] - 1) + 1
        if out_size[i] < 1:
            raise ValueError(
                f"{op}: {axis} of {size[i]} with padding {before} + {after} must be at least the "
                f"{'' if p.kind == 'full' else p.kind + ' '}kernel's extent of {extent}"
            )
        limit = {"reflect": size[i] - 1, "circular": size[i]}.get(p.modes[i])
        if limit is not None and max(before, after) > limit:
            raise ValueError(
                f"{op}: padding_mode {p.modes[i]!r} requires a padding of at most {limit} for "
                f"a {axis} of {size[i]}, got {max(before, after)}"
            )
