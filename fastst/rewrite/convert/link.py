"""One call in a chain: what it computes, of what, and what has become of its value."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .kept import CannotDefer, Kept
from .layouts import Call, Names, call
from .state import State

if TYPE_CHECKING:
    from .promise import Promise

unseen = torch._C.DisableTorchFunctionSubclass  # promises are to C++ what they are within it
Gates = Mapping[Tensor, Tensor]
NO_GATES: Gates = MappingProxyType({})


class Link:
    """One call in a chain: how to compute it, and what all calls up to it are as one operation.

    Attributes:
        before: the link whose value is the first argument; None for a convolution.
        run: computes the value from that of ``before``.
        begun: the ``Begins`` of its first convolution, or of the operation whose output it is of.
        plan: what ``rules`` know of the chain up to here.
        kept: the other tensors that the call reads; ``reads``: all that the chain reads.
        state: in which it was called.
        value: the result, once somebody wanted it; ``held``: it as it was then, while others may
            read it; ``edge``: where gradients of it went then; ``written``: the node that has made
            what it is since; ``unseen``: a write was noticed too late to tell who read it.
        readers: how many links have this one before them.
        views: links that see the memory of the value, or a copy of it; ``sees``: this is one;
            ``viewed``: this or one before it is.
        taken: whether an operation, whose gradients pass it by, has it within.
        asked: whether somebody has asked for its gradient; ``separate``: or for one before it, so
            that no operation may take it in any more.
        promise: of the value, as long as anybody has it.
        norm: the batch norm of the chain; ``vectors``: its weight, bias, mean and variance, as they
            are read; ``half``: what the first pass has left, where one in training asked for it.
        ends: the ``Begins`` of the second convolution, where that has one.
    """

    __slots__ = (
        "__weakref__", "asked", "before", "begun", "dtype", "edge", "ends", "half", "held", "kept",
        "norm", "plan", "promise", "readers", "reads", "run", "sees", "shape", "state", "taken",
        "unseen", "value", "vectors", "version", "viewed", "views", "written",
    )  # fmt: skip

    def __init__(
        self,
        before: Link | None,
        run: Callable[..., Tensor],
        plan: Any,
        kept: tuple[tuple[str, Kept], ...],
        state: State,
        shape: Any,
        dtype: torch.dtype,
        begun: Any = None,
    ) -> None:
        self.before, self.run, self.plan, self.kept, self.state = before, run, plan, kept, state
        self.shape, self.dtype = shape, dtype
        self.value: Tensor | None = None
        self.held: Kept | None = None
        self.version: int | None = None
        self.edge: GradientEdge | None = None
        self.written: Any = None
        self.unseen = False
        self.readers, self.sees, self.taken, self.asked = 0, False, False, False
        self.promise: Callable[[], Promise | None] = _nobody
        self.views: list[weakref.ref[Link]] = []
        if before is None:
            self.begun, self.reads, self.viewed = begun, kept, False
            self.norm: Any = None
            self.vectors: tuple[Tensor | None, ...] = ()
            self.half: Any = None
            self.ends: Any = None
            return
        self.begun, self.viewed = before.begun, before.viewed
        self.norm, self.vectors = before.norm, before.vectors
        self.half, self.ends = before.half, before.ends
        before.readers += 1
        self.reads = (*before.reads, *kept) if kept else before.reads
        if before.value is not None:
            before.hold()

    @property
    def name(self) -> str:
        """What messages call it."""
        name: str = self.begun.name
        return name

    @property
    def convolution(self) -> Link:
        """The first link of the chain."""
        link = self
        while link.before is not None:
            link = link.before
        return link

    def tensors(self) -> list[Tensor]:
        return [kept.tensor for _, kept in self.reads]

    def is_unchanged(self) -> bool:
        """Whether all that the chain reads is what it was."""
        for _, kept in self.reads:  # noqa: SIM110 -- in less time
            if not kept.same:
                return False
        return True

    def let_go(self) -> None:
        for _, kept in self.reads:
            kept.let_go()

    def calls(self, first: Names, others: Names, source: Link | None = None) -> tuple[Call, ...]:
        """All calls up to this one, of a chain that begins behind ``source``, and by which names
        tensors of its first call and of the others are known."""
        names = first if self.before is source else others
        own = call(self.run, {name: names[name] for name, _ in self.kept})
        if self.before is source or self.before is None:
            return (own,)
        return *self.before.calls(first, others, source), own

    def take(self) -> None:
        """Say that an operation has it within, with all that is before it."""
        link: Link | None = self
        while link is not None:
            link.taken, link = True, link.before

    @property
    def separate(self) -> bool:
        link: Link | None = self
        while link is not None and not link.asked:
            link = link.before
        return link is not None

    def compute(self, reader: Any = "C++") -> Tensor:
        """The value, as separate calls make it, for whoever reads it."""
        if self.value is None:
            self.plan.note_separate(
                self, f"its output goes to {getattr(reader, '__name__', reader)}"
            )
        return self._settle()

    def computed(self) -> Link:
        """It without what only computing needs, once the value is there: that outlives the rest.

        Backward of a custom function may compute again what needs a gradient.
        """
        state = self.state
        if state.traced or not (self.kept or self.before):
            return self
        if state.grad and any(kept.needs_grad for _, kept in self.reads):
            return self
        plan = getattr(self.plan, "computed", None)
        left = Link(None, _gone, plan, (), state, self.shape, self.dtype, self.begun)
        left.value, left.held, left.version = self.value, self.held, self.version
        left.edge, left.written, left.unseen = self.edge, self.written, self.unseen
        left.sees, left.viewed, left.taken = self.sees, self.viewed, self.taken
        return left

    def hold(self) -> None:
        """Notice writes to the value from now on, also those that no version counter tells of."""
        if self.value is None or self.held is not None or self.state.traced:
            return
        with contextlib.suppress(CannotDefer):
            self.held = Kept(self.value)

    def see(self, view: Link) -> None:
        """Take up a link that may see the memory of the value."""
        view.sees = view.viewed = True
        self.views.append(weakref.ref(view))

    def _settle(self) -> Tensor:
        """The value; what sees its memory is made with it, before anybody can write to it."""
        source = None
        if self.value is None and self.before is not None:  # whose value may come with this one
            source = self.before._settle() if self.sees else self.before.current_value()
        if self.value is None:
            self.value = value = self._compute(source)
            self.version = None if value.is_inference() else value._version
            self.written = node = value.grad_fn
            self.edge = None if node is None else GradientEdge(node, value.output_nr)
            if self.readers:
                self.hold()
            for view in filter(None, (ref() for ref in self.views)):
                view._settle()
        return self.value

    def _fresh_value(self) -> Tensor:
        """The value in memory of its own, whatever has been written to another one."""
        if self.run is _gone and self.held is not None:
            return self.held.get(output_of(self), grad=False, ended=False)
        return self._compute(None if self.before is None else self.before.current_value())

    def _compute(self, source: Tensor | None, gates: Gates = NO_GATES) -> Tensor:
        what, state = self.name or "the model", self.state
        ended = state.hooks is not None and not state.hooked
        with _leaves_as_they_were(kept for _, kept in self.kept if kept.switched):
            tensors = {
                name: kept.get(f"{name} of {what}", state.grad, ended) for name, kept in self.kept
            }
            given = {name: gates.get(t, t) for name, t in tensors.items()} if gates else tensors
            if state.hooks is not None:
                self.let_go()
            with state.restored():
                value = self.run(source, **given)
        return value

    def compute_again(self, gates: Gates = NO_GATES) -> Tensor:
        """The value with a graph of its own; ``gates``: what it reads in the place of tensors."""
        return self._compute(
            None if self.before is None else self.before.compute_again(gates), gates
        )

    def replay(self, source: Link, value: Tensor) -> Tensor:
        """What the calls after a link make of another value than that of the link."""
        if self is source:
            return value
        assert self.before is not None
        return self._compute(self.before.replay(source, value))

    def current_value(self, keep: bool = False) -> Tensor:
        """The value for the link after this one: kept, if anybody else may want it too, or its
        gradient."""
        if self.value is None:
            if keep or self.readers > 1:
                return self.compute()
            return self._settle() if self._has_gradient() else self._fresh_value()
        if self.steady:
            return self.value
        if self.asked:  # another value would have no hooks
            raise RuntimeError(
                f"fastst: {output_of(self)} was written to after its gradient was asked for and "
                "before what reads it was computed; write to a clone"
            )
        return self._fresh_value()

    def _has_gradient(self) -> bool:
        """Whether somebody may still ask for its gradient."""
        promise = self.promise()
        return promise is not None and needs_gradient(promise)

    @property
    def lasts(self) -> bool:
        """Whether the value is there and can still be had as it is now after a write to it."""
        if not self.steady:
            return False
        self.hold()
        return self.run is not _gone or not (self.held is None or self.held.foreign)

    @property
    def steady(self) -> bool:
        """Whether the value, if it is there, has not been written to."""
        if self.value is None:
            return True
        if self.held is not None:
            return self.held.same
        return not self.value.is_inference() and self.value._version == self.version


def _gone(*_: Any) -> Tensor:
    """In the place of a call whose value is there."""
    raise AssertionError


def _nobody() -> None:
    """In the place of a reference to a promise."""


@contextlib.contextmanager
def _leaves_as_they_were(switched: Iterator[Kept]) -> Iterator[None]:
    """Within the block leaves need a gradient that needed one when they were read."""
    leaves = [kept.tensor for kept in switched]
    for leaf in leaves:
        leaf.requires_grad_(not leaf.requires_grad)
    try:
        yield
    finally:
        for leaf in leaves:
            leaf.requires_grad_(not leaf.requires_grad)


def needs_gradient(p: Promise) -> bool:
    with unseen():
        return p.requires_grad


def output_of(link: Link) -> str:
    return f"the output of {link.name or 'the convolution'}"
