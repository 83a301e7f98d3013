"""A promise: what a convolution answers with instead of computing its output at once.

``Promise`` is a tensor that knows its shape, dtype and device, and how to compute itself. Whatever
``rules`` can put into one operation extends it; everything else that touches it gets the tensor
that the separate modules would have made, computed in the state in which it was promised.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from .link import NO_GATES, Gates, Link, needs_gradient, output_of, unseen
from .state import function_modes, passing_over

_as_tensor: Callable[..., Any] = torch._C._disabled_torch_function_impl
_make: Callable[..., Any] = Tensor._make_wrapper_subclass
_node_of: Any = Tensor.grad_fn.__get__  # type: ignore[union-attr]
_set_throw = torch._C._set_throw_on_mutable_data_ptr


class _Node(torch.autograd.Function):
    """Lets autograd see a promise where C++ reads it without asking: a custom Function's input."""

    @staticmethod
    def forward(ctx: Any, link: Link, *tensors: Tensor) -> Any:
        ctx.link, ctx.tensors, ctx.materialize_grads = link, tensors, False
        return _wrap(link)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * (1 + len(ctx.tensors))
        link: Link = ctx.link
        # Some may have been frozen since. One that is read twice gets all of its gradient once.
        wanted = list(dict.fromkeys(t for t in ctx.tensors if t.requires_grad))
        if _are_hooked(wanted) or _are_made_of_others(wanted):
            # Hooks are those of the graph around this node, which calls them. And where x is made
            # of a weight, the weight's gradient from here is that which passes x by.
            with torch.enable_grad():
                gates = {t: _Gate.apply(t) for t in wanted}
            value = _value_with_own_graph(link, gates)
            with _closed(gates.values()):
                grads = _gradients(value, list(gates.values()), grad)
        else:
            value = link.compute()
            _check_writes(link)
            try:
                grads = _gradients(link.edge or value, wanted, grad)
            except RuntimeError as error:  # backward of another reader has freed the graph
                if "backward through the graph a second time" not in str(error):
                    raise
                grads = _gradients(_value_with_own_graph(link, cause=error), wanted, grad)
        found = dict(zip(wanted, grads, strict=True))
        return None, *(found.pop(t, None) for t in ctx.tensors)


class _WrittenNode(torch.autograd.Function):
    """The same of a promise whose value autograd has seen somebody write to."""

    @staticmethod
    def forward(ctx: Any, link: Link, value: Tensor) -> Any:
        ctx.link, ctx.written = link, value.grad_fn
        ctx.set_materialize_grads(False)
        return _wrap(link)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if ctx.link.value.grad_fn is not ctx.written:
            _check_writes(ctx.link)
        return None, grad


def _check_writes(link: Link) -> None:
    """
    Raises:
        RuntimeError: nothing tells whether what C++ has read was written to before or after that.
    """
    _notice_writes(link)
    if link.unseen:
        raise RuntimeError(
            f"fastst: {output_of(link)} was read by a custom autograd function, and a view of it "
            "was written to; give the function a clone"
        )


def _notice_writes(link: Link) -> None:
    """Notice writes that autograd has seen, and nobody told of: through a view, say."""
    if link.value is not None and link.value.grad_fn is not link.written:
        link.unseen = True


def _gradients(
    value: Tensor | GradientEdge, wanted: list[Tensor], grad: Tensor
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(
        value, wanted, grad, retain_graph=True, allow_unused=True,
        create_graph=torch.is_grad_enabled(),
    )  # fmt: skip


def _value_with_own_graph(
    link: Link, gates: Gates = NO_GATES, cause: BaseException | None = None
) -> Tensor:
    if link.separate:  # whose hooks another graph would not have
        raise needs_clone(link) from cause
    return link.compute_again(gates)


def _are_hooked(tensors: list[Tensor]) -> bool:
    """Whether asking for the gradient of one of them calls somebody's hook."""
    return any(t._backward_hooks or t.retains_grad for t in tensors)


def _are_made_of_others(tensors: list[Tensor]) -> bool:
    """Whether a gradient of one of them goes on to another one."""
    edges = {_edge(t): t for t in tensors}
    return len(tensors) > 1 and any(
        edges.get(edge, t) is not t
        for t in tensors
        if not t.is_leaf
        for edge in _edges_behind(_edge(t))
    )


def _edge(t: Tensor) -> tuple[Any, int]:
    edge = get_gradient_edge(t)
    return edge.node, edge.output_nr


def _edges_behind(edge: tuple[Any, int]) -> set[tuple[Any, int]]:
    """All edges of autograd's graph to which a gradient of one goes on."""
    seen, open_ = set(), [edge]
    while open_:
        for behind in open_.pop()[0].next_functions:
            if behind[0] is not None and behind not in seen:
                seen.add(behind)
                open_.append(behind)
    return seen


class _Gate(torch.autograd.Function):
    """A tensor itself, whose gradient may be kept from going on."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.closed = False
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return None if ctx.closed else grad


@contextlib.contextmanager
def _closed(gates: Iterable[Tensor]) -> Iterator[None]:
    nodes: list[Any] = [gate.grad_fn for gate in gates]
    for node in nodes:
        node.closed = True
    try:
        yield
    finally:
        for node in nodes:
            node.closed = False


OURS: Any = _Node._backward_cls, _WrittenNode._backward_cls
# Without the search for functorch's wrappers, which are never among what a promise reads.
_apply_node: Callable[..., Any] = super(torch.autograd.Function, _Node).apply
_apply_written_node: Callable[..., Any] = super(torch.autograd.Function, _WrittenNode).apply


def needs_clone(link: Link) -> RuntimeError:
    return RuntimeError(
        f"fastst: {output_of(link)}, or what was made of it, was read by a custom autograd "
        "function, which requires a clone of it where its gradient is asked for as well"
    )


class _ValueNode(torch.autograd.Function):
    """The value of a promise to which autograd has given a node of its own."""

    @staticmethod
    def forward(ctx: Any, promise: Promise) -> Tensor:
        return promise.link.compute().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _wrap(link: Link) -> Promise:
    made: Promise = _make(Promise, link.shape, dtype=link.dtype, device=link.state.device)
    # It has no memory: C++ that asks nobody (to_dlpack of old) is to raise, not to crash.
    _set_throw(made)
    return made


def promise(link: Link) -> Promise:
    """The promise of what a link computes."""
    if link.state.grad:
        tensors = [kept.tensor for _, kept in link.reads if kept.needs_grad]
        if tensors:
            return _mark_differentiable(link, _apply_node(link, *tensors))
    made = _wrap(link)
    made.link = link
    return made


def _mark_differentiable(link: Link, made: Promise) -> Promise:
    made.link, made._differentiable, link.promise = link, True, weakref.ref(made)
    return made


class Promise(Tensor):
    """A tensor that is computed when somebody reads it."""

    link: Link
    _differentiable = False  # whether it was made with a node of autograd's
    _seen: Tensor  # its value as part of a graph that has a node of its own for it

    def dim(self) -> int:
        """As ``SHAPE_ONLY`` has it, in less time: every batch norm asks."""
        return super().dim() if function_modes() else len(self.link.shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SHAPE_ONLY:
            return _as_tensor(func, types, args, kwargs or {})
        alone = _PLAIN.issuperset(types)  # no other class answers for a tensor of its own
        rule = RULES.get(func) if alone else None
        if rule is not None:
            made = rule(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        reals, named = _reals(args, func), _reals(kwargs or {}, func)
        for p in args:
            if type(p) is Promise:
                _notice_writes(p.link)
        with unseen() if alone else contextlib.nullcontext():
            result = func(*reals, **named)
        if torch.compiler.is_compiling():  # of a part of the model: Dynamo guards all that is read
            return result
        _resemble(args)
        if kwargs:  # out=u
            _resemble(kwargs.values())
        if isinstance(result, Tensor):  # u.mul_(2) is u, and so is u.contiguous()
            for given, own in ((args, reals), ((kwargs or {}).values(), named.values())):
                for p, t in zip(given, own, strict=True):
                    if t is result:
                        return p
        return result

    def as_subclass(self, cls: Any) -> Any:  # about which PyTorch asks nobody
        return real(self, "as_subclass").as_subclass(cls)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # which C++ has, without a signature
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd, which has seen ``_Node``."""
        if func.overloadpacket is torch.ops.aten.set_:
            raise RuntimeError(
                "fastst: set_ of the output of a converted convolution requires that it has been "
                "computed; call it on a clone of it"
            )
        if func is _fits_data:
            return _fits_with_memory(*args)
        args, kwargs = _reals(args, func, True), _reals(kwargs or {}, func, True)
        return func(*args, **kwargs)


_PLAIN = frozenset((Promise, Tensor, nn.Parameter))
# What PyTorch asks before ``t.data = u``, and the only thing: then t is in the memory that u has.
_fits_data = torch.ops.aten._has_compatible_shallow_copy_type.default
_AUTOGRAD = "AutogradCPU", "AutogradCUDA", "AutogradMPS", "AutogradXPU"


@functools.cache
def hear_of_data() -> torch.library.Library:
    """Let promises hear of ``t.data = u`` from now on, whatever t is; returns what sees to that as
    long as it lives."""
    library = torch.library.Library("aten", "IMPL")
    for key in _AUTOGRAD:
        library.impl("_has_compatible_shallow_copy_type", _fits_with_memory, key)
    return library


def _fits_with_memory(t: Tensor, u: Tensor) -> Any:
    """What PyTorch answers, once u has memory; as there, no class and no mode is asked."""
    value = u.link.compute(".data").detach() if type(u) is Promise else None
    below = torch._C._AutoDispatchBelowAutograd()
    # Where no operator asks a promise.
    kernels = passing_over("Python", "PythonTLSSnapshot", "ADInplaceOrView")
    with below, kernels, torch._C.DisableTorchFunction():
        if value is not None:
            torch.ops.aten.set_.source_Tensor(u, value)
        return _fits_data(t, u)


_OWN = "link", "_differentiable", "_seen"  # attributes of a promise that are none of its value


def real(value: Any, reader: Any = "C++", detached: bool = False) -> Any:
    """The tensor of a promise, for whoever reads it; anything else as it is."""
    if type(value) is not Promise:
        return value
    tensor, seen = value.link.compute(reader), vars(value).get("_seen")
    # Dynamo guards all that is read of a part of the model.
    compiling = torch.compiler.is_compiling()
    if not compiling:
        value.link = value.link.computed()
        if len(vars(value)) > 1:  # copies and pickles have somebody's attributes, too
            vars(tensor).update({n: v for n, v in vars(value).items() if n not in _OWN})
    if detached:
        return tensor.detach()
    as_made = compiling or _is_as_made(value)
    if seen is None and not (tensor.requires_grad and as_made):
        if needs_gradient(value):
            with torch.enable_grad():
                value._seen = seen = _ValueNode.apply(value)
        elif tensor.requires_grad:
            return tensor.detach()
    return tensor if seen is None else seen


def is_current(p: Any) -> bool:
    """Whether the state of a promise is that of now, and autograd sees it as it was made."""
    state: Any = p.link.state
    return bool(state.current and (not state.grad or type(p) is not Promise or _is_as_made(p)))


def _is_as_made(p: Promise) -> bool:
    """What leaves a custom Function's forward gets that one's node, or loses its own where the
    Function records nothing."""
    node: Any = _as_tensor(_node_of, (), (p,), {})
    return isinstance(node, OURS) if p._differentiable else node is None


def _reals(value: Any, reader: Any, detached: bool = False) -> Any:
    """The same of what holds promises; what holds none is as it was, be it a ``torch.Size``.

    For what calls hold mostly, tree_map takes ten times as long and leaves cycles.
    """
    kind = type(value)
    if kind is tuple or kind is list:
        made = kind([_reals(v, reader, detached) for v in value])
        return value if all(map(operator.is_, made, value)) else made
    if kind is dict:
        named = {k: _reals(v, reader, detached) for k, v in value.items()}
        return value if all(named[k] is v for k, v in value.items()) else named
    if isinstance(value, (tuple, list, dict)):
        leaves = tree_leaves(value)
        if not any(type(leaf) is Promise for leaf in leaves):
            return value
        return tree_map(lambda t: real(t, reader, detached), value)
    return real(value, reader, detached)


def _resemble(values: Any) -> None:
    """Let promises tell what their values are, which a call may have changed: ``u.resize_(0)``,
    ``u.transpose_(0, 1)``, ``u.data = ...``, ``u.detach_()``, ``u.add_(w)``."""
    for p in values:
        if type(p) in (tuple, list):
            _resemble(p)
        if type(p) is not Promise or p.link.value is None:
            continue
        link, value = p.link, p.link.value
        with unseen():
            detached = isinstance(p.grad_fn, OURS) and not value.requires_grad
        written = value.requires_grad and value.grad_fn is not link.written
        alike = (value.shape, value.dtype) == (link.shape, link.dtype)
        if alike and not detached and not written:
            continue
        link.shape, link.dtype, link.written = value.shape, value.dtype, value.grad_fn
        if written:
            other = _mark_differentiable(link, _apply_written_node(link, value))
        else:
            other = _wrap(link) if detached else promise(link)
        _become(p, other)
        link.promise = weakref.ref(p)


def settle(p: Promise) -> None:
    """Let what C++ reads from now on send its gradient through the node of the value itself."""
    link = p.link
    value = link.compute("grad_fn")
    with unseen():
        read_by_link = isinstance(p.grad_fn, _Node._backward_cls)
    if read_by_link and value.requires_grad:
        link.written = value.grad_fn
        with torch.enable_grad():
            other = _mark_differentiable(link, _apply_written_node(link, value))
        _become(p, other)
        link.promise = weakref.ref(p)


def _become(p: Promise, other: Promise) -> None:
    """Let a promise be, to C++, what another one is."""
    torch._C._swap_tensor_impl(p, other)
    p._differentiable = other._differentiable


def write_to(old: Promise, link: Link) -> Promise:
    """Write to a promise in place: the same object now is what a link computes."""
    with unseen():
        node: Any = old.grad_fn
    new = [kept for _, kept in link.reads[len(old.link.reads) :] if kept.needs_grad]
    if (new and link.state.grad) or not isinstance(node, (OURS, NoneType)):
        _become(old, promise(link))
    elif node is not None:
        node.link = link
    old.link, link.promise = link, weakref.ref(old)
    return old


_PROPERTIES = (
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse",
    "is_quantized", "is_mkldnn", "is_mps", "is_xpu", "itemsize",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex",
    "element_size", "__len__", "get_device",
)  # fmt: skip
# What shape, dtype and device alone say.
SHAPE_ONLY: set[Any] = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _METHODS), torch.numel, torch.is_floating_point,
    torch.is_complex,
}  # fmt: skip
# By function: takes the call's arguments, the first a promise; a promise or NotImplemented.
RULES: dict[Any, Callable[..., Any]] = {}
