"""Where a gradient is needed: the ops of ``registered`` joined by autograd functions.

The backward of a ``Function`` is a ``Function`` again, so that create_graph works. functorch
transforms and forward-mode AD never reach this module: ``functional`` composes for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import reference
from ..backends.contract import Backend, Begun
from ..problem import activations
from ..problem.conv3d import ConvSpec, ConvTensors
from ..problem.memory import read_address
from ..problem.spec import (
    PairProblem,
    PairSpec,
    PairTensors,
    ParallelSpec,
    ParallelTensors,
    Problem,
    memoize,
)
from . import registered
from .registered import (
    call,
    direct,
    is_plain_call,
    is_vmapped,
    pair_gradients,
    results_of,
    second_pass,
)
from .schema import encode_spec

_TENSORS = {PairSpec: PairTensors, ParallelSpec: ParallelTensors, ConvSpec: ConvTensors}


def scatter(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """One entry per tensor argument from the gradients of those that need one."""
    found = iter(grads)
    return [next(found) if n else None for n in needs]


def as_own(y: Tensor) -> Tensor:
    """A result that is nobody's view: autograd lets nobody write to a view of a function's."""
    if torch.compiler.is_compiling() or not y._is_view():
        return y
    memory = y.untyped_storage(), y.storage_offset()
    return y.new_empty(0).set_(*memory, y.shape, y.stride())  # its very strides


Aside = list[tuple[int, Tensor]]


def put_aside(tensors: Sequence[Any], *unread: int) -> tuple[tuple[Any, ...], Aside]:
    """Tensors without those at some places, and these: biases of what is linear in them.

    No gradient of any order depends on such a bias, so whoever writes to it before backward may.
    """
    if torch.compiler.is_compiling():
        return tuple(tensors), []
    aside = [
        (i, t.detach().requires_grad_(t.requires_grad))
        for i in unread
        if (t := tensors[i]) is not None
    ]
    left = {i for i, _ in aside}
    return tuple(None if i in left else t for i, t in enumerate(tensors)), aside


def take_back(tensors: Sequence[Any], aside: Aside) -> list[Any]:
    """What ``put_aside`` was given."""
    found = [*tensors]
    for i, t in aside:
        found[i] = t
    return found


class _PairFunction(torch.autograd.Function):
    """y of conv2plus1d and its statistics; keeps x and, unless it is to be recomputed, u."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: PairProblem,
        backend: str,
        backward_backend: str,
        begun: Begun | None,
        *tensors: Tensor | None,
    ) -> Any:
        args: Any = tensors
        spec = problem.spec
        if begun is None:
            results = registered.conv2plus1d_train(PairTensors(*args), problem, backend)
        else:
            results = second_pass(PairTensors(*args), problem, backend, begun)
        y, u, mean, var, *_ = scatter(results, results_of(spec))
        args, ctx.aside = put_aside(args, 4)
        ctx.first_bias = None
        if u is not None and args[3] is not None and not torch.compiler.is_compiling():
            # Gradients of the first order read u in its place.
            ctx.first_bias = args[3], None if args[3].is_inference() else args[3]._version
            args = (*args[:3], None, *args[4:])
        ctx.save_for_backward(u, mean, var, *args)
        ctx.watched = _record_versions(args)
        statistics = results[1 if u is None else 2 :]
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        # Those of y are no part of what backward computes.
        ctx.spec = spec._replace(output_statistics=False) if spec.output_statistics else spec
        ctx.backend = backward_backend
        return as_own(results[0]), *statistics

    # From PyTorch 2.13 on gradients come in a list, so that dy goes where its last reader ends.
    boxed_grads_call = True

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> Any:
        owner = dys[0] if isinstance(dys[0], list) else list(dys)
        del owner[1:]  # of statistics
        if owner[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        u, mean, var, *tensors = ctx.saved_tensors  # read once: a checkpoint unpacks them
        _check_unwritten(ctx.watched, tensors)
        tensors = take_back(tensors, ctx.aside)
        if ctx.first_bias is not None:
            tensors[3], version = ctx.first_bias
            if torch.is_grad_enabled() or is_vmapped(owner[0]):  # composes, from x on
                _check_version(tensors[3], version)
        needs = ctx.needs_input_grad[4:]
        # Then none holds them.
        if not torch.is_grad_enabled() and is_plain_call(owner[0], *tensors):
            given = PairTensors(*tensors)
            problem = Problem.of(given, ctx.spec)
            found = direct(
                "conv2plus1d_backward", problem.device.type, pair_gradients, owner, u, mean, var,
                given, problem, ctx.backend, needs,
            )  # fmt: skip
            return None, None, None, None, *scatter(found, needs)
        grads = backward_of(
            torch.ops.fastst.conv2plus1d_backward, reference.compose_pair, owner[0], (u, mean, var),
            PairTensors(*tensors), ctx.spec, ctx.backend, needs,
        )  # fmt: skip
        return None, None, None, None, *grads


Watched = list[tuple["weakref.ref[Tensor]", int, int] | None]


def _record_versions(tensors: Sequence[Tensor | None]) -> Watched:
    """What tells whether tensors that hooks of the user save are written to before backward.

    PyTorch checks versions of what it saves itself only, and more is read here than in backward of
    the separate operators: with a mid tensor that is computed again, biases, too.
    """
    if torch.compiler.is_compiling() or not torch._C._autograd._top_saved_tensors_default_hooks(
        True
    ):
        return []
    return [
        None if t is None or t.is_inference() else (weakref.ref(t), t._version, read_address(t))
        for t in tensors
    ]


def _check_unwritten(watched: Watched, found: Sequence[Tensor | None]) -> None:
    """
    Raises:
        RuntimeError: hooks have given back the memory of a tensor that has been written to since.
    """
    for was, now in zip(watched, found, strict=False):
        t = None if was is None else was[0]()
        if was is None or t is None or now is None or read_address(now) != was[2]:
            continue
        _check_version(t, was[1])


def _check_version(t: Tensor, version: int | None) -> None:
    """
    Raises:
        RuntimeError: t has been written to since it had a version; None: it counts none.
    """
    if version is not None and t._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {tuple(t.shape)} is at version {t._version}, expected version {version} "
            "instead"
        )


class _ParallelFunction(torch.autograd.Function):
    """parallel_conv2plus1d; keeps only x."""

    @staticmethod
    def forward(ctx: Any, spec: ParallelSpec, backend: str, *tensors: Tensor | None) -> Tensor:
        linear = spec.branch_activation == spec.activation == "none"
        saved, ctx.aside = put_aside(tensors, *((3, 4) if linear else ()))
        ctx.save_for_backward(*saved)
        ctx.watched = _record_versions(saved)
        ctx.spec, ctx.backend = spec, backend
        return as_own(call("parallel_conv2plus1d", *tensors, *encode_spec(spec), backend))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        tensors = take_back(ctx.saved_tensors, ctx.aside)
        _check_unwritten(ctx.watched, tensors)
        grads = backward_of(
            torch.ops.fastst.parallel_conv2plus1d_backward, reference.compose_parallel, dy, (),
            ParallelTensors(*tensors), ctx.spec, ctx.backend, ctx.needs_input_grad[2:],
        )  # fmt: skip
        return None, None, *grads


def backward_of(
    op: Callable[..., list[Tensor]],
    compose: Callable[..., Tensor],
    dy: Tensor,
    kept: tuple[Tensor, ...],
    tensors: Any,
    spec: Any,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    if is_vmapped(dy):
        grads = _composed_gradients(compose, spec, needs, dy, tensors)[0]
    elif torch.is_grad_enabled():  # create_graph
        grads = _BackwardFunction.apply(op, compose, spec, backend, needs, kept, dy, *tensors)
    else:
        grads = op(dy, *kept, *tensors, *encode_spec(spec), backend, list(needs))
    return scatter(grads, needs)


def _composed_gradients(
    compose: Callable[..., Tensor],
    spec: Any,
    needs: Sequence[bool],
    dy: Tensor,
    tensors: Sequence[Tensor | None],
) -> tuple[Sequence[Tensor], Tensor, Any]:
    """Gradients by PyTorch's own operators, differentiable where autograd is on, and the aliases
    of dy and the tensors that they are functions of."""
    create_graph = torch.is_grad_enabled()
    kind: Any = _TENSORS[type(spec)]
    with torch.enable_grad():
        # Aliases, so that nothing is differentiated through one argument into another.
        aliases = kind(*(None if t is None else t.view_as(t) for t in tensors))
        for t, n in zip(aliases, needs, strict=False):
            if n and not t.requires_grad:  # any more: somebody has frozen it since
                t.requires_grad_()
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
        return tuple(op(dy, *kept, *tensors, *encode_spec(spec), backend, list(needs)))

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
        return (None,) * 6 + tuple(scatter(second, needed))


def needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    if not torch.is_grad_enabled():
        return False
    # Compilers trace no question about inference mode, in which they call their code without grad.
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


class _NormFunction(torch.autograd.Function):
    """Batch norm of a y whose mean and biased variance are known."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float,
        own: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(y, mean, var, weight)
        ctx.eps, ctx.own = eps, own
        gamma, beta = (None if t is None else t.to(mean.dtype) for t in (weight, bias))
        return F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        y, mean, var, weight = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
        gamma = None if weight is None else weight.to(mean.dtype)
        grads = None
        if ctx.own is not None and not torch.is_grad_enabled() and not is_vmapped(dy):
            grads = ctx.own(dy, y, mean, var, gamma, ctx.eps, needs)
        if grads is None:
            grads = torch.ops.aten.native_batch_norm_backward(
                reference.with_usual_strides(dy),
                y,
                gamma,
                None,
                None,
                mean,
                (var + ctx.eps).rsqrt(),
                True,
                ctx.eps,
                needs,
            )
        dx, dgamma, dbeta = (g if n else None for g, n in zip(grads, needs, strict=True))
        return dx, None, None, dgamma, dbeta, None, None


def batch_norm(
    y: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    backend: Backend,
) -> Tensor:  # fmt: skip
    """y normalised by its own mean and biased variance, which a backend has given; its gradients by
    that backend where it can, else by PyTorch."""
    return _NormFunction.apply(y, mean, var, weight, bias, eps, backend.norm_backward)


def conv2plus1d(
    tensors: PairTensors,
    problem: PairProblem,
    backend: str,
    forward: str | None = None,
    begun: Begun | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """y; mean and biased variance of the norm over the batch with, over ranks, its count; and
    those of y with ``spec.output_statistics``.

    The op of inference takes the residual and the outer activation in; in training they are
    PyTorch's own operators, whose gradients it knows.

    Args:
        backend: what was asked for: "auto" or a name.
        forward: what runs the forward pass, where that was decided already.
        begun: what ``first_pass`` has left of it.
    """
    spec, gradients, runs = problem.spec, needs_grad(tensors), forward or backend
    outer = tensors.residual is not None or spec.outer_activation != "none"
    if outer and (spec.norm == "batch" or gradients):
        bare = tensors._replace(residual=None)
        within = Problem.of(bare, spec._replace(outer_activation="none"))
        y, inner, last = conv2plus1d(bare, within, backend, forward, begun)
        y = y if tensors.residual is None else y + tensors.residual
        return activations.apply(spec.outer_activation, y, spec.slope), inner, last
    if not (gradients or spec.norm == "batch" or spec.output_statistics):
        return registered.conv2plus1d(tensors, problem, runs), None, None
    without_u = _without_u(spec)
    if gradients:
        results = _apply(problem, runs, backend, begun, *tensors)
    else:  # nobody sees or needs u
        problem = Problem.of(tensors, without_u)
        if begun is not None:
            results = second_pass(tensors, problem, runs, begun)
        else:
            results = registered.conv2plus1d_train(tensors, problem, runs)
    found: list[Any] = scatter(results, results_of(without_u))
    y, _, mean, var, count, out_mean, out_var = found
    return (
        y,
        (mean, var, count) if spec.norm == "batch" else None,
        (out_mean, out_var) if spec.output_statistics else None,
    )


@memoize
def _without_u(spec: PairSpec) -> PairSpec:
    return spec._replace(recompute=True)


def _apply(*args: Any) -> Any:
    """``_PairFunction.apply``, which looks for what functorch has left among all arguments by a
    generator of Python's: only where there is some."""
    if torch.compiler.is_compiling():
        return _PairFunction.apply(*args)
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    for t in args[4:]:
        if t is not None and wrapped(t):
            return _PairFunction.apply(*args)
    return _apply_plain(*args)


_apply_plain: Any = super(torch.autograd.Function, _PairFunction).apply


def parallel_conv2plus1d(tensors: ParallelTensors, spec: ParallelSpec, backend: str) -> Tensor:
    if needs_grad(tensors):
        return _ParallelFunction.apply(spec, backend, *tensors)
    return call("parallel_conv2plus1d", *tensors, *encode_spec(spec), backend)
