"""Two processes that talk over gloo, handed functions to run; and a network for them to share."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastst

SIZE = 2
DTYPE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
_TIMEOUT = 60  # seconds: a test in which ranks wait for each other in vain must end


class Ranks:
    """A pool of ``SIZE`` processes, one process group over all of them."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        handle, self._store = tempfile.mkstemp(prefix="fastst-store-")
        os.close(handle)
        os.unlink(self._store)
        self._pipes, self._processes = [], []
        for rank in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._store, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, *args)`` on every rank at once; what each returned.

        Raises:
            AssertionError: on some rank it raised; with that rank's traceback.
        """
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(2 * _TIMEOUT):
                raise AssertionError(f"rank {rank} gave no answer")
            answers.append(pipe.recv())
        errors = [f"rank {r}:\n{text}" for r, (failed, text) in enumerate(answers) if failed]
        if errors:
            raise AssertionError("\n".join(errors))
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        Path(self._store).unlink(missing_ok=True)


def _serve(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, SIZE), rank=rank, world_size=SIZE,
        timeout=datetime.timedelta(seconds=_TIMEOUT),
    )  # fmt: skip
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            torch.manual_seed(0)
            pipe.send((False, function(rank, *args)))
        except Exception:
            pipe.send((True, traceback.format_exc()))
    dist.destroy_process_group()


class Network(nn.Module):
    """A residual network with every kind of layer that reaches across time."""

    def __init__(self) -> None:
        super().__init__()
        pair = {"norm": "batch", "bias": False}
        self.stem = nn.Conv3d(3, 6, (3, 3, 3), (1, 2, 2), 1, bias=False)
        self.norm = nn.BatchNorm3d(6)
        self.pool = nn.MaxPool3d(3, (2, 1, 1), 1)
        self.body = fastst.Conv2Plus1d(6, 8, 3, 2, 1, **pair)
        self.shortcut = nn.Conv3d(6, 8, 1, 2, bias=False)
        self.cross = fastst.ParallelConv2Plus1d(8, 8, 3, 1, 1, branch_norm="batch", norm="batch")
        self.head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.stem(x)).relu())
        x = F.relu(self.body(x) + self.shortcut(x))
        return self.head(self.cross(x))


def batch(n: int = 4, frames: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, frames, 8, 7, generator=generator, dtype=DTYPE)
    return x, torch.randint(5, (n,), generator=generator)


def network() -> Network:
    torch.manual_seed(2)
    return Network().to(DTYPE)


def step(model: nn.Module, x: Tensor, target: Tensor) -> None:
    F.cross_entropy(model(x), target).backward()


def whole_run(x: Tensor, target: Tensor) -> Network:
    """One process on everything: gradients and running statistics to compare with."""
    model = network()
    step(model, x, target)
    return model


def assert_same_step(model: nn.Module, whole: nn.Module) -> None:
    got, want = dict(model.named_parameters()), dict(whole.named_parameters())
    assert got.keys() == want.keys()
    for name, p in want.items():
        grad = got[name].grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(grad, p.grad, **TIGHT, msg=lambda m, n=name: f"{n}: {m}")
    for name, b in whole.named_buffers():
        got_b = dict(model.named_buffers())[name]
        torch.testing.assert_close(got_b, b, **TIGHT, msg=lambda m, n=name: f"{n}: {m}")
