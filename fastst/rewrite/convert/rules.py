"""What a call makes of a promise: a longer promise, a pair run as one operation, or nothing.

Only values decide: shapes, strides and functions as they arrive, never names or classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ... import dispatch, functional
from ...functional import BatchNorm
from ...problem import activations, conv3d_checks
from ...problem.conv3d import ConvProblem, ConvTensors
from . import asked, endings, forms, norms, pairs, readings, views
from .chain import Alone, Convolved, Guess, Plan, extended, is_open
from .folded import folds
from .geometry import first_pass, second_pass, sides_of
from .graphs import is_promise, promised
from .kept import CannotDefer, Kept, as_own, copied, valueless
from .plain import PLAIN, are_plain, are_settled, is_inference, needs_grad, result_dtype
from .promise import RULES, Link, Promise, real
from .state import State
from .traced import CONVOLVE

# ---- the first convolution


def begin(
    begun: Any, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any
) -> Promise | None:
    """The promise of a convolution; None for what must run at once.

    That is also all that the convolution would refuse.
    """
    if type(x) not in PLAIN or x.dim() != weight.dim():
        return None
    if not (are_plain(x.device, x, weight, bias) and are_settled(weight, bias)):
        return None
    state = State(x.device)
    if needs_grad(state, x, weight, bias) and is_inference(x, weight):
        return None
    dtype = result_dtype(state, x, weight, bias)
    shapes = x.shape, weight.shape, bias is not None and bias.shape
    try:
        found = first_pass(*shapes, *settings)
    except TypeError:  # sizes of a graph, or settings, that do not hash
        found = first_pass.__wrapped__(*shapes, *settings)
    if found is None or dtype is None:
        return None
    grad = needs_grad(state, weight, bias)
    plain = not (grad or state.traced) and state.autocast is None
    if found.pass_ is None and not (begun.served and plain):
        return None
    if state.traced and type(x) is FakeTensor and (grad or needs_grad(state, x)):
        return None  # an exported program has no gradient of the operation
    mode = "constant" if settings[-2] == "zeros" else settings[-2]
    padded, how = found.padded, found.how
    convolve = CONVOLVE[weight.dim()]

    def run(_: None, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if padded is not None:
            input = F.pad(input, padded, mode)
        return convolve(input, weight, bias, *how)

    try:
        kept = [("input", as_own(x)), ("weight", Kept(weight))]
        if bias is not None:
            kept.append(("bias", Kept(bias)))
    except CannotDefer:
        return None
    link = Link(None, run, None, tuple(kept), state, found.shape, dtype)
    link.plan = Alone(begun, name, settings)
    if found.pass_ is not None:
        link.plan = Plan(begun, name, found.pass_, found.names, Convolved(link))
    made: Promise | None = promised(link)
    return made


# ---- what may stand between


def extends(p: Promise) -> bool:
    """Whether a promise is of a first convolution, not of a pair."""
    return type(p.link.plan) is Plan


def _batch_norm(
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """A norm in training runs the first convolution now: its statistics are counted at its call."""
    if not is_promise(input):
        return NotImplemented
    norm = BatchNorm(running_mean, running_var, weight, bias, bool(training), momentum, eps)
    link = input.link
    plan, shape = link.plan, link.shape
    if type(plan) is not Plan:
        return _normed_elsewhere(input, norm)
    if plan.norm is not None or plan.activation is not None or plan.padded:
        return NotImplemented
    if not (is_open(input) and plan.channels(shape) and _fits(norm, input)):
        return NotImplemented
    vectors = list(zip(_VECTORS, norm[:4], strict=True))
    run = None
    if training:
        if shape.numel() == shape[1]:  # which PyTorch refuses
            return NotImplemented
        if link.state.traced:  # in a graph they are counted where they stand
            return NotImplemented
        if not valueless(plan.convolution.kept[0][1].tensor):
            run = _begin(link, norm)
            if run is None:
                return NotImplemented
            del vectors[:2]  # counted by now
    given = [(n, t) for n, t in vectors if t is not None]
    if not training and _are_copied(link.state, norm):
        kept = copied(given)
    else:
        try:
            kept = tuple([(n, Kept(t)) for n, t in given])
        except CannotDefer:
            return NotImplemented

    def separately(
        u: Tensor, running_mean: Any = None, running_var: Any = None, **affine: Tensor
    ) -> Tensor:
        return F.batch_norm(
            u, running_mean, running_var, **affine, training=training, momentum=momentum, eps=eps
        )

    return extended(input, separately, plan.normed(norm, run), kept)


_VECTORS = BatchNorm._fields[:4]


def _are_copied(state: State, norm: BatchNorm) -> bool:
    """Whether the vectors of a frozen norm are copied when it is called."""
    if state.kind != "cpu" or state.traced or needs_grad(state, *norm[2:4]):
        return False
    return type(norm.running_mean) in (Tensor, nn.Parameter)


def _normed_elsewhere(input: Any, norm: BatchNorm) -> Any:
    """A norm of what is no first convolution of a pair."""
    if type(input.link.plan) not in (endings.Ending, Alone, readings.Reading):
        return NotImplemented
    if not _fits(norm, input):
        return NotImplemented
    if is_open(input, Alone):
        return _with_norm(input.link, norm)
    made = endings.batch_norm(input, norm) if endings.ends(input) else NotImplemented
    return readings.batch_norm(input, norm) if made is NotImplemented else made


def _with_norm(link: Link, norm: BatchNorm) -> Any:
    """A convolution of a copy for inference with the frozen norm behind it."""
    if norm.training or needs_grad(link.state, *norm[:4]) or not link.unchanged():
        return NotImplemented
    tensors = {name: kept.tensor for name, kept in link.kept}
    x, weight, bias = tensors["input"], tensors["weight"], tensors.get("bias")
    plan: Alone = link.plan
    if not (folds(weight) or _has_kernels(_settings(plan), x, weight, bias)):
        return NotImplemented
    for _, kept in link.kept:
        kept.release()
    link.plan.begun.misses = 0
    if folds(weight):
        return link.run(None, x, *plan.begun.folded((weight, bias), norm))
    stride, padding, dilation, groups, mode = _settings(plan)
    return functional.conv3d(
        x, weight, bias, stride, padding, dilation, groups, padding_mode=mode, output_norm=norm
    )


def _settings(plan: Alone) -> tuple[Any, ...]:
    """Stride, padding, dilation, groups and mode, as ``conv3d`` takes them."""
    stride, padding, *rest, mode, widths = plan.settings
    return (stride, padding if mode == "zeros" else sides_of(widths), *rest, mode)


def _has_kernels(settings: Any, *tensors: Any) -> bool:
    """Whether a lone convolution runs on kernels that take a norm in."""
    if tensors[1].dim() != 5:
        return False
    given = ConvTensors(*tensors)
    try:
        spec = conv3d_checks.conv3d(
            given, None, None, *settings, False, None, None, 0.01, False
        )  # fmt: skip
    except (TypeError, ValueError):
        return False
    return dispatch.has_kernels(ConvProblem.of(given, spec))


def _fits(norm: BatchNorm, p: Promise) -> bool:
    """Whether a batch norm is one that ``conv2plus1d`` knows, and that PyTorch would not refuse."""
    mean, var, weight, bias, training, momentum, eps, _ = norm
    if not training and (mean is None or var is None):
        return False
    if type(momentum) not in (int, float) or type(eps) not in (int, float):
        return False
    if eps < 0 or (training and eps == 0):  # which PyTorch refuses
        return False
    link = p.link
    shape, dtype, own = link.shape[1:2], link.dtype, None
    if not are_plain(link.state.device, mean, var, weight, bias):
        return False
    for t in (mean, var, weight, bias):
        if t is not None:
            if t.shape != shape or own not in (None, t.dtype):
                return False
            own = t.dtype
    return own in (None, dtype) or (own is torch.float32 and dtype.itemsize == 2)


def _begin(link: Link, norm: BatchNorm) -> Any:
    """Run the first convolution, for the pair that it was last in or a likely one."""
    plan: Plan = link.plan
    u = plan.convolution.shape
    if plan.names not in ("bcthw", "bchw"):  # whose pixels or clips show later
        return None
    temporal, m = plan.first.kind == "temporal", u[1]
    shape = u if len(u) == 5 else torch.Size((*u[:2], 1, *u[2:]))
    kernel, padding = ((1, 3, 3), (0, 1, 1)) if temporal else ((3, 1, 1), (1, 0, 0))
    likely = Guess((m, m, *kernel), (1, padding, 1, 1))
    for guess in filter(None, (plan.begun.guess, likely)):
        settings = second_pass(plan.first, (), shape, guess.shape, False, *guess.how)
        if settings is None:
            continue
        x, weight, bias = plan.convolved()
        if not link.unchanged():
            return None
        first = forms.lifted(weight, temporal)
        rows = first.is_contiguous(memory_format=torch.channels_last_3d)
        layout = torch.channels_last_3d if rows else torch.contiguous_format
        second = torch.empty(
            guess.shape, dtype=first.dtype, device=first.device, memory_format=layout
        )
        for _, kept in plan.convolution.kept:
            kept.release()
        if len(u) == 4:
            x = x.unsqueeze(2)
        pairs: list[Any] = [[first, bias], [second, None]]
        if temporal:
            pairs.reverse()
        (ws, bs), (wt, bt) = pairs
        half = functional.begin(
            x, ws, wt, bs, bt, norm=norm, activation=guess.activation, **settings[0]
        )
        for _, kept in plan.convolution.kept:
            kept.hold()
        return half
    return None


def _activation(
    name: str, function: Callable[..., Any], written: bool = False
) -> Callable[..., Any]:
    """The rule of an activation; ``written``: it is the in-place form."""

    def rule(input: Any, *args: Any, **kwargs: Any) -> Any:
        named = _named(name, args, kwargs)
        if named is None:
            return NotImplemented
        kind, slope, in_place = named
        in_place = in_place or written
        if in_place and slope < 0:  # which backward refuses
            return NotImplemented

        def run(v: Tensor) -> Tensor:
            return activations.apply(kind, v, slope)

        if endings.ends(input):
            made = endings.activation(input, kind, slope, in_place)
            if made is not NotImplemented:
                return made
        if not is_open(input):
            return readings.activation(input, kind, slope, run, in_place)
        plan = input.link.plan
        if plan.activation is not None or plan.padded:
            return NotImplemented
        return extended(input, run, plan.activated(kind, slope), in_place=in_place)

    return rule


def _named(name: str, args: Any, kwargs: Any) -> tuple[str, float, bool] | None:
    """An activation's name, slope, and whether it is in place, of a call's other arguments."""
    if name == "gelu":
        how = kwargs.get("approximate", args[0] if args else "none")
        kind = {"none": "gelu", "tanh": "gelu_tanh"}.get(how)
        return None if kind is None else (kind, 0.01, False)
    names = ("negative_slope", "inplace") if name == "leaky_relu" else ("inplace",)
    given = dict(zip(names, args, strict=False)) | kwargs
    slope, in_place = given.pop("negative_slope", 0.01), given.pop("inplace", False)
    if given.keys() - set(names) or len(args) > len(names) or type(slope) not in (int, float):
        return None
    if in_place and slope < 0:  # has no backward
        return None
    return name, float(slope), bool(in_place)


# ---- sums and products


def _add(in_place: bool = False) -> Callable[..., Any]:
    def rule(input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or input is other:
            return NotImplemented
        if endings.ends(input):
            made = endings.add(input, real(other, "a sum"), in_place, first=True)
            if made is not NotImplemented:
                return made
        if not in_place and endings.ends(other):
            return endings.add(other, real(input, "a sum"), False, first=False)
        if in_place:
            return NotImplemented
        if is_open(input, norms.Root):
            return norms.raised(input, other)
        return readings.added(input, other)

    return rule


def _multiply(input: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    if is_promise(input) and is_promise(other):
        made = norms.divided(input, other)
        return norms.divided(other, input) if made is NotImplemented else made
    if is_promise(input):
        return readings.multiplied(input, other)
    return readings.multiplied(other, input)


def _dropout(input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> Any:
    """In evaluation nothing."""
    return input if is_promise(input) and not training and 0 <= p <= 1 else NotImplemented


def _to(input: Any, *args: Any, **kwargs: Any) -> Any:
    """To the dtype or the device that it has."""
    if kwargs or not is_promise(input) or [*map(type, args)] not in ([torch.dtype], [torch.device]):
        return NotImplemented
    return input if args[0] in (input.link.dtype, input.link.state.device) else NotImplemented


RULES.update({
    **asked.RULES,
    torch.add: _add(),
    Tensor.add: _add(),
    Tensor.__add__: _add(),
    Tensor.__radd__: _add(),
    Tensor.__iadd__: _add(True),
    Tensor.add_: _add(True),
    torch.mul: _multiply,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    F.batch_norm: _batch_norm,
    F.dropout: _dropout,
    Tensor.to: _to,
    **readings.RULES,
    **norms.RULES,
    **{function: pairs.SECOND[rank] for rank, function in CONVOLVE.items()},
    **views.FOLLOWED,
    **{getattr(F, name): _activation(name, getattr(F, name)) for name in activations.FUNCTIONS},
    torch.relu: _activation("relu", torch.relu),
    Tensor.relu: _activation("relu", torch.relu),
    torch.relu_: _activation("relu", torch.relu_, True),
    Tensor.relu_: _activation("relu", torch.relu_, True),
})  # fmt: skip
