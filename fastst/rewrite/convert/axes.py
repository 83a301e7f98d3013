"""Tensors whose dimensions are products of named axes: what permute and reshape do to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple


class Atom(NamedTuple):
    """Every ``inner``-th index of an axis, ``size`` of them, or as many blocks of that length."""

    axis: str
    inner: int
    size: int


Dim = tuple[Atom, ...]  # the outermost first; () where the size is 1


class AxisPad(NamedTuple):
    """A pad in terms of axes: the new axis, what it was, and samples before and after it."""

    mode: str  # as padding_mode of nn.Conv3d
    axes: tuple[tuple[str, Dim, int, int], ...]


class Axes(NamedTuple):
    """What the dimensions of a tensor are."""

    dims: tuple[Dim, ...]
    padded: tuple[AxisPad, ...] = ()


def whole_dims(names: str, shape: Sequence[int]) -> tuple[Dim, ...]:
    """Dimensions that are an axis each."""
    return tuple((Atom(name, 1, n),) if n > 1 else () for name, n in zip(names, shape, strict=True))


def join_atoms(atoms: Iterable[Atom]) -> Dim:
    """The same in fewer atoms."""
    found: list[Atom] = []
    for atom in atoms:
        if found and (found[-1].axis, found[-1].inner) == (atom.axis, atom.inner * atom.size):
            atom = Atom(atom.axis, atom.inner, atom.size * found.pop().size)
        found.append(atom)
    return tuple(found)


def reshape_dims(dims: Sequence[Dim], sizes: Sequence[int]) -> tuple[Dim, ...] | None:
    """Dimensions of these sizes, of which the product is the same; None where axes would break."""
    atoms = [atom for dim in dims for atom in dim][::-1]
    made: list[Dim] = []
    for size in sizes:
        dim: list[Atom] = []
        while size > 1:
            axis, inner, n = atoms.pop()
            if n > size:
                if n % size:
                    return None
                atoms.append(Atom(axis, inner, n // size))
                inner, n = inner * (n // size), size
            if size % n:
                return None
            dim.append(Atom(axis, inner, n))
            size //= n
        made.append(join_atoms(dim))
    return tuple(made)


def merges(dims: Sequence[Dim]) -> bool:
    """Whether a view may have to join what does not lie together in memory."""
    return any(
        (outer.axis, inner.axis) not in (("t", "h"), ("h", "w"))
        for dim in dims
        for outer, inner in itertools.pairwise(dim)
    )


class Recipe(NamedTuple):
    """A tensor's ``view``, ``permute`` and ``reshape``."""

    split: tuple[int, ...]
    order: tuple[int, ...]
    sizes: tuple[int, ...]


def recipe(source: Sequence[Dim], target: Sequence[Dim]) -> Recipe | None:
    """How to make dimensions of others: both have every index of the same axes once."""
    parts = [atom for dim in target for atom in dim]
    split: list[Atom] = []
    for dim in source:
        for axis, inner, size in dim:
            own = sorted(
                (
                    a
                    for a in parts
                    if a.axis == axis and inner <= a.inner and a.inner * a.size <= inner * size
                ),
                key=lambda a: -a.inner,
            )
            if join_atoms(own) != (Atom(axis, inner, size),):
                return None
            split += own
    if len(split) != len(parts):
        return None
    return Recipe(
        tuple(a.size for a in split),
        tuple(split.index(a) for a in parts),
        tuple(prod(a.size for a in dim) for dim in target),
    )
