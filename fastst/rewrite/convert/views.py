"""Promises in other shapes, padded, and joined to their own first frames."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import norms, readings
from .axes import Atom, Axes, AxisPad, merges, reshape_dims, whole_dims
from .chain import ChainPlan, as_view, change_plan, extend, is_open
from .graphs import is_promise, is_unread
from .link import Link
from .padding import Pad
from .plain import are_in_order
from .promise import Promise
from .readings import Reading

# ---- other shapes


def _reorder(p: Any, order: Sequence[int], call: Callable[[Tensor], Tensor]) -> Any:
    plan = p.link.plan
    if type(plan) is not ChainPlan:
        return norms.reorder(p, order, call)
    if plan.pads or sorted(order) != list(range(len(p.link.shape))):
        return NotImplemented
    axes = plan.axes_of(p.link.shape)
    axes = axes._replace(dims=tuple(axes.dims[i] for i in order))
    return _as_shape(p, axes, [p.link.shape[i] for i in order], call)


def _resize(
    p: Any, sizes: Sequence[Any], call: Callable[[Tensor], Tensor], view: bool = False
) -> Any:
    plan, shape = p.link.plan, p.link.shape
    if type(plan) is not ChainPlan:
        return norms.resize(p, _complete_sizes(sizes, shape), call)
    count, known = prod(shape), prod(n for n in sizes if n != -1)
    if plan.pads or not all(type(n) is int for n in sizes) or not count:
        return NotImplemented
    if list(sizes).count(-1) > 1 or known <= 0 or count % known:
        return NotImplemented
    sizes = [count // known if n == -1 else n for n in sizes]
    if prod(sizes) != count:
        return NotImplemented
    axes = plan.axes_of(shape)
    dims = reshape_dims(axes.dims, sizes)
    if dims is None or (view and merges(dims)):  # which PyTorch may refuse
        return NotImplemented
    return _as_shape(p, axes._replace(dims=dims), sizes, call)


def _complete_sizes(sizes: Sequence[Any], shape: Sequence[int]) -> Sequence[Any]:
    """Sizes without the one that PyTorch is to find."""
    if list(sizes).count(-1) != 1 or not all(type(n) is int for n in sizes):
        return sizes
    rest = -prod(sizes)
    return [prod(shape) // rest if n == -1 else n for n in sizes] if rest > 0 else sizes


def _as_shape(
    p: Promise, axes: Axes, shape: Sequence[int], call: Callable[[Tensor], Tensor]
) -> Promise:
    plan: ChainPlan = p.link.plan
    back = not axes.padded and axes.dims == whole_dims(plan.names, plan.shape)
    known = None if back and tuple(shape) == plan.shape else axes
    return as_view(p, call, torch.Size(shape), change_plan(plan, axes=known))


def _sizes(args: Sequence[Any]) -> Sequence[Any]:
    """Of a call with sizes one by one, or in a sequence."""
    return args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


def _dim(p: Promise, dim: Any) -> int:
    dim, rank = operator.index(dim), len(p.link.shape)
    if not -rank <= dim < rank:
        raise IndexError
    return dim % rank


def _rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Of an open promise and plain arguments; anything that it does not take is PyTorch's."""
    reads = rule in _READ

    def guard(input: Any, *args: Any, **kwargs: Any) -> Any:
        if not (is_open(input) or (reads and readings.reading_of(input) is not None)):
            return NotImplemented
        try:
            return rule(input, *args, **kwargs)
        except (TypeError, ValueError, IndexError):
            return NotImplemented

    return guard


def _permute(p: Promise, *dims: Any) -> Any:
    order = [_dim(p, d) for d in _sizes(dims)]
    return _reorder(p, order, lambda u: u.permute(order))


def _transpose(p: Promise, dim0: Any, dim1: Any) -> Any:
    a, b = _dim(p, dim0), _dim(p, dim1)
    order = list(range(len(p.link.shape)))
    order[a], order[b] = b, a
    return _reorder(p, order, lambda u: u.transpose(a, b))


def _movedim(p: Promise, source: Any, destination: Any) -> Any:
    if type(source) is not int or type(destination) is not int:
        return NotImplemented
    order = list(range(len(p.link.shape)))
    order.insert(_dim(p, destination), order.pop(_dim(p, source)))
    return _reorder(p, order, lambda u: u.movedim(source, destination))


def _reshape(p: Promise, *shape: Any) -> Any:
    sizes = tuple(_sizes(shape))
    return _resize(p, sizes, lambda u: u.reshape(sizes))


def _view(p: Promise, *shape: Any) -> Any:
    sizes = tuple(_sizes(shape))
    return _resize(p, sizes, lambda u: u.view(sizes), view=True)


def _flatten(p: Promise, start_dim: Any = 0, end_dim: Any = -1) -> Any:
    a, b, shape = _dim(p, start_dim), _dim(p, end_dim), p.link.shape
    if a >= b:
        return NotImplemented
    sizes = (*shape[:a], prod(shape[a : b + 1]), *shape[b + 1 :])
    return _resize(p, sizes, lambda u: u.flatten(a, b))


def _unflatten(p: Promise, dim: Any, sizes: Any) -> Any:
    a, shape, sizes = _dim(p, dim), p.link.shape, tuple(sizes)
    known = prod(n for n in sizes if n != -1)
    if known < 1 or sizes.count(-1) > 1 or shape[a] % known:
        return NotImplemented
    whole_sizes = tuple(shape[a] // known if n == -1 else n for n in sizes)
    if prod(whole_sizes) != shape[a]:
        return NotImplemented
    made = (*shape[:a], *whole_sizes, *shape[a + 1 :])
    return _resize(p, made, lambda u: u.unflatten(a, sizes))


def _unsqueeze(p: Promise, dim: Any) -> Any:
    rank = len(p.link.shape) + 1
    if not -rank <= operator.index(dim) < rank:
        return NotImplemented
    sizes = list(p.link.shape)
    sizes.insert(operator.index(dim) % rank, 1)
    return _resize(p, sizes, lambda u: u.unsqueeze(dim))


def _squeeze(p: Promise, dim: Any) -> Any:
    a, sizes = _dim(p, dim), list(p.link.shape)
    if sizes.pop(a) != 1:
        return NotImplemented
    return _resize(p, sizes, lambda u: u.squeeze(a))


def _contiguous(p: Promise, memory_format: Any = torch.contiguous_format) -> Any:
    if _is_in_order(p.link) and torch.empty(p.link.shape, device="meta").is_contiguous(
        memory_format=memory_format
    ):
        return p
    plan = readings.reading_of(p) or p.link.plan
    return as_view(p, lambda u: u.contiguous(memory_format=memory_format), p.link.shape, plan)


def _is_in_order(link: Link) -> bool:
    """Whether the value lies in the order of its dimensions, as all does that it is made of."""
    if link.viewed or link.state.traced:
        return False
    read = link.tensors() if link.value is None else [link.value]
    return all(are_in_order(t.shape, t.stride()) for t in read)


# ---- pads


_MODES = {"constant": "zeros", "replicate": "replicate", "reflect": "reflect",
          "circular": "circular"}  # fmt: skip


def _pad(p: Promise, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    rank = len(p.link.shape)
    if value not in (None, 0) or mode not in _MODES or not isinstance(pad, (tuple, list)):
        return NotImplemented
    if len(pad) % 2 or not 2 <= len(pad) <= 2 * (rank - 2) or not {int}.issuperset(map(type, pad)):
        return NotImplemented
    if min(pad) < 0 or (mode != "constant" and len(pad) != 2 * (rank - 2)):
        return NotImplemented
    widths = tuple(pad)
    sides = {rank - 1 - i: (widths[2 * i], widths[2 * i + 1]) for i in range(len(pad) // 2)}
    limit = {"reflect": 1, "circular": 0}.get(mode)
    if limit is not None and any(max(s) > p.link.shape[i] - limit for i, s in sides.items()):
        return NotImplemented
    return _pad_sides(p, sides, _MODES[mode], lambda z: F.pad(z, widths, mode))


def _pad_sides(
    p: Promise, sides: Mapping[int, tuple[int, int]], mode: str, call: Callable[[Tensor], Tensor]
) -> Any:
    """With samples before and after some dimensions."""
    plan: Any = p.link.plan
    shape = list(p.link.shape)
    for i, s in sides.items():
        shape[i] += sum(s)
    pad = Pad(tuple(sides.get(i, (0, 0)) for i in (2, 3, 4)), mode)
    if type(plan) is not ChainPlan:
        return readings.pad(p, pad, call, torch.Size(shape))
    if plan.axes is None and plan.names == "bcthw":
        return extend(p, call, change_plan(plan, pads=(*plan.pads, pad)), shape=torch.Size(shape))
    axes = plan.axes_of(p.link.shape)
    dims, told = list(axes.dims), []
    for i, (before, after) in sides.items():
        if before or after:
            new = f"padded {len(axes.padded)} {i}"
            told.append((new, dims[i], before, after))
            dims[i] = (Atom(new, 1, shape[i]),)
    axes = Axes(tuple(dims), (*axes.padded, AxisPad(mode, tuple(told))))
    return extend(p, call, change_plan(plan, axes=axes), shape=torch.Size(shape))


# ---- some of the frames


class Part(NamedTuple):
    """Some of a promise's samples along a dimension; the first one as often as it is there."""

    source: Link
    dim: int
    samples: tuple[int, int]  # from one to before the other

    def note_separate(self, link: Link, why: str) -> None:
        self.source.plan.note_separate(self.source, why)


def _getitem(p: Promise, index: Any) -> Any:
    """Neighbouring samples along one dimension."""
    rank = len(p.link.shape)
    index = index if isinstance(index, tuple) else (index,)
    if index.count(Ellipsis) == 1:
        i = index.index(Ellipsis)
        index = (*index[:i], *(slice(None),) * (rank + 1 - len(index)), *index[i + 1 :])
    some = [i for i, part in enumerate(index) if part != slice(None)]
    if len(some) != 1 or len(index) > rank:
        return NotImplemented
    (dim,) = some
    if type(index[dim]) is not slice or index[dim].step not in (None, 1):
        return NotImplemented
    start, stop, _ = index[dim].indices(p.link.shape[dim])
    return _part(p, dim, start, stop)


def _narrow(p: Promise, dim: Any, start: Any, length: Any) -> Any:
    dim = _dim(p, dim)
    if type(start) is not int or start < 0:
        return NotImplemented
    return _part(p, dim, start, start + length)


def _part(p: Promise, dim: int, start: int, stop: int) -> Any:
    link, shape = p.link, list(p.link.shape)
    plan = readings.reading_of(p)
    frames = dim == 2 and plan is not None and plan.frame_by_frame
    if dim < 2 or (plan is not None and plan.form) or not start < stop <= shape[dim]:
        return NotImplemented
    if not frames and (start, stop) not in ((0, 1), (shape[dim] - 1, shape[dim])):
        return NotImplemented
    shape[dim] = stop - start
    part = Part(link, dim, (start, stop))
    return as_view(p, lambda z: z.narrow(dim, start, stop - start), torch.Size(shape), part)


def _is_part(p: Any) -> bool:
    return is_promise(p) and type(p.link.plan) is Part and is_unread(p)


def _is_end(p: Any, which: str, of: Promise | None = None) -> bool:
    """Whether a promise is the first or the last sample of another along a dimension."""
    if not _is_part(p) or (of is not None and p.link.plan.source is not of.link):
        return False
    part: Part = p.link.plan
    n = part.source.shape[part.dim]
    return bool(part.samples == ((0, 1) if which == "first" else (n - 1, n)))


def _clone(p: Any, *, memory_format: Any = torch.preserve_format) -> Any:
    """Some frames of what a convolution is to read, for a cache: of them alone."""
    if not (_is_part(p) and type(p) is Promise and memory_format is torch.preserve_format):
        return NotImplemented
    part, link = p.link.plan, p.link.plan.source
    plan = link.plan
    if type(plan) is not Reading or not plan.frame_by_frame or part.dim != 2:
        return NotImplemented
    if not (plan.norm or plan.activation) or link.value is not None or not p.link.state.current:
        return NotImplemented
    start, stop = part.samples
    value = plan.source.current_value(keep=True).narrow(2, start, stop - start)
    return link.replay(plan.source, value)


def _repeat(call: Callable[..., Tensor], keeps: int) -> Callable[..., Any]:
    """A rule of ``repeat`` or ``expand``; ``keeps``: what stands for a dimension that stays."""

    def rule(p: Any, *sizes: Any) -> Any:
        if not (_is_end(p, "first") or _is_end(p, "last")):
            return NotImplemented
        sizes, dim, shape = tuple(_sizes(sizes)), p.link.plan.dim, list(p.link.shape)
        if len(sizes) != len(shape) or shape[dim] != 1 or not p.link.state.current:
            return NotImplemented
        if not all(type(n) is int for n in sizes) or sizes[dim] < 0:
            return NotImplemented
        stays = [n == keeps or (keeps == -1 and n == shape[i]) for i, n in enumerate(sizes)]
        if not all(stays[:dim] + stays[dim + 1 :]):
            return NotImplemented
        shape[dim] = sizes[dim]
        return as_view(p, lambda z: call(z, sizes), torch.Size(shape), p.link.plan)

    return rule


def _cat(tensors: Any, dim: Any = 0, **kwargs: Any) -> Any:
    """A promise between its own first and last samples is a promise that is padded; behind other
    frames it has a past."""
    if kwargs or not isinstance(tensors, (tuple, list)) or not tensors:
        return NotImplemented
    if type(dim) is int and is_promise(tensors[0]) and is_open(tensors[0], norms.Frames):
        return norms.join_frames(tensors, dim)
    if len(tensors) < 2:
        return NotImplemented
    at = next((i for i, t in enumerate(tensors) if is_promise(t) and not _is_part(t)), None)
    if at is None or type(dim) is not int:
        return NotImplemented
    p, before, after = tensors[at], tensors[:at], tensors[at + 1 :]
    reads = readings.reading_of(p) is not None
    if not (is_open(p) or reads):
        return NotImplemented
    dim = dim % len(p.link.shape)
    if reads and (len(before), len(after), dim) == (1, 0, 2) and not is_promise(before[0]):
        return readings.prepend(p, before[0])
    ends = [_is_end(t, "first", p) for t in before] + [_is_end(t, "last", p) for t in after]
    if not all(ends) or any(t.link.plan.dim != dim for t in (*before, *after)):
        return NotImplemented
    return _pad_with_copies(p, dim, *(sum(t.link.shape[dim] for t in ts) for ts in (before, after)))


def _pad_with_copies(p: Promise, dim: int, before: int, after: int) -> Any:
    """With so many copies of its first samples before it, and of its last ones after it."""

    def call(z: Tensor) -> Tensor:
        def copies(sample: int, count: int) -> list[Tensor]:
            sizes = [count if i == dim else -1 for i in range(z.dim())]
            return [z.narrow(dim, sample, 1).expand(sizes)] if count else []

        return torch.cat([*copies(0, before), z, *copies(z.shape[dim] - 1, after)], dim)

    return _pad_sides(p, {dim: (before, after)}, "replicate", call)


def _find(*names: str) -> list[Any]:
    """Functions of these names, of torch and of tensors."""
    return [getattr(where, n) for n in names for where in (torch, Tensor) if hasattr(where, n)]


# What convolutions read takes these, too.
_READ = (
    _contiguous, _pad, _getitem, _narrow, _permute, _transpose, _movedim, _reshape, _view, _flatten,
    _unflatten,
)  # fmt: skip
_SHAPES: dict[Callable[..., Any], Sequence[Any]] = {
    _permute: _find("permute"), _transpose: _find("transpose", "swapaxes", "swapdims"),
    _movedim: _find("movedim", "moveaxis"), _reshape: _find("reshape"), _view: [Tensor.view],
    _flatten: _find("flatten"), _unflatten: _find("unflatten"), _squeeze: _find("squeeze"),
    _unsqueeze: _find("unsqueeze"), _contiguous: [Tensor.contiguous],
    _pad: [F.pad, torch._C._nn.pad], _getitem: [Tensor.__getitem__], _narrow: _find("narrow"),
}  # fmt: skip
# By function: the rule of it.
RULES: dict[Any, Callable[..., Any]] = {
    **{f: _rule(rule) for rule, functions in _SHAPES.items() for f in functions},
    **dict.fromkeys(_find("clone"), _clone),
    Tensor.repeat: _repeat(Tensor.repeat, 1), Tensor.expand: _repeat(Tensor.expand, -1),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
}  # fmt: skip
