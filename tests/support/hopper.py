"""What tests of the Hopper kernels share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from fastst.backends.cuda import hopper
from tests.support import fuzz
from tests.support.fuzz import Config


def in_clusters(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType = hopper,
    names: Sequence[str] = ("spatial_tile", "temporal_tile"),
) -> None:
    """The tiles that the module's functions choose, in clusters of two.

    By four blocks; by two where warpgroups take turns, so that these come again.
    """
    for name in names:
        chosen = getattr(module, name)

        def pairs(*arguments: object, chosen: Any = chosen) -> object:
            tile: Any = chosen(*arguments)
            return replace(tile, grid=2 if getattr(tile, "groups", 2) == 1 else 4, cluster=2)

        monkeypatch.setattr(module, name, pairs)


def dense(seed: int, **fixed: object) -> Config:
    """A random configuration that the forward kernels take."""
    r = random.Random(seed)
    causal = r.choice((False, False, True, "strided"))
    stride = (r.choice((1, 1, 2)), r.choice((1, 2)), r.choice((1, 2)))
    k = r.choice((1, 2, 3, 3, 3, 5))
    choices: dict[str, object] = dict(
        seed=seed, batch=r.choice((1, 2, 3)), channels=r.choice((8, 64, 72)),
        mid=r.choice((1, 10, 45, 64, 72, 150)), out=r.choice((8, 64, 72, 136)),
        size=(r.choice((1, 2, 4, 5)), r.choice((1, 5, 8, 9)), r.choice((4, 8, 10, 17))),
        kernel=(3, k, r.choice((k, k, 3))), stride=stride, causal=causal,
        padding=(0 if causal else r.choice((1, 1, 2)), k // 2, r.choice((1, 2))),
        dilation=(1, r.choice((1, 1, 2)), r.choice((1, 1, 2))),
        padding_mode=("zeros", r.choice(("zeros", "zeros", "replicate"))),
        activation=r.choice(fuzz.ACTIVATIONS), norm=r.choice(("none", "batch", "frozen")),
        bias=(r.random() < 0.5, r.random() < 0.5), recompute=r.random() < 0.3,
        affine=r.random() < 0.7, dtype=r.choice((torch.float16, torch.bfloat16)),
        residual=r.random() < 0.3, outer_activation=r.choice(("none", "relu", "silu")),
        x_layout="channels_last",
    )  # fmt: skip
    return Config(**(choices | fixed))  # type: ignore[arg-type]
