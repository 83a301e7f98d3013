"""Comparison of a kernel family with float64 on small random data, the first time it is to be used.

A GPU, a driver or a compiler may be broken in ways that no test here has seen; so may PyTorch's
own convolutions (pytorch#163539). A check takes milliseconds once the kernels are compiled.
Verdicts are kept in ``selfcheck.json`` beside the tuning cache, by device, driver, versions and
kernel source.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.cuda.hopper import gradient_tiles
from ..backends.cuda.hopper import tiles as configs_hopper
from ..machine import cache
from ..problem.spec import PairSpec, PairTensors, ParallelSpec, ParallelTensors, Problem

# Largest error allowed, in units of the rounding of the dtype and of the largest output: the
# roundings of a right result stay under 2 of these, a wrong tap is off by tens of percent.
_ULPS = 8
_PADDING = (1,) * 6
_verdicts: dict[str, str] = {}  # by key; empty: passed
_lock = RLock()


class SelfCheckWarning(UserWarning):
    """A kernel family computes wrong numbers here and is no longer chosen by ``auto``."""


def problem_of(problem: Problem) -> str:
    """Name of the check that stands for a problem."""
    if problem.op != "conv2plus1d":
        return "parallel"
    groups = [p.groups for p in problem.passes]
    if all(p.groups == p.in_channels == p.out_channels > 1 for p in problem.passes):
        return "depthwise"
    return "grouped" if max(groups) > 1 else "dense"


def why_broken(backend: str, problem: Problem, kind: str | None = None) -> str | None:
    """What was wrong when the backend's kernels for such problems were checked here, or None.

    Checks on first use and warns once if that fails. Inside a CUDA graph capture nothing can be
    checked. ``kind`` names the check, where the problem alone does not say which kernels will run.
    """
    device, dtype = problem.device, problem.dtype
    kind = kind or problem_of(problem)
    key = _key(backend, kind, device, dtype)
    with _lock:
        if key not in _verdicts:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                # Nobody has seen the Hopper kernels run: they wait for their first check.
                unseen = kind.startswith("hopper")
                return "has not been checked before this graph capture" if unseen else None
            _verdicts.update({k: v for k, v in cache.read(_file()).items() if k not in _verdicts})
        if key not in _verdicts:
            verdict = check(backend, kind, device, dtype, problem) or ""
            _verdicts[key] = verdict
            cache.add(_file(), {key: verdict})
            if verdict:
                warnings.warn(
                    f"fastst no longer chooses backend {backend!r} for {kind} layers in {dtype}: "
                    f"it {verdict}",
                    SelfCheckWarning,
                    stacklevel=2,
                )
        return _verdicts[key] or None


def check(
    backend: str,
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    like: Problem | None = None,
) -> str | None:
    """Compare a backend with float64 on small random data.

    Args:
        backend: name, "aten" for PyTorch's own convolutions.
        kind: "dense", "grouped", "depthwise", "parallel"; "hopper" and "hopper backward" for every
            instance of the CUDA library's Hopper kernels.
        device, dtype: what to run on.
        like: a problem whose kernels are checked, where the backend has a rehearsal of it; what is
            compiled for the check then serves the call.

    Returns:
        None, or what is wrong, as the end of a sentence about the backend.
    """
    from ..backends import reference

    compose: Any = reference.compose_parallel if kind == "parallel" else reference.compose_pair
    allowed = _ULPS * _rounding(dtype, device)
    for spec, tensors, run, dy in _examples(backend, kind, dtype, like):
        there = type(tensors)(*(None if t is None else t.to(device) for t in tensors))
        try:
            with torch.no_grad():
                results = run(Problem.of(there, spec), there)
        except Exception as failure:  # a compiler or a driver that fails is a verdict, too
            return f"failed its self-check with {type(failure).__name__}: {failure}"
        for (name, true), got in zip(_truth(compose, spec, tensors, dy), results, strict=True):
            error = float((got.cpu().double() - true).abs().max() / true.abs().max())
            if not error <= allowed:
                return (
                    f"is off by {error:.2g} of the largest {name} in its self-check, "
                    f"over {allowed:.2g}"
                )
    return None


def _truth(
    compose: Callable[..., Tensor], spec: Any, tensors: Any, dy: Tensor | None
) -> list[tuple[str, Tensor]]:
    """The output or, with dy, the gradients, in float64 and by name."""
    double = {n: t.double() for n, t in tensors._asdict().items() if t is not None}
    if dy is None:
        with torch.no_grad():
            return [("output", compose(tensors._replace(**double), spec))]
    with torch.enable_grad():
        leaves = {n: t.requires_grad_() for n, t in double.items() if n not in ("mean", "var")}
        y = compose(tensors._replace(**double), spec)
        grads = torch.autograd.grad(y, list(leaves.values()), dy.double())
    return [(f"gradient of {n}", g) for n, g in zip(leaves, grads, strict=True)]


def verdicts() -> dict[str, str]:
    """Every verdict in memory and on disk, by a description of the check; empty: passed."""
    return {**cache.read(_file()), **_verdicts}


def forget() -> None:
    """Drop what this process knows, not the file."""
    _verdicts.clear()


class _Example(NamedTuple):
    spec: Any
    tensors: Any  # on the CPU
    run: Callable[[Problem, Any], Sequence[Tensor]]
    dy: Tensor | None = None  # with it, gradients are compared


def _examples(
    backend: str, kind: str, dtype: torch.dtype, like: Problem | None = None
) -> list[_Example]:
    if kind == "hopper":
        return _hopper_examples(dtype)
    if kind == "hopper backward":
        return _hopper_backward_examples(dtype)
    from . import selection

    module = selection.BACKENDS[backend]
    if like is not None and hasattr(module, "rehearse"):
        spec, shapes, run = module.rehearse(like)
        return [_Example(spec, _filled(shapes), lambda p, t: [run(p, t)])]
    spec, tensors = _example(kind, dtype)
    if kind == "parallel":
        return [_Example(spec, tensors, lambda p, t: [module.parallel_conv2plus1d(p, t)])]
    return [_Example(spec, tensors, lambda p, t: [module.conv2plus1d(p, t, False).y])]


def _example(kind: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A problem whose sizes are no multiples of any tile."""
    c = 18
    g = {"grouped": 3, "depthwise": c}.get(kind, 1)
    tensors = _tensors(dtype, (2, c, 5, 9, 7), (c, c // g, 1, 3, 3), (c, c // g, 3, 1, 1))
    common: dict[str, Any] = {"padding": _PADDING, "groups": (g, g)}
    if kind == "parallel":
        return ParallelSpec(**common, activation="relu"), ParallelTensors(*tensors[:5])
    return PairSpec(**common, norm="frozen", activation="relu"), tensors


def _filled(shapes: Any) -> Any:
    """Random tensors on the CPU like those that are given."""
    generator = torch.Generator().manual_seed(0)

    def filled(name: str, t: Tensor) -> Tensor:
        drawn = torch.randn(t.shape, generator=generator)
        if name.endswith("_weight") and t.dim() == 5:
            drawn /= math.prod(t.shape[1:]) ** 0.5
        if name == "var":
            drawn = drawn.abs() + 0.5
        return torch.empty_like(t, device="cpu").copy_(drawn)

    return type(shapes)(
        **{n: None if t is None else filled(n, t) for n, t in shapes._asdict().items()}
    )


def _hopper_examples(dtype: torch.dtype) -> list[_Example]:
    """Every instance of the spatial, the temporal and the stem's kernel."""
    from ..backends.cuda import hopper

    examples = []
    tiles = configs_hopper.trials()
    for i, (spatial, temporal, stride) in enumerate(tiles):

        def run(problem: Problem, t: Any, pair: Any = (spatial, temporal)) -> list[Tensor]:
            return [hopper.forward(problem, t, False, pair).y]

        # Half of them with statistics, and a norm and an activation between the two kernels.
        batch = 2 * i < len(tiles)
        m, k = spatial.columns + 8, temporal.columns + 8
        tensors = _tensors(dtype, (1, 72, 2, 5, 7), (m, 72, 1, 3, 3), (k, m, 3, 1, 1))
        spec = PairSpec(
            stride=(stride, 1, 1), padding=_PADDING, norm="batch" if batch else "frozen",
            activation="silu" if batch else "relu",
        )  # fmt: skip
        if batch:
            tensors = tensors._replace(mean=None, var=None)
        examples.append(_Example(spec, tensors, run))
    stem = *_stem(dtype, 21, 20), lambda p, t: [hopper.forward(p, t, False).y]
    return [*examples, _Example(*stem)]


def _hopper_backward_examples(dtype: torch.dtype) -> list[_Example]:
    """Every instance of the kernels of gradients, and the stem."""
    from ..backends.cuda import hopper

    def example(spec: PairSpec, tensors: PairTensors, tiles: Any = None) -> _Example:
        dy = Problem.of(tensors, spec).empty_output(tensors.x)
        dy.copy_(torch.randn(dy.shape, generator=torch.Generator().manual_seed(1)))
        needs = [t is not None and n not in ("mean", "var") for n, t in tensors._asdict().items()]

        def run(problem: Problem, t: Any) -> list[Tensor]:
            _, u, mean, var, *_ = hopper.forward(problem, t, True)
            box = [dy.to(t.x.device)]
            return hopper.backward(problem, t, box, u, mean, var, needs, None, tiles)

        return _Example(spec, tensors, run, dy)

    examples = []
    for spatial, temporal, (stride, plane) in gradient_tiles.trials():
        c, m = spatial.columns - 8, temporal.columns - 8
        tensors = _tensors(dtype, (1, c, 3, 5, 6), (m, c, 1, 3, 3), (24, m, 3, 1, 1))
        spec = PairSpec(
            stride=(stride, plane, plane), padding=_PADDING, norm="batch", activation="silu"
        )
        # Statistics take a bias away again: its gradient is 0.
        tensors = tensors._replace(mean=None, var=None, spatial_bias=None)
        examples.append(example(spec, tensors, (spatial, temporal)))
    tensors = _tensors(dtype, (1, 40, 3, 5, 6), (56, 40, 1, 3, 3), (24, 56, 3, 1, 1))
    examples.append(example(PairSpec(padding=_PADDING, norm="frozen", activation="silu"), tensors))
    spec, tensors = _stem(dtype, 9, 10)
    spec = spec._replace(activation="silu", recompute=True)
    return [*examples, example(spec, tensors._replace(spatial_bias=None))]


def _stem(dtype: torch.dtype, height: int, width: int) -> tuple[PairSpec, PairTensors]:
    tensors = _tensors(dtype, (1, 3, 3, height, width), (45, 3, 1, 7, 7), (64, 45, 3, 1, 1))
    spec = PairSpec(stride=(1, 2, 2), padding=(1, 1, 3, 3, 3, 3), norm="batch")
    return spec, tensors._replace(mean=None, var=None)


def _tensors(
    dtype: torch.dtype, x: Sequence[int], first: Sequence[int], second: Sequence[int]
) -> PairTensors:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def weight(shape: Sequence[int]) -> Tensor:
        return normal(*shape) / math.prod(shape[1:]) ** 0.5

    m, k = first[0], second[0]
    there = normal(*x).to(memory_format=torch.channels_last_3d)
    main = there, weight(first), weight(second), normal(m), normal(k)
    gamma, beta, mean, var = (normal(m).float() for _ in range(4))
    return PairTensors(*main, gamma, beta, mean, var.abs() + 0.5)


def _rounding(dtype: torch.dtype, device: torch.device) -> float:
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    if dtype == torch.float32 and device.type == "cuda" and tf32:
        return 2.0**-10
    # Sums of many rounded terms in the wide types; those of 16 bits are rounded at the end only.
    return float(torch.finfo(dtype).eps) * (8 if dtype.itemsize >= 4 else 1)


def _key(backend: str, kind: str, device: torch.device, dtype: torch.dtype) -> str:
    tf32 = device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    precision = " tf32" if tf32 and dtype == torch.float32 else ""
    return f"{cache.machine(device)} | {cache.versions()} | {backend} | {kind} | {dtype}{precision}"


def _file() -> Path:
    return cache.folder() / "selfcheck.json"
