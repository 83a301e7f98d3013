"""Loading of checkpoint files into models, with one clear error where they do not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SHOWN = 5  # names listed per kind of mismatch


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy a checkpoint file into a model. Nothing is copied unless everything fits.

    Args:
        model: receives the tensors.
        path: a file that ``torch.save(state_dict)`` wrote. Only tensors are read from it: no code
            in it is ever run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no state_dict, or one of another network.
    """
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what the unpickler raises depends on where the bytes go wrong
        raise ValueError(
            f"{os.fspath(path)}: a checkpoint must be a file of tensors that torch.save wrote, "
            f"but it cannot be read ({type(error).__name__})"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ValueError(
            f"{os.fspath(path)}: a checkpoint must be a state_dict (names to tensors), got "
            f"{_describe(found)}"
        )
    wanted = model.state_dict()
    problems = [
        *_list("missing", sorted(wanted.keys() - found.keys())),
        *_list("unexpected", sorted(found.keys() - wanted.keys())),
        *_list(
            "of another shape",
            [
                f"{k} {tuple(found[k].shape)} instead of {tuple(t.shape)}"
                for k, t in wanted.items()
                if k in found and found[k].shape != t.shape
            ],
        ),
    ]
    if problems:
        raise ValueError(
            f"{os.fspath(path)} is no checkpoint of this {type(model).__name__}: "
            + "; ".join(problems)
        )
    model.load_state_dict(found)


def _describe(found: Any) -> str:
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__}"
    kinds = sorted({type(v).__name__ for v in found.values()})
    return (
        f"a {type(found).__name__} of {', '.join(kinds)} under {', '.join(map(repr, found))[:80]}"
    )


def _list(label: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{len(names)} {label}: {', '.join(names[:_SHOWN])}{more}"]
