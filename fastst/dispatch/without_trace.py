"""Calls of a model that leave it, what it is called with and all random numbers as they were."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..machine import devices


class DryRun:
    """A copy of a model, and of what it is called with.

    A model that cannot be copied (what is pruned holds results, a sharded one process groups) is
    called itself, with copies of its parameters and buffers.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        known: dict[int, Tensor] = {}  # the copies, so that one that comes twice stays one
        self.args = tree_map_only(Tensor, lambda t: known.setdefault(id(t), _copied(t)), args)
        self._values: dict[str, Tensor] = {}  # in the place of the model's
        try:
            self.model = copied(model)
        except Exception:  # whatever its attributes raise
            self.model = model
            named = (*model.named_parameters(), *model.named_buffers())  # FSDP's have no memory
            self._values = {n: _copied(t) for n, t in named if t.untyped_storage().size()}

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {n: self._values.get(n, p) for n, p in self.model.named_parameters()}

    @property
    def buffers(self) -> dict[str, Tensor]:
        return {n: self._values.get(n, b) for n, b in self.model.named_buffers()}

    def __call__(self) -> Any:
        return torch.func.functional_call(self.model, self._values, self.args)


@contextmanager
def without_trace(model: nn.Module, *args: Any) -> Iterator[DryRun]:
    """Gives ``model(*args)``, of which nothing stays. Random numbers are as they were at the end of
    the block, whoever drew within it."""
    with keep_random_numbers():
        yield DryRun(model, args)


@contextmanager
def keep_random_numbers() -> Iterator[None]:
    """Leaves the states of PyTorch's, Python's and NumPy's generators as they were."""
    numpy = sys.modules.get("numpy.random")
    states = random.getstate(), numpy and numpy.get_state(), torch.get_rng_state()
    gpus = {device: devices.runtime(device).get_rng_state(device) for device in devices.in_use()}
    try:
        yield
    finally:
        for device, state in gpus.items():
            devices.runtime(device).set_rng_state(state, device)
        torch.set_rng_state(states[2])
        if numpy:
            numpy.set_state(states[1])
        random.setstate(states[0])


def copied(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy with the same training modes, in which some tensors are those of the model."""
    with torch.no_grad():  # else those of TorchScript would be copied as results of a clone
        return copy.deepcopy(model, {id(t): t for t in shared})


def copied_arguments(args: Any) -> Any:
    """The same with other memory."""
    return tree_map_only(Tensor, _copied, args)


def _copied(t: Tensor) -> Tensor:
    """A leaf in other memory, with the same strides and as well aligned."""
    flat = t.detach()
    if flat.layout != torch.strided or type(flat) is not Tensor or not t.numel():
        made = flat.clone()
    else:
        lead = t.storage_offset() % 64
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        memory = flat.new_empty(lead + span)
        memory[lead:].copy_(flat.as_strided((span,), (1,)))
        made = flat.new_empty(0)  # no view, which a converted model would take for shared memory
        made.set_(memory.untyped_storage(), lead, t.shape, t.stride())
    if isinstance(t, nn.Parameter):
        return nn.Parameter(made, t.requires_grad)
    return made.requires_grad_(t.requires_grad)
