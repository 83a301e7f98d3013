"""Strides of an operation's output: those that the calls have which it stands for.

PyTorch's convolutions write channels-last or not by what they read, by their kernel and by how much
there is to do, and what follows keeps it. So the strides are asked of PyTorch itself, of the same
calls on tensors without values; once for all calls of the same sizes and strides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from .plain import are_in_order

# A call: what it makes of the value so far, and (its argument's name, name of a tensor) of others.
Call = tuple[Callable[..., Tensor], tuple[tuple[str, str], ...]]
Names = Mapping[str, str]
_BY_DEVICE = (F.conv1d, F.conv2d, F.conv3d, F.group_norm, F.instance_norm, F.layer_norm, F.rms_norm)
_LONGEST = 4096
_known: dict[Any, tuple[int, ...]] = {}
_known_dtypes: dict[Any, torch.dtype] = {}


def call(run: Callable[..., Tensor], names: Names) -> Call:
    """A call of tensors, by its own names for them and those by which they are known."""
    return run, tuple(names.items())


def as_separate(
    y: Tensor, calls: Callable[[], Sequence[Call]], given: Mapping[str, Tensor], viewed: bool
) -> Tensor:
    """y in the strides of the separate calls; ``viewed``: some of them turn dimensions."""
    in_order = (are_in_order(t.shape, t.stride()) for t in given.values())
    if not viewed and all(in_order):  # and so is y, either way
        return y
    strides = _strides(calls(), given)
    if strides is None or y.stride() == strides:
        return y
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(y)


def _strides(calls: Sequence[Call], given: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """None for sizes of a graph that are symbols."""
    device = next(iter(given.values())).device
    key = (
        tuple((n, t.shape, t.stride(), t.dtype) for n, t in given.items()), device,
        _meaning(calls), torch.get_num_threads(), torch.is_autocast_enabled(device.type),
        torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled,
    )  # fmt: skip
    try:
        found = _known.get(key)
    except TypeError:
        return None
    if found is None:
        if len(_known) >= _LONGEST:
            _known.clear()
        with _disable_current_modes(), _AsKernelsWrite(device), torch.no_grad():
            empty = {n: _empty_like(t, "meta") for n, t in given.items()}
            value: Any = None
            for run, names in calls:
                value = run(value, **{own: empty[n] for own, n in names if n in empty})
        found = _known[key] = value.stride()
    return found


def dtype_under_autocast(
    run: Callable[..., Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.dtype:
    """Of what a call makes of a value: autocast has one of its own for some functions."""
    key = _meaning(run), shape, dtype, device, torch.get_autocast_dtype(device.type)
    found = _known_dtypes.get(key)
    if found is None:
        if len(_known_dtypes) >= _LONGEST:
            _known_dtypes.clear()
        with _disable_current_modes(), FakeTensorMode(), torch.no_grad():
            made = run(torch.empty(shape, dtype=dtype, device=device))
        found = _known_dtypes[key] = made.dtype
    return found


class _AsKernelsWrite(TorchFunctionMode):
    """Within the block calls without values give the strides that they give on a device.

    Views of fake tensors have strides of their own along axes of size 1, those of meta tensors
    PyTorch's. How a convolution or a norm writes goes by the device, which fake tensors have. Batch
    norms and pads are as their kernels.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BY_DEVICE:
            with FakeTensorMode():
                args, kwargs = tree_map_only(
                    Tensor, lambda t: _empty_like(t, self.device), (args, kwargs)
                )
                y = func(*args, **kwargs)
            return _empty_like(y, "meta")
        y = func(*args, **kwargs)
        pads = func is F.pad and kwargs["mode"] in ("replicate", "reflect")
        if pads or func is F.batch_norm:
            y = y.contiguous(memory_format=suggest_memory_format(args[0]))
        return y


def _empty_like(t: Tensor, device: torch.device | str) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)


def _meaning(what: Any) -> Any:
    """Code and settings of a call, which holds no tensors."""
    if isinstance(what, (tuple, list)):
        return tuple(map(_meaning, what))
    if not isinstance(what, FunctionType):
        return repr(what)
    return what.__code__, *(_meaning(cell.cell_contents) for cell in what.__closure__ or ())
