"""What a call of a converted model makes of its promises: for the report."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from . import begins
from .promise import real
from .report import Alone, Replaced
from .whole import Ran


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those that have memory."""
    return [(n, p) for n, p in model.named_parameters() if p.untyped_storage().size()]


def run(model: nn.Module, sample: Any) -> tuple[list[Replaced], list[Alone], dict[str, str]]:
    """The pairs of one call, convolutions that ran alone as one operation, and by the name of other
    first convolutions why they were none."""
    args = sample if isinstance(sample, tuple) else (sample,)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    values: dict[str, Any] = dict(buffers)
    with torch.no_grad():  # whatever its forward writes to
        try:
            model = copy.deepcopy(model)
        except Exception:  # of what is pruned, or some of whose attributes cannot be copied
            values |= {n: nn.Parameter(p.clone(), p.requires_grad) for n, p in _parameters(model)}
    norms = {id(b): n.rpartition(".")[0] for n, b in buffers.items()}
    with torch.no_grad(), torch.random.fork_rng(), begins.listening() as events:
        tree_map(lambda t: real(t, "the caller"), functional_call(model, values, args))
    pairs: dict[tuple[str, str], Replaced] = {}
    alone: dict[str, Alone] = {}
    reasons: dict[str, str] = {}
    for event in events:
        plan = event.plan
        if isinstance(plan, Ran):
            alone[plan.name] = plan.entry()
            continue
        first = event.name
        if event.why is not None:
            reasons.setdefault(first, event.why)
            continue
        second = "a function" if event.second is None else event.second
        norm = None if event.norm is None else norms.get(id(event.norm.running_mean), "a norm")
        activation = "none" if plan.activation is None else plan.activation[0]
        order = f"{plan.first.kind}-first"
        pairs[first, second] = Replaced(first, second, order, norm, activation)
    return list(pairs.values()), list(alone.values()), reasons
