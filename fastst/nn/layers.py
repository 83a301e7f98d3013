"""Modules: parameters and modes, no maths.

``Conv2Plus1d`` and ``ParallelConv2Plus1d`` own real ``nn.Conv3d`` and norm modules, so everything
that walks modules (initialisers, optimisers, state_dict, pruning, SyncBatchNorm, FSDP) works. Their
forward hands the children's tensors to one op where it may, and calls the children one after the
other where somebody could tell the difference (hooks, parametrizations, foreign modules).
"""

from __future__ import annotations

from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import dispatch, functional
from ..functional import Causal, IntOrTriple, PaddingArg, PaddingMode
from ..machine import exactness
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


def check_width(what: str, norm: nn.Module, channels: int) -> None:
    """
    Raises:
        ValueError: a norm of another number of channels.
    """
    for label in ("num_features", "num_channels"):  # of batch and instance, of group norms
        width = getattr(norm, label, channels)
        if isinstance(width, int) and width not in (0, channels):  # a lazy norm has 0
            raise ValueError(
                f"{what} must have {label}={channels}, the channels that it reads, got "
                f"{label}={width}"
            )


class _FactorizedConv3d(nn.Module):
    """What both layers have: the arguments of an ``nn.Conv3d``, checked, and one for each pass."""

    _op: ClassVar[str]  # what errors and warnings call the layer

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTriple,
        stride: IntOrTriple,
        padding: PaddingArg,
        dilation: IntOrTriple,
        groups: int | tuple[int, int],
        padding_mode: PaddingMode,
        causal: Causal,
    ) -> None:
        super().__init__()
        op = self._op
        self.kernel_size: Triple = geometry.triple(f"{op}: kernel_size", kernel_size, 1)
        found = geometry.resolve(
            op, self.kernel_size, stride, padding, dilation, groups, padding_mode, causal
        )
        pads = [found.padding[i : i + 2] for i in (0, 2, 4)]
        if causal:
            pads[0] = (0, 0)
        if not isinstance(padding, str) and any(before != after for before, after in pads):
            raise ValueError(
                f"{op}: padding must be the same before and after an axis, as in nn.Conv3d, "
                f"got {padding!r}"
            )
        self.in_channels = self._count(in_channels=in_channels)
        self.out_channels = self._count(out_channels=out_channels)
        self.stride, self.dilation, self._geometry = found.stride, found.dilation, found
        self.padding: Any = padding if isinstance(padding, str) else tuple(p for p, _ in pads)
        self.groups, self.padding_mode, self.causal = groups, padding_mode, causal

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Conv3d`` and the norms do."""
        for child in self.children():
            reset = getattr(child, "reset_parameters", None)
            if reset is not None:
                reset()

    def _count(self, **channels: Any) -> int:
        """A number of channels, of any type of integers.

        Raises:
            TypeError, ValueError: none, or less than 1.
        """
        ((label, n),) = channels.items()
        if not isinstance(n, Integral) or isinstance(n, bool):
            raise TypeError(f"{self._op}: {label} must be an int, got {n!r}")
        if n < 1:
            raise ValueError(f"{self._op}: {label} must be at least 1, got {n}")
        return int(n)

    def _conv(
        self, kind: str, c: int, k: int, stride: Triple, bias: bool, device: Any, dtype: Any
    ) -> nn.Conv3d:
        """The spatial or the temporal ``nn.Conv3d``, from c to k channels."""

        def pick(values: Triple, other: int) -> Triple:
            t, h, w = values
            return (other, h, w) if kind == "spatial" else (t, other, other)

        i = ("spatial", "temporal").index(kind)
        groups: int = self._geometry.groups[i]
        mode: Any = self._geometry.padding_mode[i]
        if groups < 1 or c % groups or k % groups:
            raise ValueError(
                f"{self._op}: groups must be at least 1 and divide the channels of the {kind} "
                f"convolution, {c} to {k}, got {groups}"
            )
        padding: Any = self.padding if isinstance(self.padding, str) else pick(self.padding, 0)
        if self.causal and kind == "temporal":
            padding = 0
        return nn.Conv3d(
            c, k, pick(self.kernel_size, 1), stride, padding, pick(self.dilation, 1), groups, bias,
            mode, device, dtype,
        )  # fmt: skip

    def _norm(self, norm: NormArg, channels: int, device: Any, dtype: Any) -> nn.Module | None:
        """
        Args:
            norm: a class is called with the number of channels, as torchvision calls its norms.

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
                f"{self._op}: norm must be None, 'batch', a module or a class of modules, got "
                f"{norm!r}"
            )
        check_width(f"{self._op}: norm", norm, channels)
        return norm

    def _act(self, activation: ActivationArg) -> nn.Module:
        if isinstance(activation, type) and issubclass(activation, nn.Module):
            activation = activation()
        if isinstance(activation, nn.Module):
            return activation
        name = geometry.activation_name(f"{self._op}: activation", activation)
        return activations.to_module(name)


class Conv2Plus1d(_FactorizedConv3d):
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

    _op = "Conv2Plus1d"

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
        padding_mode: PaddingMode = "zeros",
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
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            padding_mode, causal,
        )  # fmt: skip
        geometry.name(f"{self._op}: order", order, ORDERS)
        if mid_channels is None:
            n = max(1, *self._geometry.groups)
            mid_channels = n * default_mid_channels(
                self.in_channels // n, self.out_channels // n, self.kernel_size
            )
        self.mid_channels = self._count(mid_channels=mid_channels)
        self.order, self.recompute = order, recompute

        ends = (self.in_channels, self.mid_channels), (self.mid_channels, self.out_channels)
        spatial, temporal = ends if order == "spatial-first" else ends[::-1]
        t, h, w = self.stride
        self.spatial = self._conv("spatial", *spatial, (1, h, w), bias, device, dtype)
        self.norm = self._norm(norm, self.mid_channels, device, dtype)
        self.activation = self._act(activation)
        self.temporal = self._conv("temporal", *temporal, (t, 1, 1), bias, device, dtype)

    def forward(
        self, x: Tensor, *, streams: bool = False, state: tuple[Tensor, ...] | None = None
    ) -> Any:
        """y of x; shapes as above. With ``streams`` what ``stream`` gives."""
        if streams:
            return self._advance(x, state)
        checks.layer_input(self._op, x, self.in_channels)
        spatial, norm, activation, temporal = read_members(
            self, "_modules", "spatial", "norm", "activation", "temporal"
        )
        first, second = as_spatial_temporal(spatial, temporal, self.order)
        try:
            return pair_forward(
                x, first, norm, activation, second,
                order=self.order, causal=self.causal, recompute=self.recompute, owner=self._op,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise checks.of_layer(self._op, error) from None

    def stream(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The outputs that a chunk of frames completes, and the state for the next chunk.

        Outputs concatenated along time equal the run over the whole clip, for any cutting of it,
        one frame at a time included. With a temporal stride a chunk may complete no output: y then
        has no frames. It is a call of the layer: its hooks run.

        Args:
            x: (N, C, t, H, W), the next t ≥ 1 frames.
            state: what the call for the previous chunk returned; None for the first.

        Raises:
            TypeError, ValueError: the layer is not causal, normalises with statistics of the batch
                or in a way that nobody knows, or a chunk or state does not fit.
        """
        y: tuple[Tensor, tuple[Tensor, ...]] = self(x, streams=True, state=state)
        return y

    def _advance(
        self, x: Tensor, state: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
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


class ParallelConv2Plus1d(_FactorizedConv3d):
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
        branch_norm: None, "batch" or a class of norms: one for each branch.
        branch_activation: name, module or None, of each branch.
        norm: None, "batch" or a module, after combining.
        activation: name, module or None, after combining.

    Raises:
        TypeError, ValueError: arguments that do not fit, at construction.
    """

    _op = "ParallelConv2Plus1d"

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
        padding_mode: PaddingMode = "zeros",
        *,
        combine: str = "add",
        split: int | None = None,
        branch_norm: str | type[nn.Module] | None = None,
        branch_activation: ActivationArg = None,
        norm: NormArg = None,
        activation: ActivationArg = None,
        causal: Causal = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            padding_mode, causal,
        )  # fmt: skip
        geometry.name(f"{self._op}: combine", combine, COMBINES)
        c, k = self.in_channels, self.out_channels
        if split is None and combine == "cat":
            split = -(-k // 2)
        if split is not None:
            split = self._count(split=split)
            if combine != "cat" or not split < k:
                raise ValueError(
                    f"{self._op}: split requires combine='cat' and 0 < split < out_channels ({k}), "
                    f"got {split!r} with combine={combine!r}"
                )
        self.combine = combine
        if isinstance(branch_norm, nn.Module):
            raise TypeError(
                f"{self._op}: branch_norm must be None, 'batch' or a class of modules, one for "
                f"each branch, got the module {branch_norm!r}"
            )

        spatial, temporal = (k, k) if split is None else (split, k - split)
        self.spatial = self._conv("spatial", c, spatial, self.stride, bias, device, dtype)
        self.temporal = self._conv("temporal", c, temporal, self.stride, bias, device, dtype)
        self.spatial_norm = self._norm(branch_norm, spatial, device, dtype)
        self.temporal_norm = self._norm(branch_norm, temporal, device, dtype)
        self.branch_activation = self._act(branch_activation)
        self.norm = self._norm(norm, k, device, dtype)
        self.activation = self._act(activation)

    def forward(self, x: Tensor) -> Tensor:
        """y of x; shapes as ``nn.Conv3d``."""
        checks.layer_input(self._op, x, self.in_channels)
        if x.dim() == 4:  # for norms and activations channels are the second axis
            y: Tensor = self.forward(x.unsqueeze(0)).squeeze(0)
            return y
        if self.causal:
            parts = self.spatial_norm, self.temporal_norm, self.branch_activation, self.norm
            owner = f"{self._op}: causal=True"
            streaming.check_frame_by_frame(owner, *parts, self.activation)
        why = self._why_composed()
        if why is not None:
            dispatch.fall_back(self._op, why)
            return self._compose(x)
        if exactness.is_required():  # folded norms have other bits
            dispatch.record_composed(self._op, exactness.WHY)
            return self._compose(x)
        branch = activations.from_module(self.branch_activation)
        after = activations.from_module(self.activation)
        assert branch is not None and after is not None
        # A norm in training mode, or behind an activation, stands outside of the op.
        folds = self.norm is None or (_folds(self.norm) and branch[0] == "none")
        weights = [_fold(self.spatial, self.spatial_norm), _fold(self.temporal, self.temporal_norm)]
        if self.norm is not None and folds:
            weights = self._fold_branches(weights)
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
            raise checks.of_layer(self._op, error) from None
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
        known = map(activations.from_module, acts.values())
        if len({found for found in known if found is not None and found[0] == "leaky_relu"}) > 1:
            return "its two leaky ReLUs have different slopes"
        return None

    def _fold_branches(self, weights: list[tuple[Tensor, Tensor | None]]) -> Any:
        scale, shift = _scale_shift(self.norm)
        if self.combine == "add":
            (ws, bs), (wt, bt) = weights
            return [_scale_conv(ws, bs, scale, shift), _scale_conv(wt, bt, scale, None)]
        n = weights[0][0].shape[0]
        scales, shifts = (scale[:n], scale[n:]), (shift[:n], shift[n:])
        affine = zip(weights, scales, shifts, strict=True)
        return [_scale_conv(w, b, s, h) for (w, b), s, h in affine]

    def _compose(self, x: Tensor) -> Tensor:
        a = self.spatial(x)
        b = self.temporal(pad_causally(x, self.temporal, self.causal))
        a = self.branch_activation(a if self.spatial_norm is None else self.spatial_norm(a))
        b = self.branch_activation(b if self.temporal_norm is None else self.temporal_norm(b))
        y = a + b if self.combine == "add" else torch.cat((a, b), 1)
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


def _scale_conv(
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
    return _scale_conv(conv.weight, conv.bias, *_scale_shift(norm))
