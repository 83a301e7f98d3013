"""The ``fastst::`` operators: schema, fake, implementation, autograd.

Each public function has one op that only computes (inference), one that also returns what backward
needs, and a backward op; all opaque to the compiler and all of them pure. A ``Function`` joins them
where a gradient is needed; its backward is a ``Function`` again, so that create_graph works.
functorch transforms and forward-mode AD never reach this module: ``functional`` composes for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..backends import reference
from ..backends.contract import finished
from ..problem import activations, slicing
from ..problem.spec import PairSpec, PairTensors, ParallelSpec, ParallelTensors, Problem, remembered
from . import batch_slices

_PAIR_TENSORS = (
    "Tensor x, Tensor spatial_weight, Tensor temporal_weight, Tensor? spatial_bias, "
    "Tensor? temporal_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var, "
    "Tensor? residual"
)
# Few arguments: each costs the host about a tenth of what dispatching an op does.
_PAIR_SPEC = (
    "int[] geometry, str names, float slope, float eps, bool recompute, bool output_statistics"
)
_PARALLEL_TENSORS = (
    "Tensor x, Tensor spatial_weight, Tensor temporal_weight, Tensor? spatial_bias, "
    "Tensor? temporal_bias"
)
_PARALLEL_SPEC = "int[] geometry, str names, float slope"

_PAIR, _PARALLEL = len(PairTensors._fields), len(ParallelTensors._fields)

_library = torch.library.Library("fastst", "DEF")


def _register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        return _bare(args[0].device.type, implementation, *args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastst::{name}", fake, lib=_library)


def _bare(device: str, implementation: Callable[..., Any], *args: Any) -> Any:
    """Kernels see the dtypes that functional decided on, and nothing records their insides."""
    if torch.is_autocast_enabled(device):
        with torch.no_grad(), torch.autocast(device, enabled=False):
            return implementation(*args)
    if not torch.is_grad_enabled():
        return implementation(*args)
    with torch.no_grad():
        return implementation(*args)


@remembered
def packed(spec: PairSpec | ParallelSpec) -> tuple[Any, ...]:
    """A specification as the ops take it: all ints, all names, then what is left, in its order."""
    stride, padding, dilation, groups, modes, *rest = spec
    names = ",".join([*modes, *[v for v in rest if isinstance(v, str)]])
    numbers = [v for v in rest if not isinstance(v, str)]
    return (*stride, *padding, *dilation, *groups), names, *numbers


@lru_cache(maxsize=4096)
def _pair_spec(
    geometry: tuple[int, ...],
    names: str,
    slope: float,
    eps: float,
    recompute: bool,
    output_statistics: bool,
) -> PairSpec:
    *modes, activation, norm, order, outer, group = names.split(",", 6)
    return PairSpec._make((
        *_geometry(geometry, modes), activation, slope, norm, eps, order, recompute, outer, group,
        output_statistics,
    ))  # fmt: skip


@lru_cache(maxsize=4096)
def _parallel_spec(geometry: tuple[int, ...], names: str, slope: float) -> ParallelSpec:
    *modes, branch, activation, combine = names.split(",")
    return ParallelSpec._make((*_geometry(geometry, modes), branch, activation, slope, combine))


def _geometry(ints: tuple[int, ...], modes: Sequence[str]) -> tuple[tuple[Any, ...], ...]:
    """The first five fields of both specifications."""
    return ints[:3], ints[3:9], ints[9:12], ints[12:], tuple(modes)


def pair_arguments(args: Sequence[Any]) -> tuple[PairTensors, PairSpec, Problem, str]:
    """What the arguments of an op of ``conv2plus1d`` describe, and its backend."""
    geometry, *rest, backend = args[_PAIR:]
    tensors, spec = PairTensors(*args[:_PAIR]), _pair_spec(tuple(geometry), *rest)
    return tensors, spec, Problem.of(tensors, spec), backend


def _trained_pair(args: Sequence[Any]) -> tuple[PairTensors, PairSpec, Problem, str]:
    """
    Raises:
        ValueError: a residual or an outer activation, which have no backward here.
    """
    tensors, spec, problem, backend = pair_arguments(args)
    if problem.residual or spec.outer_activation != "none":
        raise ValueError("conv2plus1d_train: requires no residual and no outer activation")
    return tensors, spec, problem, backend


def parallel_arguments(
    args: Sequence[Any],
) -> tuple[ParallelTensors, ParallelSpec, Problem, str]:
    """What the arguments of an op of ``parallel_conv2plus1d`` describe, and its backend."""
    geometry, names, slope, backend = args[_PARALLEL:]
    tensors = ParallelTensors(*args[:_PARALLEL])
    spec = _parallel_spec(tuple(geometry), names, slope)
    return tensors, spec, Problem.of(tensors, spec), backend


def _apart(results: Sequence[Tensor]) -> list[Tensor]:
    """What an op returns must share no memory: rows that a kernel wrote to one table do."""
    seen: set[int] = set()
    apart = []
    for t in results:
        storage = t.untyped_storage()._cdata
        apart.append(t.clone() if storage in seen else t)
        seen.add(storage)
    return apart


# ---- conv2plus1d


def _conv2plus1d(*args: Any) -> Tensor:
    tensors, _, problem, backend = pair_arguments(args)
    result = dispatch.choose(problem, "forward", backend).conv2plus1d(problem, tensors, False)
    return finished(result, problem, tensors)


def _conv2plus1d_fake(*args: Any) -> Tensor:
    return pair_arguments(args)[2].empty_output(args[0])


def _made(spec: PairSpec) -> tuple[bool, ...]:
    """Which of y, u, batch_mean, batch_var, batch_count, out_mean and out_var there are."""
    batch, out = spec.norm == "batch", spec.output_statistics
    return True, not spec.recompute, batch, batch, spec.group != "", out, out


def _conv2plus1d_train(*args: Any) -> list[Tensor]:
    tensors, spec, problem, backend = _trained_pair(args)
    r = dispatch.choose(problem, "forward", backend).conv2plus1d(problem, tensors, True)
    out = [r.out_mean, r.out_var]
    if spec.output_statistics and r.out_mean is None:  # of a backend that is not asked for them
        y = r.y.to(problem.accumulate_dtype)
        out = list(torch.var_mean(y, (0, 2, 3, 4), correction=0))[::-1]
    results = (r.y, r.u, r.mean, r.var, r.total, *out)
    return _apart([t for t, made in zip(results, _made(spec), strict=True) if made])


def _conv2plus1d_train_fake(*args: Any) -> list[Tensor]:
    _, spec, problem, _ = _trained_pair(args)
    x: Tensor = args[0]

    def statistics(*size: int) -> Tensor:
        return x.new_empty(size, dtype=problem.accumulate_dtype)

    m, k = problem.mid_channels, problem.out_channels
    _, kept, batch, _, several, out, _ = _made(spec)
    return [
        problem.empty_output(x), *([x.new_empty(problem.mid_shape)] if kept else []),
        *([statistics(m), statistics(m)] if batch else []), *([statistics()] if several else []),
        *([statistics(k), statistics(k)] if out else []),
    ]  # fmt: skip


def _conv2plus1d_backward(
    dy: Tensor, u: Tensor | None, batch_mean: Tensor | None, batch_var: Tensor | None, *args: Any
) -> list[Tensor]:
    return _pair_gradients([dy], u, batch_mean, batch_var, *args)


def _pair_gradients(
    box: list[Tensor], u: Tensor | None, mean: Tensor | None, var: Tensor | None, *args: Any
) -> list[Tensor]:
    """``conv2plus1d_backward`` of the dy in a list, which is emptied once nothing reads dy."""
    *args, needs = args  # type: ignore[assignment]
    tensors, spec, problem, backend = _trained_pair(args)
    chosen = dispatch.choose(problem, "backward", backend)
    if spec.recompute and hasattr(chosen, "mids"):
        count = slicing.count(problem, chosen.mids(problem))
        if count > 1:
            return batch_slices.gradients(
                lambda p: dispatch.choose(p, "backward", backend), count, problem, tensors, box[0],
                mean, var, needs,
            )  # fmt: skip
    return _apart(chosen.conv2plus1d_backward(problem, tensors, box, u, mean, var, needs))


def _conv2plus1d_backward_fake(
    dy: Tensor, u: Tensor | None, batch_mean: Tensor | None, batch_var: Tensor | None, *args: Any
) -> list[Tensor]:
    return [torch.empty_like(t) for t, n in zip(args[:_PAIR], args[-1], strict=False) if n]


_register(
    f"conv2plus1d({_PAIR_TENSORS}, {_PAIR_SPEC}, str backend) -> Tensor",
    _conv2plus1d,
    _conv2plus1d_fake,
)
_register(
    f"conv2plus1d_train({_PAIR_TENSORS}, {_PAIR_SPEC}, str backend) -> Tensor[]",
    _conv2plus1d_train,
    _conv2plus1d_train_fake,
)
_register(
    "conv2plus1d_backward(Tensor dy, Tensor? u, Tensor? batch_mean, Tensor? batch_var, "
    f"{_PAIR_TENSORS}, {_PAIR_SPEC}, str backend, bool[] needs) -> Tensor[]",
    _conv2plus1d_backward,
    _conv2plus1d_backward_fake,
)


# ---- parallel_conv2plus1d


def _parallel_conv2plus1d(*args: Any) -> Tensor:
    tensors, _, problem, backend = parallel_arguments(args)
    return dispatch.choose(problem, "forward", backend).parallel_conv2plus1d(problem, tensors)


def _parallel_conv2plus1d_fake(*args: Any) -> Tensor:
    return parallel_arguments(args)[2].empty_output(args[0])


def _parallel_conv2plus1d_backward(dy: Tensor, *args: Any) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    tensors, _, problem, backend = parallel_arguments(args)
    grads = dispatch.choose(problem, "backward", backend).parallel_conv2plus1d_backward(
        problem, tensors, dy, needs
    )
    return _apart(grads)


def _parallel_conv2plus1d_backward_fake(dy: Tensor, *args: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t, n in zip(args[:5], args[-1], strict=False) if n]


_register(
    f"parallel_conv2plus1d({_PARALLEL_TENSORS}, {_PARALLEL_SPEC}, str backend) -> Tensor",
    _parallel_conv2plus1d,
    _parallel_conv2plus1d_fake,
)
_register(
    f"parallel_conv2plus1d_backward(Tensor dy, {_PARALLEL_TENSORS}, {_PARALLEL_SPEC}, "
    "str backend, bool[] needs) -> Tensor[]",
    _parallel_conv2plus1d_backward,
    _parallel_conv2plus1d_backward_fake,
)


# ---- autograd


def _scatter(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """One entry per tensor argument from the gradients of those that need one."""
    found = iter(grads)
    return [next(found) if n else None for n in needs]


class _PairFunction(torch.autograd.Function):
    """y of conv2plus1d and its statistics; keeps x and, unless it is to be recomputed, u."""

    @staticmethod
    def forward(ctx: Any, spec: PairSpec, backend: str, *tensors: Tensor | None) -> Any:
        results = torch.ops.fastst.conv2plus1d_train(*tensors, *packed(spec), backend)
        y, u, mean, var, *_ = _scatter(results, _made(spec))
        ctx.save_for_backward(u, mean, var, *tensors)
        statistics = results[1 if u is None else 2 :]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        ctx.spec, ctx.backend = spec, backend
        return y, *statistics

    # From PyTorch 2.13 on gradients come in a list, so that dy goes where its last reader ends.
    boxed_grads_call = True

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        box = dys[0] if isinstance(dys[0], list) else list(dys)
        del box[1:]  # of statistics
        if box[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        u, mean, var, *tensors = ctx.saved_tensors  # read once: a checkpoint unpacks them
        needs = ctx.needs_input_grad[2:]
        if _direct(box[0], *tensors):
            seen: Any = nullcontext()
            if torch.autograd._profiler_enabled():
                seen = torch.autograd.profiler.record_function("fastst::conv2plus1d_backward")
            with seen:
                found = _bare(
                    box[0].device.type, _pair_gradients, box, u, mean, var, *tensors,
                    *packed(ctx.spec), ctx.backend, needs,
                )  # fmt: skip
            return None, None, *_scatter(found, needs)
        grads = _backward(
            torch.ops.fastst.conv2plus1d_backward, reference.compose_pair, box[0], (u, mean, var),
            PairTensors(*tensors), ctx.spec, ctx.backend, needs,
        )  # fmt: skip
        return None, None, *grads


def _direct(*tensors: Tensor | None) -> bool:
    """Whether nobody but a profiler would see an op called now: then none holds its arguments."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or _batched(tensors[0]):
        return False
    # A view that is to be negated when it is read (z.conj().imag) is what a dispatcher resolves.
    plain = (Tensor, torch.nn.Parameter)
    return all(t is None or (type(t) in plain and not t.is_neg()) for t in tensors)


def _batched(t: Tensor | None) -> bool:
    """Whether a tensor stands for many: is_grads_batched maps backward over dy, by the older of
    PyTorch's two vmaps."""
    if t is None or torch.compiler.is_compiling():
        return False
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(t)
    )


class _ParallelFunction(torch.autograd.Function):
    """parallel_conv2plus1d; keeps only x."""

    @staticmethod
    def forward(ctx: Any, spec: ParallelSpec, backend: str, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.spec, ctx.backend = spec, backend
        return torch.ops.fastst.parallel_conv2plus1d(*tensors, *packed(spec), backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        grads = _backward(
            torch.ops.fastst.parallel_conv2plus1d_backward, reference.compose_parallel, dy, (),
            ParallelTensors(*ctx.saved_tensors), ctx.spec, ctx.backend, ctx.needs_input_grad[2:],
        )  # fmt: skip
        return None, None, *grads


def _backward(
    op: Callable[..., list[Tensor]],
    compose: Callable[..., Tensor],
    dy: Tensor,
    kept: tuple[Tensor, ...],
    tensors: Any,
    spec: Any,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    if _batched(dy):
        grads = _composed_gradients(compose, spec, needs, dy, tensors)[0]
    elif torch.is_grad_enabled():  # create_graph
        grads = _BackwardFunction.apply(op, compose, spec, backend, needs, kept, dy, *tensors)
    else:
        grads = op(dy, *kept, *tensors, *packed(spec), backend, list(needs))
    return _scatter(grads, needs)


def _composed_gradients(
    compose: Callable[..., Tensor],
    spec: PairSpec | ParallelSpec,
    needs: Sequence[bool],
    dy: Tensor,
    tensors: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor], Tensor, Any]:
    """Gradients by PyTorch's own operators, differentiable where autograd is on, and the aliases
    of dy and the tensors that they are functions of."""
    create_graph = torch.is_grad_enabled()
    kind: Any = PairTensors if isinstance(spec, PairSpec) else ParallelTensors
    with torch.enable_grad():
        # Aliases, so that nothing is differentiated through one argument into another.
        aliases = kind(*(None if t is None else t.view_as(t) for t in tensors))
        dy = dy.view_as(dy)
        wanted = [t for t, n in zip(aliases, needs, strict=False) if n]
        grads = torch.autograd.grad(
            compose(aliases, spec), wanted, dy, create_graph=create_graph, allow_unused=True
        )
    return grads, dy, aliases


class _BackwardFunction(torch.autograd.Function):
    """A backward op with a gradient of its own, which composes: right for any order."""

    @staticmethod
    def forward(
        ctx: Any,
        op: Callable[..., list[Tensor]],
        compose: Callable[..., Tensor],
        spec: Any,
        backend: str,
        needs: Sequence[bool],
        kept: tuple[Tensor, ...],
        dy: Tensor,
        *tensors: Tensor | None,
    ) -> Any:
        ctx.compose, ctx.spec, ctx.needs = compose, spec, needs
        ctx.save_for_backward(dy, *tensors)
        return tuple(op(dy, *kept, *tensors, *packed(spec), backend, list(needs)))

    @staticmethod
    def backward(ctx: Any, *ddgrads: Tensor) -> Any:
        higher = torch.is_grad_enabled()
        dy, *tensors = ctx.saved_tensors
        with torch.enable_grad():
            grads, dy, tensors = _composed_gradients(ctx.compose, ctx.spec, ctx.needs, dy, tensors)
        sources = [t for t in (dy, *tensors) if t is not None and t.requires_grad]
        live = [
            (g, d) for g, d in zip(grads, ddgrads, strict=True) if g is not None and g.requires_grad
        ]
        second = torch.autograd.grad(
            [g for g, _ in live], sources, [d for _, d in live],
            create_graph=higher, allow_unused=True,
        )  # fmt: skip
        needed = [t is not None and t.requires_grad for t in (dy, *tensors)]
        return (None,) * 6 + tuple(_scatter(second, needed))


def _needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


class _NormFunction(torch.autograd.Function):
    """Batch norm of a y whose mean and biased variance are known."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float,
        backend: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(y, mean, var, weight)
        ctx.eps, ctx.own = eps, getattr(backend, "norm_backward", None)
        gamma, beta = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
        return F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        y, mean, var, weight = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        gamma = None if weight is None else weight.to(mean.dtype)
        grads = None
        if ctx.own is not None and not torch.is_grad_enabled() and not _batched(dy):
            grads = ctx.own(dy, y, mean, var, gamma, ctx.eps, needs)
        if grads is None:
            grads = torch.ops.aten.native_batch_norm_backward(
                dy, y, gamma, None, None, mean, (var + ctx.eps).rsqrt(), True, ctx.eps, needs
            )
        dx, dgamma, dbeta = (g if n else None for g, n in zip(grads, needs, strict=True))
        return dx, None, None, dgamma, dbeta, None, None


def batch_norm(
    y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    backend: ModuleType,
) -> Tensor:  # fmt: skip
    """y normalised by its own mean and biased variance, which a backend has given; its gradients by
    that backend where it can, else by PyTorch."""
    return _NormFunction.apply(y, mean, var, weight, bias, eps, backend)


def conv2plus1d(
    tensors: PairTensors, spec: PairSpec, backend: str
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """y; mean and biased variance of the norm over the batch with, over ranks, its count; and
    those of y with ``spec.output_statistics``.

    The op of inference takes the residual and the outer activation in; in training they are
    PyTorch's own operators, whose gradients it knows.
    """
    outer = tensors.residual is not None or spec.outer_activation != "none"
    if outer and (spec.norm == "batch" or _needs_grad(tensors)):
        bare = tensors._replace(residual=None), spec._replace(outer_activation="none")
        y, inner, last = conv2plus1d(*bare, backend)
        y = y if tensors.residual is None else y + tensors.residual
        return activations.apply(spec.outer_activation, y, spec.slope), inner, last
    gradients = _needs_grad(tensors)
    if not (gradients or spec.norm == "batch" or spec.output_statistics):
        return torch.ops.fastst.conv2plus1d(*tensors, *packed(spec), backend), None, None
    without_u = spec._replace(recompute=True)  # outside of autograd nobody sees or needs it
    if gradients:
        results = _PairFunction.apply(spec, backend, *tensors)
    else:
        results = torch.ops.fastst.conv2plus1d_train(*tensors, *packed(without_u), backend)
    found: list[Any] = _scatter(results, _made(without_u))
    y, _, mean, var, count, out_mean, out_var = found
    return (
        y,
        (mean, var, count) if spec.norm == "batch" else None,
        (out_mean, out_var) if spec.output_statistics else None,
    )


def parallel_conv2plus1d(tensors: ParallelTensors, spec: ParallelSpec, backend: str) -> Tensor:
    if _needs_grad(tensors):
        return _ParallelFunction.apply(spec, backend, *tensors)
    return torch.ops.fastst.parallel_conv2plus1d(*tensors, *packed(spec), backend)
