"""Convolutions of frames and of pixels as those of clips: Conv2d, then Conv1d or Conv2d."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.contract import Begun
from .axes import Atom, Axes, Dim, Recipe, join_atoms, recipe, whole_dims
from .geometry import Separable, second_dims, second_pass
from .padding import Pad


class Form(NamedTuple):
    """How a pair of convolutions of any rank is one of clips."""

    settings: dict[str, Any]  # of ``conv2plus1d``
    x: Recipe
    y: Recipe
    shape: torch.Size  # of y
    frames: tuple[int, int] | None  # clips and their frames, where the first one knew frames only

    def as_clips(self, half: Begun) -> Begun | None:
        """What the first pass of all frames has left, as of clips; None where it is no view."""
        if self.frames is None:
            return None
        return half._replace(u=half.u.view(*self.frames, *half.u.shape[2:]))


def lift(w: Tensor, temporal: bool) -> Tensor:
    """A weight of any rank as one of rank 5: of a temporal convolution or of a spatial one."""
    if w.dim() == 5:
        return w
    if temporal:
        return w.reshape(*w.shape[:3], 1, 1)
    return w.unsqueeze(2)


def lifted_shape(w: Sequence[int], first: Separable) -> tuple[int, ...]:
    """The same of the shape of a second convolution's weight."""
    if len(w) == 5:
        return tuple(w)
    return (*w[:3], 1, 1) if first.kind == "spatial" else (*w[:2], 1, *w[2:])


def arrange(x: Tensor, how: Recipe) -> Tensor:
    """A tensor by its recipe: a view, where one will do."""
    return x.view(how.split).permute(how.order).reshape(how.sizes)


def make_dense(y: Tensor) -> Tensor:
    """Dense in a memory format, as a convolution of that rank leaves it."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(y.dim())
    if last is not None and y.is_contiguous(memory_format=last):
        return y
    return y.contiguous()


def form(
    first: Any, names: str, x: Sequence[int], u: Sequence[int], axes: Axes, z: Sequence[int],
    w: Sequence[int], b: Any, *settings: Any,
) -> Form | None:  # fmt: skip
    """The pair of a first convolution of x that leaves u, and a second one of z.

    ``axes`` say what z is of u. None where that is no pair, or could be more than one.
    """
    places = second_dims(first, w, *settings)
    if places is None or len(z) != len(w):
        return None
    own = "hw" if first.kind == "spatial" else "t"
    passive = [
        dim for name, dim in zip(names, whole_dims(names, x), strict=True) if name not in own
    ]
    batch, c, *passive = passive
    roles, pads = _strip_pads(axes, places)
    rest = _rest([batch, *passive], roles)
    if rest is None or max(map(len, roles)) > 1:
        return None
    left = [dim for name, dim in zip(names, whole_dims(names, u), strict=True) if name in own]
    order = (lambda t, hw: [*t, *hw]) if own == "hw" else (lambda hw, t: [*t, *hw])
    kept = [dim for name, dim in zip(names, whole_dims(names, x), strict=True) if name in own]
    take = recipe(whole_dims(names, x), [rest, c, *order(roles, kept)])
    inside = [(Atom("in", 1, z[i]),) for i in places]
    sizes = tuple(map(_size, [rest, (Atom("c", 1, z[1]),), *order(inside, left)]))
    sides = [Pad(tuple(order(p, [(0, 0)] * len(own))), mode) for mode, p in pads]
    found = second_pass(first, tuple(sides), sizes, w, b, *settings)
    if take is None or found is None:
        return None
    options, size = found
    new = [n for i, n in enumerate(size) if (i == 0) == (own == "hw")]
    ends = [_dim(f"end {i}", n) for i, n in enumerate(new)]
    k, target = _dim("k", w[0]), dict(enumerate(axes.dims)) | dict(zip(places, ends, strict=True))
    if target[1] != _dim("c", u[1]):
        return None
    target[1] = k
    give = recipe([rest, k, *order(ends, left)], list(target.values()))
    if give is None:
        return None
    frames = None
    if names == "bchw" and all(atom.inner == 1 for atom in roles[0]):
        frames = _size(rest), _size(roles[0])
    return Form(options, take, give, torch.Size(give.sizes), frames)


def _dim(axis: str, size: int) -> Dim:
    return (Atom(axis, 1, size),) if size > 1 else ()


def _size(dim: Dim) -> int:
    return prod(atom.size for atom in dim)


def _strip_pads(axes: Axes, places: Sequence[int]) -> tuple[list[Dim], list[Any]]:
    """Dimensions without the pads on them, and these, from the first on: mode and sides."""
    roles = [axes.dims[i] for i in places]
    pads: list[Any] = []
    for mode, padded in axes.padded[::-1]:
        sides = [(0, 0)] * len(roles)
        for axis, dim, before, after in padded:
            for i, role in enumerate(roles):
                if [atom.axis for atom in role] == [axis] and role == _dim(axis, role[0].size):
                    roles[i], sides[i] = dim, (before, after)
        pads.insert(0, (mode, sides))
    return roles, pads


def _rest(passive: Sequence[Dim], roles: Sequence[Dim]) -> Dim | None:
    """What remains of axes without some atoms, where it is one atom or none."""
    taken, rest = [atom for dim in roles for atom in dim], []
    for dim in passive:
        for axis, _, size in dim:
            for atom in sorted((a for a in taken if a.axis == axis), key=lambda a: -a.inner):
                outer = atom.inner * atom.size
                if size > outer:
                    rest.append(Atom(axis, outer, size // outer))
                size = atom.inner
            if size > 1:
                rest.append(Atom(axis, 1, size))
    found = join_atoms(rest)
    return found if len(found) < 2 else None
