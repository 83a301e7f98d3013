"""Calls of convolutions whose tensors are PyTorch's own, and what their result is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .state import State

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


class Facts(NamedTuple):
    """All of a plain tensor that a decision may read: not its values, nor where they lie."""

    kind: type
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    grad: bool  # whether it needs one
    negative: bool  # to be negated when it is read: others of these bits are complex
    inference: bool  # it cannot be saved for backward
    settled: bool  # nobody's view: such weights are freed when a module's call ends (FSDP)

    @property
    def contiguous(self) -> bool:
        return are_in_order(self.shape, self.stride)


def are_in_order(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether strides are those of new memory. Others may mean channels-last to PyTorch, be it only
    along an axis of size 1."""
    if 0 in shape:
        return True
    dense = 1
    for n, s in zip(shape[::-1], stride[::-1], strict=True):
        if s != dense:
            return False
        dense *= n
    return True


def facts(t: Any) -> tuple[Any, ...] | None:
    """The fields of ``Facts``; None of what is no plain tensor of values in strides."""
    kind = type(t)
    if kind not in PLAIN or t.layout is not torch.strided:
        return None
    return (
        kind, t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_neg(),
        t.is_inference(), kind is nn.Parameter or not t._is_view(),
    )  # fmt: skip


def plain_call(x: Any, weight: Any, bias: Any) -> torch.dtype | None:
    """The dtype of a convolution's result, or None for a call that must run at once."""
    if (
        type(x) not in PLAIN
        or x.dim() != 5
        or not (are_plain(x.device, x, weight, bias) and are_settled(weight, bias))
    ):
        return None
    state = State(x.device)
    if state.forbids_operations or (state.faked and type(x) is not FakeTensor):
        return None
    if needs_grad(state, weight, bias) and is_inference(x, weight):
        return None
    return result_dtype(state, x, weight, bias)


def are_plain(device: torch.device, *tensors: Tensor | None) -> bool:
    """Whether tensors are PyTorch's own, of values in strides, all on one device."""
    for t in tensors:
        if t is None:
            continue
        if type(t) not in PLAIN or t.layout is not torch.strided or t.device != device:
            return False
        if t.is_neg():  # others of these bits are complex, of which kernels take none
            return False
    return True


def needs_grad(state: State, *tensors: Tensor | None) -> bool:
    if state.grad:
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def is_inference(*tensors: Tensor) -> bool:
    """Whether one of them cannot be saved for backward."""
    return any(t.is_inference() for t in tensors)


def are_settled(*weights: Tensor | None) -> bool:
    """Whether weights are nobody's views: such ones are freed when a module's call ends (FSDP)."""
    return all(w is None or type(w) is nn.Parameter or not w._is_view() for w in weights)


def result_dtype(state: State, *tensors: Tensor | None) -> torch.dtype | None:
    """Of a convolution of these tensors, or None where it may refuse them."""
    return common_dtype({t.dtype for t in tensors if t is not None}, state.autocast)


def common_dtype(dtypes: set[torch.dtype], autocast: torch.dtype | None) -> torch.dtype | None:
    """The same of dtypes, and of that of autocast."""
    if len(dtypes) == 1 and autocast is None:
        (dtype,) = dtypes
        return dtype if dtype in FLOATS else None
    if not dtypes.issubset(FLOATS):
        return None
    if autocast is not None and torch.float64 not in dtypes:
        return autocast if autocast in FLOATS else None
    return next(iter(dtypes)) if len(dtypes) == 1 else None
