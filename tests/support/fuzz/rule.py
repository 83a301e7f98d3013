"""The rule: as close to float64 as PyTorch's own operators, twice their error and a few ulps."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastst
from fastst.functional import BatchNorm, conv2plus1d, parallel_conv2plus1d

from .config import USUAL, Config, Limits, random_config
from .conv3d import (
    ConvConfig,
    ConvLimits,
    call_conv,
    clear_conv,
    compose_conv,
    frozen_norm,
    held_conv,
    make_conv,
    random_conv,
)
from .truth import MOMENTUM, compose, first_pass
from .values import clear_of_kinks, make

SEED = int(os.environ.get("FASTST_SEED", "0"))
CASES = int(os.environ.get("FASTST_FUZZ", "0"))

# A few ulps beside PyTorch's own error, of the largest magnitude that enters the result. float32
# has more of them: its sums are rounded at every step (a thousand terms one after the other lose
# about ten), those of 16 bits only at the end.
ULPS = {torch.float32: 12.0, torch.float16: 4.0, torch.bfloat16: 4.0}
# Being off by more is a bug of PyTorch's convolutions, not a tolerance: on the CPU there are some
# in grouped float32 gradients and in bfloat16.
VENDOR_BUG = {torch.float32: 1024.0, torch.float16: 64.0, torch.bfloat16: 32.0}
FLOAT64 = 1e-10


def call(config: Config, t: dict[str, Tensor]) -> Tensor:
    """y by fastst."""
    weights = t["spatial_weight"], t["temporal_weight"]
    main = (t["x"], *weights, t.get("spatial_bias"), t.get("temporal_bias"))
    if config.parallel:
        return parallel_conv2plus1d(*main, **config.kwargs())
    norm = None
    if config.norm != "none":
        norm = BatchNorm(
            t["running_mean"], t["running_var"], t.get("norm_weight"), t.get("norm_bias"),
            config.norm == "batch", MOMENTUM, config.eps,
        )  # fmt: skip
    return conv2plus1d(
        *main, norm=norm, residual=t.get("residual"), outer_norm=frozen_norm(config, t),
        **config.kwargs(),
    )  # fmt: skip


def _held(config: Config, tensors: dict[str, Tensor]) -> Any:
    """Statistics of the batch in float64, where the norm takes some."""
    return first_pass(config, tensors)[1:] if config.norm == "batch" else None


class Kit(NamedTuple):
    """What is known of one kind of configurations."""

    make: Callable[..., tuple[dict[str, Tensor], Tensor]]
    call: Callable[[Any, dict[str, Tensor]], Tensor]
    compose: Callable[..., tuple[Tensor, Any]]
    clear: Callable[[Any, dict[str, Tensor]], bool]
    held: Callable[[Any, dict[str, Tensor]], Any]


KITS: dict[type, Kit] = {
    Config: Kit(make, call, compose, clear_of_kinks, _held),
    ConvConfig: Kit(make_conv, call_conv, compose_conv, clear_conv, held_conv),
}
Results = dict[str, Tensor]


def _as_usual(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of the truth: PyTorch's batch norm backward is wrong for some strides of N."""
    return t.to(dtype).clone(memory_format=torch.contiguous_format)


def results(
    function: Callable[[Any, dict[str, Tensor]], Tensor],
    config: Any,
    tensors: dict[str, Tensor],
    dy: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Results:
    """Output, gradients by the name of their tensor, and running statistics after the call."""
    leaves = {}
    if dtype is not None and dy is not None:
        dy = _as_usual(dy, dtype)
    for name, t in tensors.items():
        leaf = t.detach() if dtype is None else _as_usual(t.detach(), dtype)
        if name.startswith("running"):
            leaf = leaf.clone()
        elif dy is not None and name not in config.constant:
            leaf.requires_grad_()
        leaves[name] = leaf
    wanted = [n for n, t in leaves.items() if t.requires_grad]
    y = function(config, leaves)
    out = {"y": y.detach()}
    if config.norm == "batch":
        out |= {n: leaves[n] for n in ("running_mean", "running_var")}
    if dy is not None and wanted:
        grads = torch.autograd.grad(y, [leaves[n] for n in wanted], dy.to(y.dtype))
        out |= {f"grad of {n}": g for n, g in zip(wanted, grads, strict=True)}
    return out


def scales(
    config: Any, tensors: dict[str, Tensor], dy: Tensor | None, truth: Results
) -> dict[str, float]:
    """Largest magnitude that enters each result.

    Some gradients are 0, or nearly, because large terms cancel: through batch statistics (a bias
    before batch norm has none at all), or where the gradient of the output is constant. The terms
    are as large as gradients with those statistics held, as it is and with random signs.
    """
    largest = {n: float(t.abs().max()) if t.numel() else 0.0 for n, t in truth.items()}
    if dy is None:
        return largest
    kit = KITS[type(config)]
    with torch.no_grad():
        taken = kit.held(config, tensors)
    generator = torch.Generator().manual_seed(config.seed)
    for draw in range(4):
        signs = torch.randint(2, dy.shape, generator=generator) * 2 - 1 if draw else 1
        held = results(
            lambda c, t: kit.compose(c, t, taken)[0],
            config,
            tensors,
            dy * signs,
            torch.float64,
        )
        for n in largest.keys() & held.keys() - {"y"}:
            largest[n] = max(largest[n], float(held[n].abs().max()))
    return largest


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Everything that Python code allocates without writing to it is full of NaN."""

    def fill(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisonous(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            if type(t) is Tensor and t.device.type != "meta":
                t.detach().fill_(torch.nan if t.is_floating_point() else 113)
            return t

        return poisonous

    with contextlib.ExitStack() as stack:
        for owner, names in (
            (torch, ("empty", "empty_like", "empty_strided", "empty_permuted")),
            (Tensor, ("new_empty", "new_empty_strided")),
        ):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, fill(getattr(owner, name))))
        yield


def error(result: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite where one of them is no number."""
    if not truth.numel():
        return 0.0
    worst = float((result.double().to(truth.device) - truth).abs().max())
    return math.inf if math.isnan(worst) else worst


def complaints(
    config: Any, ours: Results, peers: list[Results], truth: Results, scale: dict[str, float]
) -> list[str]:
    """What of ``ours`` is further from the truth than the rule allows."""
    found = []
    eps = torch.finfo(config.dtype).eps
    for name, true in truth.items():
        got, own = ours[name], peers[0][name]
        if got.shape != true.shape or got.dtype != own.dtype:
            found.append(
                f"{name}: {got.dtype} {tuple(got.shape)}, not {own.dtype} {tuple(true.shape)}"
            )
            continue
        err, bound, told = error(got, true), FLOAT64 * scale[name], ""
        if config.dtype != torch.float64:
            ulp = eps * scale[name]
            errors = [error(peer[name], true) for peer in peers]
            sane = [e for e in errors if e <= VENDOR_BUG[config.dtype] * ulp]
            bound = 2 * max(sane, default=0.0) + ULPS[config.dtype] * ulp
            told = f", PyTorch {' and '.join(f'{e:.3g}' for e in errors)}"
        if not err <= bound:
            found.append(f"{name}: error {err:.3g} > {bound:.3g} (largest {scale[name]:.3g}{told})")
    return found


def no_rounding(config: Any, ours: Results, truth: Results, scale: dict[str, float]) -> list[str]:
    """What of ``ours`` is further from the truth than any order of summation explains."""
    eps = torch.finfo(config.dtype).eps
    found = []
    for name, true in truth.items():
        bound = VENDOR_BUG.get(config.dtype, FLOAT64 / eps) * eps * scale[name]
        err = error(ours[name], true)
        if not err <= bound:
            found.append(f"{name}: error {err:.3g} > {bound:.3g} (largest {scale[name]:.3g})")
    return found


def check(
    config: Config | ConvConfig, backend: str = "auto", backward: bool = True, device: str = "cpu"
) -> str | None:
    """Hold one backend to the rule for one configuration.

    Args:
        backend: name; every phase must run on it, or the reason why it refuses is returned.
        backward: also compare every gradient (but none where values lie on a kink after all).

    Returns:
        None, or why the backend refused (``BackendError``); nothing was compared then.

    Raises:
        AssertionError: the configuration, and everything that is wrong with its results.
    """
    kit = KITS[type(config)]
    tensors, dy = kit.make(config, device)
    grad = dy if backward and kit.clear(config, tensors) else None
    before = {n: t.clone() for n, t in tensors.items()}
    with fastst.use_backend(backend), poisoned():
        try:
            ours = results(kit.call, config, tensors, grad)
        except fastst.BackendError as refusal:
            return str(refusal)
    changed = [n for n, t in tensors.items() if not torch.equal(t, before[n])]
    on_cpu = {n: t.cpu() for n, t in tensors.items()}
    dy_cpu = None if grad is None else grad.cpu()
    truth = results(lambda c, t: kit.compose(c, t)[0], config, on_cpu, dy_cpu, torch.float64)
    peers = [
        results(lambda c, t, last=last: kit.compose(c, t, None, last)[0], config, tensors, grad)
        for last in (False, True)
    ]
    found = complaints(config, ours, peers, truth, scales(config, on_cpu, dy_cpu, truth))
    found += [f"{n} was overwritten" for n in changed]
    assert not found, f"\nbackend {backend!r}, {config}\n  " + "\n  ".join(found)
    return None


def hold(
    config: Config | ConvConfig, backend: str = "auto", backward: bool = True, device: str = "cpu"
) -> None:
    """``check``, where the backend must run: that it refuses is no wrong result but the end.

    Raises:
        AssertionError: as ``check``.
        pytest.fail.Exception: the backend refused.
    """
    why = check(config, backend, backward, device)
    if why is not None:
        pytest.fail(f"backend {backend!r} refused {config}: {why}")


def fuzz(
    backend: str,
    cases: int,
    limits: Limits | ConvLimits = USUAL,
    *,
    first: int = SEED,
    backward: bool = True,
    device: str = "cpu",
    least: float = 0.5,
) -> None:
    """Check ``cases`` random configurations (FASTST_FUZZ if set), and that most did run.

    Raises:
        AssertionError: with the configuration and the seed; or when less than the share ``least``
            of the configurations was accepted by the backend.
    """
    cases = CASES or cases
    refused = []
    for seed in range(first, first + cases):
        draw: Any = random_conv if isinstance(limits, ConvLimits) else random_config
        config = draw(seed, limits)
        try:
            why = check(config, backend, backward, device)
        except Exception as wrong:
            raise AssertionError(f"FASTST_SEED={seed} FASTST_FUZZ=1: {config}: {wrong}") from wrong
        if why is not None:
            refused.append(why)
    assert len(refused) <= (1 - least) * cases, f"refused {len(refused)} of {cases}: {refused[0]}"
