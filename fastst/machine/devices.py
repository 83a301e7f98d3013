"""GPUs as PyTorch has them: the one place that knows their types and calls their runtimes.

AMD's are of the type "cuda", too. Another type that Triton compiles for, such as "xpu", needs its
module among ``_RUNTIMES``, what its kernels are compiled for in ``capability``, its limits in
``gpu``, and its driver in ``describe_driver``. What belongs to NVIDIA alone is ``backends/cuda``.
"""

from __future__ import annotations

import contextlib
import functools
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from . import gpu

_RUNTIMES: dict[str, Any] = {"cuda": torch.cuda}
_NOTHING = contextlib.nullcontext()
_MODULE = Path("/proc/driver/nvidia/version")
_torch: Any = torch._C
_cudnn: Any = torch.backends.cudnn  # its attributes are made when it is imported


def is_gpu(device: torch.device) -> bool:
    return device.type in _RUNTIMES


def kind(device: torch.device) -> str:
    """ "gpu" of any type of GPU, else the type."""
    name = device.type
    return "gpu" if name in _RUNTIMES else name


def is_rocm() -> bool:
    """Whether GPUs are AMD's."""
    return torch.version.hip is not None


def runtime(device: torch.device) -> Any:
    """PyTorch's module for a GPU: its streams, events and memory."""
    return _RUNTIMES[device.type]


def present() -> list[torch.device]:
    """All GPUs here."""
    return [
        torch.device(name, i)
        for name, module in _RUNTIMES.items() for i in range(module.device_count())
    ]  # fmt: skip


def in_use() -> list[torch.device]:
    """Those that this process has asked something of already."""
    return [device for device in present() if runtime(device).is_initialized()]


@functools.cache
def capability(device: torch.device) -> gpu.Capability:
    """What kernels are compiled for: see ``gpu``."""
    if is_rocm():
        return gpu.amd(runtime(device).get_device_properties(device).gcnArchName)
    found: gpu.Capability = runtime(device).get_device_capability(device)
    return found


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return int(runtime(device).get_device_properties(device).multi_processor_count)


def describe(device: torch.device) -> str:
    """A GPU in words."""
    p = runtime(device).get_device_properties(device)
    return (
        f"{p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} "
        f"multiprocessors, {p.total_memory / 2**30:.0f} GiB"
    )


def describe_driver() -> str:
    """What beside its model decides how a GPU computes."""
    driver = _torch._cuda_getDriverVersion()
    return f"driver {driver}{_kernel_module()} cudnn {_cudnn.version()}"


def _kernel_module() -> str:
    """Version of NVIDIA's driver where Linux tells: that of CUDA stays the same over many."""
    with suppress(OSError):
        text = _MODULE.read_text(errors="replace")
        if found := re.search(r"Module.*?\s(\d+(?:\.\d+)+)\s", text):
            return f" {found[1]}"
    return ""


def convolves_in_tf32() -> bool:
    """Whether PyTorch's float32 convolutions may round their operands to TF32."""
    return bool(_cudnn.conv.fp32_precision == "tf32")


def set_tf32(on: bool) -> None:
    """Turn PyTorch's switch of that."""
    _cudnn.conv.fp32_precision = "tf32" if on else "ieee"


def guard(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The device is the current one, if it is a GPU."""
    module = _RUNTIMES.get(device.type)
    if module is None or module.current_device() == device.index:
        return _NOTHING
    found: contextlib.AbstractContextManager[Any] = module.device(device)
    return found


def current_stream(device: torch.device) -> Any:
    """PyTorch's stream of a GPU; None of what is none."""
    return runtime(device).current_stream(device) if is_gpu(device) else None


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if is_gpu(device):
        runtime(device).synchronize(device)


def capturing(device: torch.device) -> bool:
    """Whether what a GPU is given now is recorded as a graph."""
    return is_gpu(device) and bool(runtime(device).is_current_stream_capturing())
