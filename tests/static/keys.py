"""How many kernels a change of sizes compiles, by Triton's own keys: nothing is compiled here."""

from __future__ import annotations

from itertools import product
from typing import Any
from unittest import mock

from fastst.backends import triton as backend
from fastst.backends.triton import tiles
from tests.static.cases import SERVED, Case

SIZES = (
    (14, 14), (28, 28), (56, 56), (112, 112), (64, 64), (48, 80), (45, 80), (90, 160), (90, 159),
    (180, 320), (256, 256), (135, 240), (31, 57),
)  # fmt: skip


def compiled(cases: list[Case], batches: tuple[int, ...]) -> int:
    """Kernels that Triton would compile for all of them."""
    from triton.runtime.jit import JITFunction

    keys: set[Any] = set()

    def note(self: Any, key: Any, signature: Any, device: Any, *rest: Any) -> object:
        keys.add((self.__name__, key))
        self.device_caches[device][0][key] = found = object()
        return found

    def launch(kernel: Any, grid: Any, config: Any, *args: Any, **meta: Any) -> None:
        if config is not None:
            meta |= tiles.launch_options(config)
        kernel.warmup(*args, grid=grid, **meta)

    with (
        mock.patch.object(JITFunction, "_do_compile", note),
        mock.patch.object(backend.launch, "run", launch),
        mock.patch.object(backend.launch, "capability", lambda device: (9, 0)),
        mock.patch.object(backend.launch, "allows_tf32", lambda: True),
    ):
        for case in cases:
            for batch in batches:
                case.run(batch)
    for module in vars(backend.launch.kernels()).values():
        for function in vars(module).values() if hasattr(module, "__file__") else ():
            if isinstance(function, JITFunction):
                function.device_caches.clear()
    return len(keys)


def inference(channels_last: bool) -> int:
    """One layer in 858 sizes."""
    frames = (1, 2, 4, 5, 8, 15, 16, 17, 32, 33, 64)
    cases = [
        Case("sizes", (64, 144, 64), (t, *size), channels_last=channels_last, **SERVED)
        for t, size in product(frames, SIZES)
    ]
    return compiled(cases, (1, 2, 3, 4, 8, 16))


def training() -> int:
    """One layer in 160 sizes, forward and backward."""
    frames, sizes = (1, 8, 16, 17, 32), (*SIZES[:5], (45, 80), (90, 160), (135, 240))
    cases = [Case("sizes", (64, 144, 64), (t, *size)) for t, size in product(frames, sizes)]
    return compiled(cases, (1, 2, 3, 8))
