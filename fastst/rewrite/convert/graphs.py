"""Promises in a graph that a compiler traces: values that remember what they were made of.

A graph is exact, and forgets what nobody reads. So nothing is put off there: every call is traced
as it stands, and its result remembers its chain. A second convolution that fits takes the pair, and
what lies between is left to the compiler to forget.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._pytree import tree_leaves

from .link import Link
from .promise import RULES, SHAPE_ONLY, Promise, promise, real


def _trace(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """What rules do not know may write to it, or see its memory: then it forgets its chain."""
    kwargs = kwargs or {}
    if func in SHAPE_ONLY:
        with _plain(*args):
            return func(*args, **kwargs)
    rule = RULES.get(func)
    if rule is not None:
        made = rule(*args, **kwargs)
        if made is not NotImplemented:
            return made
    for value in tree_leaves((args, kwargs)):
        forget(value, func)
    return func(*args, **kwargs)


def _dispatch(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Backward reads what it has saved without asking."""
    for value in tree_leaves((args, kwargs)):
        if type(value) in _PLAIN:
            value.__class__ = _PLAIN[type(value)]
    return func(*args, **(kwargs or {}))


class _Functional(FunctionalTensor):
    link: Link
    __torch_function__ = classmethod(_trace)
    __torch_dispatch__ = classmethod(_dispatch)


class _Fake(FakeTensor):
    link: Link
    __torch_function__ = classmethod(_trace)
    __torch_dispatch__ = classmethod(_dispatch)


_REMEMBERING: dict[type, type] = {FunctionalTensor: _Functional, FakeTensor: _Fake}
_PLAIN: dict[type, Any] = {kind: plain for plain, kind in _REMEMBERING.items()}


@contextlib.contextmanager
def _plain(*values: Any) -> Iterator[None]:
    """Within the block these are what every other tensor of the graph is."""
    changed = [v for v in values if type(v) in _PLAIN]
    kinds = [type(v) for v in changed]
    for v in changed:
        v.__class__ = _PLAIN[type(v)]
    try:
        yield
    finally:
        for v, kind in zip(changed, kinds, strict=True):
            v.__class__ = kind


def forget(value: Any, reader: Any) -> None:
    """Let a value of a graph be no promise any more."""
    if type(value) in _PLAIN:
        link: Link = value.link
        link.plan.note_separate(link, f"its output goes to {getattr(reader, '__name__', reader)}")
        value.__class__ = _PLAIN[type(value)]


def is_promise(value: Any) -> bool:
    return type(value) is Promise or type(value) in _PLAIN


def is_unread(p: Any) -> bool:
    """Whether nobody has computed a promise yet, or has written to it in a graph."""
    link: Link = p.link
    return link.value is None or (type(p) is not Promise and _version(link.value) == link.version)


def read_out(value: Any, reader: Any) -> Any:
    """The tensor of a promise, for whoever reads it; anything else as it is."""
    forget(value, reader)
    return real(value, reader)


def promise_or_trace(link: Link) -> Any:
    """The promise of what a link computes."""
    if not link.state.traced:
        return promise(link)
    before = None if link.before is None else link.before.value
    with _plain(before):
        value = link.run(before, **{name: kept.tensor for name, kept in link.kept})
    return before if value is before else _remember(value, link)


def write_in_graph(p: Any, link: Link) -> Any:
    """A value of a graph after what a link computes of it has been written to it."""
    with _plain(p):
        p.copy_(link.run(p, **{name: kept.tensor for name, kept in link.kept}))
    return _remember(p, link)


def _remember(value: Any, link: Link) -> Any:
    link.value, link.version, link.dtype = value, _version(value), value.dtype
    value.__class__ = _REMEMBERING.get(type(value), type(value))
    value.link = link
    return value


def _version(value: Tensor) -> int | None:
    with _plain(value):
        return None if value.is_inference() else value._version
