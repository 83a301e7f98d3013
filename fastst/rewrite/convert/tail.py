"""What comes after a pair, and when it may be part of the pair's op.

In training that is a batch norm, which needs statistics of the output. For inference it is what
ends a residual block after its last pair: the op is called where the last of it was, so that
nothing which runs before that may write to what the pair reads.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ...problem import activations
from .match import Chain, Modules, Tail, functional_activation
from .trace import Assign, is_watched

_ADD = (operator.add, torch.add, "add")
_ADD_IN_PLACE = (Assign.iadd, "add_")
# What leaves these is a new tensor.
_NEW = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.pooling._AvgPoolNd)


def find_tails(chains: Iterable[Chain], modules: Modules) -> None:
    """Give each chain of a graph its tail; where two meet in a sum, the first takes it."""
    taken: set[fx.Node] = set()
    for chain in chains:
        tail = follow(chain.convs[1].node, chain.named, modules)
        if taken.isdisjoint(tail.nodes) and not chain.obstacles:
            chain.tail = tail
            taken.update(tail.nodes)


def norm_behind(node: fx.Node, modules: Modules) -> fx.Node | None:
    """The call of a batch norm that alone reads what a node leaves, and is the only one of it.

    It is called as the module that it is wherever it is anything more than that.
    """
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module" or users[0].kwargs:
        return None
    (norm,) = users
    once = [n.target for n in norm.graph.nodes].count(norm.target) == 1
    return norm if once and type(modules(str(norm.target))) is nn.BatchNorm3d else None


def follow(node: fx.Node, inner: tuple[str, float] | None, modules: Modules) -> Tail:
    """The tail behind a node that is the output of a pair with this activation in it."""
    nodes: list[fx.Node] = []
    tail = Tail()
    while len(node.users) == 1:
        node, previous = next(iter(node.users)), node
        nodes.append(node)
        module = modules(str(node.target)) if node.op == "call_module" else None
        if module is not None and is_watched(module):
            break
        if type(module) is nn.Identity:
            continue
        if not tail.nodes:
            for kinds, in_place in ((_ADD, False), (_ADD_IN_PLACE, True)):
                other = _other(node, previous) if node.target in kinds else None
                if other is not None and not (in_place and node.args[0] is other):
                    tail = Tail(tuple(nodes), other, in_place=in_place)
            if tail.nodes:
                continue
        named = functional_activation(node) if module is None else activations.from_module(module)
        if named is not None and _one_slope(named, inner):
            tail = Tail(tuple(nodes), tail.residual, *named, tail.in_place)
        break
    return tail


def _other(node: fx.Node, one: fx.Node) -> fx.Node | None:
    """The other one of two terms, added as they are; None for numbers and for one added twice."""
    if node.kwargs or len(node.args) != 2:
        return None
    others = [a for a in node.args if a is not one]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _one_slope(outer: tuple[str, float], inner: tuple[str, float] | None) -> bool:
    """Whether the op, which has one slope, can run both activations."""
    slopes = {slope for name, slope in (outer, inner or outer) if name == "leaky_relu"}
    return len(slopes) < 2


def why_apart(chain: Chain, modules: Modules) -> str | None:
    """Why the pair cannot run where its tail ends, or None: what runs between might write to it."""
    own = list(chain.calls())
    every = list(own[0].graph.nodes)
    between = every[every.index(own[0]) : every.index(own[-1])]
    for node in between:
        if node not in own and _writes(node, modules, between):
            return f"{node.target} runs before the sum and may write to what the pair reads"
    return None


def _writes(node: fx.Node, modules: Modules, between: Sequence[fx.Node]) -> bool:
    """Whether a call may write to a tensor that was there before the calls between."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    target: Any = node.target
    in_place = bool(
        node.kwargs.get("inplace", False)
        or "out" in node.kwargs
        or any(a is True for a in node.args)
    )
    if node.op == "call_module":
        module = modules(str(target))
        if not type(module).__module__.startswith("torch.nn."):
            return True
        in_place = bool(getattr(module, "inplace", False))
    elif node.op == "call_method":
        in_place = in_place or (target.endswith("_") and not target.endswith("__"))
    elif Assign.has(target):
        in_place = True
    elif target is getattr or getattr(target, "__module__", None) == "_operator":
        in_place = target.__name__ in (*vars(Assign), "setitem")
    elif torch.overrides.resolve_name(target) is None:
        return True
    else:
        in_place = in_place or target.__name__.endswith("_")
    return in_place and not _is_new(node.args[0] if node.args else None, modules, between)


def _is_new(node: Any, modules: Modules, between: Sequence[fx.Node]) -> bool:
    """Whether a node is a tensor that one of the calls between has made."""
    if node not in between or node.op != "call_module":
        return False
    module = modules(str(node.target))
    if type(module) is nn.Identity:
        return _is_new(node.args[0], modules, between)
    return isinstance(module, _NEW)
