"""A stand-in for ``torch.cuda``: two GPUs of one model and one of another."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

NAMES = ("NVIDIA H200", "NVIDIA H200", "NVIDIA A100-SXM4-80GB")
CAPABILITIES = ((9, 0), (9, 0), (8, 0))


class StandIn:
    """What was asked of it; ``capturing`` may be set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.capturing = 0, False
        self.synchronized: list[int] = []
        functions: dict[str, Any] = {
            "is_available": lambda: True,
            "device_count": lambda: len(NAMES),
            "current_device": lambda: self.current,
            "set_device": self._set,
            "get_device_name": lambda device=None: NAMES[self._index(device)],
            "get_device_capability": lambda device=None: CAPABILITIES[self._index(device)],
            "get_device_properties": self._properties,
            "is_current_stream_capturing": lambda: self.capturing,
            "current_stream": lambda device=None: SimpleNamespace(cuda_stream=7),
            "synchronize": lambda device=None: self.synchronized.append(self._index(device)),
            "device": lambda device: contextlib.nullcontext(),
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)

    def _index(self, device: Any) -> int:
        index = device if isinstance(device, int | None) else torch.device(device).index
        return self.current if index is None else index

    def _set(self, device: Any) -> None:
        self.current = self._index(device)

    def _properties(self, device: Any) -> SimpleNamespace:
        i = self._index(device)
        major, minor = CAPABILITIES[i]
        return SimpleNamespace(
            name=NAMES[i], major=major, minor=minor,
            multi_processor_count=132 if major == 9 else 108,
            total_memory=141 << 30, L2_cache_size=50 << 20,
        )  # fmt: skip
