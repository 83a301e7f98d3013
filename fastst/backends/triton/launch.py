"""What the machine has, and how a kernel is started. Tests replace functions of this module."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...machine import gpu
from . import tiles


@functools.cache
def found() -> tuple[ModuleType | None, str | None]:
    """The kernels, or why there are none."""
    if importlib.util.find_spec("triton") is None:
        return None, "needs the package triton, which is not installed"
    try:
        from . import kernels
        from .kernels import (  # noqa: F401
            depthwise,
            depthwise_backward,
            input_gradient,
            pack,
            pair,
            parallel,
            statistics,
            tap_conv,
            weight_gradient,
        )
    except Exception as error:  # a broken Triton must not break the other backends
        return None, f"needs a working Triton: importing it failed with {error!r}"
    return kernels, None


def kernels() -> ModuleType:
    """The kernels, where ``found`` says that there are some."""
    modules, missing = found()
    if modules is None:
        raise RuntimeError(f"backend 'triton' {missing}")
    return modules


@functools.cache
def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter (set before Triton was imported)."""
    modules, _ = found()
    return modules is not None and type(modules.tap_conv.tap_conv).__name__ == "InterpretedFunction"


@functools.cache
def capability(device: torch.device) -> gpu.Capability:
    """Compute capability; that of the data-centre Hopper where the interpreter stands in."""
    if device.type == "cuda" and torch.version.hip is not None:
        return gpu.amd(torch.cuda.get_device_properties(device).gcnArchName)
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def triton_version() -> tuple[int, ...]:
    """The numbers of the version of Triton, whatever package has brought it."""
    import triton

    return tuple(int(n) for n in re.findall(r"\d+", triton.__version__)[:3])


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a usual number where the interpreter stands in."""
    return counted(device) if device.type == "cuda" else gpu.processors(capability(device))


@functools.cache
def counted(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tf32_allowed() -> bool:
    """Whether float32 convolutions may round their operands to TF32, by PyTorch's own switch."""
    if torch.version.hip is not None:
        return False  # most of AMD's GPUs have no such product, and Triton refuses to compile it
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def run(
    kernel: Any,
    grid: tuple[int, ...],
    config: tiles.Config | None,
    *args: Any,
    **meta: Any,
) -> None:
    """Run a kernel on the device of its first tensor."""
    device = next(a.device for a in args if isinstance(a, Tensor))
    guard: Any = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    if config is not None:
        meta |= tiles.launch_options(config)
    with guard:
        kernel[grid](*args, **meta)
