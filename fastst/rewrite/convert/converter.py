"""``convert`` and ``revert``: which convolutions of a model may begin or end a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from . import sampling
from .begins import ATTRIBUTE, Begins, put_on, take_off
from .names import Filter, holders, matcher
from .report import Alone, Left, Replaced, Report
from .whole import Whole, is_whole

_NOT_SELECTED = "not selected by only= and skip="
_NEVER_CALLED = "the sample does not reach it, or it ends no pair"
_ALONE = "no convolution beside it fits; another one may, when the model runs"


def convert(
    model: nn.Module,
    sample: Any = None,
    *,
    only: Filter | None = None,
    skip: Filter | None = None,
) -> Report:
    """Let every pair of a spatial and a temporal convolution in a model run as one op, in place.

    A pair is a (1, kh, kw) and a (kt, 1, 1) convolution, in either order, with at most a batch norm
    and an activation between them. Which convolutions follow each other shows when the model runs:
    the first of a pair answers with a promise of its output, and whatever else than a pair becomes
    of that is computed as before. No forward, class, parameter, buffer, hook or key changes.

    Converting again changes nothing, unless the filters now admit more.

    Args:
        model: any module; a pair itself, too.
        sample: what the model is called with, a tensor or a tuple of arguments; it is run once, in
            its mode, without gradients and on a copy of its buffers, and the report says exactly
            what happened. Without one, the report says which neighbours fit.
        only: convert only pairs one of whose convolutions, or a module that holds one, has a name
            that matches: a pattern or several (``fnmatch``), or a predicate of name and module.
        skip: do not convert those that match.

    Returns:
        The pairs, and why other convolutions are left.

    Raises:
        TypeError: ``model`` is no module, or a filter neither pattern nor predicate.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module, got {type(model).__name__}")
    admits, rejects = matcher("only", model, only), matcher("skip", model, skip)
    convs, left = _find_separable(model)
    _prepare_alone(model, convs, lambda name: (only is None or admits([name]), rejects([name])))
    before: dict[str, tuple[bool, bool]] = {}  # wanted and barred, as an earlier call had it
    for name, conv in convs.items():
        wanted, barred = only is None or admits([name]), rejects([name])
        old = vars(conv).get(ATTRIBUTE)
        if isinstance(old, Begins) and old.conv is conv:
            before[name] = old.selection
            old.wanted, old.barred = old.wanted or wanted, old.barred and barred
        else:
            put_on(Begins(conv, name, wanted, barred))
    if sample is None:
        pairs = _neighbours(convs)
        for pair in pairs:  # until a call has shown it
            vars(convs[pair.first])[ATTRIBUTE].expect(convs[pair.second])
        alone: list[Alone] = []
        reasons: dict[str, str] = {}
    else:
        pairs, alone, reasons = sampling.run(model, sample)
    report = Report(alone=alone, whole=_whole_names(model))
    for pair in pairs:
        names = [n for n in (pair.first, pair.second) if n in convs]
        ends = [vars(convs[n])[ATTRIBUTE] for n in names]
        if not _is_selected(b.selection for b in ends):
            left += [Left(n, _NOT_SELECTED) for n in names]
        elif _is_selected(before.get(n, (False, False)) for n in names):
            report.already.append(pair)
        else:
            report.replaced.append(pair)
    paired = {n for pair in pairs for n in (pair.first, pair.second)}
    kinds = {separable_kind(conv) for conv in convs.values()}
    for name, conv in convs.items():
        if name not in paired:
            other = "temporal" if separable_kind(conv) == "spatial" else "spatial"
            single = f"the model has no {other} convolution left to pair it with"
            unknown = single if len(kinds) < 2 else _ALONE if sample is None else _NEVER_CALLED
            if not _is_selected([vars(conv)[ATTRIBUTE].selection]):
                unknown = _NOT_SELECTED
            left.append(Left(name, reasons.get(name, unknown)))
    place = {name: i for i, (name, _) in enumerate(model.named_modules())}
    report.left = sorted(left, key=lambda entry: place.get(entry.name, 0))
    return report


def _prepare_alone(
    model: nn.Module, convs: dict[str, Any], selects: Callable[[str], tuple[bool, bool]]
) -> None:
    """Prepare convolutions that are no half of a pair: over space and time at once, or of a model
    that has none along the other axes."""
    single = len({separable_kind(conv) for conv in convs.values()}) < 2
    for name, conv in model.named_modules():
        if not (is_whole(conv) or (single and name in convs)) or _why_never(conv) is not None:
            continue
        old = vars(conv).get(ATTRIBUTE)
        wanted, barred = selects(name)
        if isinstance(old, Whole) and old.conv is conv:
            wanted, barred = old.wanted or wanted, old.barred and barred
        put_on(Whole(conv, name, wanted, barred))


def _is_selected(ends: Iterable[tuple[bool, bool]]) -> bool:
    """Whether the filters want a pair of which these are (wanted, barred)."""
    ends = list(ends)
    return any(wanted for wanted, _ in ends) and not any(barred for _, barred in ends)


def revert(model: nn.Module) -> list[str]:
    """Undo ``convert`` in place.

    Returns:
        Names of the convolutions that were converted.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert: model must be an nn.Module, got {type(model).__name__}")
    names = []
    for name, module in model.named_modules():
        if isinstance(vars(module).get(ATTRIBUTE), Begins):
            take_off(module)
            names.append(name)
    return names


def serve(model: nn.Module) -> None:
    """Let what follows a convolution be part of it, in a copy that is not trained.

    That is the end of a residual block, in its last pair, and a frozen norm behind any convolution.
    """
    for name, module in model.named_modules():
        if type(module) is nn.Conv3d and ATTRIBUTE not in vars(module):
            put_on(Begins(module, name, wanted=False, barred=False))
        found = vars(module).get(ATTRIBUTE)
        if isinstance(found, Begins):
            found.served = True


def _find_separable(model: nn.Module) -> tuple[dict[str, Any], list[Left]]:
    """Convolutions along time or space only, outside of layers; and why others are left."""
    convs: dict[str, Any] = {}
    left: list[Left] = []
    layers: list[str] = []
    kinds = {separable_kind(m) for m in model.modules()} - {None}  # a 2D network has no pairs
    for name, module in model.named_modules():
        if any(above in layers for above in ("", *holders(name))):
            continue
        if type(module).__module__.startswith("fastst.nn."):
            layers.append(name)
            what = f"is one operation already, a {type(module).__name__}"
            left.append(Left(name, what))
        elif separable_kind(module) in kinds and (len(kinds) > 1 or len(module.kernel_size) == 3):
            why = _why_never(module)
            if why is None:
                convs[name] = module
            else:
                left.append(Left(name, why))
    return convs, left


def _whole_names(model: nn.Module) -> list[str]:
    """Convolutions over space and time at once."""
    return [name for name, m in model.named_modules() if is_whole(m)]


def _neighbours(convs: dict[str, Any]) -> list[Replaced]:
    """Convolutions next to each other in the model that fit."""
    pairs: list[Replaced] = []
    rest: Iterable[tuple[str, Any]] = convs.items()
    before: tuple[str, Any] | None = None
    for name, conv in rest:
        if before is not None:
            first, kind = before[1], separable_kind(before[1])
            if separable_kind(conv) != kind and first.out_channels == conv.in_channels:
                pairs.append(Replaced(before[0], name, f"{kind}-first"))
                before = None
                continue
        before = name, conv
    return pairs


def separable_kind(module: Any) -> str | None:
    """ "spatial" or "temporal" for a convolution that does something along these axes only.

    One over time alone is a 1D convolution; a 2D one is either of frames, or of frames and pixels.
    """
    kernel, stride = getattr(module, "kernel_size", None), getattr(module, "stride", None)
    if not (isinstance(kernel, tuple) and isinstance(stride, tuple)):
        return None
    if len(kernel) != len(stride) or not hasattr(module, "in_channels"):
        return None
    acts = [k != 1 or s != 1 for k, s in zip(kernel, stride, strict=True)]
    if len(acts) == 2 and acts[1]:
        acts = [False, *acts]
    if acts[0] and not any(acts[1:]):
        return "temporal"
    return "spatial" if any(acts[1:]) and not acts[0] else None


def _why_never(module: Any) -> str | None:
    """Why a convolution is none that could answer with a promise, or None."""
    kind = type(module)
    base = next((c for c in (nn.Conv3d, nn.Conv2d, nn.Conv1d) if isinstance(module, c)), None)
    if base is None:
        return f"it is a {kind.__module__}.{kind.__name__}, not an nn.Conv3d"
    own = vars(module).get(ATTRIBUTE)
    if kind._conv_forward is not base._conv_forward or not isinstance(own, (Begins, type(None))):
        return f"its _conv_forward is another one than that of nn.{base.__name__}"
    return None
