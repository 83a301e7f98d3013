"""Two processes that talk over gloo, started once and handed functions to run."""

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

SIZE = 2
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
