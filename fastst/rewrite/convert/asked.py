"""Who asks for the gradient of a promise: hooks, ``retain_grad``, ``grad`` and ``inputs=``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .link import needs_gradient
from .promise import OURS, Promise, needs_clone, real, settle


def _ask(*args: Any, **kwargs: Any) -> Any:
    """
    Raises:
        RuntimeError: for the gradient of what lies in an operation, which never forms it.
    """
    for p in tree_leaves((args, kwargs)):
        if type(p) is Promise and p.link.taken and p.requires_grad:
            raise RuntimeError(
                f"fastst: the output of {p.link.name or 'the convolution'}, or what a norm or "
                "an activation has made of it, is part of an operation that has run; ask for its "
                "gradient before the next convolution reads it, or leave the convolution out with "
                "fastst.convert(..., skip=...)"
            )
        _mark_asked(p)
    return NotImplemented


def _mark_asked(p: Any) -> Any:
    """What is made of a promise goes by its value from now on."""
    if type(p) is Promise and needs_gradient(p):
        p.link.asked = True
    return NotImplemented


def _grad_fn(p: Any) -> Any:
    """Its node is that of the value, of which there is to be one for all who read it."""
    _mark_asked(p)
    if type(p) is Promise and needs_gradient(p) and not torch.compiler.is_compiling():
        settle(p)
    return NotImplemented


def _grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    """
    Raises:
        RuntimeError: for the gradient of what C++ has read, whose graph knows leaves only.
    """
    _ask(outputs, inputs)
    asked = {p.link for p in tree_leaves(inputs) if type(p) is Promise}
    for node in _graph(outputs) if asked else ():
        link = node.link if isinstance(node, OURS) else None
        while link is not None:
            if link in asked:
                raise needs_clone(link)
            link = link.before
    return NotImplemented


def _graph(outputs: Any) -> set[Any]:
    """All nodes that backward of some tensors, or of edges, may come to."""
    found: set[Any] = set()
    ahead = [getattr(real(t), "grad_fn", t) for t in tree_leaves(outputs)]
    while ahead:
        node = ahead.pop()
        if node not in found and hasattr(node, "next_functions"):
            found.add(node)
            ahead += [following for following, _ in node.next_functions]
    return found


def _backward(tensors: Any, *args: Any, inputs: Any = None, **kwargs: Any) -> Any:
    return NotImplemented if inputs is None else _grad(tensors, inputs)


_GRAD_FN: Any = Tensor.grad_fn  # of the class: what reads it
# By function: refuses, notes, or nothing.
RULES: dict[Any, Callable[..., Any]] = {
    Tensor.register_hook: _ask, Tensor.retain_grad: _ask,
    Tensor.backward: _backward, torch.autograd.backward: _backward, torch.autograd.grad: _grad,
    _GRAD_FN.__get__: _grad_fn,
}  # fmt: skip
