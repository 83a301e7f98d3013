"""What besides tensors decides about a result: modes of the thread, and the stream."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import checkpoint
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from ...machine import devices

_autograd: Any = torch._C._autograd
_top_hooks: Any = _autograd._top_saved_tensors_default_hooks
_outside_of_functorch: Any = torch._C._DisableFuncTorch
function_modes: Callable[[], int] = torch._C._len_torch_function_stack
operator_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
KNOWS = "knows_operations"  # an attribute of modes that look for operations of this library
_KINDS: dict[torch.device, str] = {}  # their ``type``, which makes a string each time


class State:
    """As it is in this thread now."""

    __slots__ = (
        "_modes", "autocast", "device", "faked", "grad", "hooks", "inference", "kind", "stream",
        "traced", "watched",
    )  # fmt: skip

    def __init__(self, device: torch.device) -> None:
        kind = _KINDS.get(device) or _KINDS.setdefault(device, device.type)
        self.device, self.kind, self._modes = device, kind, (modes := _read_modes(device, kind))
        (
            self.inference, self.grad, self.traced, self.autocast, self.stream, self.hooks,
            self.watched, self.faked,
        ) = modes  # fmt: skip

    @property
    def current(self) -> bool:
        """Whether it is that of this thread now. In transforms no promise is made."""
        return not in_transform() and _read_modes(self.device, self.kind) == self._modes

    @property
    def hooked(self) -> bool:
        """Whether what backward needs is saved by the same hooks now."""
        return not self.grad or bool(self.hooks == _top_hooks(True))

    @property
    def in_checkpoint(self) -> bool:
        """Whether backward will run all this again, and must find what was saved now."""
        return self.hooks is not None and self.hooks[0].__module__ == checkpoint.__name__

    @property
    def forbids_operations(self) -> bool:
        """Whether each call must run at once and as it stands: somebody sees it, or a checkpoint
        saves what it saves."""
        return not self.traced and (
            self.watched or self.in_checkpoint or (operator_modes() != 0 and in_make_fx())
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The state as it was, within the block."""
        now = State(self.device)
        with contextlib.ExitStack() as stack:
            if now.watched and not self.watched:
                stack.enter_context(torch._C.DisableTorchFunction())
            if (now.watched and not self.watched) or (now.faked and not self.faked):
                stack.enter_context(_disable_current_modes())
            if self.grad and _is_below_autograd():
                stack.enter_context(_above_autograd())
            if now.inference != self.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if now.autocast != self.autocast:
                on = self.autocast is not None
                stack.enter_context(
                    torch.autocast(self.kind, self.autocast, on, cache_enabled=False)
                )
            if now.stream != self.stream:
                stack.enter_context(devices.runtime(self.device).stream(self.stream))
            # Asked anew: where the reader records nothing it has not looked for hooks.
            if self.grad and _top_hooks(True) != self.hooks:
                stack.enter_context(_saved_under(self.hooks))
            if torch._C._are_functorch_transforms_active():
                stack.enter_context(_outside_of_functorch())
            yield
        if now.stream is not None and self.stream is not None and now.stream != self.stream:
            now.stream.wait_stream(self.stream)


def _read_modes(device: torch.device, kind: str) -> tuple[Any, ...]:
    """In inference mode? Are gradients recorded? Does a compiler trace? Then autocast's dtype, the
    stream, the hooks of saved tensors, whether modes of the user's see each call, and whether what
    is computed has no values."""
    inference, traced = torch.is_inference_mode_enabled(), torch.compiler.is_compiling()
    grad = torch.is_grad_enabled() and not inference
    watched = bool(function_modes() or operator_modes()) and is_watched()
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return (
        inference, grad, traced,
        torch.get_autocast_dtype(kind) if on else None,
        None if kind == "cpu" else devices.current_stream(device),
        _top_hooks(True) if grad else None,
        watched and not traced,
        operator_modes() != 0 and in_fake_mode() and not traced,
    )  # fmt: skip


def in_transform() -> bool:
    """Whether functorch, forward-mode AD or ``torch.jit.trace`` is at work."""
    return bool(
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state()
    )


def is_watched() -> bool:
    """Whether a mode of the user's sees calls of functions or of operators, outside of a compiler.

    ``with torch.device(...)`` is one that only looks at what makes tensors.
    """
    functions, operators = function_modes(), operator_modes()
    modes = map(torch._C._get_function_stack_at, range(functions))
    if not all(isinstance(mode, DeviceContext) for mode in modes):
        return True
    # Those of PyTorch itself, by which it traces, have a place of their own on the stack.
    below = map(torch._C._get_dispatch_stack_at, range(operators))
    return not all(hasattr(mode, "_mode_key") or hasattr(mode, KNOWS) for mode in below)


def sees_functions() -> bool:
    """Whether a mode of the user's sees calls of functions, outside of a compiler."""
    if not torch._C._len_torch_function_stack():
        return False
    return is_watched() and not torch.compiler.is_compiling()


def in_fake_mode() -> bool:
    """Whether a ``FakeTensorMode`` makes tensors without values of all that is computed."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def in_make_fx() -> bool:
    """Whether ``make_fx`` records each operator."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def _is_below_autograd() -> bool:
    """Whether the reader is C++ that autograd has called: it would see nothing of what runs now."""
    if torch.compiler.is_dynamo_compiling():  # 2.11 has no place for keys in its graph
        return False
    key = torch._C.DispatchKey.AutogradFunctionality
    return torch._C._dispatch_tls_is_dispatch_key_excluded(key)


def _above_autograd() -> Any:
    """A context in which autograd sees calls again."""
    return passing_over(without=("AutogradFunctionality", "ADInplaceOrView", "AutogradOther"))


def passing_over(*names: str, without: Sequence[str] = ()) -> Any:
    """A context in which the dispatcher passes over some keys more, and no longer over others."""
    keys: Any = torch._C._dispatch_tls_local_exclude_set()
    for name in names:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    for name in without:
        keys = keys.remove(getattr(torch._C.DispatchKey, name))
    guard: Any = torch._C._ForceDispatchKeyGuard
    return guard(torch._C._dispatch_tls_local_include_set(), keys)


@contextlib.contextmanager
def _saved_under(hooks: Any) -> Iterator[None]:
    """Within the block tensors for backward are saved by these hooks: later ones see none."""
    later = []
    while (top := _top_hooks(True)) not in (None, hooks):
        later.append(top)
        _autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for top in reversed(later):
            _autograd._push_saved_tensors_default_hooks(*top)
