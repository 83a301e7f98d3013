"""``convert`` and ``revert``: walks over a model, module by module, the innermost first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from . import fused
from .match import Chain, Tail, find, separable, why_altered, why_unfit
from .probe import Whole, could_be_whole, recognise
from .report import Left, Replaced, Report
from .tail import find_outer_norms, find_tails, follow, why_apart
from .trace import CannotTrace, Trace, is_watched, switched, trace, traceable

Filter = str | Sequence[str] | Callable[[str, nn.Module], bool]

_NEVER_RUN = (None, "no forward that could be traced calls it as a plain convolution")
_NOT_SELECTED = "not selected by only= and skip="
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def convert(model: nn.Module, *, only: Filter | None = None, skip: Filter | None = None) -> Report:
    """Let every pair of a spatial and a temporal convolution in a model run as one op, in place.

    A pair is a (1, kh, kw) and a (kt, 1, 1) ``nn.Conv3d``, in either order, with at most a batch
    norm and an activation between them. They are found in what each module's ``forward`` does,
    whatever the modules are called. Nothing that holds state changes: modules, parameters, buffers,
    hooks and ``state_dict`` keys are the same objects and names as before, and so are outputs and
    gradients. A module that runs a pair gets a subclass of its own class, whose ``forward`` calls
    the op; ``revert`` gives it its own class back.

    Converting again changes nothing, unless the filters now admit more.

    Args:
        model: any module; a pair itself, too.
        only: convert only pairs one of whose convolutions, or a module that holds one, has a name
            that matches: a pattern or several (``fnmatch``), or a predicate of name and module.
        skip: do not convert those that match.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: ``model`` is no module, or a filter neither pattern nor predicate.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {type(model).__name__}")
    admits, rejects = _matcher("only", model, only), _matcher("skip", model, skip)
    walk = _Walk(model, lambda names: (only is None or admits(names)) and not rejects(names))
    for name, module in reversed(list(model.named_modules())):
        walk.visit(name, module)
    return walk.report()


def convert_for_inference(model: nn.Module) -> Report:
    """``convert``, with what ends a residual block as part of the op of its last pair."""
    walk = _Walk(model, lambda names: True, tails=True)
    for name, module in reversed(list(model.named_modules())):
        walk.visit(name, module)
    return walk.report()


def revert(model: nn.Module) -> list[str]:
    """Undo ``convert`` in place.

    Returns:
        Names of the modules that have their own forward back.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: something else, such as FSDP, has changed the class of a converted module since.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: model must be an nn.Module, got {type(model).__name__}")
    names = []
    for name, module in model.named_modules():
        if fused.is_converted(module):
            if not fused.is_direct(module):
                raise ValueError(
                    f"revert: the class of {name or 'the model'} was changed after fastst.convert, "
                    f"to {type(module).__name__}; undo that first"
                )
            fused.revert_module(module)
            names.append(name)
    return names


class _Walk:
    """One conversion: what has been found out about each convolution, by full name."""

    def __init__(
        self, model: nn.Module, wanted: Callable[[Iterable[str]], bool], tails: bool = False
    ) -> None:
        self.wanted, self.tails = wanted, tails
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.first = {id(m): name for name, m in reversed(list(self.modules.items()))}
        self.place = {name: i for i, name in enumerate(self.modules)}
        self.uses = Counter(map(id, self.modules.values()))
        self.replaced: list[Replaced] = []
        self.already: list[Replaced] = []
        # Convolutions that a converted module above runs, until that is visited.
        self.owned = {
            self._name(name, conv)
            for name, m in model.named_modules()
            if fused.is_converted(m) and fused.is_direct(m)
            for conv in fused.convs_of(m._plan)
        }
        self.layers = {name: m for name, m in model.named_modules() if _is_layer(m)}
        self.reasons: dict[str, tuple[str | None, str]] = {}
        self._consider(name for name in self.first.values() if name not in self.owned)

    def _name(self, name: str, path: str) -> str:
        """The first name of the module at a path from another one."""
        return self.first[id(self.modules[_join(name, path)])]

    def visit(self, name: str, module: nn.Module) -> None:
        """Convert what a module's own forward holds, once its descendants have been visited."""
        before: tuple[fused.Pair, ...] = ()
        if isinstance(module, fused.Converted):
            if not fused.is_direct(module):
                return
            before = module._plan.pairs
            self._take_back(name, module)
        if is_leaf(module) or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return
        homes = self._homes_of_tails(module) if self.tails else {}
        for path in homes:
            self._take_back(_join(name, path), module.get_submodule(path))
        inside = [n for n in self.reasons if n != name and _under(n, name)]
        try:
            if len({separable(self.modules[n]) for n in inside}) == 2:
                self._convert(name, module, before, homes)
        except CannotTrace as error:
            for n in inside:
                if self.reasons[n] == _NEVER_RUN:
                    self.reasons[n] = (None, f"{_title(name, module)} was left: {error}")
        opened = [p for p, _, _ in module._plan.opened] if fused.is_converted(module) else []  # type: ignore[union-attr]
        for path, plan in homes.items():
            if path not in opened:
                self._apply(_join(name, path), module.get_submodule(path), plan, set())
        if not any(fused.is_converted(m) or _is_layer(m) for m in module.modules()):
            self._convert_whole(name, module, before)

    def _consider(self, names: Iterable[str]) -> None:
        """Convolutions of which nothing is known yet."""
        for n in names:
            if separable(self.modules[n]) and not self._in_layer(n):
                self.reasons[n] = _NEVER_RUN

    def _in_layer(self, name: str) -> bool:
        """Whether a layer of this library holds a module."""
        return any(above in self.layers for above in ("", *_above(name)))

    def _take_back(self, name: str, module: Any) -> None:
        """Revert a module, and look at its convolutions again."""
        convs = [self._name(name, conv) for conv in fused.convs_of(module._plan)]
        fused.revert_module(module)
        self.replaced = [e for e in self.replaced if e.name != name]
        self.owned.difference_update(convs)
        self._consider(convs)

    def _homes_of_tails(self, module: nn.Module) -> dict[str, fused.Plan]:
        """Converted modules that a module calls, by path; none if no pair of theirs ends in it."""
        try:
            graph = trace(module, is_leaf).graph
        except CannotTrace:
            return {}
        get = module.get_submodule
        calls = {n: get(str(n.target)) for n in graph.nodes if n.op == "call_module"}
        calls = {n: m for n, m in calls.items() if fused.is_converted(m) and fused.is_direct(m)}
        if not any(follow(n, None, get).nodes for n in calls):
            return {}
        return {str(n.target): m._plan for n, m in calls.items()}  # type: ignore[misc]

    def _convert(
        self,
        name: str,
        module: nn.Module,
        before: Sequence[fused.Pair],
        homes: Iterable[str] = (),
    ) -> None:
        _check_class(module)
        get = module.get_submodule
        open_all = _graph(module, None)
        chains, loose = find(open_all.graph, get)
        for path, reason in loose.items():
            self.reasons[self._name(name, path)] = (None, reason)
        for path, told in open_all.closed.items():
            for n in self.reasons:
                if _under(n, _join(name, path)) and self.reasons[n] == _NEVER_RUN:
                    self.reasons[n] = (None, f"{_join(name, path)}: {told}")
        known = {(p.first, p.second) for p in before}
        if self.tails or any(p.residual or p.outer != "none" for p in before):
            find_tails(chains, get)
            for chain in chains:
                if chain.tail.nodes and why_apart(chain, get) is not None:
                    chain.tail = Tail()
        chosen: list[Chain] = []
        for chain in _not_at_home(chains, homes):
            names = chain.names
            why = None if names in known else self._why_left(name, module, chain)
            if why is None:
                chosen.append(chain)
            else:
                full = [self._name(name, path) for path in names]
                self.reasons[full[0]] = (full[1], why)
        if not chosen:
            return
        # Opened again only along the way to the pairs: the rest is called as it is.
        crossed = {path for chain in chosen for path in _crossed(chain)}
        traced = _graph(module, crossed)
        wanted = {c.names for c in chosen}
        again = [c for c in find(traced.graph, get)[0] if c.names in wanted]
        find_tails(again, get)
        tails = {c.names: c.tail for c in chosen}
        for chain in again:
            chain.tail = chain.tail if tails[chain.names].nodes else Tail()
        if not self.tails:
            find_outer_norms(again, get)
        here, there = ([(c.names, c.tail.computes()) for c in cs] for cs in (chosen, again))
        if here != there:
            raise CannotTrace("its graph depends on how far it is opened")
        self._apply(name, module, fused.plan_of(module, traced.graph, traced.opened, again), known)

    def _convert_whole(self, name: str, module: nn.Module, before: Sequence[fused.Pair]) -> None:
        """Convert a module that is a pair as a whole, though no graph shows it."""
        if not could_be_whole(module):
            return
        known = {(p.first, p.second) for p in before}
        convs = [self._name(name, n) for n, m in module.named_modules() if isinstance(m, _CONVS)]
        if not self.owned.isdisjoint(convs):
            return
        why = self._why_not_whole(module)
        whole = None if why is not None else recognise(module)
        if isinstance(whole, str):
            why = f"{_title(name, module)} was left: {whole}"
        if why is None and not before and not self.wanted(convs):
            why = _NOT_SELECTED
        if why is None and isinstance(whole, Whole):
            self._apply(name, module, fused.plan_of_whole(module, whole), known)
        elif why is not None and self.reasons.get(convs[0], _NEVER_RUN) == _NEVER_RUN:
            self.reasons[convs[0]] = (convs[1], why)  # else a trace has seen more

    def _why_not_whole(self, module: nn.Module) -> str | None:
        """Why a module must not be copied and asked, or None."""
        below = dict(module.named_modules())
        del below[""]
        for path, m in below.items():
            if self.uses[id(m)] > 1 and len(m.state_dict()) > 0:
                return f"{path} is shared: the model holds it {self.uses[id(m)]} times"
            if is_watched(m):
                return f"{path} has hooks"
        try:
            _check_class(module)
        except CannotTrace as error:
            return str(error)
        return why_altered(module.get_submodule, below)

    def _apply(
        self, name: str, module: nn.Module, plan: fused.Plan, known: set[tuple[str, str]]
    ) -> None:
        fused.apply(module, plan)
        for pair in plan.pairs:
            entry = Replaced(
                name, self._name(name, pair.first), self._name(name, pair.second),
                pair.norm and self._name(name, pair.norm), pair.activation, pair.order,
                pair.residual, pair.outer,
                pair.outer_norm and self._name(name, pair.outer_norm),
            )  # fmt: skip
            (self.already if (pair.first, pair.second) in known else self.replaced).append(entry)
            for conv in (entry.first, entry.second):
                self.reasons.pop(conv, None)

    def _why_left(self, name: str, module: nn.Module, chain: Chain) -> str | None:
        """Why a chain is not to be replaced, or None."""
        if chain.obstacles:
            return "; ".join(chain.obstacles)
        why = why_unfit(chain, module.get_submodule)
        if why is not None:
            return why
        norm = () if chain.norm is None else (str(chain.norm.target),)
        for path in (*chain.names, *norm):
            uses = self.uses[id(module.get_submodule(path))]
            if uses > 1:
                return f"{path} is shared: the model holds it {uses} times"
        for path in _crossed(chain):
            if is_watched(module.get_submodule(path)):
                return f"{path} has hooks"
        if not self.wanted([self._name(name, path) for path in chain.names]):
            return _NOT_SELECTED
        return None

    def report(self) -> Report:
        """In the order of the model."""
        for name, told in self.reasons.items():
            if told == _NEVER_RUN:
                self.reasons[name] = (None, self._why_never_run(name))
        partners = {second for second, _ in self.reasons.values() if second is not None}
        left = [
            Left(name, second, reason)
            for name, (second, reason) in self.reasons.items()
            if second is not None or name not in partners
        ]
        for name, layer in self.layers.items():
            left.append(Left(name, None, f"is one operation already, a {type(layer).__name__}"))
        return Report(
            sorted(self.replaced, key=lambda e: self.place[e.first]),
            sorted(self.already, key=lambda e: self.place[e.first]),
            sorted(left, key=lambda e: self.place[e.name]),
        )

    def _why_never_run(self, name: str) -> str:
        """Why no graph has shown what a convolution's output meets."""
        module = self.modules[name]
        for above in ("", *_above(name)):
            if isinstance(self.modules[above], (fx.GraphModule, torch.jit.ScriptModule)):
                return f"{_title(above, self.modules[above])} was left: its class is its graph"
        if not isinstance(module, nn.Conv3d):
            return f"it is a {type(module).__module__}.{type(module).__name__}, not an nn.Conv3d"
        other = "spatial" if separable(module) == "temporal" else "temporal"
        if other not in {separable(self.modules[n]) for n in self.reasons}:
            return f"the model has no {other} convolution left to pair it with"
        return _NEVER_RUN[1]


def _graph(module: nn.Module, only: set[str] | None) -> Trace:
    """The graph of a module, which must be the same in training and in evaluation."""
    parts = traceable(module)
    modes = [m.training for m in parts]
    sources = []
    try:
        for training in (True, False):
            for m in parts:
                object.__setattr__(m, "training", training)
            with switched(training):
                found = trace(module, is_leaf, only)
            sources.append(found.graph.python_code("self").src)
    finally:
        for m, training in zip(parts, modes, strict=True):
            object.__setattr__(m, "training", training)
    if sources[0] != sources[1]:
        raise CannotTrace("its forward is another one in training than in evaluation")
    return found


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is called as it is: PyTorch's own, and what runs pairs already."""
    if fused.is_converted(module) or isinstance(module, torch.jit.ScriptModule):
        return True
    foreign = not type(module).__module__.startswith("torch.")
    return _is_layer(module) or not (foreign or isinstance(module, _CONTAINERS))


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of this library, which runs its convolutions as one op."""
    return type(module).__module__.startswith("fastst.layers")


def _check_class(module: nn.Module) -> None:
    """
    Raises:
        CannotTrace: the class of a module cannot be replaced by a subclass.
    """
    if "forward" in module.__dict__:
        raise CannotTrace("its forward was replaced on the object")
    if type(module).forward is nn.Module.forward:
        raise CannotTrace("it has no forward")


def _crossed(chain: Chain) -> list[str]:
    """Paths of the modules whose forward must be opened to see a chain, the outermost first."""
    stacks = [node.meta.get("nn_module_stack", {}).values() for node in chain.calls()]
    paths = {path: None for stack in stacks for path, _ in stack}
    called = {str(node.target) for node in chain.calls() if node.op == "call_module"}
    return [path for path in paths if path not in called]


def _not_at_home(chains: Sequence[Chain], homes: Iterable[str]) -> list[Chain]:
    """Without the chains that lie, tail and all, in one of these modules, each the home of several.

    All that are in a home of which one chain comes out have to come out with it.
    """

    def inside(chain: Chain, home: str) -> bool:
        return all(_under(path, home) for path in chain.names)

    def leaves(chain: Chain, home: str) -> bool:
        stacks = [n.meta.get("nn_module_stack", {}).values() for n in chain.tail.nodes]
        return any(home not in [path for path, _ in stack] for stack in stacks)

    closed = [h for h in homes if not any(inside(c, h) and leaves(c, h) for c in chains)]
    return [c for c in chains if not any(inside(c, h) for h in closed)]


def _join(name: str, path: str) -> str:
    return f"{name}.{path}" if name and path else name or path


def _under(name: str, above: str) -> bool:
    return not above or name == above or name.startswith(f"{above}.")


def _above(path: str) -> list[str]:
    """The paths of the modules that hold the one at a path, without the root."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _title(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _matcher(label: str, model: nn.Module, given: Filter | None) -> Callable[[Iterable[str]], bool]:
    """Whether one of some names, or a module that holds one of them, passes a filter.

    Raises:
        TypeError: a filter neither pattern nor predicate.
    """
    if given is None:
        return lambda names: False
    patterns = [given] if isinstance(given, str) else given
    if callable(patterns):
        passes = patterns
    elif isinstance(patterns, Sequence) and all(isinstance(p, str) for p in patterns):
        passes = lambda name, _: any(fnmatchcase(name, p) for p in patterns)  # noqa: E731
    else:
        raise TypeError(
            f"convert: {label} must be a pattern, a sequence of patterns or a predicate of name "
            f"and module, got {given!r}"
        )
    return lambda names: any(
        passes(n, model.get_submodule(n)) for name in names for n in [*_above(name), name]
    )
