"""The ``fastst::`` operators: schema, fake, implementation, autograd.

Each public function has one op that only computes (inference), one that also returns what backward
needs, and a backward op; all opaque to the compiler and all of them pure. A ``Function`` joins them
where a gradient is needed; its backward is a ``Function`` again, so that create_graph works.
functorch transforms and forward-mode AD never reach this module: ``functional`` composes for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activations, dispatch, parts
from .backends import finished, reference
from .shapes import PairSpec, PairTensors, ParallelSpec, ParallelTensors, Problem

_PAIR_TENSORS = (
    "Tensor x, Tensor spatial_weight, Tensor temporal_weight, Tensor? spatial_bias, "
    "Tensor? temporal_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? var, "
    "Tensor? residual"
)
_PAIR_SPEC = (
    "int[] stride, int[] padding, int[] dilation, int[] groups, str[] padding_mode, "
    "str activation, float slope, str norm, float eps, str order, bool recompute, "
    "str outer_activation, str group, bool output_statistics"
)
_PARALLEL_TENSORS = (
    "Tensor x, Tensor spatial_weight, Tensor temporal_weight, Tensor? spatial_bias, "
    "Tensor? temporal_bias"
)
_PARALLEL_SPEC = (
    "int[] stride, int[] padding, int[] dilation, int[] groups, str[] padding_mode, "
    "str branch_activation, str activation, float slope, str combine"
)

_PAIR, _PAIR_END = len(PairTensors._fields), len(PairTensors._fields + PairSpec._fields)

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
    with torch.no_grad():
        return implementation(*args)


def pair_arguments(args: Sequence[Any]) -> tuple[PairTensors, PairSpec, Problem, str]:
    """What the arguments of an op of ``conv2plus1d`` describe, and its backend."""
    tensors, spec = PairTensors(*args[:_PAIR]), PairSpec(*_tuples(args[_PAIR:_PAIR_END]))
    return tensors, spec, Problem.of(tensors, spec), args[_PAIR_END]


def _trained_pair(args: Sequence[Any]) -> tuple[PairTensors, PairSpec, Problem, str]:
    """
    Raises:
        ValueError: a residual or an outer activation, which have no backward here.
    """
    tensors, spec, problem, backend = pair_arguments(args)
    if problem.residual or spec.outer_activation != "none":
        raise ValueError("conv2plus1d_train: requires no residual and no outer activation")
    return tensors, spec, problem, backend


def _parallel(args: Sequence[Any]) -> tuple[ParallelTensors, ParallelSpec, Problem, str]:
    tensors, spec = ParallelTensors(*args[:5]), ParallelSpec(*_tuples(args[5:14]))
    return tensors, spec, Problem.of(tensors, spec), args[14]


def _apart(results: Sequence[Tensor]) -> list[Tensor]:
    """What an op returns must share no memory: rows that a kernel wrote to one table do."""
    seen: set[int] = set()
    apart = []
    for t in results:
        storage = t.untyped_storage()._cdata
        apart.append(t.clone() if storage in seen else t)
        seen.add(storage)
    return apart


def _tuples(values: Sequence[Any]) -> list[Any]:
    return [tuple(v) if isinstance(v, list) else v for v in values]


# ---- conv2plus1d


def _conv2plus1d(*args: Any) -> Tensor:
    tensors, _, problem, backend = pair_arguments(args)
    result = dispatch.choose(problem, "forward", backend).conv2plus1d(problem, tensors, False)
    return finished(result, problem, tensors)


def _conv2plus1d_fake(*args: Any) -> Tensor:
    return pair_arguments(args)[2].empty_output(args[0])


def _conv2plus1d_train(*args: Any) -> tuple[Tensor, ...]:
    tensors, spec, problem, backend = _trained_pair(args)
    r = dispatch.choose(problem, "forward", backend).conv2plus1d(problem, tensors, True)
    kept = [r.u, r.mean, r.var, r.total, r.out_mean, r.out_var]
    if spec.output_statistics and r.out_mean is None:  # of a backend that is not asked for them
        y = r.y.to(problem.accumulate_dtype)
        var, mean = torch.var_mean(y, (0, 2, 3, 4), correction=0)
        kept[4:] = mean, var
    nothing = r.y.new_empty(0)
    return tuple(_apart([r.y, *(nothing.clone() if t is None else t for t in kept)]))


def _conv2plus1d_train_fake(*args: Any) -> tuple[Tensor, ...]:
    _, spec, problem, _ = _trained_pair(args)
    x: Tensor = args[0]
    u = x.new_empty(0 if spec.recompute else problem.mid_shape)
    mean, var, count, out_mean, out_var = (x.new_empty(0) for _ in range(5))
    if spec.norm == "batch":
        m, dtype = problem.mid_channels, problem.accumulate_dtype
        mean, var = x.new_empty(m, dtype=dtype), x.new_empty(m, dtype=dtype)
        count = x.new_empty((), dtype=dtype) if spec.group else count
    if spec.output_statistics:
        out_mean, out_var = (
            x.new_empty(problem.out_channels, dtype=problem.accumulate_dtype) for _ in range(2)
        )
    return problem.empty_output(x), u, mean, var, count, out_mean, out_var


def _conv2plus1d_backward(
    dy: Tensor, u: Tensor, batch_mean: Tensor, batch_var: Tensor, *args: Any
) -> list[Tensor]:
    return _pair_gradients([dy], u, batch_mean, batch_var, *args)


def _pair_gradients(
    box: list[Tensor], u: Tensor, batch_mean: Tensor, batch_var: Tensor, *args: Any
) -> list[Tensor]:
    """``conv2plus1d_backward`` of the dy in a list, which is emptied once nothing reads dy."""
    *args, needs = args  # type: ignore[assignment]
    tensors, spec, problem, backend = _trained_pair(args)
    mean, var = (batch_mean, batch_var) if spec.norm == "batch" else (None, None)
    chosen = dispatch.choose(problem, "backward", backend)
    if spec.recompute and hasattr(chosen, "mids"):
        count = parts.count(problem, chosen.mids(problem))
        if count > 1:
            return parts.gradients(
                lambda p: dispatch.choose(p, "backward", backend), count, problem, tensors, box[0],
                mean, var, needs,
            )  # fmt: skip
    grads = chosen.conv2plus1d_backward(
        problem, tensors, box, None if spec.recompute else u, mean, var, needs
    )
    return _apart(grads)


def _conv2plus1d_backward_fake(
    dy: Tensor, u: Tensor, batch_mean: Tensor, batch_var: Tensor, *args: Any
) -> list[Tensor]:
    return [torch.empty_like(t) for t, n in zip(args[:_PAIR], args[-1], strict=False) if n]


_register(
    f"conv2plus1d({_PAIR_TENSORS}, {_PAIR_SPEC}, str backend) -> Tensor",
    _conv2plus1d,
    _conv2plus1d_fake,
)
_register(
    f"conv2plus1d_train({_PAIR_TENSORS}, {_PAIR_SPEC}, str backend)"
    " -> (Tensor y, Tensor u, Tensor batch_mean, Tensor batch_var, Tensor batch_count, "
    "Tensor out_mean, Tensor out_var)",
    _conv2plus1d_train,
    _conv2plus1d_train_fake,
)
_register(
    "conv2plus1d_backward(Tensor dy, Tensor u, Tensor batch_mean, Tensor batch_var, "
    f"{_PAIR_TENSORS}, {_PAIR_SPEC}, str backend, bool[] needs) -> Tensor[]",
    _conv2plus1d_backward,
    _conv2plus1d_backward_fake,
)


# ---- parallel_conv2plus1d


def _parallel_conv2plus1d(*args: Any) -> Tensor:
    tensors, _, problem, backend = _parallel(args)
    return dispatch.choose(problem, "forward", backend).parallel_conv2plus1d(problem, tensors)


def _parallel_conv2plus1d_fake(*args: Any) -> Tensor:
    return _parallel(args)[2].empty_output(args[0])


def _parallel_conv2plus1d_backward(dy: Tensor, *args: Any) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    tensors, _, problem, backend = _parallel(args)
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
        y, u, *statistics = torch.ops.fastst.conv2plus1d_train(*tensors, *spec, backend)
        ctx.save_for_backward(u, *statistics[:2], *tensors)
        ctx.mark_non_differentiable(*statistics)
        ctx.spec, ctx.backend = spec, backend
        return y, *statistics

    # From PyTorch 2.13 on gradients come in a list, so that dy goes where its last reader ends.
    boxed_grads_call = True

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        box = dys[0] if isinstance(dys[0], list) else list(dys)
        del box[1:]  # of statistics
        u, mean, var, *tensors = ctx.saved_tensors  # read once: a checkpoint unpacks them
        needs = ctx.needs_input_grad[2:]
        if _direct(box[0], *tensors):
            device = box[0].device.type
            found = _bare(
                device, _pair_gradients, box, u, mean, var, *tensors, *ctx.spec, ctx.backend, needs
            )
            return None, None, *_scatter(found, needs)
        grads = _backward(
            torch.ops.fastst.conv2plus1d_backward, reference.compose_pair, box[0], (u, mean, var),
            PairTensors(*tensors), ctx.spec, ctx.backend, needs,
        )  # fmt: skip
        return None, None, *grads


def _direct(*tensors: Tensor | None) -> bool:
    """Whether nobody would see an op that is called now: then none has to hold its arguments."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


class _ParallelFunction(torch.autograd.Function):
    """parallel_conv2plus1d; keeps only x."""

    @staticmethod
    def forward(ctx: Any, spec: ParallelSpec, backend: str, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.spec, ctx.backend = spec, backend
        return torch.ops.fastst.parallel_conv2plus1d(*tensors, *spec, backend)

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
    if torch.is_grad_enabled():  # create_graph
        grads = _BackwardFunction.apply(op, compose, spec, backend, needs, kept, dy, *tensors)
    else:
        grads = op(dy, *kept, *tensors, *spec, backend, list(needs))
    return _scatter(grads, needs)


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
        return tuple(op(dy, *kept, *tensors, *spec, backend, list(needs)))

    @staticmethod
    def backward(ctx: Any, *ddgrads: Tensor) -> Any:
        higher = torch.is_grad_enabled()
        kind: Any = PairTensors if isinstance(ctx.spec, PairSpec) else ParallelTensors
        with torch.enable_grad():
            # Aliases, so that nothing is differentiated through one argument into another.
            aliases: list[Any] = [
                None if t is None else t.view_as(t) if needed else t.detach()
                for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[6:], strict=True)
            ]
            dy, *tensors = aliases
            y = ctx.compose(kind(*tensors), ctx.spec)
            wanted = [t for t, n in zip(tensors, ctx.needs, strict=False) if n]
            grads = torch.autograd.grad(y, wanted, dy, create_graph=True, allow_unused=True)
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
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _NormFunction(torch.autograd.Function):
    """Batch norm of a y whose mean and biased variance are known."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float
    ) -> Tensor:
        ctx.save_for_backward(y, mean, var, weight)
        ctx.eps = eps
        gamma, beta = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
        return F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        y, mean, var, weight = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        grads = torch.ops.aten.native_batch_norm_backward(
            dy, y, None if weight is None else weight.to(mean.dtype), None, None, mean,
            (var + ctx.eps).rsqrt(), True, ctx.eps, needs,
        )  # fmt: skip
        dx, dgamma, dbeta = (g if n else None for g, n in zip(grads, needs, strict=True))
        return dx, None, None, dgamma, dbeta, None


def batch_norm(
    y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """y normalised by its own mean and biased variance, which are given, with its gradients."""
    return _NormFunction.apply(y, mean, var, weight, bias, eps)


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
    if _needs_grad(tensors):
        y, *statistics = _PairFunction.apply(spec, backend, *tensors)
    elif spec.norm == "batch" or spec.output_statistics:
        spec = spec._replace(recompute=True)  # nothing needs u
        y, _, *statistics = torch.ops.fastst.conv2plus1d_train(*tensors, *spec, backend)
    else:
        return torch.ops.fastst.conv2plus1d(*tensors, *spec, backend), None, None
    mean, var, count, out_mean, out_var = statistics
    return (
        y,
        (mean, var, count) if spec.norm == "batch" else None,
        (out_mean, out_var) if spec.output_statistics else None,
    )


def parallel_conv2plus1d(tensors: ParallelTensors, spec: ParallelSpec, backend: str) -> Tensor:
    if _needs_grad(tensors):
        return _ParallelFunction.apply(spec, backend, *tensors)
    return torch.ops.fastst.parallel_conv2plus1d(*tensors, *spec, backend)
