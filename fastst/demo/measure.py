"""Agreement, time and memory of models that should compute the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..machine import devices

Step = Callable[[nn.Module, Tensor], object]


def infer(model: nn.Module, x: Tensor) -> Tensor:
    """Logits in eval mode, as float64 on the CPU."""
    model.eval()
    with torch.inference_mode():
        return model(x).double().cpu()


def train(model: nn.Module, x: Tensor) -> None:
    """Forward and backward in training mode towards class 0; leaves gradients behind."""
    model.train()
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long, device=x.device)).backward()


def gradient(model: nn.Module) -> Tensor:
    """The gradients of all parameters as one float64 vector on the CPU."""
    return _flatten([p.grad for p in model.parameters() if p.grad is not None])


def running_statistics(model: nn.Module) -> Tensor:
    """All buffers of floating point as one float64 vector on the CPU."""
    return _flatten([b for b in model.buffers() if b.is_floating_point()])


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖."""
    return float((value - truth).norm() / truth.norm())


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd holds between forward and backward, parameters and buffers left out.

    Each storage counts once, whole, however many tensors view it.
    """
    model.train()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    for t in (*model.parameters(), *model.buffers()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    del y  # until here every saved tensor was alive, so that no address counted twice
    return sum(kept.values())


def medians(
    step: Step,
    models: Mapping[str, nn.Module],
    x: Tensor,
    repeats: int,
    tick: Callable[[], object],
) -> dict[str, float]:
    """Median seconds of ``step`` on each model, taken in turns after one round of warming up."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            devices.wait_for(x.device)
            start = time.perf_counter()
            step(model, x)
            devices.wait_for(x.device)
            if turn:
                times[name].append(time.perf_counter() - start)
            tick()
    return {name: statistics.median(t) for name, t in times.items()}


def _flatten(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().cpu().flatten() for t in tensors])
