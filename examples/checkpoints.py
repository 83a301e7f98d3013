"""Checkpoint files: written whole or not at all, and read without running what is in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; until it is complete on disk the file keeps what it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU; only tensors and plain values are read.

    Raises:
        CheckpointError: no such file, damaged, or no mapping.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint") from error
    except Exception as error:  # whatever it is, it is about this file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or no checkpoint: {reason}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is no checkpoint: holds a {type(found).__name__}")
    return found
