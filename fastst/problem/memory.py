"""Where tensors lie."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_torch: Any = torch._C


def _from_storage(t: Tensor) -> int:
    return int(_torch._data_address(t) + t.storage_offset() * t.element_size())


# Of a tensor that is only read. ``Tensor.data_ptr`` is for those that write: it gives a tensor of
# which there are copy-on-write clones other memory, while another thread may read the old one.
read_address: Callable[[Tensor], int] = getattr(Tensor, "const_data_ptr", _from_storage)


def is_shared(t: Tensor) -> bool:
    """Whether there may be copy-on-write clones of a tensor's memory."""
    return bool(_torch._is_cow_tensor(t))


# The first clone of some memory changes who owns it, which two threads must not do at once.
_cloning = threading.Lock()


def lazy_clone(t: Tensor) -> Tensor | None:
    """A copy-on-write clone, without a gradient; None of memory that PyTorch has not allocated:
    NumPy's, shared with other processes, mapped from a file, given by DLPack."""
    grad = t.requires_grad and torch.is_grad_enabled()
    try:  # which somebody may interrupt anywhere
        if grad:
            torch._C._set_grad_enabled(False)
        with _cloning:
            return torch._lazy_clone(t)
    except RuntimeError:
        return None
    finally:
        if grad:
            torch._C._set_grad_enabled(True)
