"""Modules that as a whole are a pair, whatever they are written with: recognised by what they do.

Tracing sees no pair of a ``Conv2d`` and a ``Conv1d`` among reshapes, and nothing in a forward that
branches on ranks and sizes. Such a module is small, so it can be asked: a copy of it in float64 is
run on clips of several sizes, in evaluation and in training, and compared with what its weights
would compute as a pair. Only what agrees to rounding everywhere, running statistics included, is
taken for one.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import dispatch
from ...nn.pair_of_modules import batch_norm_arguments, counts_batches, run_pair
from ...problem import activations
from .match import separable
from .padding import Sides
from .trace import SWITCHES, context, switched

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What a forward may do with a function: modules are found as modules.
_FUNCTIONS = ("none", "relu", "silu")
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Whole:
    """How a module computes: a pair, then maybe a norm and an activation; paths from the module."""

    spatial: str
    temporal: str
    order: str
    norm: str | None
    activation: tuple[str, float]
    padding: Sides
    temporal_mode: str
    tail_norm: str | None
    tail_activation: tuple[str, float]

    @property
    def ends_in_pair(self) -> bool:
        return self.tail_norm is None and self.tail_activation[0] == "none"

    @property
    def paths(self) -> tuple[str, ...]:
        """Of all modules that the op replaces the calls of."""
        found = (self.spatial, self.temporal, self.norm, self.tail_norm)
        return tuple(p for p in found if p is not None)


def could_be_whole(module: nn.Module) -> bool:
    """Whether a module has the parts of a pair and nothing else."""
    parts = _parts(module)
    return parts is not None and next(_candidates(module, parts), None) is not None


def recognise(module: nn.Module) -> Whole | str:
    """How a module that could be a pair computes, or why it is none."""
    parts = _parts(module)
    assert parts is not None
    try:
        copied = copy.deepcopy(module).double().cpu().eval()
    except Exception as error:  # whatever user code, or a tensor that cannot be copied, raises
        return f"copying it raised {type(error).__name__}: {str(error)[:100]}"
    with dispatch.use_backend("reference"), torch.no_grad():
        return _recognise(copied, parts)


def _recognise(copied: nn.Module, parts: _Parts) -> Whole | str:
    channels = _channels(copied, parts)
    generator = torch.Generator().manual_seed(0)
    for buffer in copied.buffers():
        if buffer.is_floating_point():  # nothing may hide behind zeros and ones
            buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype) + 0.5)
    for p in copied.parameters():
        p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.1)
    x = _clip(generator, channels, 2, 7, 9, 8)
    state = _state(copied)
    try:
        if _switches(copied, parts, x):
            return SWITCHES
        y = copied(x.clone())
    except Exception as error:  # whatever user code raises
        return f"running it on a clip raised {type(error).__name__}: {str(error)[:100]}"
    if _state(copied) != state:
        return "it keeps state between calls"
    for candidate in _candidates(copied, parts):
        if _agrees(copied, candidate, x, y) and _holds(copied, candidate, generator, channels):
            return candidate
    return "its output is not that of its two convolutions as a pair"


def run_whole(
    x: Tensor,
    spatial: Any,
    temporal: Any,
    norm: Any,
    tail_norm: Any,
    *,
    order: str,
    activation: tuple[str, float],
    padding: Sides,
    temporal_mode: str,
    tail_activation: tuple[str, float],
    outer_norm: Any = None,
) -> Tensor:
    """What a recognised module computes, and a norm after it; (N, C, T, H, W) in and out."""
    y = run_pair(
        x, _weight(spatial, "spatial"), _weight(temporal, "temporal"), spatial.bias, temporal.bias,
        norm, outer_norm=outer_norm,
        stride=(_setting(temporal, "stride", 0), *_space(spatial, "stride")), padding=padding,
        dilation=(_setting(temporal, "dilation", 0), *_space(spatial, "dilation")),
        groups=(spatial.groups, temporal.groups),
        padding_mode=(spatial.padding_mode, temporal_mode),
        activation=activation[0], negative_slope=activation[1], order=order,
    )  # fmt: skip
    if tail_norm is not None:  # of whatever rank: over all positions of a channel
        n = batch_norm_arguments(tail_norm)
        assert n is not None
        y = torch.nn.functional.batch_norm(y, *n[:-1])  # all but the group of processes
        if counts_batches(tail_norm):
            tail_norm.num_batches_tracked.add_(1)
    return activations.apply(tail_activation[0], y, tail_activation[1])


# ---- parts and hypotheses


@dataclass(frozen=True)
class _Parts:
    convs: tuple[str, str]
    norms: tuple[str, ...]
    activations: tuple[tuple[str, float], ...]


def _parts(module: nn.Module) -> _Parts | None:
    """Two convolutions, at most two batch norms, known activations, and nothing else."""
    convs, norms, acts = [], [], []
    for path, m in module.named_modules():
        known = activations.from_module(m)
        if type(m) is nn.Conv3d and separable(m) is None:
            return None
        if type(m) in _CONVS:
            convs.append(path)
        elif type(m) in _NORMS:
            norms.append(path)
        elif known is not None and type(m) is not nn.Identity:
            acts.append(known)
        elif (
            (
                type(m).__module__.startswith("torch.nn")
                and not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity))
            )
            or any(True for _ in m.parameters(recurse=False))
            or m._buffers
        ):
            return None
    if len(convs) != 2 or len(norms) > 2:
        return None
    return _Parts((convs[0], convs[1]), tuple(norms), tuple(dict.fromkeys(acts)))


def _is_temporal(conv: Any) -> bool:
    kernel = conv.kernel_size
    return len(kernel) == 1 or (kernel[0] > 1 and all(k == 1 for k in kernel[1:]))


def _channels(module: nn.Module, parts: _Parts) -> int:
    a, b = (module.get_submodule(p) for p in parts.convs)
    return a.in_channels if a.out_channels == b.in_channels else b.in_channels  # type: ignore[return-value]


def _candidates(module: nn.Module, parts: _Parts) -> Iterator[Whole]:
    """Every way in which the parts might be put together."""
    get = module.get_submodule
    acts = dict.fromkeys([*parts.activations, *((name, 0.01) for name in _FUNCTIONS)])
    norms = [None, *parts.norms]
    for first, second in (parts.convs, parts.convs[::-1]):
        a, b = get(first), get(second)
        if a.out_channels != b.in_channels or _is_temporal(a) == _is_temporal(b):
            continue
        spatial, temporal = (second, first) if _is_temporal(a) else (first, second)
        order = "temporal-first" if _is_temporal(a) else "spatial-first"
        mids = [n for n in norms if n is None or get(n).num_features == a.out_channels]
        tails = [n for n in norms if n is None or get(n).num_features == b.out_channels]
        for mid, tail in itertools.product(mids, tails):
            if {mid, tail} - {None} != set(parts.norms) or (mid is not None and mid == tail):
                continue
            for act, last in itertools.product(acts, acts):
                for sides, mode in _paddings(get(spatial), get(temporal)):
                    yield Whole(spatial, temporal, order, mid, act, sides, mode, tail, last)


def _paddings(spatial: Any, temporal: Any) -> Iterator[tuple[Sides, str]]:
    """The modules' own padding, and where they have none that of a forward: "same" or causal."""
    own = [(n, n) for n in _space(spatial, "padding")]
    spaces = [tuple(own)]
    if not any(map(any, own)):
        spaces.append((_same(spatial, -2), _same(spatial, -1)))
    n = _setting(temporal, "padding", 0)
    times = [((n, n), temporal.padding_mode)]
    if n == 0:
        extent = sum(_same(temporal, 0))
        lefts = {extent, extent + 1 - _setting(temporal, "stride", 0)} - {0}
        padded = [_same(temporal, 0), *((left, 0) for left in sorted(lefts) if left > 0)]
        times += itertools.product(padded, ("zeros", "replicate"))
    for space, (time, mode) in itertools.product(dict.fromkeys(spaces), times):
        yield (time, *space), mode


def _same(conv: Any, axis: int) -> tuple[int, int]:
    """Padding with which stride 1 keeps the size, as TensorFlow's "same" has it."""
    extent = _setting(conv, "dilation", axis) * (_setting(conv, "kernel_size", axis) - 1)
    return extent // 2, extent - extent // 2


def _setting(conv: Any, name: str, axis: int) -> int:
    values = getattr(conv, name)
    return 0 if isinstance(values, str) else int(values[axis])


def _space(conv: Any, name: str) -> tuple[int, int]:
    return _setting(conv, name, -2), _setting(conv, name, -1)


def _weight(conv: Any, kind: str) -> Tensor:
    """A weight of any rank as that of a (1, kh, kw) or (kt, 1, 1) convolution; a view."""
    w: Tensor = conv.weight
    if kind == "spatial":
        return w if w.dim() == 5 else w.unsqueeze(2)
    return w if w.dim() == 5 else w.view(*w.shape[:3], 1, 1)


# ---- comparison


def _clip(generator: torch.Generator, channels: int, *size: int) -> Tensor:
    n, *thw = size
    return torch.randn(n, channels, *thw, generator=generator, dtype=torch.float64)


def _compute(module: nn.Module, w: Whole, x: Tensor) -> Tensor:
    def get(path: str | None) -> Any:
        return None if path is None else module.get_submodule(path)

    return run_whole(
        x, get(w.spatial), get(w.temporal), get(w.norm), get(w.tail_norm), order=w.order,
        activation=w.activation, padding=w.padding, temporal_mode=w.temporal_mode,
        tail_activation=w.tail_activation,
    )  # fmt: skip


def _agrees(module: nn.Module, whole: Whole, x: Tensor, y: Any) -> bool:
    try:
        ours = _compute(module, whole, x)
    except (ValueError, RuntimeError):
        return False
    return isinstance(y, Tensor) and _close(ours, y)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
    return bool((a - b).abs().max() <= _TOLERANCE * scale) if b.numel() else True


def _holds(module: nn.Module, whole: Whole, generator: torch.Generator, channels: int) -> bool:
    """Whether a candidate agrees on clips of other sizes, and in training with all buffers."""
    kernels = [module.get_submodule(p).kernel_size for p in (whole.spatial, whole.temporal)]
    least = math.prod(max(k) for k in kernels)  # type: ignore[arg-type]
    for training, size in itertools.product(
        (False, True), ((1, 5, 11, 9), (3, 8, 9, 13), (2, 1, 9, 9), (1, 6, least + 9, 8))
    ):
        x = _clip(generator, channels, *size)
        theirs, ours = (copy.deepcopy(module).train(training) for _ in range(2))
        try:
            y = theirs(x.clone())
        except Exception:  # a size that it does not take, which nothing can be told from
            continue
        if not _agrees(ours, whole, x, y):
            return False
        pairs = zip(theirs.buffers(), ours.buffers(), strict=True)
        if not all(_close(a.double(), b.double()) for a, b in pairs):
            return False
    return True


def _switches(module: nn.Module, parts: _Parts, x: Tensor) -> bool:
    """Whether the convolutions run in another context than the module is called in."""
    seen: list[bool] = []
    for on in (False, True):
        with switched(on):
            outside = context()
            handles = [
                module.get_submodule(path).register_forward_pre_hook(
                    lambda m, args, outside=outside: seen.append(context() != outside)
                )
                for path in parts.convs
            ]
            try:
                module(x.clone())
            finally:
                for handle in handles:
                    handle.remove()
    return any(seen)


def _state(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes and buffers of all modules, to tell whether a call has changed any."""
    found: list[tuple[str, Any]] = []
    for name, m in module.named_modules():
        for k, v in (*m.__dict__.items(), *m._buffers.items()):
            if k not in ("_parameters", "_buffers", "_modules"):
                size = len(v) if isinstance(v, (list, dict, set)) else None
                found.append((f"{name}.{k}", (id(v), size)))
    return found
