"""What a call of a converted model makes of its promises: for the report."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ...dispatch.without_trace import without_trace
from . import begins
from .begins import Begins
from .promise import real
from .report import Alone, Replaced
from .whole import Ran


def run(model: nn.Module, sample: Any) -> tuple[list[Replaced], list[Alone], dict[str, str]]:
    """The pairs of one call, convolutions that ran alone as one operation, and by the name of other
    first convolutions why they were none."""
    args = sample if isinstance(sample, tuple) else (sample,)
    with torch.no_grad(), without_trace(model, *args) as call, begins.listening() as events:
        tree_map(lambda t: real(t, "the caller"), call())
    norms = {id(b): n.rpartition(".")[0] for n, b in call.buffers.items()}
    names = {id(m): n for n, m in call.model.named_modules()}

    def name_of(begun: Begins) -> str:
        """As the model has it: its convolution may have been converted as one of a part."""
        return names.get(id(begun.conv), begun.name)

    pairs: dict[tuple[str, str], Replaced] = {}
    alone: dict[str, Alone] = {}
    reasons: dict[str, str] = {}
    for event in events:
        plan = event.plan
        if isinstance(plan, Ran):
            name = name_of(event.begun)
            alone[name] = plan.entry(name)
            continue
        first = name_of(event.begun)
        if event.why is not None:
            reasons.setdefault(first, event.why)
            continue
        second = "a function" if event.second is None else name_of(event.second)
        norm = None if event.norm is None else norms.get(id(event.norm.running_mean), "a norm")
        activation = "none" if plan.activation is None else plan.activation[0]
        order = f"{plan.first.kind}-first"
        pairs[first, second] = Replaced(first, second, order, norm, activation)
    return list(pairs.values()), list(alone.values()), reasons
