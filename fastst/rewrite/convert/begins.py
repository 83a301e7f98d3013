"""What ``convert`` puts on a convolution: an object in the place of its ``_conv_forward``.

``type(m)``, ``m.forward``, parameters, hooks and keys stay what they were. Whatever a forward does
before and after it calls the convolution itself happens as it stands, subclasses included. Copies,
shallow ones too, and pickles get an object of their own; a tool that replaces ``_conv_forward``
takes its place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ... import dispatch
from ...nn.pair_of_modules import RECOMPUTE, Answer, has_hooks
from . import pairs, replaced, rules, traced
from .chain import ChainPlan, Guess
from .folded import Folded
from .graphs import is_promise, read_out
from .promise import hear_of_data
from .state import in_transform, sees_functions

ATTRIBUTE = "_conv_forward"
_REDUCE = "__reduce_ex__"  # by which copies and pickles of the convolution are made
_FORWARDS = tuple(kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d))
_LONGEST = 64  # calls between two promises of a convolution that never pairs
_PATIENCE = 4  # chains in a row that end nowhere, before the convolution is asked less often


class Event(NamedTuple):
    """What became of a promise."""

    begun: Begins  # of the convolution
    plan: Any
    why: str | None = None  # it was computed as it stood; None for a pair
    second: Begins | None = None  # of a pair; None for a function
    norm: Any = None  # of a pair, as ``functional`` has it


_listeners: list[list[Event]] = []


@contextmanager
def listening() -> Iterator[list[Event]]:
    """Collect what becomes of promises within the block, process-wide."""
    events: list[Event] = []
    _listeners.append(events)
    try:
        yield events
    finally:
        _listeners[:] = [one for one in _listeners if one is not events]


def tell(event: Event) -> None:
    for events in _listeners:
        events.append(event)


class Begins(Answer):
    """The convolution itself, answered with a promise where it may be the first of a pair."""

    reads = False  # whether it can take in what stands before it

    def __init__(self, conv: Any, name: str, wanted: bool, barred: bool) -> None:
        # It has this: a model is freed with its last user.
        self._conv: Callable[[], Any] = weakref.ref(conv)
        self.name = name  # in the model that was converted
        self.wanted = wanted  # by only=
        self.barred = barred  # by skip=
        self.misses = self.waits = 0
        self.wastes = 0  # pairs that ran though somebody read what lies in them, or ran twice
        self.missed_followers = 0  # outputs in a row that were promised, and of which nothing came
        self.served = False  # whether it is of a copy for inference
        self.folded = Folded()
        self.frozen: Any = None  # the frozen norm that was called of its output last
        self.key = traced.register(self)
        self.guess: Guess | None = None  # the second convolution of its last pair, or a likely one

    def __call__(self, x: Any, weight: Any, bias: Any) -> Tensor:
        conv = self._conv()
        how = (conv.stride, conv.padding, conv.dilation, conv.groups)
        mode, widths = conv.padding_mode, None
        if mode != "zeros":
            widths = tuple(conv._reversed_padding_repeated_twice)
        if not torch.compiler.is_dynamo_compiling():
            return self.answer(x, weight, bias, how, mode, widths)
        known = traced.LOWERS and traced.finds_convolutions() and _is_pytorchs(conv)
        if known and traced.can_hold(*how):
            traced.allow()
            return traced.convolution(self.key, x, weight, bias, *how, mode, widths)
        return type(conv)._conv_forward(conv, x, weight, bias)

    def answer(self, x: Any, weight: Any, bias: Any, how: Any, mode: str, widths: Any) -> Tensor:
        """The promise of the convolution, the pair that it is the second of, or its output."""
        conv = self._conv()
        if type(x) is not Tensor and is_promise(x):
            if self.barred or not self._speaks() or type(x.link.plan) is not ChainPlan:
                x = read_out(x, f"{type(conv).__name__} {self.name}")
            else:
                x.link.ends = self
                if mode != "zeros":
                    return type(conv)._conv_forward(conv, x, weight, bias)
                made = pairs.second(x, weight, bias, *how)
                if made is not NotImplemented:
                    return made
                x = read_out(x, f"{type(conv).__name__} {self.name}")
        if not self.barred and self._defers():
            made = rules.begin(self, x, weight, bias, (*how, mode, widths))
            if made is not None:
                return made
        return type(conv)._conv_forward(conv, x, weight, bias)

    def answers_for(self, module: nn.Module) -> bool:
        return self.conv is module

    @property
    def conv(self) -> Any:
        """The convolution, or None where nobody has it any more."""
        return self._conv()

    def reduce(self, protocol: Any) -> Any:
        """The convolution, for ``copy`` and ``pickle``: what they make of it has one of these for
        itself. That of a shallow copy would else read the settings of the original."""
        kind: Any = type(self.conv)
        made = kind.__reduce_ex__(self.conv, protocol)
        if isinstance(made, str) or len(made) < 3 or ATTRIBUTE not in (made[2] or ()):
            return made  # its class has another way
        make, args, state, *rest = made
        own = {**self.__getstate__(), "conv": None}
        state = {n: v for n, v in state.items() if n not in (ATTRIBUTE, _REDUCE)}
        return (_rebuild, (type(self), own, make, args), state, *rest)

    @property
    def selection(self) -> tuple[bool, bool]:
        return self.wanted, self.barred

    @property
    def recompute(self) -> bool | None:
        conv = self._conv()
        found: bool | None = None if conv is None else vars(conv).get(RECOMPUTE)
        return found

    def _defers(self) -> bool:
        """Whether to promise now: not where calling it may do more than its class says."""
        if self.waits and not torch.compiler.is_compiling():
            self.waits -= 1
            return False
        return self._speaks() and not in_transform()

    def _speaks(self) -> bool:
        """Whether it may answer for its convolution: not where calling that one may do more than
        PyTorch's own, or where somebody sees all that is asked of its tensors."""
        conv = self._conv()
        hooked = has_hooks(conv) or torch_module._has_any_global_hook()  # of its call, of all calls
        return not (hooked or sees_functions()) and _is_pytorchs(conv)

    def note_waste(self, ending: bool) -> None:
        """A promise was read although it is part of an operation: something is computed twice."""
        if torch.compiler.is_compiling():
            return
        self.wastes += 1
        if self.wastes >= _PATIENCE and ending:
            self.served = False
        elif self.wastes >= _PATIENCE:
            self.waits = _LONGEST

    def awaits_follower(self, state: Any) -> bool:
        """Whether to promise the output of an operation: a norm in training may follow, or what the
        next convolution reads."""
        conv = self._conv()
        if (conv is None or not conv.training) and (state.grad or not self.reads):
            return False
        self.missed_followers += 1
        return self.missed_followers <= _PATIENCE or self.missed_followers % _LONGEST == 0

    def __getstate__(self) -> dict[str, Any]:
        state = {n: v for n, v in self.__dict__.items() if n != "_conv"}
        return {**state, "folded": Folded(), "frozen": None, "conv": self.conv}

    def __setstate__(self, state: dict[str, Any]) -> None:
        conv = state.pop("conv")
        self.__dict__.update(state, key=traced.register(self))
        if conv is not None:
            self._conv = weakref.ref(conv)

    def expect(self, conv: Any) -> None:
        """Guess the second convolution of its first pair."""
        if self.guess is None and len(conv.kernel_size) == 3:
            shape = conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size
            self.guess = Guess(shape, (conv.stride, conv.padding, conv.dilation, conv.groups))

    def note_pair(self, link: Any, second: Guess) -> None:
        """A pair runs as one operation."""
        self.misses, self.guess = 0, second
        if _listeners:
            tell(Event(self, link.plan, second=link.ends, norm=link.norm))

    def note_miss(self, link: Any, why: str) -> None:
        """A promise was computed as it stands. After some in a row, fewer and fewer are made."""
        dispatch.record_composed(self.name or "the convolution", why)
        tell(Event(self, link.plan, why))
        if torch.compiler.is_compiling():
            return
        self.misses += 1
        if self.misses >= _PATIENCE:
            self.waits = min(2 ** (self.misses - _PATIENCE + 2), _LONGEST)


def put_on(begins: Begins) -> None:
    """Let it answer for its convolution."""
    hear_of_data()
    vars(begins.conv).update({ATTRIBUTE: begins, _REDUCE: begins.reduce})


def take_off(conv: Any) -> None:
    for name in (ATTRIBUTE, _REDUCE):
        vars(conv).pop(name, None)


def _rebuild(kind: type[Begins], state: dict[str, Any], make: Any, args: Any) -> Any:
    """A convolution as ``reduce`` has it, without its attributes."""
    begins, conv = kind.__new__(kind), make(*args)
    begins.__setstate__({**state, "conv": conv})
    put_on(begins)
    return conv


def _is_pytorchs(conv: Any) -> bool:
    """Whether a convolution, and the functions that a chain stands for, compute what PyTorch's do:
    tools replace the method of a class, or a function of ``torch.nn.functional``."""
    return type(conv)._conv_forward in _FORWARDS and replaced.are_pytorchs()
