"""The native library ``fastst._C`` and its launches, as functions of tensors.

With FASTST_CUDA_EMULATE=1, in a source checkout, it is the same kernels compiled for the host
(emulator/), for CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...machine import settings
from ...problem.memory import read_address
from ...problem.spec import PairProblem, PairSpec, PairTensors, Pass, Problem
from .. import native, ranks

_DTYPES = {
    torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64",
}  # fmt: skip
_LARGEST_GRID_YZ = 65535
# Enough blocks to fill a large GPU several times over; more only lengthens the second stage.
_REDUCTION_BLOCKS = 2048
_COEFFICIENTS = ("mean", "scale", "beta", "p", "q")
_EMULATOR = Path(__file__).parents[3] / "emulator" / "build.py"


# Descriptions of the tables that statistics (mean, var) make.
Tables = Callable[[Tensor, Tensor], Sequence[Any]]


def _no_tables(mean: Tensor, var: Tensor) -> Sequence[Any]:
    return ()


def is_emulated() -> bool:
    return settings.flag("FASTST_CUDA_EMULATE")


@functools.cache
def load_emulated() -> ModuleType | str:
    """The emulated library, built if need be, or why there is none."""
    if not _EMULATOR.exists():
        return "is emulated (FASTST_CUDA_EMULATE), which needs a source checkout with its tests"
    build = import_file("fastst_emulator_build", _EMULATOR)
    try:
        return import_file(build.MODULE, build.module())
    except (ImportError, RuntimeError) as error:
        return f"is emulated (FASTST_CUDA_EMULATE), but the emulator cannot be built: {error}"


def import_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load() -> ModuleType | str:
    """``fastst._C``, or why it is not there."""
    return native.load("_C", "the CUDA toolkit's nvcc", "FASTST_BUILD_CUDA")


def library() -> ModuleType:
    """The native library, or the emulated one.

    Raises:
        ImportError: there is none; says why.
    """
    return native.require("cuda", load_emulated() if is_emulated() else load())


@functools.cache
def _dtypes(lib: ModuleType) -> dict[torch.dtype, Any]:
    return {dtype: getattr(lib.Dtype, name) for dtype, name in _DTYPES.items()}


class Launcher(native.Launcher):
    """Launches of one call, on the current stream of its device."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(library(), problem, problem.accumulate_dtype)
        self.problem = problem
        self.dtype = _dtypes(self.lib)[problem.dtype]
        pair, size = PairSpec(), problem.out_size
        if isinstance(problem, PairProblem):
            pair, size = problem.spec, problem.mid_size
        self.eps, self.batch_norm, self.group = pair.eps, pair.norm == "batch", pair.group
        self.count = problem.batch * math.prod(size)
        self.total: Tensor | None = None  # count of all ranks of the group, once it is known
        on_gpu = problem.device.type == "cuda"
        self.stream: int = torch.cuda.current_stream(problem.device).cuda_stream if on_gpu else 0

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.accumulate, device=self.problem.device)

    def rows(self, size: Sequence[int], channels: int) -> Tensor:
        """Workspace (N, channels, T, H, W) in the dtype of x, channels last."""
        p = self.problem
        rows = torch.empty((p.batch, *size, channels), dtype=p.dtype, device=p.device)
        return rows.permute(0, 4, 1, 2, 3)

    def branch(
        self, source: Any, weight: Tensor, bias: Tensor | None, p: Pass, activation: str = "none"
    ) -> Any:
        return self.lib.Branch(
            source, self.view(weight), self.array(bias), self.conv(p), self.act(activation)
        )

    def tap_conv(
        self,
        branches: Sequence[Any],
        out: Sequence[Tensor],
        write: str = "forward",
        activation: str = "none",
        aux: Any = None,
        transposed: bool = False,
        around: tuple[int, int] = (0, 0),
    ) -> None:
        lib = self.lib
        conv = lib.TapConv(
            list(branches), [self.view(o) for o in out], aux, getattr(lib.Write, write),
            self.act(activation), self.slope, transposed, around,
        )  # fmt: skip
        lib.tap_conv(self.dtype, conv, self.stream)

    def weight_gradient(self, x: Any, dy: Any, p: Pass, weight: Tensor, positions: int) -> Tensor:
        """Gradient in the accumulation dtype, for sources x and dy."""
        splits = _splits(positions, -(-weight.numel() // 256))
        partials = self.empty(splits, *weight.shape)
        self.lib.weight_gradient(
            self.dtype, x, dy, self.conv(p), self.view(weight), self.array(partials), splits,
            self.stream,
        )  # fmt: skip
        return self.sum_rows(partials)[0]

    def sum_rows(self, *partials: Tensor) -> list[Tensor]:
        """The sum of each over the first axis; nothing that is launched later may read them.

        One part is its own sum.
        """
        lib = self.lib
        out = [p[0] if p.shape[0] == 1 else self.empty(*p.shape[1:]) for p in partials]
        sums = [
            lib.RowSum(self.array(p), self.array(o), p.shape[0])
            for p, o in zip(partials, out, strict=True)
            if p.shape[0] > 1
        ]
        if sums:
            lib.sum_rows(self.dtype, sums, self.stream)
        self.kept = [t for t in self.kept if all(t is not p for p in partials)]
        return out

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per channel of (N, M, T, H, W)."""
        return self.combine_statistics(self._parts(u, 1))

    def statistics_of_sets(self, x: Tensor, sets: int) -> tuple[Tensor, Tensor]:
        """The same, (sets, C), of as many positions in each: of all clips, of a clip or a frame."""
        mean, var = self.moments(self._parts(x, sets))
        return mean.view(sets, -1), var.view(sets, -1)

    def _parts(self, u: Tensor, sets: int) -> Tensor:
        channels = u.shape[1]
        splits = _splits(u.numel() // channels // sets, sets * -(-channels // 32))
        partials = self.empty(splits, 3, sets * channels)
        self.lib.channel_statistics(
            self.dtype, self.view(u), self.array(partials), splits, sets, self.stream
        )
        return partials

    def position_moments(self, x: Tensor, centred: bool) -> tuple[Tensor | None, Tensor]:
        """Mean over the channels of each position, and mean square around it, or around 0."""
        n, _, *size = x.shape
        mean, var = self.empty(n, *size) if centred else None, self.empty(n, *size)
        self.lib.position_moments(
            self.dtype, self.view(x), self.array(mean), self.array(var), self.stream
        )
        return mean, var

    def position_sums(self, dv: Tensor, u: Any, centred: bool) -> Tensor:
        """(2, N, T, H, W): means over the channels of scale·dv, or 0, and of scale·dv·x̂."""
        n, _, *size = dv.shape
        out = self.empty(2, n, *size)
        self.lib.position_sums(self.dtype, self.view(dv), u, centred, self.array(out), self.stream)
        return out

    def write_source(self, source: Any, out: Tensor) -> None:
        """What is read, into memory that may be what the source is stored in."""
        self.lib.write_source(self.dtype, source, self.view(out), self.stream)

    def moments(self, partials: Tensor, tables: Tables = _no_tables) -> tuple[Tensor, Tensor]:
        """Mean and biased variance from (splits, 3, C), and the tables that they make."""
        mean, var = self.empty(partials.shape[2]), self.empty(partials.shape[2])
        self.lib.combine_statistics(
            self.dtype, self.array(partials), self.array(mean), self.array(var),
            partials.shape[0], tables(mean, var), self.stream,
        )  # fmt: skip
        return mean, var

    def combine_statistics(
        self, partials: Tensor, tables: Tables = _no_tables
    ) -> tuple[Tensor, Tensor]:
        """The same for u, of all ranks of the group."""
        if not self.group:
            return self.moments(partials, tables)
        mean, var = self.moments(partials)
        group = ranks.resolve(self.group)
        mean, var, self.total = ranks.pool_statistics(mean, var, self.count, group)
        if made := tables(mean, var):
            self.lib.pack(self.dtype, [], made, self.stream)
        return mean, var

    def sums(self, source: Any, shape: Sequence[int], u: Any = None) -> Tensor:
        """(2, C): Σ s and Σ s·(u − mean), for a source s shaped as ``shape``, by the norm of u."""
        return self.sums_of_sets(source, shape, 1, u)[:, 0]

    def sums_of_sets(self, source: Any, shape: Sequence[int], sets: int, u: Any = None) -> Tensor:
        """(2, sets, C): the same, as of ``statistics_of_sets``."""
        channels = shape[1]
        splits = _splits(math.prod(shape) // channels // sets, sets * -(-channels // 32))
        partials = self.empty(splits, 2, sets, channels)
        self.lib.channel_sums(
            self.dtype, source, u, self.array(partials), splits, sets, self.stream
        )
        return self.sum_rows(partials)[0]

    def _channels(self, t: Tensor | None) -> Any:
        """(C,) as it lies."""
        if t is None:
            return self.lib.PerChannel()
        if t.stride(0) != 1 and t.shape[0] > 1:
            t = t.contiguous()
        self.kept.append(t)
        return self.lib.PerChannel(read_address(t), _dtypes(self.lib)[t.dtype])

    def norm(
        self,
        channels: int,
        bias: Tensor | None = None,  # of the convolution before
        t: PairTensors | None = None,
        mean: Tensor | None = None,
        var: Tensor | None = None,
    ) -> Any:
        """The library's description; without statistics of what only has a bias."""
        each: tuple[Tensor | None, ...] = (None,) * 4
        if t is not None and var is not None:
            each = mean, var, t.norm_weight, t.norm_bias
        return self.lib.Norm(*map(self._channels, (*each, bias)), self.eps, channels)

    def table(self, norm: Any, out: Tensor, rows: Sequence[str]) -> Any:
        """To fill ``out`` (rows, columns), by the names of the library's ``Row``."""
        kinds = [getattr(self.lib.Row, name) for name in rows]
        return self.lib.Table(norm, self.array(out), kinds)

    def norm_coefficients(self, t: PairTensors, mean: Tensor, var: Tensor) -> Tensor:
        """(5, M): mean, scale, beta, p, q."""
        out = self.empty(5, mean.shape[0])
        norm = self.norm(mean.shape[0], None, t, mean, var)
        self.lib.pack(self.dtype, [], [self.table(norm, out, _COEFFICIENTS)], self.stream)
        return out

    def norm_gradient_coefficients(
        self, t: PairTensors, sums: Tensor, statistics: Sequence[Tensor], coefficients: Tensor,
        means: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """dgamma; fills rows p and q of the coefficients. Means as of ``BatchSlice``."""
        norm = self.norm(sums.shape[1], None, t, *statistics)
        dgamma = self.empty(sums.shape[1])
        tables = [self.table(norm, coefficients, _COEFFICIENTS)]
        self.norm_gradients(norm, sums[None], (dgamma, None, None), tables, means)
        return dgamma

    def norm_gradients(
        self,
        norm: Any,
        partials: Tensor,
        gradients: Sequence[Tensor | None],
        tables: Sequence[Any],
        means: Tensor | None = None,
    ) -> None:
        """
        Args:
            norm: as of ``norm``.
            partials: (rows, 2, C) of Σdv and Σdv·(u − mean).
            gradients: (C,) to fill: dgamma, dbeta and that of a bias before the norm.
            tables: to fill; their p, q and r follow from the sums.
            means: as of ``BatchSlice``.
        """
        lib, local = self.lib, None
        if means is not None or self.group:
            local = partials[0] if len(partials) == 1 else self.sum_rows(partials)[0]
            if means is None:
                means = ranks.pool_means(local, self.count, ranks.resolve(self.group))

        def launch(partials: Tensor, gradients: Sequence[Tensor | None], tables: Any) -> None:
            lib.norm_gradient(
                self.dtype, norm, self.array(partials), len(partials), float(self.count),
                self.batch_norm, [self.array(g) for g in gradients], tables, self.stream,
            )  # fmt: skip

        if local is None or means is None:
            return launch(partials, gradients, tables)
        launch(local[None], gradients, [])
        launch((means * self.count)[None], [None] * 3, tables)


@contextlib.contextmanager
def launching(problem: Problem) -> Iterator[Launcher]:
    guard = torch.cuda.device(problem.device) if problem.device.type == "cuda" else None
    with guard or contextlib.nullcontext():
        yield Launcher(problem)


def _splits(positions: int, blocks: int) -> int:
    """Into how many parts a sum over positions is cut when ``blocks`` blocks cover the rest.

    No part has fewer than 256 terms: the second stage reads one partial per part.
    """
    return min(-(-_REDUCTION_BLOCKS // blocks), max(1, positions // 256), _LARGEST_GRID_YZ)
