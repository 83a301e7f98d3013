"""Settings of the whole process that hold from a call on, or within a ``with`` block."""

from __future__ import annotations

from typing import Any, TypeVar

S = TypeVar("S", bound="Scoped")


class Scoped:
    """Gives its class a value; at the end of a ``with`` block the one before comes back."""

    value: Any  # of the class

    def __init__(self, value: Any) -> None:
        kind = type(self)
        self._previous, kind.value = kind.value, value

    def __enter__(self: S) -> S:
        return self

    def __exit__(self, *error: object) -> None:
        type(self).value = self._previous
