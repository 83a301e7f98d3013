"""A conv, a norm, an activation and a conv module, run as one op where nobody can tell.

What ``Conv2Plus1d`` and converted models have in common: reading the tensors and settings off
existing modules, and calling the modules one after the other where calling them might do more than
their class says.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import dispatch, functional
from ..backends.conv_pass import pad
from ..functional import BatchNorm, Causal
from ..problem import activations
from ..problem.geometry import left_padding
from ..problem.spec import memoize
from . import streaming, sync_batch_norm

RECOMPUTE = "_fastst_recompute"  # on spatial convolutions, by ``memory.set_memory_budget``
_BATCH_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm, sync_batch_norm.SyncBatchNorm)
NORMS = (*_BATCH_NORMS, nn.GroupNorm, nn.InstanceNorm3d, nn.LayerNorm, nn.RMSNorm)


class Ending(NamedTuple):
    """What ends a residual block after its last pair: activation(y + residual)."""

    residual: Any  # whatever the block adds; part of the op if it is a tensor like y
    activation: str
    slope: float
    in_place: bool  # the sum is written to y, whose dtype it keeps

    def apply(self, y: Tensor) -> Tensor:
        """As the block computes it."""
        if self.residual is not None:
            y = y.add_(self.residual) if self.in_place else y + self.residual
        return activations.apply(self.activation, y, self.slope)

    def fits(self, x: Tensor, shape: Sequence[int]) -> bool:
        """Whether the op computes the same for an output of this shape."""
        if torch.is_autocast_enabled(x.device.type):
            return False
        r = self.residual
        like = isinstance(r, Tensor) and (r.shape, r.dtype, r.device) == (shape, x.dtype, x.device)
        return r is None or like


def pair_forward(
    x: Tensor,
    first: nn.Module,
    norm: nn.Module | None,
    activation: nn.Module | None,
    second: nn.Module,
    *,
    order: str | None = None,
    causal: Causal = False,
    recompute: bool | None = None,
    owner: str = "conv pair",
    outer_norm: nn.Module | None = None,
    ending: Ending | None = None,
) -> Tensor:
    """Run existing modules ``second(activation(norm(first(x))))`` as one ``conv2plus1d``.

    One of ``first`` and ``second`` is a (1, kh, kw), the other a (kt, 1, 1) ``nn.Conv3d``. Where
    the modules cannot be seen through, they are called one after the other, and a
    ``FallbackWarning`` says why. Running statistics of the norm are updated as the norm would.

    Args:
        x: (N, C, T, H, W) or (C, T, H, W).
        first, norm, activation, second: the modules; norm and activation may be None.
        order: which of the two convolutions is which; None to read it off their kernels.
        causal: see ``functional.conv2plus1d``.
        recompute: the same; None for what ``set_memory_budget`` has chosen, if anything.
        owner: what a warning calls them.
        outer_norm: a norm of the output, before the ending; may be None.
        ending: what is applied to the output.
    """
    order = order or pair_order(first, second)
    why = why_composed(first, norm, activation, second, order)
    if why is not None:
        dispatch.fall_back(owner, why)
        y = compose_modules(x, first, norm, activation, second, order, causal)
        y = y if outer_norm is None else outer_norm(y)
        return y if ending is None else ending.apply(y)
    spatial, temporal = as_spatial_temporal(first, second, order)
    named = activations.from_module(activation)
    assert named is not None
    if recompute is None:
        recompute = vars(spatial).get(RECOMPUTE)
    ws, bs = read_members(spatial, "_parameters", "weight", "bias")
    wt, bt = read_members(temporal, "_parameters", "weight", "bias")
    return run_pair(
        x, ws, wt, bs, bt, norm, outer_norm=outer_norm, ending=ending, activation=named[0],
        negative_slope=named[1], order=order, causal=causal, recompute=recompute,
        **_settings(*_numbers(spatial), *_numbers(temporal)),
    )  # fmt: skip


def run_pair(
    x: Tensor,
    spatial_weight: Tensor,
    temporal_weight: Tensor,
    spatial_bias: Tensor | None,
    temporal_bias: Tensor | None,
    norm: Any,
    *,
    outer_norm: Any = None,
    ending: Ending | None = None,
    **settings: Any,
) -> Tensor:
    """``conv2plus1d`` with the batch norms of modules, whose running statistics it updates.

    A norm of the output is part of the call where it is a plain batch norm in training, which
    needs the statistics of the output; else the module is called.

    Args:
        settings: of ``conv2plus1d``, with stride and dilation as triples and padding as pairs.
    """
    inside = outer_norm is not None and _needs_statistics(x, outer_norm)
    if inside:
        settings["outer_norm"] = batch_norm_arguments(outer_norm)
    after = ending
    if ending is not None and outer_norm is None:
        shape = _output_shape(x, spatial_weight, temporal_weight, settings)
        if ending.fits(x, shape):
            settings |= {"residual": ending.residual, "outer_activation": ending.activation}
            if ending.activation == "leaky_relu":
                settings["negative_slope"] = ending.slope
            after = None
    y = functional.conv2plus1d(
        x, spatial_weight, temporal_weight, spatial_bias, temporal_bias,
        norm=batch_norm_arguments(norm), **settings,
    )  # fmt: skip
    if counts_batches(norm):
        norm.num_batches_tracked.add_(1)
    if outer_norm is not None and not inside:
        why = why_foreign({}, {"norm": outer_norm}, {})
        say_separate(outer_norm, why or "x is unbatched or it is compiled")
        y = outer_norm(y)
    elif counts_batches(outer_norm):
        outer_norm.num_batches_tracked.add_(1)
    return y if after is None else after.apply(y)


def say_separate(norm: nn.Module, why: str) -> None:
    """Let ``explain`` say why a batch norm in training reads y for its statistics."""
    if norm.training and isinstance(norm, nn.modules.batchnorm._BatchNorm):
        dispatch.record_composed(f"{type(norm).__name__} after a pair", why)


def _needs_statistics(x: Tensor, norm: Any) -> bool:
    """Whether a norm of the output does nothing but normalise with statistics of the batch.

    The compiler is not asked for them: it fuses a norm with what follows.
    """
    if torch.compiler.is_compiling() or x.dim() != 5:
        return False
    if type(norm) is not nn.BatchNorm3d or not norm.training:
        return False
    return why_foreign({}, {"norm": norm}, {}) is None


def _output_shape(
    x: Tensor, spatial_weight: Tensor, temporal_weight: Tensor, settings: Mapping[str, Any]
) -> tuple[int, ...]:
    """(N, K, T', H', W'), or (K, T', H', W'), of a pair that is not causal."""
    last = temporal_weight if settings["order"] == "spatial-first" else spatial_weight
    kernel = (temporal_weight.shape[2], *spatial_weight.shape[3:])
    axes = zip(
        x.shape[-3:], kernel, settings["stride"], settings["padding"], settings["dilation"],
        strict=True,
    )  # fmt: skip
    size = ((n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)
    return (*x.shape[:-4], last.shape[0], *size)


def compose_modules(
    x: Tensor,
    first: nn.Module,
    norm: nn.Module | None,
    activation: nn.Module | None,
    second: nn.Module,
    order: str,
    causal: Causal = False,
) -> Tensor:
    """The modules called one after the other."""
    if x.dim() == 4:  # batch norms take no unbatched input
        y = compose_modules(x.unsqueeze(0), first, norm, activation, second, order, causal)
        return y.squeeze(0)
    if causal:
        streaming.check_frame_by_frame("causal=True", norm, activation)
    if order == "temporal-first":
        x = pad_causally(x, first, causal)
    x = first(x)
    x = x if norm is None else norm(x)
    x = x if activation is None else activation(x)
    if order == "spatial-first":
        x = pad_causally(x, second, causal)
    return second(x)


def why_composed(
    first: nn.Module,
    norm: nn.Module | None,
    activation: nn.Module | None,
    second: nn.Module,
    order: str | None = None,
) -> str | None:
    """Why the modules cannot run as one op, or None where they can."""
    spatial, temporal = as_spatial_temporal(first, second, order or pair_order(first, second))
    convs = {"spatial convolution": spatial, "temporal convolution": temporal}
    why = why_foreign(convs, {"norm": norm}, {"activation": activation})
    if why is not None:
        return why
    return _why_no_pair(*_numbers(spatial), *_numbers(temporal))


Numbers = tuple[Any, ...]  # of a convolution: kernel_size, stride, sides, dilation, groups, mode


def _numbers(conv: Any) -> Numbers:
    sides = conv.padding if type(conv.padding) is tuple else tuple(sides_of(conv))
    how = conv.dilation, conv.groups, conv.padding_mode
    return conv.kernel_size, conv.stride, sides, *how


def _both(side: Any) -> tuple[int, int]:
    """Padding before and after, of an entry of ``Numbers``."""
    return side if isinstance(side, tuple) else (side, side)


@memoize
def _why_no_pair(*both: Any) -> str | None:
    """Why convolutions of these numbers, the spatial one's first, are no pair, or None."""
    for label, numbers, axes in (("spatial", both[:6], (0,)), ("temporal", both[6:], (1, 2))):
        kernel, stride, sides, *_ = numbers
        for i in axes:
            came = kernel[i], stride[i], sum(_both(sides[i]))
            if came != (1, 1, 0):
                return (
                    f"its {label} convolution must have kernel 1, stride 1 and padding 0 in "
                    f"{'thw'[i]}, got {came}"
                )
    return None


@memoize
def _settings(*both: Any) -> dict[str, Any]:
    """Arguments of ``conv2plus1d`` from the numbers of both, the spatial one's first."""
    (_, stride, sides, *how), (_, of_t, before_t, *how_t) = both[:6], both[6:]
    dilation, groups, mode = zip(how, how_t, strict=True)
    return {
        "stride": (of_t[0], *stride[1:]),
        "padding": (_both(before_t[0]), *map(_both, sides[1:])),
        "dilation": (dilation[1][0], *dilation[0][1:]),
        "groups": groups,
        "padding_mode": mode,
    }


def pair_order(first: nn.Module, second: nn.Module) -> str:
    """The order of two convolutions, read off their kernels, strides and padding."""

    def fits(conv: Any, axes: Sequence[int]) -> bool:
        """Whether a convolution does nothing along these axes."""
        if not isinstance(conv, nn.Conv3d):
            return False
        sides = sides_of(conv)
        return all((conv.kernel_size[i], conv.stride[i], sum(sides[i])) == (1, 1, 0) for i in axes)

    temporal_first = fits(first, (1, 2)) and fits(second, (0,))
    spatial_first = fits(first, (0,)) and fits(second, (1, 2))
    return "temporal-first" if temporal_first and not spatial_first else "spatial-first"


def as_spatial_temporal(first: Any, second: Any, order: str) -> tuple[Any, Any]:
    """(spatial, temporal) of (first, second), and the other way round."""
    return (first, second) if order == "spatial-first" else (second, first)


def why_foreign(
    convs: Mapping[str, nn.Module],
    norms: Mapping[str, nn.Module | None],
    acts: Mapping[str, nn.Module | None],
    known: Sequence[type[nn.Module]] = _BATCH_NORMS,
) -> str | None:
    """Why calling a child might do more than its class says, or what no kernel knows.

    ``known``: classes of norms.
    """
    for label, child in (*convs.items(), *norms.items(), *acts.items()):
        if child is None:
            continue
        kind = type(child)
        if label in convs:
            if kind is not nn.Conv3d:
                name = f"{kind.__module__}.Conv3d" if kind.__name__ == "Conv3d" else kind.__name__
                return f"its {label} is a {name}, not a plain nn.Conv3d"
        elif kind not in known if label in norms else activations.from_module(child) is None:
            return f"its {label} is a {kind.__name__}, which no kernel knows"
        why = why_more_than_class(child)
        if why is not None:
            return f"its {label} {why}"
    if torch_module._has_any_global_hook():
        return "global module hooks are registered"
    if _read(F, _FUNCTION_NAMES, _read_functions) != _FUNCTIONS:
        return "a function of torch.nn.functional was replaced"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody sees a module's call, or moves what it needs when it returns."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def why_more_than_class(module: nn.Module) -> str | None:
    """What the call of a module of PyTorch's runs besides the forward of its class, or None."""
    if has_hooks(module):
        return "has hooks"
    replaced = _find_replaced_method(module)
    return None if replaced is None else f"has a {replaced} that is not of its class"


class Answer:
    """What stands in the place of a module's method and does the same, as in converted models."""

    def answers_for(self, module: nn.Module) -> bool:
        """Whether it is of this module, and not of one from which somebody took it."""
        raise NotImplementedError


class _Methods(NamedTuple):
    """What the forward of a class of modules runs."""

    names: tuple[str, ...]
    read: Callable[[type], Any]  # as they are now
    own: tuple[Any, ...]  # as they were; None where somebody had replaced one before

    @classmethod
    def of(cls, kind: type[nn.Module]) -> _Methods:
        def is_own(method: Any) -> bool:
            home = getattr(method, "__globals__", {}).get("__name__", "")
            return home.startswith(("torch.nn.", "fastst."))

        names = tuple(name for name in _METHODS if hasattr(kind, name))
        read = operator.attrgetter(*names)
        return cls(names, read, tuple(m if is_own(m) else None for m in read(kind)))


def _find_replaced_method(module: nn.Module) -> str | None:
    """The method of a module that somebody replaced, on the module or on its class."""
    kind, here = type(module), module.__dict__
    known = _OWN_METHODS.get(kind) or _Methods.of(kind)
    now = _read(kind, known.names, known.read)
    forward, conv_forward, check, call = _METHODS
    replaced = forward in here or conv_forward in here or check in here or call in here
    if now == known.own and not replaced:
        return None
    for name in _METHODS:
        if name in here and not (isinstance(here[name], Answer) and here[name].answers_for(module)):
            return name
    of_class = (n for n, a, b in zip(known.names, now, known.own, strict=True) if a is not b)
    return next(of_class, None)


def _read(of: Any, names: Sequence[str], read: Callable[[Any], Any]) -> Any:
    """``read(of)``, which Dynamo cannot trace: it reads one name after the other."""
    if torch.compiler.is_compiling():
        return tuple([getattr(of, name) for name in names])
    return read(of)


# What the forwards of the modules call, as it was.
_FUNCTION_NAMES = ("conv3d", "batch_norm", *activations.FUNCTIONS)
_read_functions = operator.attrgetter(*_FUNCTION_NAMES)
_FUNCTIONS = _read_functions(F)
# Tools replace what convolutions and norms run: seamless tiling, LoRA, split-GPU loaders.
_METHODS = ("forward", "_conv_forward", "_check_input_dim", "_call_impl")
_OWN_METHODS = {kind: _Methods.of(kind) for kind in (nn.Conv3d, *NORMS, *activations.MODULES)}


def read_members(module: nn.Module, kind: str, *names: str) -> list[Any]:
    """Parameters, buffers or modules of a module; its ``__getattr__`` would take half a µs each."""
    own = module.__dict__[kind]
    return [own[n] if n in own else getattr(module, n) for n in names]


def sides_of(conv: Any) -> list[tuple[int, int]]:
    """Padding (before, after) of each axis of an ``nn.Conv3d``, strings resolved."""
    if isinstance(conv.padding, str):
        w = conv._reversed_padding_repeated_twice
        return [(w[4], w[5]), (w[2], w[3]), (w[0], w[1])]
    return [(p, p) for p in conv.padding]


def sides(spatial: Any, temporal: Any) -> tuple[tuple[int, int], ...]:
    return (sides_of(temporal)[0], *sides_of(spatial)[1:])


def counts_batches(norm: Any) -> bool:
    """Whether a batch norm counts this batch."""
    counts = norm is not None and norm.training and norm.track_running_stats
    return counts and norm.num_batches_tracked is not None


def batch_norm_arguments(norm: Any) -> BatchNorm | None:
    """The functional form of a batch norm module in the mode it is in."""
    if norm is None:
        return None
    mean, var = read_members(norm, "_buffers", "running_mean", "running_var")
    training = norm.training or (mean is None and var is None)
    momentum = norm.momentum
    if momentum is None:  # cumulative average; counted after the op has run
        momentum = 1.0 / (float(norm.num_batches_tracked) + 1) if counts_batches(norm) else 0.0
    if norm.training and not norm.track_running_stats:
        mean = var = None
    weight, bias = read_members(norm, "_parameters", "weight", "bias")
    group = sync_batch_norm.group_name(norm)
    return BatchNorm(mean, var, weight, bias, training, momentum, norm.eps, group)


def pad_causally(x: Tensor, conv: Any, causal: Causal) -> Tensor:
    """x with the frames before the first that a causal temporal convolution reads."""
    if not causal:
        return x
    left = left_padding(conv.kernel_size[0], conv.stride[0], conv.dilation[0], causal)
    batched = x if x.dim() == 5 else x.unsqueeze(0)
    padded = pad(batched, (left, 0, 0, 0, 0, 0), str(conv.padding_mode))
    return padded if x.dim() == 5 else padded.squeeze(0)
