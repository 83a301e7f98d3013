"""Backward on the Triton backend: every gradient, and what is launched and allocated for them."""

from __future__ import annotations

import fuzz
import pytest
from fuzz import Config, Limits
from test_triton import DEVICE, few_programs, launched  # noqa: F401

from fastst import configs

pytest.importorskip("triton", reason="Triton is not installed")


def dense(config: Config) -> bool:
    channels = (config.channels, config.mid)
    if config.order == "temporal-first":
        channels = channels[::-1]
    groups = zip(channels, config.groups, strict=True)
    return not any(configs.thin(c // g, g) for c, g in groups)


TINY = Limits(
    batch=2, channels=20, frames=5, space=7, work=30_000, fixed=dict(op="conv2plus1d"),
    accept=dense,
)  # fmt: skip


def check(config: Config) -> None:
    why = fuzz.check(config, "triton", device=DEVICE)
    assert why is None, why


@pytest.mark.parametrize("part", range(8))
def test_random_gradients_are_right(part: int) -> None:
    fuzz.fuzz("triton", 5, TINY, first=fuzz.SEED + 1000 * part, device=DEVICE, least=1.0)
