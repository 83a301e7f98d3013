"""Pairs in a traced graph: by kernels and data flow, never by the name of a class or attribute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ...nn import pair_of_modules
from ...problem import activations
from .padding import Pad, explicit_padding, first_frames, merge

Modules = Callable[[str], nn.Module]  # the module at a path from the root of a graph

_RELU = (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_")
_UNARY = {F.silu: "silu", F.hardswish: "hardswish"}


@dataclass(frozen=True)
class Conv:
    """A 3D convolution in a graph, called as a module or with the weight of one."""

    node: fx.Node
    path: str  # of the module
    kind: str  # "spatial" | "temporal"
    stride: tuple[int, ...]
    padding: Pad
    dilation: tuple[int, ...]
    groups: int
    plain: bool  # the call of a module that is exactly nn.Conv3d


@dataclass(frozen=True)
class Tail:
    """What follows a pair and can be part of its op: the sum with a shortcut, an activation."""

    nodes: tuple[fx.Node, ...] = ()  # in order of execution
    residual: fx.Node | None = None
    activation: str = "none"
    slope: float = 0.01
    in_place: bool = False  # the shortcut is added into the output of the pair

    def computes(self) -> tuple[object, ...]:
        return self.residual is not None, self.activation, self.slope, self.in_place


@dataclass
class Chain:
    """Two separable convolutions with only unary steps between them, from the first on."""

    convs: list[Conv]
    nodes: list[fx.Node]  # all but convolutions, in order
    obstacles: list[str] = field(default_factory=list)  # why it is no pair
    norm: fx.Node | None = None
    activation: fx.Node | None = None
    named: tuple[str, float] | None = None  # of the activation
    pads: tuple[list[Pad], list[Pad]] = field(default_factory=lambda: ([], []))
    source: fx.Node | None = None  # what the first convolution, or its padding, reads
    tail: Tail = field(default_factory=Tail)
    outer_norm: fx.Node | None = None  # of the output, which only it reads

    @property
    def order(self) -> str:
        return f"{self.convs[0].kind}-first"

    @property
    def names(self) -> tuple[str, str]:
        """Paths of the two convolutions."""
        return self.convs[0].path, self.convs[1].path

    @property
    def plain(self) -> bool:
        """Whether modules alone say what is computed."""
        return all(c.plain for c in self.convs) and not any(self.pads)

    def calls(self) -> Iterable[fx.Node]:
        """All nodes, in order of execution."""
        every = {c.node for c in self.convs} | {*self.nodes, *self.tail.nodes, self.outer_norm}
        return (n for n in self.convs[0].node.graph.nodes if n in every)


def separable(module: nn.Module) -> str | None:
    """ "spatial" or "temporal" for a 3D convolution that does something along these axes only."""
    kernel, stride = getattr(module, "kernel_size", None), getattr(module, "stride", None)
    if not (isinstance(kernel, tuple) and isinstance(stride, tuple)):
        return None
    if not len(kernel) == len(stride) == 3 or not hasattr(module, "in_channels"):
        return None
    acts = [k != 1 or s != 1 for k, s in zip(kernel, stride, strict=True)]
    if acts[0] and not any(acts[1:]):
        return "temporal"
    return "spatial" if any(acts[1:]) and not acts[0] else None


def find(graph: fx.Graph, modules: Modules) -> tuple[list[Chain], dict[str, str]]:
    """Chains between separable convolutions, pairs and near-pairs, in order of execution.

    Args:
        graph: of one module.
        modules: gives the module at a path from that root.

    Returns:
        The chains, of which those without obstacles are disjoint; and for each separable
        convolution that begins none, what its output meets.
    """
    convs = {n: c for n in graph.nodes if (c := _conv(n, modules)) is not None}
    times = Counter(c.path for c in convs.values())
    times.update(n.target for n in graph.nodes if n.op == "call_module" and n not in convs)
    chains: list[Chain] = []
    loose: dict[str, str] = {}
    taken: set[fx.Node] = set()
    for node, conv in convs.items():
        if node in taken:
            continue
        chain = _follow(conv, convs, modules)
        if isinstance(chain, str):
            loose[conv.path] = chain
            continue
        used = [*chain.names, *(str(n.target) for n in (chain.norm,) if n is not None)]
        chain.obstacles += [f"{p} is called {times[p]} times" for p in used if times[p] > 1]
        if not chain.obstacles:
            taken.update(c.node for c in chain.convs)
        chains.append(chain)
    return chains, loose


def _conv(node: fx.Node, modules: Modules) -> Conv | None:
    """The separable convolution that a node calls."""
    if node.op == "call_module":
        module = modules(str(node.target))
        kind = separable(module)
        if kind is None or not isinstance(module, nn.Conv3d):
            return None
        padding = Pad(tuple(pair_of_modules.sides_of(module)), module.padding_mode)
        return Conv(
            node, str(node.target), kind, module.stride, padding, module.dilation, module.groups,
            type(module) is nn.Conv3d,
        )  # fmt: skip
    if node.op != "call_function" or node.target is not torch.conv3d:
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    weight = given["weight"]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    path, _, name = str(weight.target).rpartition(".")
    bias = given.get("bias")
    if not path or name != "weight" or separable(modules(path)) is None:
        return None
    if bias is not None and getattr(bias, "target", None) != f"{path}.bias":
        return None
    numbers = [given.get("stride", 1), given.get("padding", 0), given.get("dilation", 1)]
    triples = [(v,) * 3 if isinstance(v, int) else v for v in numbers]
    groups = given.get("groups", 1)
    if not all(_ints(t) and len(t) == 3 for t in triples) or not isinstance(groups, int):
        return None
    stride, margin, dilation = triples
    kind = separable(modules(path))
    assert kind is not None
    sides = Pad(tuple((p, p) for p in margin), "zeros")
    return Conv(node, path, kind, tuple(stride), sides, tuple(dilation), groups, False)


def _ints(values: object) -> bool:
    return isinstance(values, (tuple, list)) and all(isinstance(v, int) for v in values)


def _follow(first: Conv, convs: dict[fx.Node, Conv], modules: Modules) -> Chain | str:
    """The chain that begins at a convolution, or what stands in its way to another one."""
    chain = Chain([first], [])
    node = first.node
    while True:
        copied = first_frames(node)
        if copied is not None:
            nodes, pad = copied
            chain.nodes += nodes
            chain.pads[1].append(pad)
            node = nodes[-1]
            continue
        if len(node.users) != 1:
            where = "its output" if node is first.node else f"the output of {_name(node)}"
            return f"{where} is used {len(node.users)} times"
        node = next(iter(node.users))
        if node.op == "output":
            return "its output leaves the module before another convolution"
        if node in convs:
            other = convs[node]
            if other.kind == first.kind:
                return f"its output goes to {other.path}, which is {first.kind} too"
            chain.convs.append(other)
            _absorb_padding(chain, modules)
            return chain
        module = modules(str(node.target)) if node.op == "call_module" else None
        if module is not None and hasattr(module, "kernel_size"):
            return f"its output goes to {node.target}, a {type(module).__name__}"
        if len(node.all_input_nodes) != 1:
            return f"its output goes to {_name(node)} together with others"
        chain.nodes.append(node)
        _step(chain, node, module)


def _step(chain: Chain, node: fx.Node, module: nn.Module | None) -> None:
    """Take a unary step into the chain: norm, activation, padding, nothing, or an obstacle."""
    if type(module) is nn.Identity:
        return
    pad = explicit_padding(node, module)
    if pad is not None:
        chain.pads[1].append(pad)
        return
    early = chain.activation is None and not chain.pads[1]
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and chain.norm is None and early:
        chain.norm = node
        return
    named = functional_activation(node)
    if module is not None:
        named = activations.from_module(module)
    if named is not None and early:
        chain.activation, chain.named = node, named
        return
    what = f"{node.target}, a {type(module).__name__}," if module is not None else _name(node)
    chain.obstacles.append(f"{what} stands between")


def _absorb_padding(chain: Chain, modules: Modules) -> None:
    """Take the padding before the first convolution into the chain, and check all of it."""
    node = chain.convs[0].node
    while True:
        source = node.all_input_nodes[0]
        module = modules(str(source.target)) if source.op == "call_module" else None
        pad = explicit_padding(source, module)
        nodes = [source]
        if pad is None:
            for origin in source.all_input_nodes:
                copied = first_frames(origin, among_others=True)
                if copied is not None and copied[0][-1] is source:
                    nodes, pad = copied
        if pad is None or len(source.users) != 1:
            break
        chain.nodes[:0] = nodes
        chain.pads[0].insert(0, pad)
        node = nodes[0]
    chain.source = node.all_input_nodes[0]
    for conv, pads in zip(chain.convs, chain.pads, strict=True):
        merged = merge([*pads, conv.padding], conv.kind)
        if isinstance(merged, str):
            chain.obstacles.append(f"{conv.path}: {merged}")


def functional_activation(node: fx.Node) -> tuple[str, float] | None:
    """Name and slope of an activation called as a function or method of a tensor."""
    if node.op not in ("call_function", "call_method"):
        return None
    options = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    rest = node.args[1:]  # inplace, or the slope
    if node.target in _RELU and not options and len(rest) <= 1:
        return "relu", 0.01
    if node.target in _UNARY and not options and len(rest) <= 1:
        return _UNARY[node.target], 0.01
    if node.target is F.gelu and not rest and options.keys() <= {"approximate"}:
        return ("gelu" if options.get("approximate", "none") == "none" else "gelu_tanh"), 0.01
    if node.target is F.leaky_relu and options.keys() <= {"negative_slope"} and len(rest) <= 1:
        slope = rest[0] if rest else options.get("negative_slope", 0.01)
        return ("leaky_relu", float(slope)) if isinstance(slope, (int, float)) else None
    return None


def why_altered(modules: Modules, paths: Iterable[str]) -> str | None:
    """Why the parameters of some modules are not plain tensors with values, or None."""
    for path in paths:
        module = modules(path)
        if isinstance(module, nn.modules.lazy.LazyModuleMixin):
            return f"{path} is lazy: it has no weights before its first call"
        if torch.nn.utils.parametrize.is_parametrized(module):
            return f"{path} is parametrized"
        for name, p in module.named_parameters(recurse=False):
            if p.is_meta:
                return f"{path}.{name} is on the meta device"
            if not p.is_floating_point() or type(p.data) is not torch.Tensor:
                return f"{path}.{name} is quantised or a tensor of another class"
    return None


def why_unfit(chain: Chain, modules: Modules) -> str | None:
    """Why the modules of a chain cannot run as one op as they stand, or None."""
    norm = None if chain.norm is None else str(chain.norm.target)
    altered = why_altered(modules, [*chain.names, *([] if norm is None else [norm])])
    if altered is not None:
        return altered
    act = chain.activation
    return pair_of_modules.why_foreign(
        {
            f"convolution {c.path}": modules(c.path)
            for c in chain.convs
            if c.node.op == "call_module"
        },
        {f"norm {norm}": None if norm is None else modules(norm)},
        {f"activation {act}": modules(str(act.target))} if act and act.op == "call_module" else {},
    )


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))
