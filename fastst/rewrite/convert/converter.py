"""``convert`` and ``revert``: walks over a model, module by module, the innermost first."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from . import fused
from .match import Chain, Tail, find, separable, why_altered, why_unfit
from .names import Filter, holders, join, matcher, title, under
from .probe import Whole, could_be_whole, recognise
from .report import Left, Replaced, Report, norm_told
from .tail import find_tails, follow, norm_behind, why_apart
from .trace import CannotTrace, Trace, is_watched, switched, trace, traceable

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
    the op; ``revert`` gives it its own class back. So does a module that applies a batch norm to
    what a pair leaves, which in training takes its statistics from the op.

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
    admits, rejects = matcher("only", model, only), matcher("skip", model, skip)
    walk = _Walk(model, lambda names: (only is None or admits(names)) and not rejects(names))
    for name, module in reversed(list(model.named_modules())):
        walk.visit(name, module)
    for name, module in reversed(list(model.named_modules())):
        walk.visit_norms(name, module)
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
        # Modules that end in a pair, and the norm after each, as a conversion before had it or as
        # this one has.
        self.normed_before: set[tuple[str, str]] = set()
        self.normed: dict[str, tuple[str, str | None]] = {}
        self.reasons: dict[str, tuple[str | None, str]] = {}
        self._consider(name for name in self.first.values() if name not in self.owned)

    def _name(self, name: str, path: str) -> str:
        """The first name of the module at a path from another one."""
        return self.first[id(self.modules[join(name, path)])]

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
            self._take_back(join(name, path), module.get_submodule(path))
        inside = [n for n in self.reasons if n != name and under(n, name)]
        try:
            if len({separable(self.modules[n]) for n in inside}) == 2:
                self._convert(name, module, before, homes)
        except CannotTrace as error:
            for n in inside:
                if self.reasons[n] == _NEVER_RUN:
                    self.reasons[n] = (None, f"{title(name, module)} was left: {error}")
        opened = [p for p, _, _ in module._plan.opened] if fused.is_converted(module) else []  # type: ignore[union-attr]
        for path, plan in homes.items():
            if path not in opened:
                self._apply(join(name, path), module.get_submodule(path), plan, set())
        if not any(fused.is_converted(m) or _is_layer(m) for m in module.modules()):
            self._convert_whole(name, module, before)

    def _consider(self, names: Iterable[str]) -> None:
        """Convolutions of which nothing is known yet."""
        for n in names:
            if separable(self.modules[n]) and not self._in_layer(n):
                self.reasons[n] = _NEVER_RUN

    def _in_layer(self, name: str) -> bool:
        """Whether a layer of this library holds a module."""
        return any(above in self.layers for above in ("", *holders(name)))

    def _take_back(self, name: str, module: Any) -> None:
        """Revert a module, and look at its convolutions again."""
        convs = [self._name(name, conv) for conv in fused.convs_of(module._plan)]
        self.normed_before.update(
            (self._name(name, part), self._name(name, norm)) for part, norm in module._plan.normed
        )
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
                if under(n, join(name, path)) and self.reasons[n] == _NEVER_RUN:
                    self.reasons[n] = (None, f"{join(name, path)}: {told}")
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
        crossed = {path for chain in chosen for path in _crossed(chain.calls())}
        traced = _graph(module, crossed)
        wanted = {c.names for c in chosen}
        again = [c for c in find(traced.graph, get)[0] if c.names in wanted]
        find_tails(again, get)
        tails = {c.names: c.tail for c in chosen}
        for chain in again:
            chain.tail = chain.tail if tails[chain.names].nodes else Tail()
        normed = [] if self.tails else self._normed(name, module, traced.graph)
        if not self.tails:
            for chain in again:
                if not chain.tail.nodes:
                    chain.outer_norm = self._norm_behind(chain.convs[1].node, get)
        here, there = ([(c.names, c.tail.computes()) for c in cs] for cs in (chosen, again))
        if here != there:
            raise CannotTrace("its graph depends on how far it is opened")
        plan = fused.plan_of(module, traced.graph, traced.opened, again, normed)
        self._apply(name, module, plan, known)

    def visit_norms(self, name: str, module: nn.Module) -> None:
        """Convert a module that has no pairs of its own, but the norms after those of its parts."""
        if is_leaf(module) or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return
        near = dict(_near(module))
        ends = any(map(fused.ends_in_pair, near.values()))
        if not (ends and any(type(m) is nn.BatchNorm3d for m in near.values())):
            return
        if any(module is m for above in self.modules.values() for m in _opened_by(above)):
            return
        try:
            _check_class(module)
            lists = {path for path, m in near.items() if isinstance(m, nn.Sequential)}
            traced = _graph(module, lists)
            normed = self._normed(name, module, traced.graph)
            crossed = {path for calls in normed for path in _crossed(calls)}
            if normed and crossed != set(traced.opened):
                traced = _graph(module, crossed)
                normed = self._normed(name, module, traced.graph)
            if normed:
                plan = fused.plan_of(module, traced.graph, traced.opened, [], normed)
                self._apply(name, module, plan, set())
        except CannotTrace:
            return  # as it was: nobody asked for a norm

    def _normed(
        self, name: str, module: nn.Module, graph: fx.Graph
    ) -> list[tuple[fx.Node, fx.Node]]:
        """Calls of parts that end in a pair, and of the norm after each."""
        found = []
        get = module.get_submodule
        for node in graph.nodes:
            if node.op != "call_module" or node.kwargs or not fused.ends_in_pair(get(node.target)):
                continue
            norm = self._norm_behind(node, get)
            if norm is None:
                continue
            names = self._name(name, node.target), self._name(name, str(norm.target))
            if names in self.normed_before or self.wanted(self._last_pair(names[0])):
                found.append((node, norm))
        return found

    def _norm_behind(self, node: fx.Node, get: Callable[[str], nn.Module]) -> fx.Node | None:
        """The norm behind a node, if nobody else holds it."""
        norm = norm_behind(node, get)
        return norm if norm is not None and self.uses[id(get(str(norm.target)))] == 1 else None

    def _last_pair(self, name: str) -> list[str]:
        """Names of the convolutions of the pair in which a module ends."""
        module: Any = self.modules[name]
        last = fused.convs_of(module._plan)[-2:] if fused.is_converted(module) else ()
        return [self._name(name, path) for path in last or ("spatial", "temporal")]

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
            why = f"{title(name, module)} was left: {whole}"
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
        for part, norm in plan.normed:
            names = self._name(name, part), self._name(name, norm)
            self._tell_norm(*names, _why_watched(self.modules, names))
        for pair in plan.pairs:
            outer = pair.outer_norm and self._name(name, pair.outer_norm)
            entry = Replaced(
                name, self._name(name, pair.first), self._name(name, pair.second),
                pair.norm and self._name(name, pair.norm), pair.activation, pair.order,
                pair.residual, pair.outer, outer, outer and _why_watched(self.modules, [outer]),
            )  # fmt: skip
            (self.already if (pair.first, pair.second) in known else self.replaced).append(entry)
            for conv in (entry.first, entry.second):
                self.reasons.pop(conv, None)

    def _tell_norm(self, part: str, norm: str, apart: str | None) -> None:
        """Put the norm after a part into the entry of the part's last pair."""
        self.normed[part] = norm, apart
        for entries in (self.replaced, self.already):
            for i, e in enumerate(entries):
                if e.name == part and self._last_pair(part)[-1] == e.second:
                    entries[i] = dataclasses.replace(e, outer_norm=norm, apart=apart)

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
        for path in _crossed(chain.calls()):
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
            norm = f", then {norm_told(*self.normed[name])}" if name in self.normed else ""
            what = f"is one operation already, a {type(layer).__name__}{norm}"
            left.append(Left(name, None, what))
        return Report(
            sorted(self.replaced, key=lambda e: self.place[e.first]),
            sorted(self.already, key=lambda e: self.place[e.first]),
            sorted(left, key=lambda e: self.place[e.name]),
        )

    def _why_never_run(self, name: str) -> str:
        """Why no graph has shown what a convolution's output meets."""
        module = self.modules[name]
        for above in ("", *holders(name)):
            if isinstance(self.modules[above], (fx.GraphModule, torch.jit.ScriptModule)):
                return f"{title(above, self.modules[above])} was left: its class is its graph"
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
    return type(module).__module__.startswith("fastst.nn.layers")


def _check_class(module: nn.Module) -> None:
    """
    Raises:
        CannotTrace: the class of a module cannot be replaced by a subclass.
    """
    if "forward" in module.__dict__:
        raise CannotTrace("its forward was replaced on the object")
    if type(module).forward is nn.Module.forward:
        raise CannotTrace("it has no forward")


def _crossed(calls: Iterable[fx.Node]) -> list[str]:
    """Paths of the modules whose forward must be opened to see calls, the outermost first."""
    calls = list(calls)
    stacks = [node.meta.get("nn_module_stack", {}).values() for node in calls]
    paths = {path: None for stack in stacks for path, _ in stack}
    called = {str(node.target) for node in calls if node.op == "call_module"}
    return [path for path in paths if path not in called]


def _near(module: nn.Module, above: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children by path, and what lists of modules hold that are not converted."""
    for name, child in module.named_children():
        path = join(above, name)
        yield path, child
        if isinstance(child, _CONTAINERS) and not fused.is_converted(child):
            yield from _near(child, path)


def _opened_by(module: nn.Module) -> list[nn.Module]:
    """What the plan of a module goes into: it must stay of the class that it has."""
    if not fused.is_converted(module):
        return []
    return [module.get_submodule(path) for path, _, _ in module._plan.opened]  # type: ignore[union-attr]


def _why_watched(modules: dict[str, nn.Module], names: Iterable[str]) -> str | None:
    return next((f"{n or 'the model'} has hooks" for n in names if is_watched(modules[n])), None)


def _not_at_home(chains: Sequence[Chain], homes: Iterable[str]) -> list[Chain]:
    """Without the chains that lie, tail and all, in one of these modules, each the home of several.

    All that are in a home of which one chain comes out have to come out with it.
    """

    def inside(chain: Chain, home: str) -> bool:
        return all(under(path, home) for path in chain.names)

    def leaves(chain: Chain, home: str) -> bool:
        stacks = [n.meta.get("nn_module_stack", {}).values() for n in chain.tail.nodes]
        return any(home not in [path for path, _ in stack] for stack in stacks)

    closed = [h for h in homes if not any(inside(c, h) and leaves(c, h) for c in chains)]
    return [c for c in chains if not any(inside(c, h) for h in closed)]
