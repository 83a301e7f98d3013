"""Triton's interpreter without what it does again and again, or for nothing: half of its time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any


def prepare_child() -> None:
    """What conftest.py does where tests ask for it, in a process that a test has started."""
    from fastst.machine import gpu

    gpu.processors = lambda capability: 1
    quicken()


@functools.cache
def quicken() -> None:
    """For the rest of this process.

    Its functions are put into Triton's language for each launch and for each call of a device
    function: here once. Every sum of integers is computed a second time, in 64 bits, to be compared
    by an assertion that only runs in debug mode. Every value works out again what its shape says.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: nothing
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    dtypes: dict[str, Any] = {}
    dtype_of = interpreter._get_np_dtype
    interpreter._get_np_dtype = lambda ty: (
        dtypes.get(ty.name) or dtypes.setdefault(ty.name, dtype_of(ty))
    )
    _remember(tl.block_type, lambda element, shape: (element.name, *shape))
    _remember(
        tl.tensor, lambda handle, ty: tuple(ty.shape) if ty.is_block() else (),
        handle=lambda handle, ty: handle, type=lambda handle, ty: ty,
        dtype=lambda handle, ty: ty.scalar,
    )  # fmt: skip


def _remember(
    kind: Any, key: Callable[[Any, Any], Hashable], **own: Callable[[Any, Any], Any]
) -> None:
    """Its objects of one key share all attributes but their ``own``."""
    make, known = kind.__init__, {}

    def init(self: Any, a: Any, b: Any) -> None:
        found = known.get(of := key(a, b))
        if found is None:
            make(self, a, b)
            known[of] = vars(self).copy()
            return
        vars(self).update(found)
        for name, value in own.items():
            setattr(self, name, value(a, b))

    kind.__init__ = init
