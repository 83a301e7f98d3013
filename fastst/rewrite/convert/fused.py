"""Converted modules: the same objects, with a forward in which pairs of modules run as one op.

A converted module keeps its children, parameters, buffers, hooks and attributes; only its class
changes, to a subclass of its own whose forward runs the rewritten graph. Calls, or changes of the
module, that the graph was not made for run the original forward.
"""

from __future__ import annotations

import importlib
import linecache
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

from ... import dispatch
from ...nn.pair_of_modules import Ending, pair_forward, run_pair, tell_apart
from ...problem import activations
from ...problem.spec import ACTIVATIONS
from .match import Chain
from .padding import Pad, merge
from .probe import Whole, run_whole
from .trace import CannotTrace, Parameters, is_watched

# One module of each functional activation: they have no state.
_ACTIVATIONS = {name: activations.to_module(name) for name in ACTIVATIONS}


@dataclass(frozen=True)
class Pair:
    """Paths, from the converted module, of the modules that run as one op."""

    first: str
    norm: str | None
    activation: str  # its name
    second: str
    order: str
    residual: bool = False  # whether the op adds a shortcut
    outer: str = "none"  # name of the activation of its output
    outer_norm: str | None = None  # the batch norm of its output, if the op computes that


@dataclass(frozen=True)
class Plan:
    """What the forward of a converted module is."""

    source: str  # of a function run(self, *required)
    imports: tuple[tuple[str, str, str], ...]  # name in the source, module, qualified name
    pairs: tuple[Pair, ...]
    opened: tuple[tuple[str, type[nn.Module], int], ...]  # path, class, number of children
    children: int  # of the module itself
    normed: tuple[tuple[str, str], ...] = ()  # parts that end in a pair, and the norm after each
    ends_in_pair: bool = False  # whether what the forward returns is what a pair leaves
    rank: int | None = None  # of the input, where another one has no pair in it


class Converted:
    """Mixed into the class of a module while ``fastst.convert`` has replaced its pairs."""

    _original: type[nn.Module]
    _plan: Plan

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Slices of an nn.Sequential construct their own class: they are no converted modules.
        # Without arguments it is a replica, which is given the attributes of this one.
        return cls._original(*args, **kwargs) if args or kwargs else object.__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self._original, self._plan), self.__dict__

    def __setattr__(self, name: str, value: Any) -> None:
        if _matters(self, name, value):
            kind, pairs = self._original.__name__, self._plan.pairs
            revert_module(self)
            if pairs:
                dispatch.fall_back(
                    kind, f"its attribute {name!r} changed after fastst.convert; convert again"
                )
            setattr(self, name, value)
        else:
            super().__setattr__(name, value)


def _matters(module: Any, name: str, value: Any) -> bool:
    """Whether an assignment may change what the original forward would compute."""
    if name == "training" or name.startswith("_") or name == "forward":
        return False
    children = module.__dict__.get("_modules", {})
    if name in children:  # looked up at each call, but for None and opened ones
        parts = {path.split(".")[0] for path, _, _ in module._plan.opened}
        is_leaf = isinstance(value, nn.Module) and children[name] is not None
        return not is_leaf or name in parts
    old = module.__dict__.get(name, value)
    if old is value:
        return False
    comparable = isinstance(old, (bool, int, float, str, tuple, type(None)))
    return not comparable or type(old) is not type(value) or bool(old != value)


def is_converted(module: nn.Module) -> bool:
    return isinstance(module, Converted)


def is_direct(module: nn.Module) -> bool:
    """Whether nothing has changed the class of a converted module since."""
    return "_plan" in type(module).__dict__


def convs_of(plan: Plan) -> list[str]:
    """Paths, from the converted module, of the convolutions in its pairs."""
    return [path for pair in plan.pairs for path in (pair.first, pair.second)]


def revert_module(module: Any) -> None:
    """Give a converted module its own class back."""
    object.__setattr__(module, "__class__", module._original)


def apply(module: nn.Module, plan: Plan) -> None:
    """Give a module the forward of a plan."""
    module.__class__ = _class_of(type(module), plan)


def ends_in_pair(module: nn.Module) -> bool:
    """Whether a module can be told of a norm that is applied to what it returns."""
    kind = type(module)
    return "forward_normed" in vars(kind) and kind.__call__ is nn.Module.__call__


def call_normed(norm: nn.Module, module: nn.Module, *args: Any) -> Tensor:
    """norm(module(*args)), with statistics from the last pair of the module where it gives some.

    The module is called, and then the norm, wherever that may be more than what its class says.
    """
    if torch.compiler.is_compiling():  # the compiler fuses a norm with what follows
        return norm(module(*args))
    own = vars(type(module)).get("forward_normed")
    if own is None:
        why = "the module before it was exchanged, reverted or given another class"
    elif is_watched(module) or module._compiled_call_impl is not None:
        why = "the module that ends in the pair has hooks, or was compiled"
    elif torch_module._has_any_global_hook():
        why = "global module hooks are registered"
    else:
        return own(module, norm, *args)
    y = module(*args)
    tell_apart(norm, why)
    return norm(y)


def _rebuild(original: type[nn.Module], plan: Plan) -> Any:
    module = original.__new__(original)
    object.__setattr__(module, "__class__", _class_of(original, plan))
    return module


_classes: dict[tuple[type[nn.Module], Plan], type[nn.Module]] = {}


def _class_of(original: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The class of converted modules; the same for the same plan, so that compilers reuse code."""
    key = (original, plan)
    if key not in _classes:
        body = {
            "_original": original, "_plan": plan, **_forwards(original, plan),
            "__module__": original.__module__, "__doc__": original.__doc__,
        }  # fmt: skip
        _classes.setdefault(key, type(f"Fused{original.__name__}", (Converted, original), body))
    return _classes[key]


_FORWARD = """\
def forward({signature}):
    if rank is not None and isinstance({first}, Tensor) and {first}.dim() != rank:
        return original.forward({call})
    why = why_not(({required},), ({optional}), ({variadic}), ({opened}), self)
    if why is None:
        return run(self, {required})
    if loses_pairs:
        fall_back({label!r}, why)
        return original.forward({call})
    y = original.forward({call})
    record_composed({label!r}, why)
    return y

def forward_normed(self, norm, {required}):
    why = why_not(({required},), given, (), ({opened}), self)
    if why is None and rank in (None, {first}.dim()):
        return run(self, {required}, norm)
    return norm(forward(self, {required}))
"""


def _forwards(original: type[nn.Module], plan: Plan) -> dict[str, Callable[..., Any]]:
    """A forward with the parameters of the original one, which runs the plan where it may.

    With it, where that ends in a pair, one that applies a norm to what it returns.
    """
    p = Parameters.of(original)
    expected = tuple((kind, children) for _, kind, children in plan.opened)

    def why_not(required: Any, optional: Any, variadic: Any, opened: Any, self: Any) -> str | None:
        if len(self._modules) != plan.children:
            return "it has more or fewer children than when it was converted"
        return _why_not(p, expected, required, optional, variadic, opened)

    source = _FORWARD.format(
        signature=p.declaration(),
        first=p.required[0],
        call=p.call(),
        required=", ".join(p.required),
        optional="".join(f"{n}, " for n in p.optional),
        variadic="".join(f"{n}, " for n in p.variadic),
        opened="".join(f"{_expression(path)}, " for path, _, _ in plan.opened),
        label=original.__name__,
    )
    namespace = {
        "why_not": why_not, "run": _compile(plan, original), "original": original,
        "fall_back": dispatch.fall_back, "record_composed": dispatch.record_composed,
        "loses_pairs": bool(plan.pairs), "rank": plan.rank, "Tensor": Tensor,
        "defaults": p.optional, "given": (*p.optional.values(),),
    }  # fmt: skip
    made = _execute(source, f"forward of a converted {original.__qualname__}", namespace)
    return {n: made[n] for n in ("forward", "forward_normed")[: 1 + plan.ends_in_pair]}


def _why_not(
    parameters: Parameters,
    expected: Sequence[tuple[type[nn.Module], int]],
    required: Sequence[Any],
    optional: Sequence[Any],
    variadic: Sequence[Any],
    opened: Sequence[nn.Module],
) -> str | None:
    """Why a call is not one that the plan was made for, or None."""
    for name, value in zip(parameters.required, required, strict=True):
        if not isinstance(value, Tensor):
            return f"its argument {name!r} is a {type(value).__name__}, not a tensor"
    for (name, default), value in zip(parameters.optional.items(), optional, strict=True):
        same = value is default or (isinstance(value, (bool, int, float, str)) and value == default)
        if not same:
            return f"its argument {name!r} is given"
    if any(variadic):
        return "it is called with arguments that it does not name"
    for module, (kind, children) in zip(opened, expected, strict=True):
        if type(module) is not kind or len(module._modules) != children:
            return f"its {kind.__name__} has changed since fastst.convert"
        if is_watched(module):
            return f"its {kind.__name__} has hooks"
    return None


# ---- source code of a plan


def plan_of(
    module: nn.Module,
    graph: fx.Graph,
    opened: Sequence[str],
    chains: Sequence[Chain],
    normed: Sequence[tuple[fx.Node, fx.Node]],
) -> Plan:
    """Rewrite a graph so that each chain is one call, and write it down. Consumes the graph.

    Args:
        normed: calls of modules that end in a pair, and of the norm after each: one call, too.

    Raises:
        CannotTrace: the graph calls a function that cannot be imported by name.
    """
    pairs, watched = [], list(opened)
    made: dict[fx.Node | None, fx.Node] = {}  # by the convolution whose output it is
    bare: set[fx.Node] = set()  # outputs of convolutions
    for chain in chains:
        nodes, tail = list(chain.calls()), chain.tail
        source = made.get(chain.source, chain.source)
        with graph.inserting_before(nodes[-1] if tail.nodes else nodes[0]):
            call = _plain_call if chain.plain else _call
            ending = {}
            if tail.nodes:
                added = made.get(tail.residual, tail.residual)
                values = (added, tail.activation, tail.slope, tail.in_place)
                ending["ending"] = graph.call_function(Ending, values)
            if chain.outer_norm is not None:
                ending["outer_norm"] = graph.get_attr(str(chain.outer_norm.target))
            y = call(module, graph, chain, source, ending)
        nodes[-1].replace_all_uses_with(y)
        made[nodes[-1]] = y
        if nodes[-1] is chain.convs[1].node:
            bare.add(y)
        for node in reversed(nodes):
            graph.erase_node(node)
        norm = None if chain.norm is None else str(chain.norm.target)
        act = "none" if chain.named is None else chain.named[0]
        after = None if chain.outer_norm is None else str(chain.outer_norm.target)
        end = (tail.residual is not None, tail.activation, after)
        pairs.append(Pair(chain.names[0], norm, act, chain.names[1], chain.order, *end))
        # Nothing else would see that these have changed.
        used = [str(n.target) for n in tail.nodes if n.op == "call_module"]
        if not chain.plain:
            between = [n for n in (chain.norm, chain.activation) if n and n.op == "call_module"]
            used += [*chain.names, *(str(n.target) for n in between)]
        watched += [p for p in dict.fromkeys(used) if p not in watched]
    for node, norm_node in normed:
        with graph.inserting_before(node):
            parts = [graph.get_attr(str(n.target)) for n in (norm_node, node)]
            y = graph.call_function(call_normed, (*parts, *node.args))
        norm_node.replace_all_uses_with(y)
        graph.erase_node(norm_node)
        graph.erase_node(node)
    returned: Any = graph.output_node().args[0]
    ends_in_pair = isinstance(returned, fx.Node) and returned in bare and len(returned.users) == 1
    if ends_in_pair:
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            norm_node = graph.placeholder("outer_norm", default_value=None)
        returned.update_kwarg("outer_norm", norm_node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    code = graph.python_code("self")
    kinds = []
    for path in watched:
        m = module.get_submodule(path)
        kinds.append((path, type(m), len(m._modules)))
    imports = _imports(code.globals, code.src)
    return Plan(
        code.src, imports, tuple(pairs), tuple(kinds), len(module._modules),
        tuple((str(a.target), str(b.target)) for a, b in normed), ends_in_pair,
    )  # fmt: skip


def plan_of_whole(module: nn.Module, whole: Whole) -> Plan:
    """The plan of a module that as a whole is a pair."""
    (x,) = Parameters.of(type(module)).required
    paths = (whole.spatial, whole.temporal, whole.norm, whole.tail_norm)
    modules = ", ".join("None" if p is None else _expression(p) for p in paths)
    norm, given = ", outer_norm=None", ", outer_norm=outer_norm"
    if not whole.ends_in_pair:
        norm = given = ""
    source = (
        f"def forward(self, {x}{norm}):\n"
        f"    return run_whole({x}, {modules}, order={whole.order!r}, "
        f"activation={whole.activation!r}, padding={whole.padding!r}, "
        f"temporal_mode={whole.temporal_mode!r}, "
        f"tail_activation={whole.tail_activation!r}{given})\n"
    )
    convs = (whole.spatial, whole.temporal)
    first, second = convs if whole.order == "spatial-first" else convs[::-1]
    pair = Pair(first, whole.norm, whole.activation[0], second, whole.order)
    below = list(module.named_modules())[1:]
    return Plan(
        source, (("run_whole", run_whole.__module__, "run_whole"),), (pair,),
        tuple((path, type(m), len(m._modules)) for path, m in below), len(module._modules),
        ends_in_pair=whole.ends_in_pair, rank=5,
    )  # fmt: skip


def _plain_call(
    module: nn.Module, graph: fx.Graph, chain: Chain, source: Any, ending: dict[str, fx.Node]
) -> fx.Node:
    """Settings are read off the modules at each call."""
    norm = None if chain.norm is None else graph.get_attr(str(chain.norm.target))
    act = None
    if chain.activation is not None and chain.activation.op == "call_module":
        act = graph.get_attr(str(chain.activation.target))
    elif chain.named is not None:
        act = graph.call_function(functional_activation, chain.named)
    first, second = map(graph.get_attr, chain.names)
    return graph.call_function(
        pair_forward, (source, first, norm, act, second), {"order": chain.order, **ending}
    )


def _call(
    module: nn.Module, graph: fx.Graph, chain: Chain, source: Any, ending: dict[str, fx.Node]
) -> fx.Node:
    """Settings are those that the trace has seen."""
    convs = {
        c.kind: (c, merge([*pads, c.padding], c.kind))
        for c, pads in zip(chain.convs, chain.pads, strict=True)
    }
    (spatial, around), (temporal, along) = convs["spatial"], convs["temporal"]
    assert isinstance(around, Pad) and isinstance(along, Pad)
    tensors: list[Any] = [source]
    for name in ("weight", "bias"):
        for c in (spatial, temporal):
            there = getattr(module.get_submodule(c.path), name) is not None
            tensors.append(graph.get_attr(f"{c.path}.{name}") if there else None)
    norm = None if chain.norm is None else graph.get_attr(str(chain.norm.target))
    activation, slope = chain.named or ("none", 0.01)
    settings: dict[str, Any] = {
        "stride": (temporal.stride[0], *spatial.stride[1:]),
        "padding": (along.sides[0], *around.sides[1:]),
        "dilation": (temporal.dilation[0], *spatial.dilation[1:]),
        "groups": (spatial.groups, temporal.groups),
        "padding_mode": (around.mode, along.mode),
        "activation": activation,
        "negative_slope": slope,
        "order": chain.order,
    }
    return graph.call_function(run_pair, (*tensors, norm), settings | ending)


def functional_activation(name: str, slope: float) -> nn.Module:
    """A module of an activation that the source calls as a function."""
    return nn.LeakyReLU(slope) if name == "leaky_relu" else _ACTIVATIONS[name]


def _imports(names: dict[str, Any], source: str) -> tuple[tuple[str, str, str], ...]:
    """Where what the source refers to comes from."""
    found = []
    for name, value in names.items():
        if name not in source or name in ("inf", "nan", "NoneType"):
            continue
        if isinstance(value, types.ModuleType):
            found.append((name, value.__name__, ""))
            continue
        module = getattr(value, "__module__", None)
        path = getattr(value, "__qualname__", "")
        try:
            same = _import(module or "", path) is value
        except (ImportError, AttributeError, ValueError):
            same = False
        if not same:
            raise CannotTrace(f"its forward calls {name}, which cannot be imported by name")
        found.append((name, str(module), path))
    return tuple(found)


def _import(module: str, path: str) -> Any:
    found: Any = importlib.import_module(module)
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found


def _compile(plan: Plan, original: type[nn.Module]) -> Callable[..., Any]:
    names: dict[str, Any] = {name: _import(m, path) for name, m, path in plan.imports}
    names.update(torch=torch, inf=float("inf"), nan=float("nan"), NoneType=type(None))
    run = _execute(plan.source, f"converted {original.__qualname__}", names)["forward"]
    return run


def _execute(source: str, title: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Run source code that tracebacks can show."""
    filename = f"<{title} #{abs(hash(source)) % 16**8:08x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), namespace)
    return namespace


def _expression(path: str) -> str:
    """The expression for a module at a path from self."""
    text = "self"
    for name in path.split("."):
        text = f"{text}.{name}" if name.isidentifier() else f"getattr({text}, {name!r})"
    return text
