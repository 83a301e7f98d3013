"""Pairs in a traced graph: by kernels and data flow, never by the name of a class or attribute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import activations
from ..pairing import why_composed

Modules = Callable[[str], nn.Module]  # the module at a path from the root of a graph

_RELU = (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_")


@dataclass
class Chain:
    """Two separable convolutions with only unary steps between them, from the first on."""

    nodes: list[fx.Node]  # from the first convolution to the second
    order: str
    norm: fx.Node | None = None
    activation: fx.Node | None = None
    named: tuple[str, float] | None = None  # of a functional activation
    obstacles: list[str] = field(default_factory=list)  # why it is no pair

    @property
    def first(self) -> str:
        return str(self.nodes[0].target)

    @property
    def second(self) -> str:
        return str(self.nodes[-1].target)


def separable(module: nn.Module) -> str | None:
    """ "spatial" or "temporal" for a 3D convolution that does something along these axes only."""
    kernel = getattr(module, "kernel_size", None)
    stride = getattr(module, "stride", None)
    if not (isinstance(kernel, tuple) and isinstance(stride, tuple) and len(kernel) == 3):
        return None
    if len(stride) != 3 or not hasattr(module, "in_channels"):
        return None
    acts = [k != 1 or s != 1 for k, s in zip(kernel, stride, strict=True)]
    if acts[0] and not any(acts[1:]):
        return "temporal"
    return "spatial" if any(acts[1:]) and not acts[0] else None


def find(graph: fx.Graph, modules: Modules) -> tuple[list[Chain], dict[str, str]]:
    """Chains between separable convolutions, pairs and near-pairs, disjoint, in order of execution.

    Args:
        graph: of one module.
        modules: gives the module at a path from that root.

    Returns:
        The chains; and for each separable convolution that begins none, what its output meets.
    """
    called = [n for n in graph.nodes if n.op == "call_module"]
    times = Counter(n.target for n in called)
    chains, loose, taken = [], {}, set()
    for node in called:
        kind = separable(modules(str(node.target)))
        if kind is None or node in taken:
            continue
        chain = _follow(node, kind, modules)
        if isinstance(chain, str):
            loose[str(node.target)] = chain
            continue
        for n in chain.nodes:
            if n.op == "call_module" and times[n.target] > 1 and _has_state(modules, n):
                chain.obstacles.append(f"{n.target} is called {times[n.target]} times")
        if not chain.obstacles:
            taken.update(chain.nodes)
        chains.append(chain)
    return chains, loose


def _has_state(modules: Modules, node: fx.Node) -> bool:
    return len(modules(str(node.target)).state_dict()) > 0


def _follow(first: fx.Node, kind: str, modules: Modules) -> Chain | str:
    """The chain that begins at a convolution, or what stands in its way to another one."""
    chain = Chain([first], f"{kind}-first")
    node = first
    while True:
        if len(node.users) != 1:
            where = "its output" if node is first else f"the output of {_name(node)}"
            return f"{where} is used {len(node.users)} times"
        node = next(iter(node.users))
        if node.op == "output":
            return "its output leaves the module before another convolution"
        chain.nodes.append(node)
        module = modules(str(node.target)) if node.op == "call_module" else None
        other = separable(module) if module is not None else None
        if other is not None:
            if other == kind:
                return f"its output goes to {node.target}, which is {other} too"
            return chain
        if module is not None and hasattr(module, "kernel_size"):
            return f"its output goes to {node.target}, a {type(module).__name__}"
        if len(node.all_input_nodes) != 1:
            return f"its output goes to {_name(node)} together with others"
        _step(chain, node, module)


def _step(chain: Chain, node: fx.Node, module: nn.Module | None) -> None:
    """Take a unary step into the chain, as norm, activation, nothing, or an obstacle."""
    if type(module) is nn.Identity:
        return
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not chain.norm and not _acted(chain):
        chain.norm = node
        return
    named = functional_activation(node)
    known = named is not None
    if module is not None:
        known = activations.from_module(module) is not None
    if known and not _acted(chain):
        chain.activation, chain.named = node, named
        return
    second = "a second activation, " if known else ""
    what = _name(node) if module is None else f"{node.target}, a {type(module).__name__},"
    chain.obstacles.append(f"{second}{what} stands between")


def _acted(chain: Chain) -> bool:
    return chain.activation is not None


def functional_activation(node: fx.Node) -> tuple[str, float] | None:
    """Name and slope of an activation called as a function or method of a tensor."""
    if node.op not in ("call_function", "call_method"):
        return None
    options = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    rest = node.args[1:]
    if node.target in _RELU and not options and len(rest) <= 1:
        return "relu", 0.01
    if node.target is F.silu and not options and len(rest) <= 1:
        return "silu", 0.01
    if node.target is F.hardswish and not options and len(rest) <= 1:
        return "hardswish", 0.01
    if node.target is F.gelu and not rest and options.keys() <= {"approximate"}:
        return ("gelu" if options.get("approximate", "none") == "none" else "gelu_tanh"), 0.01
    if node.target is F.leaky_relu and options.keys() <= {"negative_slope"} and len(rest) <= 1:
        slope: Any = rest[0] if rest else options.get("negative_slope", 0.01)
        return "leaky_relu", float(slope)
    return None


def why_unfit(chain: Chain, modules: Modules) -> str | None:
    """Why the modules of a chain cannot run as one op as they stand, or None."""
    nodes = [n for n in chain.nodes if n.op == "call_module"]
    for node in nodes:
        module = modules(str(node.target))
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            return f"{node.target} is lazy: it has no weights before its first call"
        if torch.nn.utils.parametrize.is_parametrized(module):
            return f"{node.target} is parametrized"
        for name, p in module.named_parameters(recurse=False):
            if p.is_meta:
                return f"{node.target}.{name} is on the meta device"
            if not p.is_floating_point() or type(p.data) is not torch.Tensor:
                return f"{node.target}.{name} is quantised or a tensor of another class"
    get = lambda node: None if node is None else modules(str(node.target))  # noqa: E731
    act = None if chain.named is not None else get(chain.activation)
    return why_composed(
        modules(chain.first), get(chain.norm), act, modules(chain.second), chain.order
    )


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))
