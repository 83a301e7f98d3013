"""What a call of a converted model makes of its promises: for the report."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from . import begins
from .promise import real
from .report import Replaced


def run(model: nn.Module, sample: Any) -> tuple[list[Replaced], dict[str, str]]:
    """The pairs of one call, and by the name of other first convolutions why they were none."""
    args = sample if isinstance(sample, tuple) else (sample,)
    with torch.no_grad(), contextlib.suppress(Exception):
        model = copy.deepcopy(model)  # whatever its forward writes to; some cannot be copied
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    norms = {id(b): n.rpartition(".")[0] for n, b in buffers.items()}
    with torch.no_grad(), torch.random.fork_rng(), begins.listening() as events:
        tree_map(lambda t: real(t, "the caller"), functional_call(model, buffers, args))
    pairs: dict[tuple[str, str], Replaced] = {}
    reasons: dict[str, str] = {}
    for event in events:
        plan = event.plan
        first = plan.begun.name
        if event.why is not None:
            reasons.setdefault(first, event.why)
            continue
        second = "a function" if plan.ends is None else plan.ends.name
        norm = None if plan.norm is None else norms.get(id(plan.norm.running_mean), "a norm")
        activation = "none" if plan.activation is None else plan.activation[0]
        order = f"{plan.first.kind}-first"
        pairs[first, second] = Replaced(first, second, order, norm, activation)
    return list(pairs.values()), reasons
