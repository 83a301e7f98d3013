"""A promise: what a convolution answers with instead of computing its output at once.

``Promise`` is a tensor that knows its shape, dtype and device, and how to compute itself. Whatever
``rules`` can put into one operation extends it; everything else that touches it gets the tensor
that the separate modules would have made, computed in the state in which it was promised.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._pytree import tree_map

_unseen = torch._C.DisableTorchFunctionSubclass
_autograd: Any = torch._C._autograd
_make: Callable[..., Any] = Tensor._make_wrapper_subclass


class State:
    """What besides tensors decides about a result: modes of the thread, and the stream."""

    __slots__ = ("autocast", "device", "grad", "hooks", "inference", "stream", "traced")

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        self.device = device
        self.traced = torch.compiler.is_compiling()
        self.inference = torch.is_inference_mode_enabled()
        self.grad = torch.is_grad_enabled() and not self.inference
        on = kind != "meta" and torch.is_autocast_enabled(kind)
        self.autocast = torch.get_autocast_dtype(kind) if on else None
        self.stream = torch.cuda.current_stream(device) if kind == "cuda" else None
        self.hooks = _autograd._top_saved_tensors_default_hooks(True) if self.grad else None

    @property
    def current(self) -> bool:
        """Whether it is that of this thread now."""
        if self.inference != torch.is_inference_mode_enabled():
            return False
        if self.grad != (torch.is_grad_enabled() and not self.inference):
            return False
        if self.traced != torch.compiler.is_compiling():
            return False
        kind = self.device.type
        on = kind != "meta" and torch.is_autocast_enabled(kind)
        if self.autocast != (torch.get_autocast_dtype(kind) if on else None):
            return False
        if kind == "cuda" and self.stream != torch.cuda.current_stream(self.device):
            return False
        return self.hooked

    @property
    def hooked(self) -> bool:
        """Whether what backward needs is saved by the same hooks now."""
        hooks = _autograd._top_saved_tensors_default_hooks(True) if self.grad else None
        return bool(self.hooks == hooks)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The state as it was, within the block."""
        now = State(self.device)
        with contextlib.ExitStack() as stack:
            if self.grad and _below_autograd():
                stack.enter_context(_above_autograd())
            if now.inference != self.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if now.autocast != self.autocast:
                on = self.autocast is not None
                kind = self.device.type
                stack.enter_context(torch.autocast(kind, self.autocast, on, cache_enabled=False))
            if now.stream != self.stream:
                stack.enter_context(torch.cuda.stream(self.stream))
            if now.hooks != self.hooks:
                stack.enter_context(_saved_under(self.hooks))
            yield
        if now.stream is not None and self.stream is not None and now.stream != self.stream:
            now.stream.wait_stream(self.stream)


def _below_autograd() -> bool:
    """Whether the reader is C++ that autograd has called: it would see nothing of what runs now."""
    key = torch._C.DispatchKey.AutogradFunctionality
    return torch._C._dispatch_tls_is_dispatch_key_excluded(key)


def _above_autograd() -> Any:
    """A context in which autograd sees calls again."""
    keys: Any = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "ADInplaceOrView", "AutogradOther"):
        keys = keys.remove(getattr(torch._C.DispatchKey, name))
    guard: Any = torch._C._ForceDispatchKeyGuard
    return guard(torch._C._dispatch_tls_local_include_set(), keys)


@contextlib.contextmanager
def _saved_under(hooks: Any) -> Iterator[None]:
    """Within the block tensors for backward are saved by these hooks: later ones see none."""
    later = []
    while (top := _autograd._top_saved_tensors_default_hooks(True)) not in (None, hooks):
        later.append(top)
        _autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for top in reversed(later):
            _autograd._push_saved_tensors_default_hooks(*top)


class Kept:
    """A tensor as it is now, whatever is written to it later.

    A copy-on-write clone: it costs no memory unless somebody writes. Memory that cannot be cloned
    so, or that FSDP resizes, is watched by its version counter and address instead.
    """

    __slots__ = ("address", "clone", "needs_grad", "resized", "tensor", "valueless", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.needs_grad = tensor, tensor.requires_grad
        self.version = None if tensor.is_inference() else tensor._version
        self.address = 0  # of the clone, or of memory that has none
        self.clone: Tensor | None = None
        self.resized, self.valueless = False, valueless(tensor)
        if self.valueless:
            return
        self.resized = type(tensor) is nn.Parameter and _is_sharded(tensor)
        self.hold()
        if self.clone is None:
            if self.version is None:
                raise CannotDefer
            self.address = tensor.data_ptr()

    def hold(self) -> None:
        """Take a clone, where that can be."""
        if self.resized:
            return
        grad = self.needs_grad and torch.is_grad_enabled()
        if grad:
            torch._C._set_grad_enabled(False)
        try:
            self.clone = clone = torch._lazy_clone(self.tensor)
            self.address = _address(clone)
        except RuntimeError:  # memory that PyTorch has not allocated
            self.clone, self.address = None, 0
        finally:
            if grad:
                torch._C._set_grad_enabled(True)

    def release(self) -> None:
        """Give the memory back to the tensor alone, so that reading it by address copies nothing.

        From now on it is watched by its version counter, if it has one. Its address says nothing:
        memory that others hold clones of moves when it is read.
        """
        if self.clone is not None:
            self.clone, self.address = None, 0
            self.tensor.data_ptr()

    def held_again(self) -> None:
        """After ``release``, where there is no version counter."""
        if self.version is None and not self.valueless:
            self.hold()

    @property
    def foreign(self) -> bool:
        """Whether its memory is of others (NumPy, shared), who may write to it unseen."""
        return self.clone is None and not (self.valueless or self.resized)

    @property
    def same(self) -> bool:
        """Whether the tensor still is what it was, and in the memory that it had."""
        t = self.tensor
        if t.requires_grad != self.needs_grad:
            return False
        if self.version is not None and t._version != self.version:
            return False
        if self.clone is None:
            return not self.address or t.data_ptr() == self.address
        if _address(t) == self.address:
            return True
        # Memory of its own, which a reader by address makes as well as a writer to ``.data``.
        if t.device != self.clone.device or not torch.equal(t, self.clone):
            return False
        self.hold()
        return True

    def get(self, what: str, grad: bool, ended: bool) -> Tensor:
        """The tensor, or its clone where the tensor has been written to.

        Args:
            grad: whether gradients go to it, if it needs some.
            ended: whether the reader was called in a checkpoint that has ended: backward would have
                read there what has been written by then.

        Raises:
            RuntimeError: it is another one now, and the clone would not do.
        """
        if self.same:
            return self.tensor
        wanted = grad and (self.needs_grad or self.tensor.requires_grad)
        if self.clone is not None and not (wanted or ended):
            return self.clone
        raise RuntimeError(
            f"fastst: {what} changed after the call that read it and before its result was "
            "computed; leave the convolution out with fastst.convert(..., skip=...), or read its "
            "output before that"
        )


# Without making memory of its own of a clone.
_address: Callable[[Tensor], int] = torch._C._data_address  # type: ignore[attr-defined]


def valueless(tensor: Tensor) -> bool:
    """Whether a tensor has a shape only."""
    return tensor.is_meta or type(tensor) in (FakeTensor, FunctionalTensor)


def _is_sharded(parameter: nn.Parameter) -> bool:
    """Whether ``fully_shard`` gives a parameter its memory for a call, and takes it away again."""
    composable = sys.modules.get("torch.distributed._composable_state")
    for found in list(getattr(composable, "_module_state_mapping", {}).values()):
        state = found() if isinstance(found, weakref.ref) else found
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before PyTorch 2.13
            groups = filter(None, [getattr(state, "_fsdp_param_group", None)])
        for group in groups:
            for one in group.fsdp_params:
                if getattr(one, "_unsharded_param", None) is parameter:
                    return True
    return False


class CannotDefer(Exception):
    """Nothing would tell whether a tensor is written to: its reader runs at once."""


class Link:
    """One call in a chain: how to compute it, and what all calls up to it are as one operation.

    Attributes:
        before: the link whose value is the first argument; None for a convolution.
        run: computes the value from that of ``before``.
        plan: what ``rules`` know of the chain up to here.
        kept: the other tensors that the call reads.
        state: in which it was called.
        value: the result, once somebody wanted it.
        readers: how many links have this one before them.
        views: links that see the memory of the value, or a copy of it; ``sees``: this is one.
    """

    __slots__ = (
        "__weakref__", "before", "dtype", "kept", "plan", "readers", "run", "sees",
        "shape", "state", "value", "version", "views",
    )  # fmt: skip

    def __init__(
        self,
        before: Link | None,
        run: Callable[..., Tensor],
        plan: Any,
        kept: tuple[tuple[str, Kept], ...],
        state: State,
        shape: Any,
    ) -> None:
        self.before, self.run, self.plan, self.kept, self.state = before, run, plan, kept, state
        self.shape = shape
        self.value: Tensor | None = None
        self.dtype: torch.dtype
        self.version: int | None = None
        self.readers, self.sees = 0, False
        self.views: list[weakref.ref[Link]] = []
        if before is not None:
            before.readers += 1

    def all_kept(self) -> list[tuple[str, Kept]]:
        """All that the chain reads."""
        above = [] if self.before is None else self.before.all_kept()
        return [*above, *self.kept]

    def tensors(self) -> list[Tensor]:
        return [kept.tensor for _, kept in self.all_kept()]

    def unchanged(self) -> bool:
        """Whether all that the chain reads is what it was."""
        return all(kept.same for _, kept in self.all_kept())

    def compute(self, reader: Any = "C++") -> Tensor:
        """The value, as separate calls make it, for whoever reads it."""
        if self.value is None:
            self.plan.told(f"its output goes to {getattr(reader, '__name__', reader)}")
        return self._settled()

    def see(self, view: Link) -> None:
        """Take up a link that may see the memory of the value."""
        view.sees = True
        self.views.append(weakref.ref(view))

    def _settled(self) -> Tensor:
        """The value; what sees its memory is made with it, before anybody can write to it."""
        source = None
        if self.value is None and self.before is not None:  # whose value may come with this one
            source = self.before._settled() if self.sees else self.before.current()
        if self.value is None:
            self.value = value = self._computed(source)
            self.version = None if value.is_inference() else value._version
            for view in filter(None, (ref() for ref in self.views)):
                view._settled()
        return self.value

    def _fresh(self) -> Tensor:
        """The value in memory of its own, whatever has been written to another one."""
        return self._computed(None if self.before is None else self.before.current())

    def _computed(self, source: Tensor | None) -> Tensor:
        what, state = self.plan.name or "the model", self.state
        ended = state.hooks is not None and not state.hooked
        tensors = {
            name: kept.get(f"{name} of {what}", state.grad, ended) for name, kept in self.kept
        }
        released = [kept for _, kept in self.kept if kept.same]
        for kept in released:  # by address, kernels would make memory of its own for a clone
            kept.release()
        with self.state.restored():
            value = self.run(source, **tensors)
        for kept in released:
            kept.held_again()
        return value

    def again(self) -> Tensor:
        """The value with a graph of its own."""
        return self._computed(None if self.before is None else self.before.again())

    def replayed(self, source: Link, value: Tensor) -> Tensor:
        """What the calls after a link make of another value than that of the link."""
        if self is source:
            return value
        assert self.before is not None
        return self._computed(self.before.replayed(source, value))

    def current(self, keep: bool = False) -> Tensor:
        """The value for the link after this one: kept, if anybody else may want it too."""
        if self.value is None:
            return self.compute() if keep or self.readers > 1 else self._fresh()
        return self.value if self.steady else self._fresh()

    @property
    def steady(self) -> bool:
        """Whether the value, if it is there, has not been written to."""
        if self.value is None or self.value.is_inference():
            return self.value is None
        return self.value._version == self.version


class _Node(torch.autograd.Function):
    """Lets autograd see a promise where C++ reads it without asking: a custom Function's input."""

    @staticmethod
    def forward(ctx: Any, link: Link, dtype: torch.dtype, *tensors: Tensor) -> Any:
        ctx.link, ctx.tensors = link, tensors
        return _wrap(link, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        wanted = [t for t in ctx.tensors if t.requires_grad]
        graph = torch.is_grad_enabled()

        def gradients(value: Tensor) -> Iterator[Tensor | None]:
            return iter(torch.autograd.grad(
                value, wanted, grad, retain_graph=True, allow_unused=True, create_graph=graph
            ))  # fmt: skip

        try:
            grads = gradients(ctx.link.compute())
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            grads = gradients(ctx.link.again())  # backward of another reader has freed the graph
        return None, None, *(next(grads) if t.requires_grad else None for t in ctx.tensors)


class _Read(torch.autograd.Function):
    """The value of a promise to which autograd has given a node of its own."""

    @staticmethod
    def forward(ctx: Any, promise: Promise) -> Tensor:
        return promise.link.compute().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _wrap(link: Link, dtype: torch.dtype) -> Promise:
    made: Promise = _make(Promise, link.shape, dtype=dtype, device=link.state.device)
    # It has no memory: C++ that asks nobody (to_dlpack of old) is to raise, not to crash.
    torch._C._set_throw_on_mutable_data_ptr(made)
    return made


def promise(link: Link, dtype: torch.dtype) -> Promise:
    """The promise of what a link computes."""
    link.dtype = dtype
    if link.state.grad:
        tensors = link.tensors()
        if any(t.requires_grad for t in tensors):
            made: Promise = _Node.apply(link, dtype, *tensors)
            made.link = link
            return made
    made = _wrap(link, dtype)
    made.link = link
    return made


class Promise(Tensor):
    """A tensor that is computed when somebody reads it."""

    link: Link
    seen: Tensor  # its value as part of a graph that has a node of its own for it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SHAPE_ONLY:
            with _unseen():
                return func(*args, **(kwargs or {}))
        rule = RULES.get(func)
        if rule is not None:
            made = rule(*args, **(kwargs or {}))
            if made is not NotImplemented:
                return made
        args, kwargs = _reals(args, func), _reals(kwargs or {}, func)
        with _unseen():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd, which has seen ``_Node``."""
        args, kwargs = _reals(args, func, True), _reals(kwargs or {}, func, True)
        return func(*args, **kwargs)


def real(value: Any, reader: Any = "C++", detached: bool = False) -> Any:
    """The tensor of a promise, for whoever reads it; anything else as it is."""
    if type(value) is not Promise:
        return value
    tensor, seen = value.link.compute(reader), vars(value).get("seen")
    if detached:
        return tensor.detach()
    if seen is None:
        with _unseen():
            needs_grad = value.requires_grad
        # Without one of its own it left a custom Function's forward, which autograd has given one.
        if needs_grad and not tensor.requires_grad:
            with torch.enable_grad():
                value.seen = seen = _Read.apply(value)
    return tensor if seen is None else seen


def _reals(value: Any, reader: Any, detached: bool = False) -> Any:
    """The same of what holds promises; for what calls hold mostly, tree_map takes ten times as long
    and leaves cycles."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([_reals(v, reader, detached) for v in value])
    if kind is dict:
        return {k: _reals(v, reader, detached) for k, v in value.items()}
    if isinstance(value, (tuple, list, dict)):
        return tree_map(lambda t: real(t, reader, detached), value)
    return real(value, reader, detached)


def replace(old: Promise, link: Link, dtype: torch.dtype) -> Promise:
    """Write to a promise in place: the same object now is what a link computes."""
    new = promise(link, dtype)
    torch._C._swap_tensor_impl(old, new)
    old.link = link
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
