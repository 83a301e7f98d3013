"""What a call makes of a promise: a longer promise, a pair run as one operation, or nothing.

Only values decide: shapes, strides and functions as they arrive, never names or classes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ... import dispatch, functional
from ...functional import BatchNorm
from ...problem import activations, conv3d_checks
from ...problem.conv3d import ConvProblem, ConvTensors
from ...problem.memory import read_address
from ...problem.spec import PairTensors, offset_of
from . import asked, endings, forms, norms, pairs, readings, views
from .chain import ChainPlan, Guess, Single, change_plan, exact_key, extend, have_flags, is_open
from .folded import folds
from .geometry import first_pass, second_pass, sides_of
from .graphs import is_promise, promise_or_trace
from .kept import CannotDefer, Kept, as_own, copy_vectors, is_valueless
from .link import Link
from .plain import Facts, common_dtype, facts, needs_grad
from .promise import RULES, Promise, real
from .state import State
from .traced import CONVOLVE

# ---- the first convolution


class Start(NamedTuple):
    """How a convolution begins a chain."""

    run: Callable[..., Tensor]
    plan: ChainPlan | Single
    shape: torch.Size  # of its output
    dtype: torch.dtype


def begin(begun: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: Any) -> Any:
    """The promise of a convolution; None for what must run at once.

    That is also all that the convolution would refuse.
    """
    given: Any = facts(x), facts(weight), bias is not None and facts(bias)
    if None in given:
        return None
    state = State(x.device)
    if state.forbids_operations or (state.faked and given[0][0] is not FakeTensor):
        return None
    modes = state.grad, state.autocast, state.traced, begun.served
    try:
        start = _start(*given, settings, exact_key(settings), *modes)
    except (TypeError, ValueError):  # sizes of a graph, or settings, that do not hash
        start = _start.__wrapped__(*given, settings, b"", *modes)
    if start is None:
        return None
    try:
        kept = [("input", as_own(x, given[0])), ("weight", Kept(weight, given[1]))]
        if bias is not None:
            kept.append(("bias", Kept(bias, given[2])))
    except CannotDefer:
        return None
    run, plan, shape, dtype = start
    return promise_or_trace(Link(None, run, plan, tuple(kept), state, shape, dtype, begun))


@lru_cache(maxsize=4096)
def _start(
    x: Any, weight: Any, bias: Any, settings: Any, exact: bytes, grad: bool,
    autocast: torch.dtype | None, traced: bool, served: bool,
) -> Start | None:  # fmt: skip
    """How a convolution of tensors with these facts begins; None for what must run at once.

    Args:
        bias: False for none.
        settings: stride, padding, dilation, groups, padding mode and its widths; ``exact``: the
            same with the types of its numbers.
        grad, autocast, traced: of the state.
        served: whether it is of a copy for inference.
    """
    given = [Facts(*f) for f in (x, weight, bias) if f]
    one, *weights = given
    rank = len(one.shape)
    if rank != len(weights[0].shape) or rank not in CONVOLVE or have_flags(settings):
        return None
    if any(f.device != one.device or f.negative for f in given):
        return None
    if not all(f.settled for f in weights):
        return None
    wanted = grad and any(f.grad for f in given)
    if wanted and (one.inference or weights[0].inference):
        return None
    shapes = one.shape, weights[0].shape, len(weights) > 1 and weights[1].shape
    found = first_pass(*shapes, *settings)
    dtype = common_dtype({f.dtype for f in given}, autocast)
    if found is None or dtype is None:
        return None
    plain = not (grad and any(f.grad for f in weights)) and not traced and autocast is None
    if found.pass_ is None and not (served and plain):
        return None
    if traced and one.kind is FakeTensor and wanted:
        return None  # an exported program has no gradient of the operation
    mode = "constant" if settings[-2] == "zeros" else settings[-2]
    padded, how = found.padded, found.how
    convolve = CONVOLVE[rank]

    def run(_: None, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if padded is not None:
            input = F.pad(input, padded, mode)
        return convolve(input, weight, bias, *how)

    plan: ChainPlan | Single = Single(settings)
    if found.pass_ is not None:
        dense = not traced and all(f.contiguous for f in given)
        plan = ChainPlan(
            found.pass_, found.names, tuple(given), dtype, autocast, found.shape,
            dense=dense,
        )  # fmt: skip
    return Start(run, plan, found.shape, dtype)


# ---- what may stand between


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
    if type(input) is not Promise and not is_promise(input):
        return NotImplemented
    link, training = input.link, bool(training)
    given = running_mean, running_var, weight, bias, training, momentum, eps
    if type(link.plan) is not ChainPlan:
        return _norm_elsewhere(input, BatchNorm(*given))
    if not is_open(input):
        return NotImplemented
    frozen: Frozen | None = link.begun.frozen
    if frozen is not None and frozen.holds(link, given):
        return frozen.make_promise(link)
    norm = BatchNorm(*given)
    norm_facts = tuple([t is not None and facts(t) for t in norm[:4]])
    plan = None if None in norm_facts else _plan_with_norm(link, norm, norm_facts)
    if plan is None:
        return NotImplemented
    known: Any = zip(_VECTORS, norm[:4], norm_facts, strict=True)
    vectors = [(n, t, f) for n, t, f in known if f]
    half = None
    if training:
        if link.state.traced:  # in a graph they are counted where they stand
            return NotImplemented
        if not is_valueless(link.convolution.kept[0][1].tensor):
            half = _run_first(link, plan, norm)
            if half is None:
                return NotImplemented
            vectors = [one for one in vectors if one[0] in _AFFINE]  # others are counted by now
    if not training and _are_copied(link.state, norm):
        copies = copy_vectors([(n, t) for n, t, _ in vectors])
        rows = {name: one.tensor for name, one in copies}
        link.begun.frozen = frozen = Frozen(
            link.plan, link.shape, link.state.inference, norm, plan, copies,
            tuple([(t, rows[n], f) for n, t, f in vectors]), tuple(map(rows.get, _IN_ORDER)),
            _bind_norm(norm),
        )  # fmt: skip
        return frozen.make_promise(link)
    try:
        kept = tuple([(n, Kept(t, f)) for n, t, f in vectors])
    except CannotDefer:
        return NotImplemented
    longer = Link(link, _bind_norm(norm), plan, kept, link.state, link.shape, link.dtype)
    longer.norm, longer.half = norm, half
    longer.vectors = (weight, bias) if training else (weight, bias, running_mean, running_var)
    return promise_or_trace(longer)


def _bind_norm(norm: BatchNorm) -> Callable[..., Tensor]:
    """A batch norm as a call of its own."""
    training, momentum, eps = norm[4:7]

    def run(
        u: Tensor, running_mean: Any = None, running_var: Any = None, **affine: Tensor
    ) -> Tensor:
        return F.batch_norm(
            u, running_mean, running_var, **affine, training=training, momentum=momentum, eps=eps
        )

    return run


class Frozen(NamedTuple):
    """A frozen norm as it was when it was called last."""

    before: ChainPlan  # of the chain that it was called of
    shape: torch.Size  # of that one's value
    inference: bool  # whether in inference mode
    norm: BatchNorm
    plan: ChainPlan  # of the chain with it
    kept: tuple[tuple[str, Any], ...]  # its vectors as they were
    watched: tuple[tuple[Tensor, Tensor, Any], ...]  # each vector, as it was, and its facts
    in_order: tuple[Tensor | None, ...]  # as they were, in the order of the operation
    run: Callable[..., Tensor]

    def holds(self, link: Link, given: tuple[Any, ...]) -> bool:
        """Whether a norm of a chain is this one, to the values of its vectors."""
        if link.plan is not self.before or link.shape != self.shape:
            return False
        if link.state.inference is not self.inference:
            return False
        if not all(map(operator.is_, given, self.norm)):
            return False
        # Whoever writes to a vector or to its clone, or asks for the address of one, moves it.
        for t, one, then in self.watched:
            if read_address(t) != read_address(one) or facts(t) != then:
                return False
        return True

    def make_promise(self, link: Link) -> Any:
        """The promise of a chain with it."""
        longer = Link(link, self.run, self.plan, self.kept, link.state, link.shape, link.dtype)
        longer.norm, longer.vectors, longer.reads = self.norm, self.in_order, link.reads
        return promise_or_trace(longer)


_VECTORS = BatchNorm._fields[:4]
_AFFINE = _VECTORS[2:]
_IN_ORDER = *_AFFINE, *_VECTORS[:2]  # of the operation


def _plan_with_norm(link: Link, norm: BatchNorm, norm_facts: tuple[Any, ...]) -> ChainPlan | None:
    """The plan of a chain with a batch norm, or None for what is left to PyTorch.

    ``norm_facts``: of its vectors, False for none.
    """
    numbers: Any = norm.training, norm.eps, type(norm.eps), type(norm.momentum)
    try:
        return _cached_plan_with_norm(link.plan, link.shape, *norm_facts, *numbers)
    except TypeError:
        return _cached_plan_with_norm.__wrapped__(link.plan, link.shape, *norm_facts, *numbers)


@lru_cache(maxsize=4096)
def _cached_plan_with_norm(
    plan: ChainPlan, shape: torch.Size, mean: Any, var: Any, weight: Any, bias: Any,
    training: bool, eps: Any, kind: type, of_momentum: type,
) -> ChainPlan | None:  # fmt: skip
    """The plan of a chain of that shape with a batch norm of vectors with these facts (False for
    none), or None for what is left to PyTorch."""
    if (
        plan.norm is not None
        or plan.activation is not None
        or plan.padded
        or not plan.channels(shape)
    ):
        return None
    if not training and not (mean and var):
        return None
    if {kind, of_momentum} - {int, float}:
        return None
    vectors = [Facts(*f) for f in (mean, var, weight, bias) if f]
    if not _knows_vectors(vectors, eps, training, shape, plan.dtype, plan.given[0].device):
        return None
    asked = mean, var, weight, bias, training, eps, kind
    return change_plan(plan, norm=asked, dense=plan.dense and all(f.contiguous for f in vectors))


def _knows_norm(norm: BatchNorm, p: Promise) -> bool:
    """Whether a batch norm is one that the operation knows, and that PyTorch would not refuse."""
    if not norm.training and (norm.running_mean is None or norm.running_var is None):
        return False
    if {type(norm.momentum), type(norm.eps)} - {int, float}:
        return False
    vectors = [facts(t) for t in norm[:4] if t is not None]
    link = p.link
    known = [Facts(*f) for f in vectors if f is not None]
    if len(known) < len(vectors):
        return False
    return _knows_vectors(known, norm.eps, norm.training, link.shape, link.dtype, link.state.device)


def _knows_vectors(
    vectors: Sequence[Facts], eps: Any, training: bool, shape: torch.Size, dtype: torch.dtype,
    device: torch.device,
) -> bool:  # fmt: skip
    """Whether a batch norm of a value is one that the operation knows."""
    if eps < 0 or (training and (eps == 0 or prod(shape) == shape[1])):  # which PyTorch refuses
        return False
    if any(f.device != device or f.negative or f.shape != shape[1:2] for f in vectors):
        return False
    own = {f.dtype for f in vectors}
    return own in (set(), {dtype}) or (own == {torch.float32} and dtype.itemsize == 2)


def _are_copied(state: State, norm: BatchNorm) -> bool:
    """Whether the vectors of a frozen norm are copied when it is called."""
    if state.kind != "cpu" or state.traced or needs_grad(state, *norm[2:4]):
        return False
    return type(norm.running_mean) in (Tensor, nn.Parameter)


def _norm_elsewhere(input: Any, norm: BatchNorm) -> Any:
    """A norm of what is no first convolution of a pair."""
    if type(input.link.plan) not in (endings.EndingPlan, Single, readings.Reading):
        return NotImplemented
    if not _knows_norm(norm, input):
        return NotImplemented
    if is_open(input, Single):
        return _fold(input.link, norm)
    made = endings.batch_norm(input, norm) if endings.is_ending(input) else NotImplemented
    return readings.batch_norm(input, norm) if made is NotImplemented else made


def _fold(link: Link, norm: BatchNorm) -> Any:
    """A convolution of a copy for inference with the frozen norm behind it."""
    if norm.training or needs_grad(link.state, *norm[:4]) or not link.is_unchanged():
        return NotImplemented
    tensors = {name: kept.tensor for name, kept in link.kept}
    x, weight, bias = tensors["input"], tensors["weight"], tensors.get("bias")
    plan: Single = link.plan
    if not (folds(weight) or _has_kernels(_settings(plan), x, weight, bias)):
        return NotImplemented
    link.begun.misses = 0
    if folds(weight):
        return link.run(None, x, *link.begun.folded((weight, bias), norm))
    stride, padding, dilation, groups, mode = _settings(plan)
    return functional.conv3d(
        x, weight, bias, stride, padding, dilation, groups, padding_mode=mode, output_norm=norm
    )


def _settings(plan: Single) -> tuple[Any, ...]:
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


def _run_first(link: Link, plan: ChainPlan, norm: BatchNorm) -> Any:
    """Run the first convolution, for the pair that it was last in or a likely one.

    ``plan``: of the chain with the norm.
    """
    if plan.names not in ("bcthw", "bchw"):  # whose pixels or clips show later
        return None
    for guess in (link.begun.guess, None):
        known = _guess_pair(plan, guess)
        if known is None:
            continue
        if not link.is_unchanged():
            return None
        x, weight, *bias = [kept.tensor for _, kept in link.convolution.kept]
        first = forms.lift(weight, plan.first.kind == "temporal")
        second = torch.empty_strided(
            known.guess.shape, known.stride, dtype=first.dtype, device=first.device
        )
        if x.dim() == 4:
            x = x.unsqueeze(2)
        tensors = PairTensors(
            x, first, second, bias[0] if bias else None, None, norm.weight, norm.bias
        )
        offset = offset_of(x)
        call = known.checked.get(offset)
        if call is None:
            name, slope = known.guess.activation
            call = known.checked[offset] = functional.check(
                tensors, norm, **known.settings, activation=name, negative_slope=slope
            )
        half = functional.begin(tensors, call, norm)
        return half
    return None


class Guessed(NamedTuple):
    """A pair with a second convolution that is a guess."""

    guess: Guess
    settings: dict[str, Any]  # of ``conv2plus1d``
    stride: tuple[int, ...]  # of the second weight: in the memory format of the first
    checked: dict[int, Any]  # by ``offset_of`` x: what ``functional.check`` has passed


@lru_cache(maxsize=4096)
def _guess_pair(plan: ChainPlan, guess: Guess | None) -> Guessed | None:
    """A chain with such a second convolution, or a likely one; None where that is none."""
    temporal, m = plan.first.kind == "temporal", plan.shape[1]
    if guess is None:
        kernel, padding = ((1, 3, 3), (0, 1, 1)) if temporal else ((3, 1, 1), (1, 0, 0))
        guess = Guess((m, m, *kernel), (1, padding, 1, 1))
    u = plan.shape if len(plan.shape) == 5 else torch.Size((*plan.shape[:2], 1, *plan.shape[2:]))
    found = second_pass(plan.first, (), u, guess.shape, False, *guess.how)
    if found is None:
        return None
    weight = plan.given[1]
    first = forms.lift(torch.empty_strided(weight.shape, weight.stride, device="meta"), temporal)
    rows = first.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if rows else torch.contiguous_format
    second = torch.empty(guess.shape, device="meta", memory_format=layout)
    return Guessed(guess, found[0], second.stride(), {})


def _activation(
    name: str, function: Callable[..., Any], written: bool = False
) -> Callable[..., Any]:
    """The rule of an activation; ``written``: it is the in-place form."""

    def rule(input: Any, *args: Any, **kwargs: Any) -> Any:
        named = _parse_activation(name, args, kwargs)
        if named is None:
            return NotImplemented
        kind, slope, in_place = named
        in_place = in_place or written
        if in_place and slope < 0:  # which backward refuses
            return NotImplemented

        def run(v: Tensor) -> Tensor:
            return activations.apply(kind, v, slope)

        if is_open(input):
            plan = input.link.plan
            if plan.activation is not None or plan.padded:
                return NotImplemented
            plan = change_plan(plan, activation=(kind, slope))
            return extend(input, run, plan, in_place=in_place)
        if endings.is_ending(input):
            made = endings.activation(input, kind, slope, in_place)
            if made is not NotImplemented:
                return made
        return readings.activation(input, kind, slope, run, in_place)

    return rule


def _parse_activation(name: str, args: Any, kwargs: Any) -> tuple[str, float, bool] | None:
    """An activation's name, slope, and whether it is in place, of a call's other arguments."""
    if name == "gelu":
        how = kwargs.get("approximate", args[0] if args else "none")
        kind = {"none": "gelu", "tanh": "gelu_tanh"}.get(how)
        return None if kind is None else (kind, 0.01, False)
    names = ("negative_slope", "inplace") if name == "leaky_relu" else ("inplace",)
    given = {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs
    slope, in_place = given.get("negative_slope", 0.01), given.get("inplace", False)
    if not given.keys() <= set(names) or len(args) > len(names) or type(slope) not in (int, float):
        return None
    if in_place and slope < 0:  # has no backward
        return None
    return name, float(slope), bool(in_place)


# ---- sums and products


def _add(in_place: bool = False) -> Callable[..., Any]:
    def rule(input: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or input is other:
            return NotImplemented
        if endings.is_ending(input):
            made = endings.add(input, real(other, "a sum"), in_place, first=True)
            if made is not NotImplemented:
                return made
        if not in_place and endings.is_ending(other):
            return endings.add(other, real(input, "a sum"), False, first=False)
        if in_place:
            return NotImplemented
        if is_open(input, norms.Root):
            return norms.add_eps(input, other)
        return readings.add(input, other)

    return rule


def _multiply(input: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    if is_promise(input) and is_promise(other):
        made = norms.apply_root(input, other)
        return norms.apply_root(other, input) if made is NotImplemented else made
    if is_promise(input):
        return readings.multiply(input, other)
    return readings.multiply(other, input)


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
    **dict.fromkeys(CONVOLVE.values(), pairs.second),
    **views.RULES,
    **{getattr(F, name): _activation(name, getattr(F, name)) for name in activations.FUNCTIONS},
    torch.relu: _activation("relu", torch.relu),
    Tensor.relu: _activation("relu", torch.relu),
    torch.relu_: _activation("relu", torch.relu_, True),
    Tensor.relu_: _activation("relu", torch.relu_, True),
})  # fmt: skip
