"""Which pairs of a network keep only their input for backward, so that it fits a memory budget."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..dispatch.without_trace import copied, keep_random_numbers
from ..nn.pair_of_modules import RECOMPUTE
from ..ops.schema import pair_arguments
from ..problem import slicing
from ..problem.spec import PairProblem, in_execution_order


class MemoryPlan(NamedTuple):
    """What ``set_memory_budget`` has chosen.

    Attributes:
        kept: bytes of mid tensors that a step keeps for backward.
        total: bytes that it would keep if no pair recomputed.
        recomputed: names of the spatial convolutions whose pairs compute u again in backward.
    """

    kept: int
    total: int
    recomputed: tuple[str, ...]


class _Use(NamedTuple):
    """One call of a pair: bytes of u, cost of computing it again, whether that is to be."""

    size: int
    flops: int
    recompute: bool


def set_memory_budget(
    model: nn.Module, budget: float | None, *inputs: Any, **keywords: Any
) -> MemoryPlan | None:
    """Let pairs recompute until a training step keeps at most a part of the mid tensors.

    The pairs are taken in the order of operations per byte, cheapest first, and then those that
    were not needed are given back. Pairs that recompute go through backward in parts of the batch
    where that keeps the peak of a step down, which counts among their operations. The choice counts
    for layers and converted pairs for which ``recompute`` was not given, and goes before
    ``FASTST_RECOMPUTE``. It depends on the shapes of the inputs only, and nothing is computed: the
    a copy of the model, without one of its parameters, runs on fake tensors, in the mode it is in.

    Args:
        model: any module with ``Conv2Plus1d`` layers or converted pairs.
        budget: largest part, from 0 to 1, of the bytes of all mid tensors that may be kept for
            backward; None takes an earlier choice back.
        inputs, keywords: of the model, as in training.

    Returns:
        What was chosen; None for a budget of None.

    Raises:
        TypeError: ``model`` is no module, or the budget no number.
        ValueError: the budget is not within 0 and 1, the model cannot be copied, does not run on
            these inputs or wants to read values of them, or none of its pairs keeps anything, as
            where nothing needs a gradient.
    """
    _check(model, budget)
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv3d)}
    if budget is None:
        _mark(convs, None)
        return None
    before = {n: vars(m).get(RECOMPUTE) for n, m in convs.items()}
    try:
        _mark(convs, False)
        least = _uses(model, inputs, keywords)
        _mark(convs, True)
        most = _uses(model, inputs, keywords)
    except BaseException:
        for name, value in before.items():
            _mark({name: convs[name]}, value)
        raise
    if not least:
        raise ValueError(
            "set_memory_budget: the model must run pairs as single operations that need gradients, "
            "and it runs none"
        )
    total = sum(use.size for use in least.values())
    kept = sum(use.size for use in least.values() if not use.recompute)
    open_ = [n for n, use in least.items() if most[n].recompute and not use.recompute]
    chosen: list[str] = []
    for name in sorted(open_, key=lambda n: least[n].flops / max(1, least[n].size)):
        if kept > budget * total:
            chosen.append(name)
            kept -= least[name].size
    for name in sorted(chosen, key=lambda n: -least[n].flops):
        if kept + least[name].size <= budget * total:
            chosen.remove(name)
            kept += least[name].size
    for name in convs:
        value = None if name not in open_ else name in chosen
        _mark({name: convs[name]}, value)
    always = [n for n, use in least.items() if use.recompute]
    return MemoryPlan(kept, total, tuple(n for n in convs if n in chosen or n in always))


def _check(model: Any, budget: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"set_memory_budget: model must be an nn.Module, got {type(model).__name__}"
        )
    if budget is None:
        return
    if not isinstance(budget, (int, float)) or isinstance(budget, bool):
        raise TypeError(f"set_memory_budget: budget must be a number or None, got {budget!r}")
    if not 0 <= budget <= 1:
        raise ValueError(f"set_memory_budget: budget must be within 0 and 1, got {budget}")


def _mark(convs: dict[str, nn.Conv3d], value: bool | None) -> None:
    for conv in convs.values():
        vars(conv).pop(RECOMPUTE, None)
        if value is not None:
            vars(conv)[RECOMPUTE] = value


def _uses(model: nn.Module, inputs: Any, keywords: Any) -> dict[str, _Use]:
    """The pairs that a forward pass runs, by the names of their spatial convolutions."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    try:
        model = copied(model, tensors.values())  # whose forward may keep what it makes
    except Exception as error:  # whatever its attributes raise
        raise ValueError(
            "set_memory_budget: the model must be one that copy.deepcopy takes: what its "
            f"forward keeps has no values: {error}"
        ) from error
    counters = {n: t.item() for n, t in tensors.items() if t.dim() == 0 and not t.is_meta}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with keep_random_numbers(), torch.enable_grad(), mode:
        state: dict[str, Tensor] = {n: mode.from_tensor(t) for n, t in tensors.items()}
        for name, value in counters.items():  # may be read: a constant has a value
            t = state[name]
            state[name] = torch.tensor(value, dtype=t.dtype, device=t.device)
            state[name].requires_grad_(t.requires_grad)
        names = {id(t): n.rpartition(".")[0] for n, t in state.items()}
        args, kwargs = tree_map_only(Tensor, mode.from_tensor, (inputs, keywords))
        try:
            with _listening(names) as found:
                functional_call(model, state, args, kwargs)
        except RuntimeError as error:
            raise ValueError(
                "set_memory_budget: the model must run on tensors that have shapes but no values, "
                f"whose values its forward must not read: {error}"
            ) from error
    return found


def _flops_again(problem: PairProblem) -> int:
    """What backward computes more where u is not kept: u, and in a second sweep u and dv."""
    first, second = problem.passes
    again = first.flops(problem.batch * math.prod(problem.mid_size))
    batch_norm = problem.spec.norm == "batch"
    if batch_norm and slicing.count(problem, 2) > 1:  # u and dv, on most backends
        again += again + second.flops(problem.batch * math.prod(problem.out_size))
    return again


@contextmanager
def _listening(names: dict[int, str]) -> Iterator[dict[str, _Use]]:
    found: dict[str, _Use] = {}

    class Mode(TorchDispatchMode):
        knows_operations = True  # without which converted models would run PyTorch's under it

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.fastst.conv2plus1d_train.default:
                tensors, spec, problem, _ = pair_arguments(args)
                weights = tensors.first_weight, tensors.second_weight
                name = names.get(id(in_execution_order(spec.order, *weights)[0]))
                if name is not None:
                    size = math.prod(problem.mid_shape) * problem.dtype.itemsize
                    flops = _flops_again(problem)
                    old = found.get(name, _Use(0, 0, spec.recompute))
                    found[name] = _Use(old.size + size, old.flops + flops, spec.recompute)
            return func(*args, **(kwargs or {}))

    with Mode():
        yield found
