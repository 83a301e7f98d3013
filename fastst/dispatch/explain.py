"""``explain``: which backend runs a module's calls, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..backends.contract import Phase
from ..problem.spec import PairProblem
from . import selection
from .selection import Decision
from .without_trace import without_trace


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found; prints as text.

    Attributes:
        backend: what runs the (first) call forward: a backend's name or "composed".
        reasons: for every backend that was not chosen for it, why; empty if composed.
        why_composed: why separate PyTorch operators run instead of one op, or None.
        calls: all calls, in order.
    """

    calls: tuple[Decision, ...]

    @property
    def backend(self) -> str:
        return self.calls[0].chosen

    @property
    def reasons(self) -> dict[str, str]:
        return _reasons(self.calls[0], "forward")

    @property
    def why_composed(self) -> str | None:
        return self.calls[0].why

    def __str__(self) -> str:
        return "\n".join(_text(call) for call in self.calls)


def explain(module: nn.Module, x: Tensor) -> Explanation:
    """Say what runs ``module(x)``: the backend, and for every other one the reason it does not.

    Runs the module once, without gradients, and leaves it, x and random numbers as they were.

    Args:
        module: a layer of fastst, or a model that contains some.
        x: what it is called with.

    Raises:
        ValueError: nothing in the module is an operation of fastst.
    """
    with (
        selection.recording(quietly=True) as calls, torch.no_grad(), without_trace(module, x) as run
    ):  # fmt: skip
        # What is computed later is so when it is read, at the latest.
        tree_map_only(Tensor, Tensor.detach, run())
    if not calls:
        raise ValueError(
            f"explain: requires a module that calls fastst on a non-empty input, got "
            f"{type(module).__name__}, which made no such call"
        )
    return Explanation(tuple(calls))


def _reasons(call: Decision, phase: Phase) -> dict[str, str]:
    if call.problem is None:
        return {}
    requested = selection.requested_backend()
    if requested != "auto":
        other = f"{requested!r} was asked for"
    elif selection.fastest_measured(call.problem, phase) is not None:
        other = f"{call.chosen!r} was measured to be faster by fastst.tune"
    else:
        other = f"{call.chosen!r} comes first"
    found = selection.reasons(call.problem, phase)
    return {n: other if why is None else why for n, why in found.items() if n != call.chosen}


def _text(call: Decision) -> str:
    if call.problem is None:
        return f"{call.what}: composed of separate PyTorch operators, because {call.why}"
    p = call.problem
    shapes = [(p.batch, p.passes[0].in_channels, *p.size), p.out_shape]
    lines = [f"{p.op} {shapes[0]} → {shapes[1]}, {p.dtype}, {p.device}"]
    if isinstance(p, PairProblem):
        lines[0] += f", {p.mid_channels} mid channels, {p.spec.order}"
        after = ["frozen norm"] * p.spec.outer_norm + ["residual"] * p.residual
        after += [p.spec.outer_activation] * (p.spec.outer_activation != "none")
        after += ["statistics for the batch norm after it"] * p.spec.output_statistics
        lines[0] += f", then {' and '.join(after)}" if after else ""
    own = ", PyTorch's own convolutions" if call.chosen == "aten" else ""
    lines.append(f"  {call.phase}: {call.chosen}{own}")
    if (avoided := selection.BACKENDS[call.chosen].avoids(p, call.phase)) is not None:
        lines.append(f"    avoided: {avoided}")
    lines += [f"    not {name}: {why}" for name, why in _reasons(call, call.phase).items()]
    return "\n".join(lines)
