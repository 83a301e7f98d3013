"""What the backends with a native library share: its loading, and its view of tensors."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..machine import left_out
from ..problem.memory import read_address
from ..problem.spec import Pass, Problem


def load(name: str, compiler: str, variable: str) -> ModuleType | str:
    """The module ``fastst.<name>``, or why it is not there.

    Args:
        compiler: what it is built with.
        variable: the environment variable that asks for it.
    """
    if importlib.util.find_spec(f"fastst.{name}") is None:
        return (
            f"needs the native library fastst.{name}, which {left_out.why_not_built(name)}: with "
            f"{compiler} on PATH, install fastst from source with {variable}=1"
        )
    try:
        return importlib.import_module(f"fastst.{name}")
    except ImportError as error:
        return (
            f"needs the native library fastst.{name}, which cannot be loaded ({error}): "
            "install fastst again"
        )


def require(backend: str, found: ModuleType | str) -> ModuleType:
    """
    Raises:
        ImportError: there is no library; says why.
    """
    if isinstance(found, str):
        raise ImportError(f"the {backend} backend {found}")
    return found


class Launcher:
    """Launches of one call: a thin layer of tensors over the functions of a native library."""

    def __init__(self, lib: ModuleType, problem: Problem, accumulate: torch.dtype) -> None:
        self.lib = lib
        self.accumulate = accumulate  # dtype of per-channel and partial results
        self.slope = float(problem.spec.slope)
        self.kept: list[Tensor] = []  # alive until everything is computed

    def act(self, name: str) -> Any:
        return getattr(self.lib.Activation, name)

    def view(self, t: Tensor) -> Any:
        return self.lib.View(read_address(t), t.shape, t.stride())

    def array(self, t: Tensor | None) -> Any:
        """Dense array in the accumulation dtype; converts small per-channel tensors to it."""
        if t is None:
            return self.lib.Array()
        if t.dtype != self.accumulate or not t.is_contiguous():
            t = t.to(self.accumulate).contiguous()
        self.kept.append(t)
        return self.lib.Array(read_address(t), t.numel())

    def plain(self, t: Tensor) -> Any:
        return self._source("plain", t, None, None)

    def norm_act(
        self,
        u: Tensor,
        coefficients: Tensor | None,
        activation: str,
        positions: Tensor | None = None,
        past: Tensor | None = None,
    ) -> Any:
        """act(norm(u)), of whose frames those of ``past`` come first, as they are.

        Args:
            coefficients: (5, C), or such a table for each clip or each frame of each clip.
            positions: (2, N, T, H, W): mean and factor of each position.
        """
        plain = coefficients is None and activation == "none"
        read = "plain" if plain else "norm_act"
        return self._source(read, u, None, coefficients, activation, positions, past)

    def norm_gradient(
        self, dv: Tensor, u: Tensor, coefficients: Tensor | None, positions: Tensor | None = None
    ) -> Any:
        """du of dv = act'(v)·dz."""
        if coefficients is None:
            return self.plain(dv)
        return self._source("norm_gradient", dv, u, coefficients, positions=positions)

    def _source(
        self, read: str, a: Tensor, b: Tensor | None, coefficients: Tensor | None,
        activation: str = "none", positions: Tensor | None = None, past: Tensor | None = None,
    ) -> Any:  # fmt: skip
        b, past = (None if t is None else self.view(t) for t in (b, past))
        return self.lib.Source(
            self.view(a), b, self.array(coefficients), getattr(self.lib.Read, read),
            self.act(activation), self.slope, self.array(positions), past,
        )  # fmt: skip

    def conv(self, p: Pass) -> Any:
        return conv(self.lib, p)


@functools.lru_cache(maxsize=4096)
def conv(lib: ModuleType, p: Pass) -> Any:
    mode = getattr(lib.PadMode, p.padding_mode if any(p.padding) else "zeros")
    of_time = []
    if p.frame_mode is not None:
        space, time = (any(p.padding[2:]), p.padding_mode), (any(p.padding[:2]), p.frame_mode)
        mode, frame_mode = (
            getattr(lib.PadMode, name if pads else "zeros") for pads, name in (space, time)
        )
        of_time = [frame_mode]
    return lib.Conv(p.kernel, p.stride, p.dilation, p.padding, p.groups, mode, *of_time)
