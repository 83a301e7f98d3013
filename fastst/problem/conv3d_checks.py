"""Validation of the arguments of ``conv3d``: one exception, before any work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import geometry, norms
from .checks import (
    batch_norm,
    describe_channels,
    memoize_check,
    residual_fits,
    same_dtype,
    sizes_fit,
    vector_fits,
)
from .conv3d import ConvProblem, ConvSpec, ConvTensors
from .spec import BatchNorm, Triple, time_height_width


@memoize_check
def conv3d(
    tensors: ConvTensors,
    cast: torch.dtype | None,
    norm: BatchNorm | norms.Norm | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    padding_mode: Any,
    causal: Any,
    input_activation: str | None,
    activation: str | None,
    negative_slope: float,
    output_statistics: bool,
    batched: bool = True,
) -> ConvSpec:
    """Validated arguments of ``conv3d``.

    Args:
        tensors: without those of the norm, but for statistics that are known.
        cast: what autocast will make of them, or None.
        batched: whether x came as a batch.

    Raises:
        TypeError, ValueError: what does not fit.
    """
    op = "conv3d"
    x, w, bias = tensors[:3]
    kernel = _kernel(op, w, groups)
    g = geometry.resolve(
        op, kernel, stride, padding, dilation, groups, padding_mode, causal,
        0 if tensors.past is None else _frames(op, tensors),
    )  # fmt: skip
    _channels_fit(op, x if batched else x[0], w, groups)
    kind, eps, norm_groups, per_frame = _input_norm(op, norm, x, tensors)
    spec = ConvSpec(
        g.stride, g.padding, g.dilation, (groups,), g.padding_mode,
        geometry.activation_name(f"{op}: input_activation", input_activation), kind,
        geometry.activation_name(f"{op}: activation", activation), float(negative_slope), eps,
        norm_groups, per_frame, bool(output_statistics),
    )  # fmt: skip
    if w.device != x.device:
        raise ValueError(f"{op}: weight must be on the device of x, {x.device}, got {w.device}")
    vector_fits(op, "bias", bias, w.shape[0], x.device)
    problem = ConvProblem.of(tensors, spec)
    sizes_fit(op, problem.conv, problem.read_size, problem.out_size)
    if tensors.residual is not None:
        residual_fits(op, tensors.residual, problem)
    if output_statistics and (tensors.residual is not None or spec.activation != "none"):
        raise ValueError(
            f"{op}: output_statistics requires a y without residual and activation, for a norm "
            "that follows it"
        )
    labels = ("x", "weight", "bias", "past")
    same_dtype(op, labels, (x, w, bias, tensors.past), cast, tensors.residual)
    return spec


def _kernel(op: str, w: Any, groups: Any) -> Triple:
    """
    Raises:
        TypeError, ValueError: a weight or groups that are none.
    """
    if not isinstance(w, Tensor):
        raise TypeError(f"{op}: weight must be a tensor, got {type(w).__name__}")
    if w.dim() != 5 or 0 in w.shape:
        raise ValueError(f"{op}: weight must be (out, in/groups, kt, kh, kw), got {tuple(w.shape)}")
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"{op}: groups must be an int, got {groups!r}")
    return time_height_width(w.shape)


def _channels_fit(op: str, x: Tensor, w: Tensor, groups: int) -> None:
    """
    Raises:
        ValueError: groups that do not divide the channels, or channels that the weight does not
            take; x is as it came.
    """
    if groups < 1 or w.shape[0] % groups:
        raise ValueError(
            f"{op}: groups must be at least 1 and divide the {w.shape[0]} output channels, "
            f"got {groups}"
        )
    if w.shape[1] * groups != x.shape[-4]:
        raise ValueError(
            f"{op}: {describe_channels(x)}; the weight takes {w.shape[1] * groups} "
            f"(groups {groups})"
        )


def _frames(op: str, tensors: ConvTensors) -> int:
    """
    Raises:
        TypeError, ValueError: a past that does not fit before x.
    """
    x, past = tensors.x, tensors.past
    if not isinstance(past, Tensor):
        raise TypeError(f"{op}: past must be a tensor or None, got {type(past).__name__}")
    if past.dim() != 5 or (*past.shape[:2], *past.shape[3:]) != (*x.shape[:2], *x.shape[3:]):
        n, c, _, h, w = x.shape
        raise ValueError(f"{op}: past must be ({n}, {c}, P, {h}, {w}), got {tuple(past.shape)}")
    if past.device != x.device:
        raise ValueError(f"{op}: past must be on the device of x, {x.device}, got {past.device}")
    return past.shape[2]


def _input_norm(
    op: str, norm: Any, x: Tensor, tensors: ConvTensors
) -> tuple[str, float, int, bool]:
    """Kind, eps, groups and per_frame of a norm of x."""
    kind, eps, groups, per_frame = "none", 1e-5, 1, False
    known = tensors.mean is not None
    if norm is None:
        if known:
            raise ValueError(f"{op}: input_statistics requires an input_norm, got None")
        return kind, eps, groups, per_frame
    channels = x.shape[1]
    labels: tuple[str, ...] = ("weight", "bias")
    if isinstance(norm, norms.Norm):
        kinds = ("group", "instance", "layer", "rms", "l2")
        kind = geometry.name(f"{op}: kind of the input_norm", norm.kind, kinds)
        groups = {"group": norm.groups, "instance": channels}.get(kind, 1)
        kind = "group" if kind == "instance" else kind
        eps, per_frame = float(norm.eps), bool(norm.per_frame) and kind == "group"
        if groups < 1 or channels % groups:
            raise ValueError(
                f"{op}: groups of the input_norm must be at least 1 and divide the {channels} "
                f"channels of x, got {groups}"
            )
    else:
        kind, eps = batch_norm(op, norm, "input_norm")
        labels = ("running_mean", "running_var", *labels)
        if norm.group:
            raise ValueError(f"{op}: input_norm takes no statistics over ranks, got {norm.group!r}")
    for label in labels:
        vector_fits(op, f"input_norm.{label}", getattr(norm, label), channels, x.device)
    if known and kind != "batch":
        raise ValueError(
            f"{op}: input_statistics requires an input_norm that is a BatchNorm in training"
        )
    for label, t in (("mean", tensors.mean), ("var", tensors.var)):
        vector_fits(op, f"input_statistics.{label}", t, channels, x.device)
    n, _, t_, h, w = x.shape
    values = n * t_ * h * w  # as PyTorch counts them
    if kind == "group":
        values *= channels // groups
        values //= 1 if norm.kind == "group" else n * (t_ if per_frame else 1)
    if kind in ("batch", "group") and values == 1:
        raise ValueError(
            f"{op}: a norm by statistics of x requires more than 1 value for each, got x of shape "
            f"{tuple(x.shape)}"
        )
    return kind, eps, groups, per_frame
