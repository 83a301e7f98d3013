"""Whether results must be PyTorch's to the last bit."""

from __future__ import annotations

from .scoped import Scoped

WHY = "fastst.exact() asks for the bits of the separate modules"


class exact(Scoped):
    """Give PyTorch's very bits from here on, or within a ``with`` block.

    Every call then runs the operators that the separate modules would run, one after the other:
    nothing is fused, and no kernel of this library is used. Process-wide like
    ``torch.backends`` flags.

    Args:
        on: False: fuse again.
    """

    value = False

    def __init__(self, on: bool = True) -> None:
        super().__init__(bool(on))


def is_required() -> bool:
    """Whether calls made now must give the very bits of PyTorch's separate modules."""
    return exact.value
