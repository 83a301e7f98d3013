"""What follows a pair and can be part of its operation: norm, sum with a shortcut, activation.

The output of a pair is a promise only where something may come of it: before a batch norm in
training, which takes the statistics that the pair's last kernel forms, and in copies for inference,
where a whole residual block ends in its last pair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...functional import BatchNorm
from .folded import folds
from .kept import CannotDefer, Kept, as_own
from .layouts import Call, as_separate, call
from .link import Link
from .promise import Promise, is_current, promise, write_to
from .state import State


class EndingPlan(NamedTuple):
    """What a chain behind a pair is, as part of its operation."""

    begun: Any  # the ``Begins`` of the first convolution
    run: Callable[..., Tensor]  # the pair, of its tensors and what ends it
    slope: float | None  # of leaky_relu, which both activations share
    sums: bool  # whether it can take a shortcut in
    norm: BatchNorm | None = None
    residual: bool = False
    ran: tuple[list[None], ...] = ()  # an element for each time that the pair has run
    activation: str | None = None
    calls: tuple[Call, ...] = ()  # that all of it stands for
    viewed: bool = False  # whether some of them turn dimensions

    def note_separate(self, link: Link, why: str) -> None:
        """The pair runs, once if all goes well."""
        if self.ran[0]:
            self.begun.note_waste(ending=True)
        self.ran[0].append(None)

    @property
    def computed(self) -> EndingPlan:
        """What is left of it when it has run."""
        return EndingPlan(self.begun, _ran, None, False)

    def finish(self, _: None, **given: Any) -> Tensor:
        """The pair with all that ends it."""
        options: dict[str, Any] = {}
        if self.residual:
            options["residual"] = given["residual"]
        if self.activation is not None:
            options["outer_activation"] = self.activation
            if self.slope is not None:
                options["negative_slope"] = self.slope
        if self.norm is not None:
            prefix = "outer "
            changed: dict[str, Any] = {
                n[len(prefix) :]: t for n, t in given.items() if n.startswith(prefix)
            }
            norm = self.norm._replace(**changed)
            second = given["second weight"], given.get("second bias")
            if folds(second[0]):
                options["second"] = self.begun.folded(second, norm)
            else:
                options["outer_norm"] = norm
        y = self.run(given, **options)
        return as_separate(y, lambda: self.calls, given, self.viewed)


def _ran(*_: Any) -> Tensor:
    """In the place of an operation that has run."""
    raise AssertionError


class PendingOperation(NamedTuple):
    """An operation that is about to run."""

    begun: Any  # the ``Begins`` of the first convolution
    run: Callable[..., Tensor]  # of its tensors, by name
    tensors: dict[str, Tensor]
    shape: torch.Size
    dtype: torch.dtype
    slope: float | None  # of leaky_relu, which both activations share
    sums: bool  # whether it can take a shortcut of that shape in
    calls: Callable[[], tuple[Call, ...]]  # that it stands for
    viewed: bool  # whether some of them turn dimensions
    held: Kept | None = None  # what holds the first of its tensors already

    def keep(self) -> tuple[tuple[str, Kept], ...]:
        """
        Raises:
            CannotDefer: a tensor cannot be kept, or cached frames are of memory that others write
                to: the output may leave the model, and be read when they have.
        """
        held = self.held
        kept = {}
        for name, t in self.tensors.items():
            if held is not None and t is held.tensor and not held.foreign:
                kept[name] = held
            else:
                kept[name] = as_own(t) if name == "first input" else Kept(t)
        if any(kept[name].foreign for name in ("first input", "past") if name in kept):
            raise CannotDefer
        return tuple(kept.items())


def is_deferred(begun: Any, x: Tensor, state: State) -> bool:
    """Whether something may come of a promise of what an operation that begins with x gives."""
    if state.traced:  # a compiler fuses what follows by itself
        return False
    served = begun.served and not (state.grad and x.requires_grad)
    # What hooks are to save must have been computed under them.
    if state.hooks is not None:
        return False
    return (served and state.autocast is None) or bool(begun.awaits_follower(state))


def defer(op: PendingOperation, state: State) -> Tensor:
    """The promise of an operation's output, or that itself where nothing would tell of writes;
    ``state``: that of now."""
    with contextlib.suppress(CannotDefer):
        kept = op.keep()
        plan = EndingPlan(
            op.begun, op.run, op.slope, op.sums,
            ran=([],), calls=op.calls(), viewed=op.viewed,
        )  # fmt: skip
        return promise(Link(None, plan.finish, plan, kept, state, op.shape, op.dtype, op.begun))
    return compute(op)


def compute(op: PendingOperation) -> Tensor:
    """The output of an operation."""
    return as_separate(op.run(op.tensors), op.calls, op.tensors, op.viewed)


def is_ending(p: Any) -> bool:
    """Whether a promise is one of this module that nobody has read."""
    if type(p) is not Promise or type(p.link.plan) is not EndingPlan or p.link.value is not None:
        return False
    return is_current(p) and p.link.is_unchanged()


def batch_norm(p: Promise, norm: BatchNorm) -> Any:
    """In training with the statistics of the pair's kernel; a frozen one waits for what follows."""
    plan: EndingPlan = p.link.plan
    if plan.norm is not None or plan.residual or plan.activation is not None:
        return NotImplemented
    if norm.training:
        if p.link.shape.numel() == p.link.shape[1]:  # which PyTorch refuses
            return NotImplemented
        plan.begun.missed_followers = 0
        p.link.take()
        given = {name: kept.tensor for name, kept in p.link.kept}
        y = plan.run(given, outer_norm=norm)
        return as_separate(y, lambda: plan.calls, given, plan.viewed)
    if not plan.begun.served:
        return NotImplemented
    tensors = {n: t for n, t in zip(norm._fields, norm[:4], strict=False) if t is not None}
    return _extend(p, {f"outer {n}": t for n, t in tensors.items()}, norm=norm)


def add(p: Promise, other: Any, in_place: bool, first: bool) -> Any:
    """The sum with a shortcut of the same shape and dtype; ``first``: the shortcut is what is added
    to the promise."""
    plan: EndingPlan = p.link.plan
    if not plan.sums or plan.residual or plan.activation is not None or type(other) is not Tensor:
        return NotImplemented
    link = p.link
    if (other.shape, other.dtype, other.device) != (link.shape, link.dtype, link.state.device):
        return NotImplemented
    if not (plan.begun.served or plan.begun.reads) or (p.link.state.grad and other.requires_grad):
        return NotImplemented
    summed = _sum if first or in_place else _other_sum
    calls = (*plan.calls, call(summed, {"residual": "residual"}))
    return _extend(p, {"residual": other}, in_place, residual=True, calls=calls)


def _sum(y: Tensor, residual: Tensor) -> Tensor:
    return y + residual


def _other_sum(y: Tensor, residual: Tensor) -> Tensor:
    return residual + y


def activation(p: Promise, kind: str, slope: float, in_place: bool) -> Any:
    """The last of what the operation can end in."""
    plan: EndingPlan = p.link.plan
    if plan.activation is not None or not plan.begun.served:
        return NotImplemented
    if kind == "leaky_relu" and plan.slope not in (None, slope):
        return NotImplemented
    shared = slope if kind == "leaky_relu" else plan.slope
    return _extend(p, {}, in_place, activation=kind, slope=shared)


def _extend(p: Promise, tensors: dict[str, Tensor], in_place: bool = False, **changes: Any) -> Any:
    link = p.link
    if in_place and any(view() is not None for view in link.views):  # which see what is written
        return NotImplemented
    plan: EndingPlan = link.plan._replace(**changes)
    try:
        kept = tuple((name, Kept(t)) for name, t in tensors.items())
    except CannotDefer:
        return NotImplemented
    if link.state.grad and any(k.needs_grad for _, k in (*link.kept, *kept)):
        return NotImplemented  # y has a gradient of its own
    if any(k.foreign for name, k in kept if name == "residual"):
        return NotImplemented
    longer = Link(
        None, plan.finish, plan, (*link.kept, *kept), link.state, link.shape, link.dtype,
        link.begun,
    )  # fmt: skip
    return write_to(p, longer) if in_place else promise(longer)
