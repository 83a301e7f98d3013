"""What ran on the machine, and how the next launches run."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .machine import Memory, Module


@contextlib.contextmanager
def young_objects() -> Iterator[None]:
    """Within, ``live_tensors`` looks at what was made within: at all, a launch costs 50 ms more."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def live_tensors() -> list[Memory]:
    """The memory of every tensor that lives: launches get plain addresses."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = Memory(storage.data_ptr(), storage.nbytes())
    return list(found.values())


def _as_it_is(text: str) -> str:
    return text


@dataclass
class Executed:
    """``plant`` changes the text of every kernel before it is decoded: faults that tests expect."""

    seed: int = 0
    count: bool = False
    plant: Callable[[str], str] = _as_it_is
    kernels: list[str] = field(default_factory=list)
    counted: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def run(
        self,
        module: Module,
        entry: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[int | float | bytes],
        memory: Iterable[Memory],
        label: str = "",
        **how: Any,
    ) -> None:
        """Launch a kernel; ``label`` is what it is called in ``kernels``."""
        counted = module.launch(
            entry, grid, block, arguments, memory, seed=self.seed, count=self.count, **how
        )
        self.kernels.append(label or entry)
        if self.count:
            self.counted.append((self.kernels[-1], counted))
