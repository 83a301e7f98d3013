"""k×k×k convolutions as pairs of a spatial and a temporal one, by singular value decomposition."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layers import Conv2Plus1d
from ..nn.pair_of_modules import why_more_than_class
from ..problem import geometry
from ..problem.spec import ORDERS
from .altered import why_altered


@dataclass(frozen=True)
class FactorizedLayer:
    """One convolution that became a pair."""

    name: str
    mid_channels: int
    full_rank: int  # with so many mid channels any weight of this shape is exact
    error: float  # of the weight, relative, in the Frobenius norm
    parameters: tuple[int, int]  # before, after
    flops: tuple[int, int]  # per output position, before and after

    def __str__(self) -> str:
        return (
            f"{self.name or 'convolution'}: {self.mid_channels} of {self.full_rank} mid channels, "
            f"error {self.error:.2e}, parameters {_ratio(self.parameters)}, "
            f"FLOPs {_ratio(self.flops)}"
        )


@dataclass(frozen=True)
class Factorization:
    """What ``factorize`` made. Printing it tells all.

    Attributes:
        module: the pair, or the copy of the model with pairs in it.
        layers: what was factorized.
        left: names of k×k×k convolutions that were not, with the reason.
    """

    module: nn.Module
    layers: list[FactorizedLayer]
    left: dict[str, str]

    @property
    def parameters(self) -> tuple[int, int]:
        """Of the factorized layers, before and after."""
        before, after = (sum(layer.parameters[i] for layer in self.layers) for i in range(2))
        return before, after

    def __str__(self) -> str:
        lines = [f"factorized: {len(self.layers)}", *(f"  {layer}" for layer in self.layers)]
        if self.layers:
            lines.append(f"  together: parameters {_ratio(self.parameters)}")
        if self.left:
            lines += [f"left: {len(self.left)}", *(f"  {n}: {why}" for n, why in self.left.items())]
        return "\n".join(lines)


def factorize(
    model: nn.Module,
    *,
    mid_channels: int | None = None,
    energy: float | None = None,
    order: str = "spatial-first",
) -> Factorization:
    """Replace k×k×k convolutions by the nearest pairs of a spatial and a temporal one.

    A weight (K, C/g, kt, kh, kw), seen as a (K·kt, C/g·kh·kw) matrix for each of the g groups, is
    cut down to its largest singular values; the two factors are the weights of a ``Conv2Plus1d``
    without norm and activation. No pair with as many mid channels has a smaller error (Eckart and
    Young). It is exact where the rank of the weight is no larger. Temporal-first sees the weight as
    a (K·kh·kw, C/g·kt) matrix. Pairs share weights where their convolutions do.

    Args:
        model: an ``nn.Conv3d``, or a model with some; left as it is.
        mid_channels: M of every pair, at most its full rank; a multiple of the groups.
        energy: instead, the fraction of the squared singular values to keep, 0 < energy ≤ 1: each
            layer takes the fewest mid channels that do.
        order: "spatial-first" or "temporal-first".

    Returns:
        The pair or a copy of the model, and for each layer its error and what it saves.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: not exactly one of ``mid_channels`` and ``energy``, or out of range; an
            ``nn.Conv3d`` that has nothing to factorize.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"factorize: model must be an nn.Module, got {type(model).__name__}")
    geometry.name("factorize: order", order, ORDERS)
    if (mid_channels is None) == (energy is None):
        raise ValueError(
            "factorize: exactly one of mid_channels and energy is required, got "
            f"mid_channels={mid_channels!r}, energy={energy!r}"
        )
    if energy is not None and not (isinstance(energy, (int, float)) and 0 < energy <= 1):
        raise ValueError(f"factorize: energy must be above 0 and at most 1, got {energy!r}")
    whole = isinstance(mid_channels, int) and not isinstance(mid_channels, bool)
    if mid_channels is not None and (not whole or mid_channels < 1):
        raise ValueError(f"factorize: mid_channels must be a positive int, got {mid_channels!r}")
    module = copy.deepcopy(model)
    layers, left = [], {}
    pairs: dict[int, Conv2Plus1d] = {}  # by convolution, so that shared ones stay shared
    made: dict[int, Conv2Plus1d] = {}  # by weight: the first pair of those that share it
    named = list(module.named_modules(remove_duplicate=False))
    for name, conv in named:
        if not _is_full(conv):
            continue
        if id(conv) not in pairs:
            why = _why_left(name, conv) or _why_tied(conv, named)
            if why is not None:
                left[name] = why
                continue
            pair, layer = _factorize(name, conv, mid_channels, energy, order)
            first = made.setdefault(id(conv.weight), pair)
            pair.spatial.weight, pair.temporal.weight = first.spatial.weight, first.temporal.weight
            pairs[id(conv)] = pair
            layers.append(layer)
        if not name:
            module = pairs[id(conv)]
        else:
            above, _, last = name.rpartition(".")
            setattr(module.get_submodule(above), last, pairs[id(conv)])
    if isinstance(model, nn.Conv3d) and not layers:
        why = left.get("", f"its kernel {model.kernel_size} is not both spatial and temporal")
        raise ValueError(f"factorize: the convolution cannot be factorized: {why}")
    return Factorization(module, layers, left)


def _is_full(module: Any) -> bool:
    if not isinstance(module, nn.Conv3d):
        return False
    kt, *space = module.kernel_size
    return kt > 1 and max(space) > 1


def _why_left(name: str, conv: Any) -> str | None:
    altered = why_altered({name: conv}.__getitem__, [name])
    if altered is not None:
        return altered
    if type(conv) is not nn.Conv3d:
        return f"it is a {type(conv).__module__}.{type(conv).__name__}, not a plain nn.Conv3d"
    why = why_more_than_class(conv)
    if why is not None:
        return f"it {why}"
    return None if conv.weight.isfinite().all() else "its weight is not finite"


def _why_tied(conv: nn.Conv3d, named: Sequence[tuple[str, nn.Module]]) -> str | None:
    """Why the weight of a convolution must stay, or None: somebody else reads it who stays."""
    for name, other in named:
        if not any(p is conv.weight for p in other.parameters(recurse=False)):
            continue
        alike = _is_full(other) and other.weight is conv.weight and other.groups == conv.groups
        if not alike or _why_left(name, other) is not None:
            return f"its weight is also that of {name or 'the model'}, which stays as it is"
    return None


def _factorize(
    name: str, conv: Any, mid_channels: int | None, energy: float | None, order: str
) -> tuple[Conv2Plus1d, FactorizedLayer]:
    w = conv.weight.detach().double()  # (K, C/g, kt, kh, kw)
    g = conv.groups
    k, c, kt, kh, kw = w.shape
    spatial_first = order == "spatial-first"
    # Groups, outputs, and the axes of the second pass; inputs, and those of the first.
    w = w.view(g, k // g, c, kt, kh * kw)
    if spatial_first:
        matrix = w.permute(0, 1, 3, 2, 4).reshape(g, k // g * kt, c * kh * kw)
    else:
        matrix = w.permute(0, 1, 4, 2, 3).reshape(g, k // g * kh * kw, c * kt)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    full = g * s.shape[-1]
    if mid_channels is None:
        assert energy is not None
        m = g * _least_rank(s, energy)
    else:
        m = min(mid_channels, full)
    if m % g:
        raise ValueError(
            f"factorize: mid_channels must be a multiple of the {g} groups of "
            f"{name or 'the convolution'}, got {mid_channels}"
        )
    each = m // g
    root = s[:, :each].sqrt()
    second = u[..., :each] * root[:, None]  # (g, K/g·axes, M/g)
    first = root[..., None] * v[:, :each]  # (g, M/g, C/g·axes)
    kept = float(s[:, :each].square().sum())
    total = float(s.square().sum())
    if spatial_first:
        spatial = first.reshape(m, c, 1, kh, kw)
        temporal = second.view(g, k // g, kt, each).permute(0, 1, 3, 2).reshape(k, each, kt, 1, 1)
    else:
        temporal = first.reshape(m, c, kt, 1, 1)
        spatial = second.view(g, k // g, kh * kw, each).permute(0, 1, 3, 2)
        spatial = spatial.reshape(k, each, 1, kh, kw)
    layer = _layer(conv, spatial, temporal, m, order)
    bias = 0 if conv.bias is None else k
    after = spatial.numel() + temporal.numel()
    # The first pass also computes the frames, or pixels, that a stride of the second one skips.
    skipped = conv.stride[0] if spatial_first else math.prod(conv.stride[1:])
    flops = 2 * (first.numel() * skipped + second.numel())
    error = math.sqrt(max(0.0, total - kept) / total) if total else 0.0
    return layer, FactorizedLayer(
        name, m, full, error, (w.numel() + bias, after + bias), (2 * w.numel(), flops)
    )


def _least_rank(s: Tensor, energy: float) -> int:
    """The fewest singular values of each group that keep the energy of all groups together."""
    squares = s.square().sum(0)
    # What is left out is summed from the smallest on: exact where it is zero.
    lost = squares.flip(0).cumsum(0).flip(0)
    floor = torch.finfo(torch.float64).eps * len(squares)
    allowed = max(1 - energy, floor) * float(lost[0])
    return max(1, int((lost > allowed).sum()))


def _layer(conv: Any, spatial: Tensor, temporal: Tensor, m: int, order: str) -> Conv2Plus1d:
    layer = Conv2Plus1d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        conv.dilation, conv.groups, False, conv.padding_mode, mid_channels=m, activation=None,
        order=order, device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    last = layer.temporal if order == "spatial-first" else layer.spatial
    with torch.no_grad():
        layer.spatial.weight.copy_(spatial)
        layer.temporal.weight.copy_(temporal)
    for p in layer.parameters():
        p.requires_grad_(conv.weight.requires_grad)
    last.bias = conv.bias
    return layer.train(conv.training)


def _ratio(numbers: tuple[int, int]) -> str:
    before, after = numbers
    return f"{before:,} → {after:,} ({after / before:.2f}×)"
