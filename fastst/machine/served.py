"""Tensors of copies for inference, of which backends may keep what they have made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..problem.memory import read_address

Made = TypeVar("Made")
# By tensor: (key, addresses and version counters of what was used, what was made of it).
_kept: Any = WeakIdKeyDictionary()


def serve(tensors: Iterable[Tensor]) -> None:
    """Lets backends keep what they make of these, as long as the tensors live and do not change."""
    for t in tensors:
        _kept[t] = {}


def get_or_make(tensors: Sequence[Tensor | None], key: Any, make: Callable[[], Made]) -> Made:
    """What ``make`` returns; of served tensors as long as it is true, that of the last call.

    Args:
        tensors: all that ``make`` reads. Only where the first is served is anything remembered,
            and a change of any of them is seen by its version counter and its address.
        key: of what else the result depends on.
    """
    kept = _kept.get(tensors[0])
    used = [t for t in tensors if t is not None]
    if kept is None or any(t.is_inference() for t in used):
        return make()
    versions = [(read_address(t), t._version, t.stride()) for t in used]
    found = kept.get(key)
    if found is None or found[0] != versions:
        kept[key] = found = versions, make()
    made: Made = found[1]
    return made
