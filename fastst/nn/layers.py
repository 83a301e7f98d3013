"""Modules: parameters and modes, no maths.

``Conv2Plus1d`` and ``ParallelConv2Plus1d`` own real ``nn.Conv3d`` and norm modules, so everything
that walks modules (initialisers, optimisers, state_dict, pruning, SyncBatchNorm, FSDP) works. Their
forward hands the children's tensors to one op where it may, and calls the children one after the
other where somebody could tell the difference (hooks, parametrizations, foreign modules).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch, functional
from ..functional import Causal, IntOrTriple, PaddingArg, Pair
from ..problem import activations, checks, geometry
from ..problem.spec import COMBINES, ORDERS, Triple, default_mid_channels
from . import streaming
from .pair_of_modules import (
    as_spatial_temporal,
    batch_norm_arguments,
    pad_causally,
    pair_forward,
    read_members,
    sides,
    why_composed,
    why_foreign,
)

# A class is called: a norm with its number of channels, an activation without arguments.
NormArg = str | nn.Module | type[nn.Module] | None
ActivationArg = str | nn.Module | type[nn.Module] | None


class Conv2Plus1d(nn.Module):
    r"""(2+1)D convolution: spatial conv, norm, activation and temporal conv as one operation.

    Takes the place of ``nn.Conv3d``: the positional signature is the same. Equals::

        nn.Sequential(spatial, norm, activation, temporal)

    with ``spatial`` a (1, kh, kw) and ``temporal`` a (kt, 1, 1) ``nn.Conv3d``, which are its
    children, as are ``norm`` and ``activation``. arXiv 1711.11248.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size: int or (kt, kh, kw).
        stride: int or (st, sh, sw).
        padding: int, (pt, ph, pw), "same" or "valid".
        dilation: int or (dt, dh, dw).
        groups: of both convolutions, or (spatial, temporal).
        bias: whether both convolutions have one.
        padding_mode: "zeros", "replicate", "reflect", "circular"; or (spatial, temporal).
        mid_channels: M; None for the number that matches the parameters of one kt×kh×kw conv.
        norm: None, "batch" (``nn.BatchNorm3d``), or a module.
        activation: "relu", "silu", "gelu" or another name that ``fastst.functional`` knows, a
            module, or None.
        order: "spatial-first" or "temporal-first".
        causal: see ``functional.conv2plus1d``; enables ``stream``. Norms that look across frames,
            as ``nn.GroupNorm`` does, are refused when it runs. A module of yours that sees each
            frame by itself has an attribute ``frame_by_frame = True``; ``stream`` requires it.
        recompute: keep only the input for backward; None for what ``fastst.set_memory_budget`` has
            chosen or, if it has not, the environment variable ``FASTST_RECOMPUTE`` says, 1 or 0;
            where nobody says, only layers without a norm do.
        device, dtype: of the parameters.

    Shape:
        (N, C, T, H, W) or (C, T, H, W) to (N, K, T', H', W') or (K, T', H', W'), as ``nn.Conv3d``.

    Raises:
        TypeError, ValueError: arguments that do not fit, at construction.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTriple,
        stride: IntOrTriple = 1,
        padding: PaddingArg = 0,
        dilation: IntOrTriple = 1,
        groups: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: Pair = "zeros",
        *,
        mid_channels: int | None = None,
        norm: NormArg = None,
        activation: ActivationArg = "relu",
        order: str = "spatial-first",
        causal: Causal = False,
        recompute: bool | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "Conv2Plus1d"
        g = _Geometry(op, kernel_size, stride, padding, dilation, groups, padding_mode, causal)
        geometry.name(f"{op}: order", order, ORDERS)
        in_channels, out_channels = _channels(
            op, in_channels=in_channels, out_channels=out_channels
        )
        if mid_channels is None:
            n = max(g.groups)
            mid_channels = n * default_mid_channels(in_channels // n, out_channels // n, g.kernel)
        (mid_channels,) = _channels(op, mid_channels=mid_channels)
        ends = (in_channels, mid_channels), (mid_channels, out_channels)
        spatial, temporal = ends if order == "spatial-first" else ends[::-1]
        _divides(op, g.groups, spatial, temporal)

        self.in_channels, self.out_channels = in_channels, out_channels
        self.mid_channels = mid_channels
        self.kernel_size, self.stride, self.dilation = g.kernel, g.stride, g.dilation
        self.padding = padding if isinstance(padding, str) else g.sides
        self.groups, self.padding_mode = groups, padding_mode
        self.order, self.causal, self.recompute = order, causal, recompute

        self.spatial = g.spatial(*spatial, g.inner_stride("spatial"), bias, device, dtype)
        self.norm = _norm_module(op, norm, mid_channels, device, dtype)
        self.activation = _activation_module(op, activation)
        self.temporal = g.temporal(*temporal, g.inner_stride("temporal"), bias, device, dtype)

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Conv3d`` and the norm do."""
        for child in self.children():
            reset = getattr(child, "reset_parameters", None)
            if reset is not None:
                reset()

    def forward(self, x: Tensor) -> Tensor:
        """y of x; shapes as above."""
        return self._run(x, None)

    def forward_normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """norm(y) of x, for a norm that somebody else holds: ``fastst.convert`` calls this.

        The norm is a module that takes y. Statistics of y that a batch norm in training needs come
        with y where the backend can.
        """
        return self._run(x, norm)

    def _run(self, x: Tensor, outer_norm: nn.Module | None) -> Tensor:
        checks.layer_input("Conv2Plus1d", x, self.in_channels)
        spatial, norm, activation, temporal = read_members(
            self, "_modules", "spatial", "norm", "activation", "temporal"
        )
        first, second = as_spatial_temporal(spatial, temporal, self.order)
        try:
            return pair_forward(
                x, first, norm, activation, second,
                order=self.order, causal=self.causal, recompute=self.recompute, owner="Conv2Plus1d",
                outer_norm=outer_norm,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise checks.of_layer("Conv2Plus1d", error) from None

    def stream(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The outputs that a chunk of frames completes, and the state for the next chunk.

        Outputs concatenated along time equal the run over the whole clip, for any cutting of it,
        one frame at a time included. With a temporal stride a chunk may complete no output: y then
        has no frames.

        Args:
            x: (N, C, t, H, W), the next t ≥ 1 frames.
            state: what the call for the previous chunk returned; None for the first.

        Raises:
            TypeError, ValueError: the layer is not causal, normalises with statistics of the batch
                or in a way that nobody knows, or a chunk or state does not fit.
        """
        spatial, temporal, norm, activation = read_members(
            self, "_modules", "spatial", "temporal", "norm", "activation"
        )
        first, second = as_spatial_temporal(spatial, temporal, self.order)
        through = None
        if why_composed(first, norm, activation, second, self.order) is None:
            named = activations.from_module(activation)
            assert named is not None
            through = streaming.Through(batch_norm_arguments(norm), *named)
        return streaming.stream(self, x, state, through)

    def extra_repr(self) -> str:
        parts = [f"order={self.order!r}"]
        if self.causal:
            parts.append(f"causal={self.causal!r}")
        if self.recompute is not None:
            parts.append(f"recompute={self.recompute}")
        return ", ".join(parts)


class ParallelConv2Plus1d(nn.Module):
    """Spatial and temporal convolution of the same input, added or concatenated.

    The 4D convolution of arXiv 2407.16514. Equals::

        a = branch_activation(spatial_norm(spatial(x)))
        b = branch_activation(temporal_norm(temporal(x)))
        y = activation(norm(a + b))  or  activation(norm(cat((a, b), 1)))

    with ``spatial`` a (1, kh, kw) and ``temporal`` a (kt, 1, 1) ``nn.Conv3d``, each with the whole
    stride. Batch norms fold into the convolutions in eval mode.

    All arguments that are not listed mean what they mean in ``Conv2Plus1d``.

    Args:
        combine: "add" or "cat".
        split: with "cat", the output channels of the spatial branch; default half, rounded up.
        branch_norm: None or "batch": one for each branch.
        branch_activation: name, module or None, of each branch.
        norm: None, "batch" or a module, after combining.
        activation: name, module or None, after combining.

    Raises:
        TypeError, ValueError: arguments that do not fit, at construction.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTriple,
        stride: IntOrTriple = 1,
        padding: PaddingArg = 0,
        dilation: IntOrTriple = 1,
        groups: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: Pair = "zeros",
        *,
        combine: str = "add",
        split: int | None = None,
        branch_norm: str | None = None,
        branch_activation: ActivationArg = None,
        norm: NormArg = None,
        activation: ActivationArg = None,
        causal: Causal = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "ParallelConv2Plus1d"
        g = _Geometry(op, kernel_size, stride, padding, dilation, groups, padding_mode, causal)
        geometry.name(f"{op}: combine", combine, COMBINES)
        in_channels, out_channels = _channels(
            op, in_channels=in_channels, out_channels=out_channels
        )
        if split is not None and (combine != "cat" or not 0 < split < out_channels):
            raise ValueError(
                f"{op}: split requires combine='cat' and 0 < split < out_channels "
                f"({out_channels}), got {split!r} with combine={combine!r}"
            )
        if combine == "cat":
            n_spatial = -(-out_channels // 2) if split is None else split
            outs = (n_spatial, out_channels - n_spatial)
        else:
            outs = (out_channels, out_channels)
        _divides(op, g.groups, (in_channels, outs[0]), (in_channels, outs[1]))

        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = g.kernel, g.stride, g.dilation
        self.padding = padding if isinstance(padding, str) else g.sides
        self.groups, self.padding_mode = groups, padding_mode
        self.combine, self.causal = combine, causal

        self.spatial = g.spatial(in_channels, outs[0], g.stride, bias, device, dtype)
        self.temporal = g.temporal(in_channels, outs[1], g.stride, bias, device, dtype)
        self.spatial_norm = _norm_module(op, branch_norm, outs[0], device, dtype)
        self.temporal_norm = _norm_module(op, branch_norm, outs[1], device, dtype)
        self.branch_activation = _activation_module(op, branch_activation)
        self.norm = _norm_module(op, norm, out_channels, device, dtype)
        self.activation = _activation_module(op, activation)

    def forward(self, x: Tensor) -> Tensor:
        """y of x; shapes as ``nn.Conv3d``."""
        checks.layer_input("ParallelConv2Plus1d", x, self.in_channels)
        if self.causal:
            parts = self.spatial_norm, self.temporal_norm, self.branch_activation, self.norm
            owner = "ParallelConv2Plus1d: causal=True"
            streaming.check_frame_by_frame(owner, *parts, self.activation)
        why = self._why_composed()
        if why is not None:
            dispatch.fall_back("ParallelConv2Plus1d", why)
            return self._compose(x)
        branch = activations.from_module(self.branch_activation)
        after = activations.from_module(self.activation)
        assert branch is not None and after is not None
        # A norm in training mode, or behind an activation, stands outside of the op.
        folds = self.norm is None or (_folds(self.norm) and branch[0] == "none")
        weights = [_fold(self.spatial, self.spatial_norm), _fold(self.temporal, self.temporal_norm)]
        if self.norm is not None and folds:
            weights = self._fold_after(weights)
        (ws, bs), (wt, bt) = weights
        try:
            y = functional.parallel_conv2plus1d(
                x, ws, wt, bs, bt, stride=self.stride, padding=sides(self.spatial, self.temporal),
                dilation=self.dilation, groups=(self.spatial.groups, self.temporal.groups),
                padding_mode=(self.spatial.padding_mode, self.temporal.padding_mode),
                branch_activation=branch[0], activation=after[0] if folds else None,
                negative_slope=next((s for n, s in (branch, after) if n == "leaky_relu"), 0.01),
                combine=self.combine, causal=self.causal,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise checks.of_layer("ParallelConv2Plus1d", error) from None
        return y if folds or self.norm is None else self.activation(self.norm(y))

    def _why_composed(self) -> str | None:
        convs = {"spatial convolution": self.spatial, "temporal convolution": self.temporal}
        acts = {"branch activation": self.branch_activation, "activation": self.activation}
        why = why_foreign(convs, {}, acts)
        if why is not None:
            return why
        for label, norm in (("spatial", self.spatial_norm), ("temporal", self.temporal_norm)):
            if norm is not None and not _folds(norm):
                return f"the norm of its {label} branch is not a plain batch norm in eval mode"
        slopes = {s for n, s in map(activations.from_module, acts.values()) if n == "leaky_relu"}  # type: ignore[misc]
        if len(slopes) > 1:
            return "its two leaky ReLUs have different slopes"
        return None

    def _fold_after(self, weights: list[tuple[Tensor, Tensor | None]]) -> Any:
        scale, shift = _scale_shift(self.norm)
        if self.combine == "add":
            (ws, bs), (wt, bt) = weights
            return [_scaled(ws, bs, scale, shift), _scaled(wt, bt, scale, None)]
        n = weights[0][0].shape[0]
        scales, shifts = (scale[:n], scale[n:]), (shift[:n], shift[n:])
        return [_scaled(w, b, s, h) for (w, b), s, h in zip(weights, scales, shifts, strict=True)]

    def _compose(self, x: Tensor) -> Tensor:
        a = self.spatial(x)
        b = self.temporal(pad_causally(x, self.temporal, self.causal))
        a = self.branch_activation(a if self.spatial_norm is None else self.spatial_norm(a))
        b = self.branch_activation(b if self.temporal_norm is None else self.temporal_norm(b))
        y = a + b if self.combine == "add" else torch.cat((a, b), -4)
        return self.activation(y if self.norm is None else self.norm(y))

    def extra_repr(self) -> str:
        return f"combine={self.combine!r}" + (f", causal={self.causal!r}" if self.causal else "")


def _folds(norm: Any) -> bool:
    """Whether a norm is a fixed affine map per channel that nobody watches."""
    plain = why_foreign({}, {"norm": norm}, {}) is None
    return plain and not norm.training and norm.running_mean is not None


def _scale_shift(norm: Any) -> tuple[Tensor, Tensor]:
    scale = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _scaled(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of scale·conv(x) + shift, in the dtype of the weight."""
    folded = (weight * scale.view(-1, 1, 1, 1, 1)).to(weight.dtype)
    b = None if bias is None else bias * scale
    if shift is not None:
        b = shift if b is None else b + shift
    return folded, None if b is None else b.to(weight.dtype)


def _fold(conv: nn.Conv3d, norm: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    if norm is None:
        return conv.weight, conv.bias
    return _scaled(conv.weight, conv.bias, *_scale_shift(norm))


# ---- construction


class _Geometry:
    """Validated geometry of a layer, and the ``nn.Conv3d`` children that it asks for."""

    def __init__(
        self,
        op: str,
        kernel_size: IntOrTriple,
        stride: IntOrTriple,
        padding: PaddingArg,
        dilation: IntOrTriple,
        groups: Any,
        padding_mode: Pair,
        causal: Causal,
    ) -> None:
        self.kernel: Triple = geometry.triple(f"{op}: kernel_size", kernel_size, 1)
        self.modes: Any
        self.stride, resolved, self.dilation, self.groups, self.modes = geometry.resolve(
            op, self.kernel, stride, padding, dilation, groups, padding_mode, causal
        )
        if not isinstance(padding, str):
            uneven = [
                i for i in range(1 if causal else 0, 3) if resolved[2 * i] != resolved[2 * i + 1]
            ]
            if uneven:
                raise ValueError(
                    f"{op}: padding must be the same before and after an axis, as in nn.Conv3d, "
                    f"got {padding!r}"
                )
        self.sides: Triple = (0 if causal else resolved[0], resolved[2], resolved[4])
        self.name = padding if isinstance(padding, str) else None
        self.causal = causal

    def inner_stride(self, kind: str) -> Triple:
        """Stride of a pass of the sequential pair: its own dimensions only."""
        return (1, *self.stride[1:]) if kind == "spatial" else (self.stride[0], 1, 1)

    def spatial(
        self, c: int, k: int, stride: Triple, bias: bool, device: Any, dtype: Any
    ) -> nn.Conv3d:
        padding: Any = self.name or (0, *self.sides[1:])
        return nn.Conv3d(
            c, k, (1, *self.kernel[1:]), stride, padding, (1, *self.dilation[1:]),
            self.groups[0], bias, self.modes[0], device, dtype,
        )  # fmt: skip

    def temporal(
        self, c: int, k: int, stride: Triple, bias: bool, device: Any, dtype: Any
    ) -> nn.Conv3d:
        padding: Any = (self.sides[0], 0, 0)
        if self.name is not None:
            padding = 0 if self.causal else self.name
        return nn.Conv3d(
            c, k, (self.kernel[0], 1, 1), stride, padding, (self.dilation[0], 1, 1),
            self.groups[1], bias, self.modes[1], device, dtype,
        )  # fmt: skip


def _channels(op: str, **counts: Any) -> list[int]:
    """Numbers of channels, of any type of integers."""
    for label, n in counts.items():
        if not isinstance(n, Integral) or isinstance(n, bool):
            raise TypeError(f"{op}: {label} must be an int, got {n!r}")
        if n < 1:
            raise ValueError(f"{op}: {label} must be at least 1, got {n}")
    return [int(n) for n in counts.values()]


def _divides(op: str, groups: Sequence[int], *passes: tuple[int, int]) -> None:
    for g, (c, k), kind in zip(groups, passes, ("spatial", "temporal"), strict=True):
        if g < 1 or c % g or k % g:
            raise ValueError(
                f"{op}: groups must be at least 1 and divide the channels of the {kind} "
                f"convolution, {c} to {k}, got {g}"
            )


def _norm_module(
    op: str, norm: NormArg, channels: int, device: Any, dtype: Any
) -> nn.Module | None:
    """
    Args:
        norm: a class is called with the number of channels, as torchvision calls its norm layers.

    Raises:
        TypeError, ValueError: no norm, or one of another number of channels.
    """
    if norm == "batch":
        return nn.BatchNorm3d(channels, device=device, dtype=dtype)
    if isinstance(norm, type):
        norm = norm(channels)
        if isinstance(norm, nn.Module):
            norm = norm.to(device, dtype)
    if norm is None:
        return None
    if not isinstance(norm, nn.Module):
        kind = ValueError if isinstance(norm, str) else TypeError
        raise kind(
            f"{op}: norm must be None, 'batch', a module or a class of modules, got {norm!r}"
        )
    for label in ("num_features", "num_channels"):  # of batch and instance norms, of group norms
        width = getattr(norm, label, channels)
        if isinstance(width, int) and width not in (0, channels):  # a lazy norm has 0
            raise ValueError(
                f"{op}: norm must have {label}={channels}, the channels that it reads, got "
                f"{label}={width}"
            )
    return norm


def _activation_module(op: str, activation: ActivationArg) -> nn.Module:
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        activation = activation()
    if isinstance(activation, nn.Module):
        return activation
    return activations.to_module(geometry.activation_name(f"{op}: activation", activation))
