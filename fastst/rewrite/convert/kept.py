"""What a promise reads: tensors as they were when it was made."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor


class CannotDefer(Exception):
    """Nothing would tell whether a tensor is written to: its reader runs at once."""


class Kept:
    """A tensor as it is now, whatever is written to it later.

    A copy-on-write clone: it costs no memory unless somebody writes. Memory that cannot be cloned
    so, or that FSDP resizes, is watched by its version counter and address instead.
    """

    __slots__ = (
        "address", "clone", "leaf", "needs_grad", "resized", "tensor", "valueless", "version",
    )  # fmt: skip

    clone: Tensor | None
    address: int  # of the clone, or of memory that has none

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.needs_grad, self.leaf = tensor, tensor.requires_grad, tensor.is_leaf
        self.version = None if tensor.is_inference() else tensor._version
        self.resized = False
        self.valueless = tensor.is_meta or type(tensor) in _VALUELESS
        if self.valueless:
            self.clone, self.address = None, 0
            return
        if _SHARDED in sys.modules and type(tensor) is nn.Parameter:
            self.resized = _is_sharded(tensor)
        self.clone, self.address = None, 0
        self.hold()
        if self.clone is None:
            if self.version is None:
                raise CannotDefer
            self.address = tensor.data_ptr()

    def hold(self) -> None:
        """Take a clone, where that can be."""
        if self.resized:
            return
        grad = self.needs_grad and torch.is_grad_enabled()
        if grad:
            torch._C._set_grad_enabled(False)
        try:
            self.clone = clone = torch._lazy_clone(self.tensor)
            self.address = _address(clone)
        except RuntimeError:  # memory that PyTorch has not allocated
            self.clone, self.address = None, 0
        finally:
            if grad:
                torch._C._set_grad_enabled(True)

    def release(self) -> None:
        """Give the memory back to the tensor alone, so that reading it by address copies nothing.

        From now on it is watched by its version counter, if it has one. Its address says nothing:
        memory that others hold clones of moves when it is read.
        """
        if self.clone is not None:
            self.clone, self.address = None, 0
            self.tensor.data_ptr()

    def held_again(self) -> None:
        """After ``release``, where no version counter tells of writes: there is none, or running
        statistics are counted, by PyTorch as well as here."""
        unversioned = self.version is None or (
            type(self.tensor) is Tensor and self.tensor.dim() == 1
        )
        if unversioned and not self.valueless:
            self.hold()

    @property
    def foreign(self) -> bool:
        """Whether its memory is of others (NumPy, shared), who may write to it unseen."""
        return self.clone is None and not (self.valueless or self.resized)

    @property
    def same(self) -> bool:
        """Whether the tensor still is what it was, and in the memory that it had."""
        t = self.tensor
        if t.requires_grad != self.needs_grad:
            return False
        held = self.clone is not None and self.version is not None
        if held and t._version == self.version and _address(t) == self.address:
            return True
        return self._unwritten

    @property
    def _unwritten(self) -> bool:
        t = self.tensor
        if self.version is not None and t._version != self.version:
            return False
        if self.clone is None:
            return not self.address or t.data_ptr() == self.address
        if _address(t) == self.address:
            return True
        # Memory of its own, which a reader by address makes as well as a writer to ``.data``.
        if (t.device, t.dtype) != (self.clone.device, self.clone.dtype):
            return False
        if not torch.equal(t, self.clone):
            return False
        self.hold()
        return True

    @property
    def switched(self) -> bool:
        """Whether a leaf has only been frozen, or made to need a gradient."""
        t = self.tensor
        return t.requires_grad != self.needs_grad and self.leaf and t.is_leaf and self._unwritten

    def get(self, what: str, grad: bool, ended: bool) -> Tensor:
        """The tensor, or its clone where the tensor has been written to.

        Args:
            grad: whether gradients go to it, if it needs some.
            ended: whether the reader was called in a checkpoint that has ended: backward would have
                read there what has been written by then.

        Raises:
            RuntimeError: it is another one now, and the clone would not do.
        """
        if self.same:
            return self.tensor
        wanted = grad and (self.needs_grad or self.tensor.requires_grad)
        if self.clone is not None and not (wanted or ended):
            return self.clone
        raise RuntimeError(
            f"fastst: {what} changed after the call that read it and before its result was "
            "computed; leave the convolution out with fastst.convert(..., skip=...), or read its "
            "output before that"
        )


# Without making memory of its own of a clone.
_address: Callable[[Tensor], int] = torch._C._data_address  # type: ignore[attr-defined]


_VALUELESS = (FakeTensor, FunctionalTensor)
_SHARDED = "torch.distributed._composable_state"


def valueless(tensor: Tensor) -> bool:
    """Whether a tensor has a shape only."""
    return tensor.is_meta or type(tensor) in _VALUELESS


def _is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ``fully_shard`` gives a parameter its memory for a call, and takes it away again."""
    composable = sys.modules.get(_SHARDED)
    for found in list(getattr(composable, "_module_state_mapping", {}).values()):
        state = found() if isinstance(found, weakref.ref) else found
        groups: Any = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before PyTorch 2.13
            groups = filter(None, [getattr(state, "_fsdp_param_group", None)])
        for group in groups:
            for one in group.fsdp_params:
                if getattr(one, "_unsharded_param", None) is parameter:
                    return True
    return False
