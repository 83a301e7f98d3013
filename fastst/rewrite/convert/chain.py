"""A first convolution and what follows it: what is known of that, and how it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...functional import BatchNorm
from .axes import Axes, Dim, whole
from .geometry import Pass
from .graphs import is_promise, promised, rewritten, unread
from .kept import Kept
from .padding import Pad
from .promise import Link, is_current, replace


class Guess(NamedTuple):
    """What a pair that is only begun may go on with."""

    shape: Sequence[int]  # of the second weight, which has five axes
    how: tuple[Any, ...]  # stride, padding, dilation and groups
    activation: tuple[str, float] = "relu", 0.01


class Convolved:
    """A first convolution: what it reads, the shape of its output, whether an operation has it.

    No link: chains that hold themselves would keep what they read until somebody collects them.
    """

    __slots__ = ("kept", "shape", "taken")

    def __init__(self, link: Link) -> None:
        self.kept, self.shape, self.taken = link.kept, link.shape, False


class Plan(NamedTuple):
    """What a chain of calls is, as one operation."""

    begun: Any  # the ``Begins`` of the first convolution
    name: str  # what messages call it
    first: Pass
    names: str  # of the axes of its input
    convolution: Convolved
    norm: BatchNorm | None = None
    activation: tuple[str, float] | None = None
    pads: tuple[Pad, ...] = ()  # before the second convolution, where ``axes`` is None
    axes: Axes | None = None  # None where the dimensions are those that the convolution left
    ends: Any = None  # the ``Begins`` of the second one, where it has one
    half: Any = None  # what the first pass has left, where a norm in training asked for it

    def normed(self, norm: BatchNorm, half: Any) -> Plan:
        return Plan(*self[:5], norm, *self[6:10], half)

    def activated(self, kind: str, slope: float) -> Plan:
        return Plan(*self[:6], (kind, slope), *self[7:])

    def ended(self, ends: Any) -> Plan:
        return Plan(*self[:9], ends, self.half)

    def convolved(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, weight and bias of the first convolution."""
        x, weight, *bias = [kept.tensor for _, kept in self.convolution.kept]
        return x, weight, bias[0] if bias else None

    def told(self, why: str) -> None:
        """The chain is computed as separate calls."""
        if self.convolution.taken:
            self.begun.wasted(ending=False)
        else:
            self.begun.missed(self, why)

    @property
    def padded(self) -> bool:
        return bool(self.pads or (self.axes is not None and self.axes.padded))

    def axes_of(self, shape: torch.Size) -> Axes:
        """What the dimensions of a value of this shape are; none of it is padded yet."""
        return self.axes or Axes(whole(self.names, shape))

    def channels(self, shape: torch.Size) -> bool:
        """Whether dimension 1 still is that of the channels."""
        if self.axes is None:
            return True
        c: Dim = whole("c", self.convolution.shape[1:2])[0]
        return self.axes.dims[1] == c


class Alone(NamedTuple):
    """A convolution that begins no pair: a frozen norm behind it may be part of it."""

    begun: Any
    name: str
    settings: tuple[Any, ...]  # stride, padding, dilation, groups, padding mode and its widths

    def told(self, why: str) -> None:
        self.begun.missed(self, why)


def is_open(p: Any, kind: type = Plan) -> bool:
    """Whether nobody has computed a promise yet, or asked for the gradient of what it is made of,
    and its state is still the current one, in which autograd sees it as it was made."""
    if not (is_promise(p) and type(p.link.plan) is kind and unread(p)):
        return False
    return is_current(p) and not p.link.separate


def extended(
    p: Any,
    run: Callable[..., Tensor],
    plan: Any,
    kept: tuple[tuple[str, Kept], ...] = (),
    shape: torch.Size | None = None,
    in_place: bool = False,
) -> Any:
    """The promise of what ``run`` makes of an open one's value, in memory of its own or in place.

    Others that see the same memory must see what is written to it: that is left to PyTorch.
    """
    link = p.link
    if in_place and (link.sees or any(view() is not None for view in link.views)):
        return NotImplemented
    state = link.state
    longer = Link(link, run, plan, kept, state, shape or link.shape, link.dtype)
    if in_place:
        return rewritten(p, longer) if state.traced else replace(p, longer)
    return promised(longer)


def seen(p: Any, call: Callable[[Tensor], Tensor], shape: torch.Size, plan: Any) -> Any:
    """The promise of what ``call`` makes of an open one's value: its memory, or a copy of it."""
    link = p.link
    longer = Link(link, call, plan, (), link.state, shape, link.dtype)
    link.see(longer)
    return promised(longer)
