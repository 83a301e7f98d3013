"""Full names of modules, and filters of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

Filter = str | Sequence[str] | Callable[[str, nn.Module], bool]


def holders(path: str) -> list[str]:
    """The paths of the modules that hold the one at a path, without the root."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def matcher(label: str, model: nn.Module, given: Filter | None) -> Callable[[Iterable[str]], bool]:
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
        passes(n, model.get_submodule(n)) for name in names for n in [*holders(name), name]
    )
