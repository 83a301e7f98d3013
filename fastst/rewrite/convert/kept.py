"""What a promise reads: tensors as they were when it was made."""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ...problem.memory import lazy_clone


class CannotDefer(Exception):
    """Nothing would tell whether a tensor is written to: its reader runs at once."""


class Kept:
    """A tensor as it is now, whatever is written to it later.

    ``known``: what ``facts`` says of the tensor, where that has been asked.

    A copy-on-write clone: it costs no memory unless somebody writes. Then it is the tensor that
    moves, so memory of which others may have the address is not cloned. That, memory that cannot be
    cloned so, and memory that FSDP resizes are watched by version counter and place instead.
    Kernels read by ``read_address``, which moves nothing.
    """

    __slots__ = (
        "address", "clone", "laid_out", "leaf", "needs_grad", "resized", "tensor", "valueless",
        "version",
    )  # fmt: skip

    clone: Tensor | None
    address: Any  # of the clone, or the place of memory that has none

    def __init__(self, tensor: Tensor, known: Sequence[Any] | None = None) -> None:
        if known is None:
            grad, inference = tensor.requires_grad, tensor.is_inference()
        else:
            grad, inference = known[5], known[7]
        self.tensor, self.needs_grad, self.leaf = tensor, grad, tensor.is_leaf
        self.version = None if inference else tensor._version
        self.resized, self.clone, self.address, self.laid_out = False, None, 0, None
        self.valueless = tensor.is_meta or type(tensor) in _VALUELESS
        if self.valueless:
            return
        self.laid_out = _layout(tensor) if known is None else known[1:4]
        if type(tensor) is nn.Parameter and _SHARDED in sys.modules:
            self.resized = _is_sharded(tensor)
        self.hold(_is_held_elsewhere(tensor))
        if self.clone is None:
            if self.version is None:
                raise CannotDefer
            self.address = self._place()

    def _place(self) -> Any:
        """What tells another memory from this one. Not the address alone: memory of which another
        thread holds a clone moves when it is written to."""
        t = self.tensor
        return t.data_ptr() if self.resized else (t.untyped_storage()._cdata, t.storage_offset())

    def hold(self, shared: bool = False) -> None:
        """Take a clone, where that can be; ``shared``: others may have the address.

        Vectors of which none can be taken so are copied: PyTorch's batch norm counts no version of
        its statistics.
        """
        if self.resized:
            return
        t = self.tensor
        clone = None if shared or _has_other_owners(t) else lazy_clone(t)
        if clone is None and t.is_cpu and t.dim() == 1:
            clone = t.detach().clone()
        if type(clone) in _VALUELESS:  # under a FakeTensorMode that takes tensors of values, too
            self.valueless = True
        elif clone is not None:
            try:
                self.clone, self.address = clone, _address(clone)
            except NotImplementedError:  # made within a transform, which has wrapped it
                self.clone, self.address = None, 0

    def let_go(self) -> None:
        """Watch it instead: hooks of saved tensors may ask for its address, which would move."""
        if self.clone is not None and _address(self.tensor) == self.address:  # else it is a copy
            self.clone, self.address = None, self._place()

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
        if self.laid_out is not None and _layout(t) != self.laid_out:
            return False
        held = self.clone is not None and self.version is not None
        if held and t._version == self.version and _address(t) == self.address:
            return True
        return self._unwritten

    @property
    def _as_laid_out(self) -> bool:
        """Whether it has the shape, the strides and the dtype that it had: ``x.data = x.data[:1]``
        changes neither the version nor the address."""
        return self.laid_out is None or _layout(self.tensor) == self.laid_out

    @property
    def _unwritten(self) -> bool:
        t = self.tensor
        if self.version is not None and t._version != self.version:
            return False
        if self.clone is None:
            return not self.address or self._place() == self.address
        if _address(t) == self.address:
            return True
        # Memory of its own, which ``data_ptr`` makes as well as a writer to ``.data``.
        if t.device != self.clone.device or not torch.equal(t, self.clone):
            return False
        if not _is_held_elsewhere(t):  # since then its address may have gone to somebody
            self.hold()
        return True

    @property
    def switched(self) -> bool:
        """Whether a leaf has only been frozen, or made to need a gradient."""
        t = self.tensor
        if t.requires_grad == self.needs_grad or not (self.leaf and t.is_leaf):
            return False
        return self._as_laid_out and self._unwritten

    def get(self, what: str, grad: bool, ended: bool) -> Tensor:
        """The tensor, or its clone where the tensor has been written to.

        Args:
            grad: whether gradients go to it, if it needs some.
            ended: whether the reader was called under hooks of saved tensors that have ended:
                backward would have read there what has been written by then.

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


class Copied(tuple[Tensor]):
    """A tensor that nobody else writes to, in the place of a ``Kept`` one."""

    __slots__ = ()
    same, switched = True, False
    tensor = property(operator.itemgetter(0))

    def let_go(self) -> None:
        """Nobody else has its address."""

    def get(self, what: str, grad: bool, ended: bool) -> Tensor:
        return self[0]


def copy_vectors(vectors: Sequence[tuple[str, Tensor]]) -> tuple[tuple[str, Any], ...]:
    """Vectors alike that need no gradient, as they are now: copied in less time than watched, or
    copy-on-write clones, which may serve again as long as they share the vectors' memory."""
    held = any(_is_held_elsewhere(t) or _has_other_owners(t) for _, t in vectors)
    clones = [None if held else lazy_clone(t) for _, t in vectors]
    rows: Sequence[Tensor] = [clone for clone in clones if clone is not None]
    if len(rows) < len(vectors):
        rows = torch.stack([t.detach() for _, t in vectors]).unbind()
    return tuple([(name, Copied((row,))) for (name, _), row in zip(vectors, rows, strict=True)])


def as_own(x: Tensor, known: Sequence[Any] | None = None) -> Kept:
    """x, or a copy of it where others may write to its memory unseen, or know its address."""
    try:
        kept = Kept(x, known)
        if kept.clone is not None or not kept.foreign:
            return kept
    except CannotDefer:
        pass
    return Kept(x.clone())


def _has_other_owners(t: Tensor) -> bool:
    """Whether more hold a tensor's memory than itself, its base, and the node that made it.

    An array of NumPy's does (``t.numpy()``, of a view too), and so does whatever else was given the
    address of another tensor of that memory.
    """
    owners, base = 2, t._base  # with the storage that is asked
    if base is not None:
        owners += 1
    whole = t if base is None else base
    # relu's and its kin, which keep their output
    if not whole.is_leaf and hasattr(type(whole.grad_fn), "_saved_result"):
        owners += 1
    return _use_count(t.untyped_storage()._cdata) > owners


def _is_held_elsewhere(t: Any) -> bool:
    """Whether something besides Python holds a tensor itself: a capsule of DLPack's, or a graph.

    What needs a gradient is not exported, and lies in graphs.
    """
    base: Any = t._base
    if base is not None and not base.requires_grad and base._use_count() > 2:  # of which t is one
        return True
    return bool(not t.requires_grad and t._use_count() > 1)


def _layout(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype


_use_count: Callable[[int], int] = torch._C._storage_Use_Count
# Without making memory of its own of a clone.
_address: Callable[[Tensor], int] = vars(torch._C)["_data_address"]


_VALUELESS = (FakeTensor, FunctionalTensor)
_SHARDED = "torch.distributed._composable_state"


def is_valueless(tensor: Tensor) -> bool:
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
