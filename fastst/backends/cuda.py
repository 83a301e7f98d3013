"""CUDA kernels of the native library ``fastst._C``: what is launched for a call, in which order.

Two families. *depthwise* fuses a depthwise pair over channels-last memory; *generic* runs whatever
the semantics allow, on any architecture, and is what the others are compared with on a GPU.

With FASTST_CUDA_EMULATE=1, in a source checkout, CPU tensors go through the same code with the
kernels compiled for the host (tests/emulator).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..shapes import PairSpec, PairTensors, ParallelSpec, ParallelTensors, Pass, Problem
from . import PairResult

_DTYPES = {
    torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64",
}  # fmt: skip
_LARGEST_GRID_YZ = 65535
# Enough blocks to fill a large GPU several times over; more only lengthens the second stage.
_REDUCTION_BLOCKS = 2048


def emulating() -> bool:
    return os.environ.get("FASTST_CUDA_EMULATE", "0") not in ("", "0")


@functools.cache
def _emulated() -> ModuleType | str:
    """The emulated library, built if need be, or why there is none."""
    builder = Path(__file__).parents[2] / "tests" / "emulator" / "build.py"
    if not builder.exists():
        return "is emulated (FASTST_CUDA_EMULATE), which needs a source checkout with its tests"
    build = _import_file("fastst_emulator_build", builder)
    try:
        return _import_file(build.MODULE, build.module())
    except (ImportError, RuntimeError) as error:
        return f"is emulated (FASTST_CUDA_EMULATE), but the emulator cannot be built: {error}"


def _import_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _load() -> ModuleType | str:
    """``fastst._C``, or why it is not there."""
    if importlib.util.find_spec("fastst._C") is None:
        return (
            "needs the native library fastst._C, which was not built: with the CUDA toolkit's nvcc "
            "on PATH, install fastst from source with FASTST_BUILD_CUDA=1"
        )
    try:
        from .. import _C
    except ImportError as error:
        return (
            f"needs the native library fastst._C, which cannot be loaded ({error}): "
            "install fastst again"
        )
    return _C


def library() -> ModuleType:
    """The native library, or the emulated one.

    Raises:
        ImportError: there is none; says why.
    """
    found = _emulated() if emulating() else _load()
    if isinstance(found, str):
        raise ImportError(f"the cuda backend {found}")
    return found


def why_not(problem: Problem, phase: str) -> str | None:
    if emulating():
        if problem.device.type != "cpu":
            return f"is emulated (FASTST_CUDA_EMULATE) and needs CPU tensors, not {problem.device}"
        emulated = _emulated()
        return emulated if isinstance(emulated, str) else None
    if problem.device.type != "cuda" or torch.version.hip is not None:
        return f"needs an NVIDIA GPU, the tensors are on {problem.device}"
    found = _load()
    if isinstance(found, str):
        return found
    if found.device_count() == 0:
        return f"cannot use the GPU: {found.device_error()}"
    return None


def avoid(problem: Problem, phase: str) -> str | None:
    """Why "auto" leaves to the next backend what this one could run."""
    if emulating():
        return "is emulated"
    return "has only its generic kernels for this problem"


class _Call:
    """Launches of one call: a thin layer of tensors over the library's functions."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.lib = library()
        self.dtype = getattr(self.lib.Dtype, _DTYPES[problem.dtype])
        self.accumulate = problem.accumulate_dtype
        self.slope = float(problem.spec.slope)
        on_gpu = problem.device.type == "cuda"
        self.stream = torch.cuda.current_stream(problem.device).cuda_stream if on_gpu else 0
        self.kept: list[Tensor] = []  # alive until everything is launched

    def act(self, name: str) -> Any:
        return getattr(self.lib.Activation, name)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.accumulate, device=self.problem.device)

    def rows(self, size: Sequence[int], channels: int) -> Tensor:
        """Workspace (N, channels, T, H, W) in the dtype of x, channels last."""
        p = self.problem
        rows = torch.empty((p.batch, *size, channels), dtype=p.dtype, device=p.device)
        return _mid(rows)

    def view(self, t: Tensor) -> Any:
        return self.lib.View(t.data_ptr(), t.shape, t.stride())

    def array(self, t: Tensor | None) -> Any:
        """Dense array in the accumulation dtype; converts small per-channel tensors to it."""
        if t is None:
            return self.lib.Array()
        t = t.to(self.accumulate).contiguous()
        self.kept.append(t)
        return self.lib.Array(t.data_ptr(), t.numel())

    def plain(self, t: Tensor, coefficients: Tensor | None = None) -> Any:
        lib = self.lib
        array = self.array(coefficients)
        return lib.Source(self.view(t), None, array, lib.Read.plain, self.act("none"), self.slope)

    def norm_act(self, u: Tensor, coefficients: Tensor | None, activation: str) -> Any:
        lib = self.lib
        array, act = self.array(coefficients), self.act(activation)
        return lib.Source(self.view(u), None, array, lib.Read.norm_act, act, self.slope)

    def norm_gradient(self, dv: Tensor, u: Tensor, coefficients: Tensor | None) -> Any:
        lib = self.lib
        return lib.Source(
            self.view(dv), self.view(u), self.array(coefficients), lib.Read.norm_gradient,
            self.act("none"), self.slope,
        )  # fmt: skip

    def conv(self, p: Pass) -> Any:
        mode = getattr(self.lib.PadMode, p.padding_mode)
        return self.lib.Conv(p.kernel, p.stride, p.dilation, p.padding, p.groups, mode)

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
        aux: Tensor | None = None,
        coefficients: Tensor | None = None,
        transposed: bool = False,
    ) -> None:
        lib = self.lib
        conv = lib.TapConv(
            list(branches), [self.view(o) for o in out], None if aux is None else self.view(aux),
            self.array(coefficients), getattr(lib.Write, write), self.act(activation), self.slope,
            transposed,
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
        return self.sum_rows(partials)

    def sum_rows(self, partials: Tensor) -> Tensor:
        out = self.empty(*partials.shape[1:])
        rows = partials.shape[0]
        self.lib.sum_rows(self.dtype, self.array(partials), self.array(out), rows, self.stream)
        return out

    def statistics(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per channel of (N, M, T, H, W)."""
        channels = u.shape[1]
        splits = _splits(u.numel() // channels, -(-channels // 32))
        partials = self.empty(splits, 3, channels)
        self.lib.channel_statistics(
            self.dtype, self.view(u), self.array(partials), splits, self.stream
        )
        return self.combine_statistics(partials)

    def combine_statistics(self, partials: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance from (splits, 3, M)."""
        mean, var = self.empty(partials.shape[2]), self.empty(partials.shape[2])
        self.lib.combine_statistics(
            self.dtype, self.array(partials), self.array(mean), self.array(var),
            partials.shape[0], self.stream,
        )  # fmt: skip
        return mean, var

    def sums(self, source: Any, shape: Sequence[int], u: Tensor | None = None) -> Tensor:
        """(2, C): Σ s and Σ s·(u − mean), for a source s shaped as ``shape``."""
        channels = shape[1]
        splits = _splits(math.prod(shape) // channels, -(-channels // 32))
        partials = self.empty(splits, 2, channels)
        self.lib.channel_sums(
            self.dtype, source, None if u is None else self.view(u), self.array(partials), splits,
            self.stream,
        )  # fmt: skip
        return self.sum_rows(partials)

    def norm_coefficients(self, t: PairTensors, mean: Tensor, var: Tensor) -> Tensor:
        """(5, M): mean, scale, shift, p, q."""
        out = self.empty(5, mean.shape[0])
        self.lib.norm_coefficients(
            self.dtype, self.array(mean), self.array(var), self.array(t.norm_weight),
            self.array(t.norm_bias), self.problem.spec.eps, self.array(out), self.stream,
        )  # fmt: skip
        return out

    def norm_gradient_coefficients(self, sums: Tensor, var: Tensor, coefficients: Tensor) -> Tensor:
        """dgamma; fills rows p and q of the coefficients."""
        problem = self.problem
        dgamma = self.empty(var.shape[0])
        count = problem.batch * math.prod(problem.mid_size)
        self.lib.norm_gradient_coefficients(
            self.dtype, self.array(sums), self.array(var), problem.spec.eps, float(count),
            problem.spec.norm == "batch", self.array(dgamma), self.array(coefficients), self.stream,
        )  # fmt: skip
        return dgamma


@contextlib.contextmanager
def _call(problem: Problem) -> Iterator[_Call]:
    guard = torch.cuda.device(problem.device) if problem.device.type == "cuda" else None
    with guard or contextlib.nullcontext():
        yield _Call(problem)


def _splits(positions: int, blocks: int) -> int:
    """Into how many parts a sum over positions is cut when ``blocks`` blocks cover the rest.

    No part has fewer than 256 terms: the second stage reads one partial per part.
    """
    return min(-(-_REDUCTION_BLOCKS // blocks), max(1, positions // 256), _LARGEST_GRID_YZ)


def _in_order(problem: Problem, t: Any) -> tuple[Any, Any]:
    """What belongs to the first and to the second pass, of (spatial, temporal)."""
    return t if problem.passes[0].kind == "spatial" else t[::-1]


def _mid(u: Tensor) -> Tensor:
    """(N, M', T, H, W) view of the mid tensor's rows."""
    return u.permute(0, 4, 1, 2, 3)


def conv2plus1d(problem: Problem, tensors: PairTensors, save: bool) -> PairResult:
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    first, second = problem.passes
    w1, w2 = _in_order(problem, (tensors.spatial_weight, tensors.temporal_weight))
    b1, b2 = _in_order(problem, (tensors.spatial_bias, tensors.temporal_bias))
    x = tensors.x
    with _call(problem) as k:
        u = x.new_empty(problem.mid_shape)
        k.tap_conv([k.branch(k.plain(x), w1, b1, first)], [_mid(u)])
        mean, var = tensors.mean, tensors.var
        if spec.norm == "batch":
            mean, var = k.statistics(_mid(u)[:, : problem.mid_channels])
        coefficients = None
        if mean is not None and var is not None:
            coefficients = k.norm_coefficients(tensors, mean, var)
        y = problem.empty_output(x)
        z = k.norm_act(_mid(u)[:, : problem.mid_channels], coefficients, spec.activation)
        k.tap_conv([k.branch(z, w2, b2, second)], [y])
    batch = spec.norm == "batch"
    kept = u if save and not spec.recompute else None
    return PairResult(y, kept, mean if batch else None, var if batch else None)


def conv2plus1d_backward(
    problem: Problem,
    tensors: PairTensors,
    dy: Tensor,
    u: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    spec: PairSpec = problem.spec  # type: ignore[assignment]
    first, second = problem.passes
    need = PairTensors(*needs)  # type: ignore[arg-type]
    w1, w2 = _in_order(problem, (tensors.spatial_weight, tensors.temporal_weight))
    need_w1, need_w2 = _in_order(problem, (need.spatial_weight, need.temporal_weight))
    need_b1, need_b2 = _in_order(problem, (need.spatial_bias, need.temporal_bias))
    x = tensors.x
    positions = [problem.batch * math.prod(s) for s in (problem.mid_size, problem.out_size)]
    dx = dw1 = dw2 = db1 = db2 = dgamma = dbeta = None
    with _call(problem) as k:
        if u is None:
            u = x.new_empty(problem.mid_shape)
            b1, _ = _in_order(problem, (tensors.spatial_bias, tensors.temporal_bias))
            k.tap_conv([k.branch(k.plain(x), w1, b1, first)], [_mid(u)])
        u = _mid(u)[:, : problem.mid_channels]
        if spec.norm == "frozen":
            mean, var = tensors.mean, tensors.var
        coefficients = None
        if mean is not None and var is not None:
            coefficients = k.norm_coefficients(tensors, mean, var)
        if need_w2:
            z = k.norm_act(u, coefficients, spec.activation)
            dw2 = k.weight_gradient(z, k.plain(dy), second, w2, positions[1])
        if need_b2:
            db2 = k.sums(k.plain(dy), dy.shape)[0]
        if need.x or need_w1 or need_b1 or need.norm_weight or need.norm_bias:
            dv = k.rows(problem.mid_size, problem.mid_channels)
            k.tap_conv(
                [k.branch(k.plain(dy), w2, None, second)], [dv], "norm_gradient", spec.activation,
                u, coefficients, transposed=True,
            )  # fmt: skip
            if coefficients is not None and var is not None:
                sums = k.sums(k.plain(dv, coefficients), dv.shape, u)
                dgamma = k.norm_gradient_coefficients(sums, var, coefficients)
                dbeta = sums[0]
            du = k.norm_gradient(dv, u, coefficients)
            if need_w1:
                dw1 = k.weight_gradient(k.plain(x), du, first, w1, positions[0])
            if need_b1:
                db1 = k.sums(du, dv.shape)[0]
            if need.x:
                dx = torch.empty_like(x)
                k.tap_conv([k.branch(du, w1, None, first)], [dx], transposed=True)
    dws, dwt = _in_order(problem, (dw1, dw2))
    dbs, dbt = _in_order(problem, (db1, db2))
    return _finish((dx, dws, dwt, dbs, dbt, dgamma, dbeta), tensors, needs)


def _branches(
    k: _Call, tensors: ParallelTensors, sources: Sequence[Any], activation: str, biased: bool = True
) -> list[Any]:
    """The spatial and the temporal branch of the parallel op."""
    t = tensors
    biases = (t.spatial_bias, t.temporal_bias) if biased else (None, None)
    weights = (t.spatial_weight, t.temporal_weight)
    return [
        k.branch(s, w, b, p, activation)
        for s, w, b, p in zip(sources, weights, biases, k.problem.passes, strict=True)
    ]


def _outputs(problem: Problem, y: Tensor) -> list[Tensor]:
    """The channels of y, or of a gradient like it, that each tap convolution writes."""
    if problem.spec.combine == "add":  # type: ignore[union-attr]
        return [y]
    return list(y.split([p.out_channels for p in problem.passes], 1))


def parallel_conv2plus1d(problem: Problem, tensors: ParallelTensors) -> Tensor:
    spec: ParallelSpec = problem.spec  # type: ignore[assignment]
    y = problem.empty_output(tensors.x)
    with _call(problem) as k:
        branches = _branches(k, tensors, [k.plain(tensors.x)] * 2, spec.branch_activation)
        if spec.combine == "add":
            k.tap_conv(branches, [y], "forward", spec.activation)
        else:
            for branch, part in zip(branches, _outputs(problem, y), strict=True):
                k.tap_conv([branch], [part], "forward", spec.activation)
    return y


def parallel_conv2plus1d_backward(
    problem: Problem, tensors: ParallelTensors, dy: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    spec: ParallelSpec = problem.spec  # type: ignore[assignment]
    need = ParallelTensors(*needs)  # type: ignore[arg-type]
    x = tensors.x
    parts = _outputs(problem, dy)
    gradients = [parts[0], parts[-1]]  # of the two branches before their activation
    dx = None
    with _call(problem) as k:
        if spec.activation != "none" or spec.branch_activation != "none":
            branches = _branches(k, tensors, [k.plain(x)] * 2, spec.branch_activation)
            gradients = [k.rows(problem.out_size, p.out_channels) for p in problem.passes]
            together = [(branches, gradients, dy)]
            if spec.combine == "cat":
                each = zip(branches, gradients, parts, strict=True)
                together = [([b], [g], part) for b, g, part in each]
            for b, g, part in together:
                k.tap_conv(b, g, "branch_gradient", spec.activation, part)
        sources = [k.plain(g) for g in gradients]
        weights = (tensors.spatial_weight, tensors.temporal_weight)
        wanted = (need.spatial_weight, need.temporal_weight)
        positions = problem.batch * math.prod(problem.out_size)
        dws, dwt = (
            k.weight_gradient(k.plain(x), s, p, w, positions) if n else None
            for n, s, p, w in zip(wanted, sources, problem.passes, weights, strict=True)
        )
        dbs, dbt = (
            k.sums(s, g.shape)[0] if n else None
            for n, s, g in zip(
                (need.spatial_bias, need.temporal_bias), sources, gradients, strict=True
            )
        )
        if need.x:
            dx = torch.empty_like(x)
            branches = _branches(k, tensors, sources, "none", biased=False)
            k.tap_conv(branches, [dx], transposed=True)
    return _finish((dx, dws, dwt, dbs, dbt), tensors, needs)


def _finish(
    grads: Sequence[Tensor | None], tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are needed, each in dtype and strides of its tensor."""
    out = []
    for g, t, needed in zip(grads, tensors, needs, strict=False):
        if needed:
            assert g is not None and t is not None
            ready = g.dtype == t.dtype and g.shape == t.shape and g is grads[0]
            out.append(g if ready else torch.empty_like(t).copy_(g.view(t.shape)))
    return out
