"""Triton's interpreter without what it does again and again, or for nothing: half of its time."""

from __future__ import annotations

import functools
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
    And one thing is mended: a comparison of scalars that is spread over a block became a block of
    integers, which Triton 3.9 refuses as a mask.
    """
    import numpy as np
    import triton.language as tl
    from triton.language import semantic
    from triton.runtime import interpreter

    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: nothing
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    builder.create_splat = lambda block, value: interpreter.TensorHandle(
        np.full(block.shape, value.data), value.dtype.scalar
    )
    dtypes: dict[str, Any] = {}
    dtype_of = interpreter._get_np_dtype
    interpreter._get_np_dtype = lambda ty: (
        dtypes.get(ty.name) or dtypes.setdefault(ty.name, dtype_of(ty))
    )
    broadcast = semantic.TritonSemantic.broadcast_impl_value
    semantic.TritonSemantic.broadcast_impl_value = lambda self, a, b: (
        (a, b) if a.type.name == b.type.name else broadcast(self, a, b)
    )
    blocks: dict[Any, dict[str, Any]] = {}
    make_block = tl.block_type.__init__

    def block(self: Any, element: Any, shape: Any) -> None:
        found = blocks.get(key := (element.name, *shape))
        if found is not None:
            vars(self).update(found)
            return
        make_block(self, element, shape)
        blocks[key] = vars(self).copy()

    shapes: dict[str, tuple[Any, Any]] = {}
    make_tensor = tl.tensor.__init__

    def tensor(self: Any, handle: Any, ty: Any) -> None:
        found = shapes.get(ty.name)
        if found is None:
            make_tensor(self, handle, ty)
            shapes[ty.name] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, ty, ty.scalar
        self.shape, self.numel = found

    tl.block_type.__init__, tl.tensor.__init__ = block, tensor
