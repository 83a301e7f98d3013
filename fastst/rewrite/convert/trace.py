"""A module's forward as a ``torch.fx`` graph, opened only as far as it has to be.

The graph holds for calls with one tensor per required parameter and every default left as it is;
``fused`` checks at run time that a call is such a one.
"""

from __future__ import annotations

import inspect
import operator
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn


class CannotTrace(Exception):
    """The forward of a module has no fixed graph; the message says why."""


@dataclass(frozen=True)
class Parameters:
    """The parameters of a forward, without self."""

    required: tuple[str, ...]
    optional: dict[str, Any]  # name to default
    variadic: tuple[str, ...]
    all: tuple[inspect.Parameter, ...]

    @classmethod
    def of(cls, kind: type[nn.Module]) -> Parameters:
        """
        Raises:
            CannotTrace: a forward without required parameters, or with required keyword-only ones.
        """
        P = inspect.Parameter
        every = tuple(inspect.signature(kind.forward).parameters.values())[1:]
        variadic = tuple(p.name for p in every if p.kind in (P.VAR_POSITIONAL, P.VAR_KEYWORD))
        optional = {p.name: p.default for p in every if p.default is not P.empty}
        required = [p for p in every if p.name not in variadic and p.name not in optional]
        if not required:
            raise CannotTrace("its forward takes no argument that is required")
        for p in required:
            if p.kind is P.KEYWORD_ONLY:
                raise CannotTrace(f"its forward requires the keyword {p.name!r}")
        return cls(tuple(p.name for p in required), optional, variadic, every)

    def declaration(self) -> str:
        """The parameters as source code; defaults are looked up in ``defaults``."""
        out, starred = ["self"], False
        for p in self.all:
            starred_here = p.kind is p.VAR_POSITIONAL
            if p.kind is p.KEYWORD_ONLY and not starred:
                out.append("*")
                starred_here = True
            starred = starred or starred_here
            default = f"=defaults[{p.name!r}]" if p.name in self.optional else ""
            out.append(_stars(p) + p.name + default)
        return ", ".join(out)

    def call(self) -> str:
        """The same as arguments that pass them all on."""
        keyword = inspect.Parameter.KEYWORD_ONLY
        given = (f"{p.name}=" if p.kind is keyword else _stars(p) for p in self.all)
        return ", ".join(["self", *(g + p.name for g, p in zip(given, self.all, strict=True))])


def _stars(p: inspect.Parameter) -> str:
    if p.kind is p.VAR_POSITIONAL:
        return "*"
    return "**" if p.kind is p.VAR_KEYWORD else ""


@dataclass(frozen=True)
class Trace:
    """A graph, and the modules whose forward was opened to write it, by path from the root."""

    graph: fx.Graph
    opened: tuple[str, ...]
    closed: dict[str, str]  # what could not be opened, and why


def trace(
    module: nn.Module, is_leaf: Callable[[nn.Module], bool], only: Collection[str] | None = None
) -> Trace:
    """Trace a module as it stands in its present mode.

    Args:
        module: whose forward is traced; left as it was.
        is_leaf: modules that are never opened.
        only: the paths that may be opened; None for all.

    Raises:
        CannotTrace: its forward depends on values, sizes or types that a call decides on, or
            changes attributes.
    """
    parameters = Parameters.of(type(module))
    tracer = _Tracer(is_leaf, only)
    before = _attributes(module)
    with _called_with(module, parameters.required), _proxies_pass(module):
        try:
            graph = tracer.trace(module)
        except Exception as error:  # whatever user code raises when it meets a Proxy
            raise CannotTrace(_told(error)) from error
        finally:
            changed = _restore(module, before)
    if changed:
        raise CannotTrace(f"its forward changes the attribute {changed!r}")
    for node in graph.nodes:
        node.type = None  # annotations would have to be imported where the source runs
    return Trace(graph, tuple(tracer.opened), tracer.closed)


def is_watched(module: nn.Module) -> bool:
    """Whether calling a module runs more than the forward of its class."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _assignment(name: str) -> Callable[[Any, Any], Any]:
    in_place = getattr(operator, name)

    def assign(a: Any, b: Any) -> Any:
        return in_place(a, b)

    assign.__name__, assign.__qualname__ = name, f"Assign.{name}"
    return assign


class Assign:
    """``a += b`` and its like as functions: fx knows none, and would write a new tensor instead.

    Those of ``operator`` it would write as statements, which change numbers that have two names.
    """

    iadd, isub, imul, itruediv = map(_assignment, ("iadd", "isub", "imul", "itruediv"))
    ifloordiv, imod, ipow = map(_assignment, ("ifloordiv", "imod", "ipow"))
    iand, ior, ixor, imatmul = map(_assignment, ("iand", "ior", "ixor", "imatmul"))

    @classmethod
    def has(cls, target: object) -> bool:
        return target is getattr(cls, getattr(target, "__name__", ""), None)


class _Value(fx.Proxy):
    """A proxy that user code takes for a tensor; see ``_proxies_pass``."""

    def _assign(self, target: Callable[[Any, Any], Any], other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {})


for _name, _target in list(vars(Assign).items()):
    if Assign.has(_target):
        setattr(
            _Value,
            f"__{_name}__",
            lambda self, other, target=_target: self._assign(target, other),
        )


SWITCHES = "its forward switches gradients, autocast or what is saved for them"


def context() -> tuple[object, ...]:
    """What context managers may have switched, which a graph does not show."""
    autocast = (
        (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")
    )
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # checkpointing, offloading
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast, hooks


@contextmanager
def switched(on: bool) -> Iterator[None]:
    """Gradients and autocast all on, or all off: what a forward switches then shows in one."""
    devices = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(d) for d in devices]
    with torch.set_grad_enabled(on):
        try:
            for d in devices:
                torch.set_autocast_enabled(d, on)
            yield
        finally:
            for d, enabled in zip(devices, before, strict=True):
                torch.set_autocast_enabled(d, enabled)


_isinstance = isinstance
_patching = threading.RLock()  # what is patched is seen by all threads


@contextmanager
def _proxies_pass(module: nn.Module) -> Iterator[None]:
    """Let user code take a proxy for a tensor where it asks.

    By name and in Python only: C++ would read memory that a proxy does not have if its
    ``__class__`` were Tensor. And not in ``builtins``, whose functions torch.compile knows by
    identity, as they are when it is imported: that may be now.
    """
    with _patching:
        spaces = [space for space in _namespaces(module) if "isinstance" not in space]
        try:
            for space in spaces:
                space["isinstance"] = _is_instance
            yield
        finally:
            for space in spaces:
                space.pop("isinstance", None)


def _namespaces(module: nn.Module) -> list[dict[str, Any]]:
    """Globals of the Python code that a forward may run, but PyTorch's and Python's own."""
    passed = sys.stdlib_module_names - {"__main__"} | {"torch"}
    found = [vars(torch)]  # torch.is_tensor
    for name, m in list(sys.modules.items()):
        if _isinstance(m, types.ModuleType) and name.partition(".")[0] not in passed:
            found.append(vars(m))
    for kind in {c for m in module.modules() for c in type(m).__mro__}:
        if kind.__module__ not in sys.modules:  # unpickled, or made by other importers
            functions = [f for f in vars(kind).values() if _isinstance(f, types.FunctionType)]
            found += [f.__globals__ for f in functions]
    return list({id(space): space for space in found}.values())


def _is_instance(value: Any, kind: Any) -> bool:
    tensor = type(value) is _Value and issubclass(Tensor, kind)
    return tensor or _isinstance(value, kind)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a forward that writes to a buffer must be seen to

    def __init__(self, is_leaf: Callable[[nn.Module], bool], only: Collection[str] | None) -> None:
        einops = sys.modules.get("einops")
        wrapped = () if einops is None else (einops.rearrange, einops.reduce, einops.repeat)
        super().__init__(autowrap_functions=wrapped)
        self._is_leaf, self._only = is_leaf, only
        self._started_in = context()
        self.opened: dict[str, None] = {}
        self.closed: dict[str, str] = {}

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if context() != self._started_in:
            raise CannotTrace(SWITCHES)
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        barred = self._only is not None and module_qualified_name not in self._only
        return barred or module_qualified_name in self.closed or self._is_leaf(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if is_watched(m) and not self.is_leaf_module(m, path):
            self.closed[path] = "has hooks"  # they are for whoever calls it, not for a trace
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        kept = len(self.graph.nodes)
        depth = len(self.module_stack)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception as error:  # a part without a fixed graph is called as a whole
            for node in reversed(list(self.graph.nodes)[kept:]):
                self.graph.erase_node(node)
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            for inner in [p for p in self.opened if p.startswith(f"{path}.")]:
                del self.opened[inner]
            self.closed[path] = _told(error)
            return super().call_module(m, forward, args, kwargs)
        self.opened[path] = None
        return result


@contextmanager
def _called_with(module: nn.Module, required: tuple[str, ...]) -> Iterator[None]:
    """Give a module, for a while, a forward with only the required parameters."""
    kind = type(module)
    names = ", ".join(required)
    namespace: dict[str, Any] = {"original": kind.forward}
    exec(f"def forward(self, {names}): return original(self, {names})", namespace)
    module.__class__ = type(kind.__name__, (kind,), {"forward": namespace["forward"]})
    try:
        yield
    finally:
        module.__class__ = kind


def _attributes(module: nn.Module) -> list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]:
    """Every module below, its attributes and its buffers, as they stand."""
    return [(m, dict(m.__dict__), dict(m._buffers)) for m in traceable(module)]


def traceable(module: nn.Module) -> list[nn.Module]:
    """The modules below that are Python objects."""
    return [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]


def _restore(
    module: nn.Module, before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]
) -> str | None:
    """Put attributes and buffers back; the name of one that was not what it had been."""
    changed = None
    for m, attributes, buffers in before:
        for now, then in ((m.__dict__, attributes), (m._buffers, buffers)):
            different = [k for k in {**now, **then} if now.get(k) is not then.get(k)]
            if different or now.keys() != then.keys():
                changed = sorted(different or now.keys() ^ then.keys())[0]
                now.clear()
                now.update(then)
    return changed


def _told(error: Exception) -> str:
    """One line of an exception that tracing met."""
    if isinstance(error, CannotTrace):
        return str(error)
    if isinstance(error, fx.proxy.TraceError):
        return "its forward branches or loops on values or sizes of tensors"
    text = " ".join(str(error).split())
    return f"tracing its forward raised {type(error).__name__}: {text[:120]}"
