"""Whether results must be PyTorch's to the last bit."""

from __future__ import annotations

from types import TracebackType

_on = False


def required() -> bool:
    """Whether calls made now must give the very bits of PyTorch's separate modules."""
    return _on


class exact:
    """Give PyTorch's very bits from here on, or within a ``with`` block.

    Every call then runs the operators that the separate modules would run, one after the other:
    nothing is fused, and no kernel of this library is used. Process-wide like
    ``torch.backends`` flags.

    Args:
        on: False: fuse again.
    """

    def __init__(self, on: bool = True) -> None:
        global _on
        self._previous = _on
        _on = bool(on)

    def __enter__(self) -> exact:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        global _on
        _on = self._previous
