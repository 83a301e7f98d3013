"""The ``fastst::`` operators: schema, fake, implementation.

Each public function has one op that only computes (inference), one that also returns what backward
needs, and a backward op; all opaque to the compiler and all of them pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..backends.contract import Begun, Gradients, PairBackward, PairResult, apply_ending
from ..problem import slicing
from ..problem.spec import PairProblem, PairSpec, PairTensors, memoize
from . import batch_slices
from .schema import (
    PAIR,
    PAIR_SPEC,
    PAIR_TENSORS,
    PARALLEL,
    PARALLEL_SPEC,
    PARALLEL_TENSORS,
    encode_spec,
    pair_arguments,
    parallel_arguments,
)

_library = torch.library.Library("fastst", "DEF")
_implementations: dict[str, Callable[..., Any]] = {}
_PLAIN = (Tensor, torch.nn.Parameter)


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _implementations[name] = implementation

    def run(*args: Any) -> Any:
        return without_autocast(args[0].device.type, implementation, *args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastst::{name}", fake, lib=_library)


def call(name: str, *args: Any) -> Any:
    """``torch.ops.fastst.<name>``, past the dispatcher, which costs time, where nobody sees it."""
    if not is_plain_call(*args):
        return getattr(torch.ops.fastst, name)(*args)
    return direct(name, args[0].device.type, _implementations[name], *args)


def is_plain_call(*args: Any) -> bool:
    """Whether nobody but a profiler would see an op called now: no mode, no tracer, no subclass."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if args[0] is not None and _stands_for_many(args[0]):
        return False
    for t in args:
        if t is None:
            continue
        if type(t) in _PLAIN:
            # To be negated when it is read (z.conj().imag): a dispatcher resolves it.
            if t.is_neg():
                return False
        elif isinstance(t, Tensor):
            return False
    return True


def is_vmapped(t: Tensor | None) -> bool:
    """Whether a tensor stands for many: is_grads_batched maps backward over dy, by the older of
    PyTorch's two vmaps."""
    return not (t is None or torch.compiler.is_compiling()) and _stands_for_many(t)


def _stands_for_many(t: Tensor) -> bool:
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(t)
    )


def direct(name: str, device: str, implementation: Callable[..., Any], *args: Any) -> Any:
    """An op past the dispatcher; profilers see one of this name."""
    if torch.autograd._profiler_enabled():
        with torch.autograd.profiler.record_function(f"fastst::{name}"):
            return without_autocast(device, implementation, *args)
    return without_autocast(device, implementation, *args)


_casts = lru_cache(torch.amp.is_autocast_available)


def without_autocast(device: str, implementation: Callable[..., Any], *args: Any) -> Any:
    """Kernels see the dtypes that functional decided on, and nothing records their insides."""
    if _casts(device) and torch.is_autocast_enabled(device):
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return implementation(*args)
    if not torch.is_grad_enabled():
        return implementation(*args)
    try:  # as torch.no_grad(), in a fifth of the time
        torch._C._set_grad_enabled(False)
        return implementation(*args)
    finally:
        torch._C._set_grad_enabled(True)


def _trained_pair(args: Sequence[Any]) -> tuple[PairTensors, PairSpec, PairProblem, str]:
    """
    Raises:
        ValueError: a residual, an outer norm or an outer activation, which have no backward here.
    """
    tensors, spec, problem, backend = pair_arguments(args)
    if problem.has_ending:
        raise ValueError(
            "conv2plus1d_train: requires no residual, no outer norm and no outer activation"
        )
    return tensors, spec, problem, backend


def clone_aliases(results: Sequence[Tensor]) -> list[Tensor]:
    """What an op returns must share no memory: rows that a kernel wrote to one table do."""
    storages = [t.untyped_storage()._cdata for t in results]
    if len({*storages}) == len(storages):
        return [*results]
    return [t.clone() if storages[i] in storages[:i] else t for i, t in enumerate(results)]


def as_laid_out(
    grads: Gradients, tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are needed, each in the shape, dtype and strides of its tensor."""
    out = []
    for grad, t, needed in zip(grads, tensors, needs, strict=False):
        if not needed:
            continue
        assert grad is not None and t is not None
        if grad.dtype != t.dtype or grad.stride() != t.stride():
            like = torch.empty_like(t, device="meta")  # whose strides differ where t is not dense
            if grad.dtype != like.dtype or grad.stride() != like.stride():
                grad = torch.empty_like(t).copy_(grad)
        out.append(grad)
    return clone_aliases(out)


# ---- conv2plus1d


def conv2plus1d(tensors: PairTensors, problem: PairProblem, backend: str) -> Tensor:
    """The op of inference; past the dispatcher and its schema, too, where nobody sees it."""
    if is_plain_call(*tensors):
        args = _run_pair, tensors, problem, backend
        found: Tensor = direct("conv2plus1d", problem.device.type, *args)
        return found
    y: Tensor = torch.ops.fastst.conv2plus1d(*tensors, *encode_spec(problem.spec), backend)
    return y


def _conv2plus1d(*args: Any) -> Tensor:
    tensors, _, problem, backend = pair_arguments(args)
    return _run_pair(tensors, problem, backend)


def _run_pair(tensors: PairTensors, problem: PairProblem, backend: str) -> Tensor:
    result = dispatch.choose(problem, "forward", backend).conv2plus1d(problem, tensors, False)
    return apply_ending(result, problem, tensors)


def _conv2plus1d_fake(*args: Any) -> Tensor:
    return pair_arguments(args)[2].empty_output(args[0])


@memoize
def results_of(spec: PairSpec) -> tuple[bool, ...]:
    """Which of y, u, batch_mean, batch_var, batch_count, out_mean and out_var there are."""
    batch, out = spec.norm == "batch", spec.output_statistics
    return True, not spec.recompute, batch, batch, spec.group != "", out, out


def conv2plus1d_train(tensors: PairTensors, problem: PairProblem, backend: str) -> list[Tensor]:
    """The op of training, likewise."""
    if is_plain_call(*tensors):
        args = _train_pair, tensors, problem, backend
        found: list[Tensor] = direct("conv2plus1d_train", problem.device.type, *args)
        return found
    encoded = *tensors, *encode_spec(problem.spec), backend
    results: list[Tensor] = torch.ops.fastst.conv2plus1d_train(*encoded)
    return results


def _conv2plus1d_train(*args: Any) -> list[Tensor]:
    tensors, _, problem, backend = _trained_pair(args)
    return _train_pair(tensors, problem, backend)


def _train_pair(tensors: PairTensors, problem: PairProblem, backend: str) -> list[Tensor]:
    r = dispatch.choose(problem, "forward", backend).conv2plus1d(problem, tensors, True)
    return _select_results(r, problem.spec)


def first_pass(tensors: PairTensors, problem: PairProblem, backend: str) -> Begun | None:
    """The first convolution of a pair with norm="batch", whose second weight is a guess.

    None where the backend that would run the pair computes both in one call only.
    """
    run = dispatch.choose_unrecorded(problem, "forward", backend).first_pass
    if run is None:
        return None
    found: Begun = without_autocast(problem.device.type, run, problem, tensors)
    return found


def second_pass(
    tensors: PairTensors, problem: PairProblem, backend: str, begun: Begun
) -> list[Tensor]:
    """What ``conv2plus1d_train`` returns, of a pair that ``first_pass`` has begun."""
    chosen = dispatch.choose(problem, "forward", backend)
    device = problem.device.type
    if chosen.second_pass is None:  # not the backend that was guessed
        r = without_autocast(device, chosen.conv2plus1d, problem, tensors, True)
    else:
        r = without_autocast(device, chosen.second_pass, problem, tensors, begun)
    return _select_results(r, problem.spec)


def _select_results(r: PairResult, spec: PairSpec) -> list[Tensor]:
    """The results that an op of training returns."""
    # Of which those that are asked for are there: the contract says so.
    results: Sequence[Any] = (r.y, r.u, r.mean, r.var, r.total, r.out_mean, r.out_var)
    return clone_aliases(list(compress(results, results_of(spec))))


def _conv2plus1d_train_fake(*args: Any) -> list[Tensor]:
    _, spec, problem, _ = _trained_pair(args)
    x: Tensor = args[0]

    def statistics(*size: int) -> Tensor:
        return x.new_empty(size, dtype=problem.accumulate_dtype)

    m, k = problem.mid_channels, problem.out_channels
    _, kept, batch, _, several, out, _ = results_of(spec)
    return [
        problem.empty_output(x), *([x.new_empty(problem.mid_shape)] if kept else []),
        *([statistics(m), statistics(m)] if batch else []), *([statistics()] if several else []),
        *([statistics(k), statistics(k)] if out else []),
    ]  # fmt: skip


def _conv2plus1d_backward(
    dy: Tensor, u: Tensor | None, batch_mean: Tensor | None, batch_var: Tensor | None, *args: Any
) -> list[Tensor]:
    *given, needs = args
    tensors, _, problem, backend = _trained_pair(given)
    return pair_gradients([dy], u, batch_mean, batch_var, tensors, problem, backend, needs)


def pair_gradients(
    dy_owner: list[Tensor],
    u: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    tensors: PairTensors,
    problem: PairProblem,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """``conv2plus1d_backward`` of the dy in a list, which is emptied once nothing reads dy."""
    problem = problem.with_gradient(dy_owner[0])
    chosen = dispatch.choose(problem, "backward", backend)
    call = PairBackward(problem, tensors, dy_owner, u, mean, var, needs)
    if problem.spec.recompute and chosen.mid_tensors_alive is not None:
        count = slicing.count(problem, chosen.mid_tensors_alive(problem))
        if count > 1:
            grads = batch_slices.gradients(
                lambda p: dispatch.choose(p, "backward", backend), count, call
            )
            return as_laid_out(grads, tensors, needs)
    return as_laid_out(chosen.conv2plus1d_backward(call), tensors, needs)


def _conv2plus1d_backward_fake(
    dy: Tensor, u: Tensor | None, batch_mean: Tensor | None, batch_var: Tensor | None, *args: Any
) -> list[Tensor]:
    return [torch.empty_like(t) for t, n in zip(args[:PAIR], args[-1], strict=False) if n]


register(
    f"conv2plus1d({PAIR_TENSORS}, {PAIR_SPEC}, str backend) -> Tensor",
    _conv2plus1d,
    _conv2plus1d_fake,
)
register(
    f"conv2plus1d_train({PAIR_TENSORS}, {PAIR_SPEC}, str backend) -> Tensor[]",
    _conv2plus1d_train,
    _conv2plus1d_train_fake,
)
register(
    "conv2plus1d_backward(Tensor dy, Tensor? u, Tensor? batch_mean, Tensor? batch_var, "
    f"{PAIR_TENSORS}, {PAIR_SPEC}, str backend, bool[] needs) -> Tensor[]",
    _conv2plus1d_backward,
    _conv2plus1d_backward_fake,
)


# ---- parallel_conv2plus1d


def _parallel_conv2plus1d(*args: Any) -> Tensor:
    tensors, _, problem, backend = parallel_arguments(args)
    run = dispatch.choose(problem, "forward", backend).parallel_conv2plus1d
    assert run is not None  # else it had been refused
    return run(problem, tensors)


def _parallel_conv2plus1d_fake(*args: Any) -> Tensor:
    return parallel_arguments(args)[2].empty_output(args[0])


def _parallel_conv2plus1d_backward(dy: Tensor, *args: Any) -> list[Tensor]:
    *given, needs = args
    tensors, _, problem, backend = parallel_arguments(given)
    problem = problem.with_gradient(dy)
    run = dispatch.choose(problem, "backward", backend).parallel_conv2plus1d_backward
    assert run is not None  # else it had been refused
    return as_laid_out(run(problem, tensors, dy, needs), tensors, needs)


def _parallel_conv2plus1d_backward_fake(dy: Tensor, *args: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t, n in zip(args[:PARALLEL], args[-1], strict=False) if n]


register(
    f"parallel_conv2plus1d({PARALLEL_TENSORS}, {PARALLEL_SPEC}, str backend) -> Tensor",
    _parallel_conv2plus1d,
    _parallel_conv2plus1d_fake,
)
register(
    f"parallel_conv2plus1d_backward(Tensor dy, {PARALLEL_TENSORS}, {PARALLEL_SPEC}, "
    "str backend, bool[] needs) -> Tensor[]",
    _parallel_conv2plus1d_backward,
    _parallel_conv2plus1d_backward_fake,
)
