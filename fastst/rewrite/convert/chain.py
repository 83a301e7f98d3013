"""A first convolution and what follows it: what is known of that, and how it grows.

What is decided of a chain is decided by facts alone, once: a ``ChainPlan`` is one object for all
chains that are alike, and what may follow it is remembered by it and by what the next call is
given.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .axes import Axes, Dim, whole_dims
from .geometry import Separable
from .graphs import is_promise, is_unread, promise_or_trace, write_in_graph
from .kept import Kept
from .layouts import dtype_under_autocast
from .link import Link
from .padding import Pad
from .plain import Facts
from .promise import Promise, is_current, promise, write_to


class Guess(NamedTuple):
    """What a pair that is only begun may go on with."""

    shape: Sequence[int]  # of the second weight, which has five axes
    how: tuple[Any, ...]  # stride, padding, dilation and groups
    activation: tuple[str, float] = "relu", 0.01


@dataclass(frozen=True, eq=False)
class ChainPlan:
    """What a chain of calls is, as one operation; compared by identity.

    Attributes:
        given: x, weight and bias of the first convolution.
        dtype: of its output.
        autocast: under which it was called.
        shape: of its output.
    """

    first: Separable
    names: str  # of the axes of its input
    given: tuple[Facts, ...]
    dtype: torch.dtype
    autocast: torch.dtype | None
    shape: torch.Size
    norm: tuple[Any, ...] | None = None  # all that was asked of a batch norm
    activation: tuple[str, float] | None = None
    pads: tuple[Pad, ...] = ()  # before the second convolution, where ``axes`` is None
    axes: Axes | None = None  # None where the dimensions are those that the convolution left
    dense: bool = False  # whether all tensors are contiguous, and none is turned

    def note_separate(self, link: Link, why: str) -> None:
        """A chain is computed as separate calls."""
        if link.convolution.taken:
            link.begun.note_waste(ending=False)
        else:
            link.begun.note_miss(link, why)

    @property
    def padded(self) -> bool:
        return bool(self.pads or (self.axes is not None and self.axes.padded))

    def axes_of(self, shape: torch.Size) -> Axes:
        """What the dimensions of a value of this shape are; none of it is padded yet."""
        return self.axes or Axes(whole_dims(self.names, shape))

    def channels(self, shape: torch.Size) -> bool:
        """Whether dimension 1 still is that of the channels."""
        if self.axes is None:
            return True
        c: Dim = whole_dims("c", self.shape[1:2])[0]
        return self.axes.dims[1] == c


@lru_cache(maxsize=4096)
def _change_plan(plan: ChainPlan, **changes: Any) -> ChainPlan:
    return replace(plan, **changes)


def change_plan(plan: ChainPlan, **changes: Any) -> ChainPlan:
    """The plan of a chain with one more call."""
    try:
        return _change_plan(plan, **changes)
    except TypeError:  # sizes of a graph do not hash
        return replace(plan, **changes)


def exact_key(settings: tuple[Any, ...]) -> bytes:
    """Settings of a convolution with the types of their numbers: 1.0 equals 1, and PyTorch refuses
    it.

    Raises:
        ValueError: there are others than tuples, numbers and names among them.
    """
    return marshal.dumps(settings, 2)


def have_flags(settings: Sequence[Any]) -> bool:
    """Whether there are truth values among numbers, where PyTorch refuses them."""
    return any(have_flags(s) if isinstance(s, tuple) else type(s) is bool for s in settings)


class Single(NamedTuple):
    """A convolution that begins no pair: a frozen norm behind it may be part of it."""

    settings: tuple[Any, ...]  # stride, padding, dilation, groups, padding mode and its widths

    def note_separate(self, link: Link, why: str) -> None:
        link.begun.note_miss(link, why)


def is_open(p: Any, kind: type = ChainPlan) -> bool:
    """Whether nobody has computed a promise yet, or asked for the gradient of what it is made of,
    and its state is still the current one, in which autograd sees it as it was made."""
    if type(p) is not Promise and not is_promise(p):
        return False
    link: Link | None = p.link
    assert link is not None
    if type(link.plan) is not kind or not (link.value is None or is_unread(p)):
        return False
    if not is_current(p):
        return False
    while link is not None:
        if link.asked:
            return False
        link = link.before
    return True


def extend(
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
    state, dtype = link.state, link.dtype
    if state.autocast is not None and not (kept or state.traced):
        dtype = dtype_under_autocast(run, link.shape, dtype, state.device)
    longer = Link(link, run, plan, kept, state, shape or link.shape, dtype)
    if state.traced:
        return write_in_graph(p, longer) if in_place else promise_or_trace(longer)
    return write_to(p, longer) if in_place else promise(longer)


def as_view(p: Any, call: Callable[[Tensor], Tensor], shape: torch.Size, plan: Any) -> Any:
    """The promise of what ``call`` makes of an open one's value: its memory, or a copy of it."""
    link = p.link
    longer = Link(link, call, plan, (), link.state, shape, link.dtype)
    link.see(longer)
    return promise_or_trace(longer)
