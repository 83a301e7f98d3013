"""Calls that a model does not remember."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def without_trace(model: nn.Module, x: Tensor) -> Iterator[Callable[[], Any]]:
    """Gives ``model(x)`` on copies of the model's buffers.

    At the end the random state is as it was at the beginning, whoever drew within the block.
    """
    tensors = (x, *model.parameters(), *model.buffers())
    gpus = {t.device for t in tensors if t.device.type == "cuda"}
    with torch.random.fork_rng(gpus):
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        yield partial(torch.func.functional_call, model, buffers, (x,))
