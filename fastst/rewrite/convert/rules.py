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
from torch._subclasses.functional_tensor import FunctionalTensor

from ... import functional
from ...functional import BatchNorm
from ...problem import activations
from . import endings, forms, readings, views
from .chain import Alone, Convolved, Guess, Plan, extended, is_open
from .forms import Form
from .geometry import first_pass, second_pass
from .graphs import is_promise, promised
from .promise import RULES, CannotDefer, Kept, Link, Promise, State, real, valueless
from .traced import CONVOLVE

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


# ---- the first convolution


def begin(
    begun: Any, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any
) -> Promise | None:
    """The promise of a convolution; None for what must run at once.

    That is also all that the convolution would refuse.
    """
    if type(x) not in _PLAIN or x.dim() != weight.dim():
        return None
    if not (_plain(x.device, x, weight, bias) and _settled(weight, bias)):
        return None
    state = State(x.device)
    if _needs_grad(state, x, weight, bias) and _is_inference(x, weight):
        return None
    dtype = _result_dtype(state, x, weight, bias)
    shapes = x.shape, weight.shape, bias is not None and bias.shape
    try:
        found = first_pass(*shapes, *settings)
    except TypeError:  # sizes of a graph, or settings, that do not hash
        found = first_pass.__wrapped__(*shapes, *settings)
    if found is None or dtype is None:
        return None
    grad = _needs_grad(state, weight, bias)
    plain = not (grad or state.traced) and state.autocast is None
    if found.pass_ is None and not (begun.served and plain):
        return None
    if state.traced and type(x) is FakeTensor and (grad or _needs_grad(state, x)):
        return None  # an exported program has no gradient of the operation
    mode = "constant" if settings[-2] == "zeros" else settings[-2]
    padded, how = found.padded, found.how
    convolve = CONVOLVE[weight.dim()]

    def run(_: None, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if padded is not None:
            input = F.pad(input, padded, mode)
        return convolve(input, weight, bias, *how)

    try:
        input = Kept(x)
        if input.foreign:
            input = Kept(x.clone())
        kept = [("input", input), ("weight", Kept(weight))]
        if bias is not None:
            kept.append(("bias", Kept(bias)))
    except CannotDefer:
        return None
    link = Link(None, run, None, tuple(kept), state, found.shape)
    link.plan = Alone(begun, name)
    if found.pass_ is not None:
        link.plan = Plan(begun, name, found.pass_, found.names, Convolved(link))
    made: Promise | None = promised(link, dtype)
    return made


def plain_call(x: Any, weight: Any, bias: Any) -> torch.dtype | None:
    """The dtype of a convolution's result, or None for a call that must run at once."""
    if (
        type(x) not in _PLAIN
        or x.dim() != 5
        or not (_plain(x.device, x, weight, bias) and _settled(weight, bias))
    ):
        return None
    state = State(x.device)
    if _needs_grad(state, weight, bias) and _is_inference(x, weight):
        return None
    return _result_dtype(state, x, weight, bias)


def _plain(device: torch.device, *tensors: Tensor | None) -> bool:
    """Whether tensors are PyTorch's own, of values in strides, all on one device."""
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN or t.layout is not torch.strided or t.device != device:
            return False
        if t.is_neg():  # complex ones are none of those that a kernel takes
            return False
    return True


def _needs_grad(state: State, *tensors: Tensor | None) -> bool:
    return state.grad and any(t is not None and t.requires_grad for t in tensors)


def _is_inference(*tensors: Tensor) -> bool:
    """Whether one of them cannot be saved for backward."""
    return any(t.is_inference() for t in tensors)


def _settled(*weights: Tensor | None) -> bool:
    """Whether weights are nobody's views: such ones are freed when a module's call ends (FSDP)."""
    return all(w is None or type(w) is nn.Parameter or not w._is_view() for w in weights)


def _result_dtype(state: State, *tensors: Tensor | None) -> torch.dtype | None:
    """Of a convolution of these tensors, or None where it may refuse them."""
    dtypes = {t.dtype for t in tensors if t is not None}
    if not dtypes.issubset(_FLOATS):
        return None
    if state.autocast is not None and torch.float64 not in dtypes:
        return state.autocast if state.autocast in _FLOATS else None
    return dtypes.pop() if len(dtypes) == 1 else None


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
    norm = BatchNorm(running_mean, running_var, weight, bias, bool(training), momentum, eps)
    if is_promise(input) and type(input.link.plan) in (endings.Ending, Alone, readings.Reading):
        if not _fits(norm, input):
            return NotImplemented
        if is_open(input, Alone):
            return _folded(input.link, norm)
        made = endings.batch_norm(input, norm) if endings.ends(input) else NotImplemented
        return readings.batch_norm(input, norm) if made is NotImplemented else made
    if not is_open(input) or not (
        training or (running_mean is not None and running_var is not None)
    ):
        return NotImplemented
    plan, shape = input.link.plan, input.link.shape
    if plan.norm is not None or plan.activation is not None or plan.padded:
        return NotImplemented
    if not plan.channels(shape):
        return NotImplemented
    if not _fits(norm, input):
        return NotImplemented
    tensors = {n: t for n, t in zip(norm._fields, norm[:4], strict=False) if t is not None}
    run = None
    if training:
        if shape.numel() == shape[1]:  # which PyTorch refuses
            return NotImplemented
        x = plan.convolution.kept[0][1].tensor
        if input.link.state.traced:  # in a graph they are counted where they stand
            return NotImplemented
        if not valueless(x):
            run = _begin(input.link, norm)
            if run is None:
                return NotImplemented
            # Counted by now.
            tensors.pop("running_mean", None)
            tensors.pop("running_var", None)
    try:
        kept = tuple((n, Kept(t)) for n, t in tensors.items())
    except CannotDefer:
        return NotImplemented

    def separately(
        u: Tensor, running_mean: Any = None, running_var: Any = None, **affine: Tensor
    ) -> Tensor:
        return F.batch_norm(
            u, running_mean, running_var, **affine, training=training, momentum=momentum, eps=eps
        )

    return extended(input, separately, kept, norm=norm, half=run)


def _folded(link: Link, norm: BatchNorm) -> Any:
    """A convolution of a copy for inference with the frozen norm behind it in its weights."""
    if norm.training or _needs_grad(link.state, *norm[:4]) or not link.unchanged():
        return NotImplemented
    tensors = {name: kept.tensor for name, kept in link.kept}
    for _, kept in link.kept:
        kept.release()
    weights = link.plan.begun.folded((tensors["weight"], tensors.get("bias")), norm)
    link.plan.begun.misses = 0
    return link.run(None, tensors["input"], *weights)


def _fits(norm: BatchNorm, p: Promise) -> bool:
    """Whether a batch norm is one that ``conv2plus1d`` knows, and that PyTorch would not refuse."""
    mean, var, weight, bias, training, momentum, eps, _ = norm
    if not training and (mean is None or var is None):
        return False
    if type(momentum) not in (int, float) or type(eps) not in (int, float):
        return False
    dtype, tensors = p.link.dtype, [t for t in (mean, var, weight, bias) if t is not None]
    for t in tensors:
        if not _plain(p.link.state.device, t) or t.shape != p.link.shape[1:2]:
            return False
        if t.dtype != dtype and not (t.dtype is torch.float32 and dtype.itemsize == 2):
            return False
    return len({t.dtype for t in tensors}) < 2


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
        x, weight, bias = _convolved(plan)
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


def _convolved(plan: Plan) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, weight and bias of the first convolution."""
    sources = dict(plan.convolution.kept)
    bias = sources.get("bias")
    return sources["input"].tensor, sources["weight"].tensor, None if bias is None else bias.tensor


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
        return extended(input, run, in_place=in_place, activation=(kind, slope))

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


# ---- the second convolution


def _second_of(rank: int) -> Callable[..., Any]:
    """The rule of a second convolution of tensors of that rank."""

    def rule(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: Any = 1,
    ) -> Any:  # fmt: skip
        if not is_open(input) or not isinstance(weight, Tensor) or len(input.link.shape) != rank:
            return NotImplemented
        if not _plain(input.link.state.device, weight, bias) or weight.dim() != rank:
            return NotImplemented
        settings = (tuple(v) if isinstance(v, list) else v for v in (stride, padding, dilation))
        return _second(input.link, weight, bias, (*settings, groups))

    return rule


SECOND = {rank: _second_of(rank) for rank in CONVOLVE}


def _second(link: Link, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Any:
    plan: Plan = link.plan
    if not _selected(plan):
        return NotImplemented
    found = _fitting(link, weight.shape, bias is not None and bias.shape, how)
    sources = link.all_kept()
    if found is None or not all(kept.same for _, kept in sources):
        return NotImplemented
    settings, shape, form = found
    half = plan.half
    if form is not None and half is not None:
        half = form.divided(half)
        if half is None:
            return NotImplemented
    x, *first = _convolved(plan)
    dtype = _result_dtype(link.state, x, first[0], first[1], weight, bias)
    if dtype is None:
        return NotImplemented
    for _, kept in sources:
        kept.release()
    name, slope = plan.activation or ("none", 0.01)
    plan.convolution.taken = True
    alike = weight.shape if form is None else forms.lifted_shape(weight.shape, plan.first)
    plan.begun.took(plan, Guess(alike, how, (name, slope)))
    recompute, own = _recompute(plan), len(plan.convolution.kept)
    tensors = {"second weight": weight, "second bias": bias}
    tensors |= {f"first {n}": k.tensor for n, k in sources[:own]}
    tensors |= {f"norm {n}": k.tensor for n, k in sources[own:]}

    def run(given: dict[str, Any], second: Any = None, **ending: Any) -> Tensor:
        x = given["first input"]
        pairs: list[Any] = [
            [given["first weight"], given.get("first bias")],
            second or [given["second weight"], given.get("second bias")],
        ]
        temporal = plan.first.kind == "temporal"
        if form is not None:
            x = forms.arranged(x, form.x)
            pairs = [[forms.lifted(w, temporal is (i == 0)), b] for i, (w, b) in enumerate(pairs)]
        if temporal:
            pairs.reverse()
        (ws, bs), (wt, bt) = pairs
        norm = plan.norm
        if norm is not None:
            prefix = "norm "
            changed: dict[str, Any] = {
                n[len(prefix) :]: t for n, t in given.items() if n.startswith(prefix)
            }
            norm = norm._replace(**changed)
        options = {"negative_slope": slope, **ending}
        y = functional.conv2plus1d(
            x, ws, wt, bs, bt, **settings, activation=name, norm=norm, recompute=recompute,
            begun=half, **options,
        )  # fmt: skip
        return y if form is None else forms.laid_out(forms.arranged(y, form.y))

    shared = slope if name == "leaky_relu" else None
    given = {n: t for n, t in tensors.items() if t is not None}
    y = endings.defer(plan.begun, run, given, shared, shape, dtype, form is None)
    for _, kept in sources:
        kept.held_again()
    return y


def _fitting(
    link: Link, w: torch.Size, b: Any, how: tuple[Any, ...]
) -> tuple[dict[str, Any], torch.Size, Form | None] | None:
    """Settings of the pair with a second convolution, the shape of y, and the form, if any."""
    plan: Plan = link.plan
    if plan.axes is None and plan.names == "bcthw":
        arguments = plan.first, plan.pads, link.shape, w, b, *how
        try:
            found = second_pass(*arguments)
        except TypeError:  # sizes of a graph, or settings, that do not hash
            found = second_pass.__wrapped__(*arguments)
        return found and (found[0], torch.Size((link.shape[0], w[0], *found[1])), None)
    x = plan.convolution.kept[0][1].tensor
    try:
        form = forms.form(
            plan.first, plan.names, x.shape, plan.convolution.shape, plan.axes_of(link.shape),
            link.shape, w, b, *how,
        )  # fmt: skip
    except TypeError:
        return None
    return None if form is None else (form.settings, form.shape, form)


def _selected(plan: Plan) -> bool:
    """Whether the filters of ``convert`` want the pair."""
    ends = plan.ends
    return bool(plan.begun.wanted or (ends is not None and ends.wanted))


def _recompute(plan: Plan) -> bool | None:
    owner = plan.begun if plan.first.kind == "spatial" else plan.ends
    return None if owner is None else owner.recompute


def _add(in_place: bool = False) -> Callable[..., Any]:
    def rule(input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or input is other:
            return NotImplemented
        if endings.ends(input):
            made = endings.add(input, real(other, "a sum"), in_place)
            if made is not NotImplemented:
                return made
        if not in_place and endings.ends(other):
            return endings.add(other, real(input, "a sum"), False)
        return NotImplemented if in_place else readings.added(input, other)

    return rule


def _multiply(input: Any, other: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else readings.multiplied(input, other)


def _dropout(input: Any, p: Any = 0.5, training: Any = True, inplace: Any = False) -> Any:
    """In evaluation nothing."""
    return input if is_promise(input) and not training and 0 <= p <= 1 else NotImplemented


def _to(input: Any, *args: Any, **kwargs: Any) -> Any:
    """To the dtype or the device that it has."""
    if kwargs or not is_promise(input) or [*map(type, args)] not in ([torch.dtype], [torch.device]):
        return NotImplemented
    return input if args[0] in (input.link.dtype, input.link.state.device) else NotImplemented


RULES.update({
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
    **{function: SECOND[rank] for rank, function in CONVOLVE.items()},
    **views.FOLLOWED,
    **{getattr(F, name): _activation(name, getattr(F, name)) for name in activations.FUNCTIONS},
    torch.relu: _activation("relu", torch.relu),
    Tensor.relu: _activation("relu", torch.relu),
    torch.relu_: _activation("relu", torch.relu_, True),
    Tensor.relu_: _activation("relu", torch.relu_, True),
})  # fmt: skip
