"""Gradients of every order, functorch transforms, checkpointing, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastst
from fastst.functional import BatchNorm, conv2plus1d, parallel_conv2plus1d
from tests.support import fuzz
from tests.support.fuzz import Config

TINY = Config(
    batch=2, channels=2, mid=3, out=2, size=(3, 3, 2), kernel=(3, 3, 2), padding=1,
    dtype=torch.float64,
)  # fmt: skip

MODES = {
    "plain": TINY,
    "batch": replace(TINY, norm="batch"),
    "batch, no affine, recompute": replace(TINY, norm="batch", affine=False, recompute=True),
    "frozen": replace(TINY, norm="frozen"),
    "temporal-first": replace(TINY, order="temporal-first"),
    "temporal-first, batch": replace(TINY, order="temporal-first", norm="batch"),
    "temporal-first, frozen": replace(TINY, order="temporal-first", norm="frozen"),
    **{f"batch, {a}": replace(TINY, norm="batch", activation=a) for a in fuzz.ACTIVATIONS},
    "causal": replace(TINY, causal=True, padding=(0, 1, 1), norm="frozen", activation="silu"),
    "causal, strided": replace(TINY, causal="strided", stride=(2, 1, 1), padding=(0, 1, 1)),
    "groups": replace(TINY, channels=4, mid=4, out=2, groups=(2, 2), norm="batch"),
    "depthwise": replace(TINY, channels=3, mid=3, out=3, groups=(3, 3), activation="silu"),
    "stride, dilation": replace(TINY, stride=(2, 1, 2), dilation=(1, 2, 1), padding=2),
    "same": replace(TINY, padding="same", kernel=(2, 3, 2), activation="gelu"),
    "reflect, replicate": replace(TINY, padding_mode=("reflect", "replicate"), activation="silu"),
    "circular": replace(TINY, padding_mode=("circular", "circular"), norm="batch"),
    "no bias": replace(TINY, bias=(False, False)),
    "add": replace(TINY, op="parallel_conv2plus1d", mid=2, kernel=(3, 3, 3), activation="none"),
    "add, activations": replace(
        TINY, op="parallel_conv2plus1d", mid=2, kernel=(3, 3, 3), activation="silu",
        branch_activation="gelu",
    ),
    "cat": replace(
        TINY, op="parallel_conv2plus1d", kernel=(3, 3, 3), combine="cat", stride=(2, 1, 2),
        branch_activation="silu",
    ),
}  # fmt: skip


def closure(config: Config) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The call as a function of the tensors that need a gradient."""
    tensors, _ = fuzz.make(config)
    running = {n: t for n, t in tensors.items() if n.startswith("running")}
    names = [n for n in tensors if n not in running]

    def call(*values: Tensor) -> Tensor:
        # Statistics cloned: gradcheck calls many times, and frozen ones must stay.
        kept = {n: t.clone() for n, t in running.items()}
        return fuzz.call(config, dict(zip(names, values, strict=True)) | kept)

    return call, [tensors[n].detach().requires_grad_() for n in names]


def composed(config: Config) -> Callable[..., Tensor]:
    """The same by PyTorch's own operators."""
    tensors, _ = fuzz.make(config)
    running = {n: t for n, t in tensors.items() if n.startswith("running")}
    names = [n for n in tensors if n not in running]

    def call(*values: Tensor) -> Tensor:
        kept = {n: t.clone() for n, t in running.items()}
        return fuzz.compose(config, dict(zip(names, values, strict=True)) | kept)[0]

    return call


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    call, inputs = closure(MODES[mode])
    assert gradcheck(call, inputs, fast_mode=False)


@pytest.mark.parametrize("mode", MODES)
def test_gradgradcheck(mode: str) -> None:
    call, inputs = closure(MODES[mode])
    assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_second_order_is_that_of_the_composition(mode: str) -> None:
    """All entries, where gradgradcheck's fast mode projects; zeros would be caught here."""
    call, inputs = closure(MODES[mode])

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = function(*inputs)
        weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
        grads = torch.autograd.grad((y * y * weight).sum(), inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(penalty, inputs)

    for ours, true in zip(second(call), second(composed(MODES[mode])), strict=True):
        scale = max(1.0, true.abs().max().item())
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("mode", ["plain", "batch", "add, activations"])
def test_third_order_and_backward_twice(mode: str) -> None:
    config = replace(MODES[mode], activation="silu")
    call, inputs = closure(config)
    results = []
    for function in (call, composed(config)):
        grad: Any = function(*inputs).square().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(grad, inputs[0], create_graph=True)
            results.append(grad)
            grad = grad.square().sum()
    for ours, true in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-9 * true.abs().max().item())
    y = call(*inputs)
    once = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    twice = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_each_gradient_alone() -> None:
    """Whatever subset is asked for, each gradient is what it is among all."""
    for mode in ("batch", "temporal-first, frozen", "cat"):
        call, inputs = closure(MODES[mode])
        everything = torch.autograd.grad(call(*inputs).square().sum(), inputs)
        for i, expected in enumerate(everything):
            alone = [t.detach() for t in inputs]
            alone[i].requires_grad_()
            (got,) = torch.autograd.grad(call(*alone).square().sum(), alone[i])
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_no_graph_when_nothing_needs_one() -> None:
    x, w, v = torch.randn(1, 2, 3, 4, 4), torch.randn(3, 2, 1, 3, 3), torch.randn(2, 3, 3, 1, 1)
    assert conv2plus1d(x, w, v, padding=1).grad_fn is None
    w.requires_grad_()
    assert conv2plus1d(x, w, v, padding=1).grad_fn is not None
    with torch.no_grad():
        assert conv2plus1d(x, w, v, padding=1).grad_fn is None
    with torch.inference_mode():
        assert conv2plus1d(x, w, v, padding=1).is_inference()


def test_writing_over_what_backward_needs_is_refused() -> None:
    x = torch.randn(1, 2, 3, 4, 4)
    w = torch.randn(3, 2, 1, 3, 3, requires_grad=True)
    y = conv2plus1d(x, w, torch.randn(2, 3, 3, 1, 1), padding=1)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def _biases(layer: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in layer.named_parameters() if name.endswith("bias") and p.dim() == 1]


@pytest.mark.parametrize(
    "layer",
    [
        fastst.Conv3d(4, 4, 3, padding=1),
        fastst.ParallelConv2Plus1d(4, 4, 3, padding=1),
        fastst.Conv2Plus1d(4, 4, 3, padding=1, recompute=False),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_biases_that_backward_does_not_read_may_be_written_to(layer: nn.Module) -> None:
    x = torch.randn(1, 4, 3, 6, 6)
    layer(x).square().sum().backward()
    expected = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    y = layer(x)
    loss = y.square().sum()
    with torch.no_grad():
        for p in _biases(layer):
            p.add_(1)
    loss.backward()
    for p, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_a_bias_that_gradients_of_gradients_read_may_not() -> None:
    layer = fastst.Conv2Plus1d(4, 4, 3, padding=1, recompute=False, activation="silu")
    x = torch.randn(1, 4, 3, 6, 6, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.spatial.bias.add_(1)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


# ---- functorch


@pytest.mark.parametrize("mode", MODES)
def test_jvp(mode: str) -> None:
    """Forward mode: right, never zeros."""
    call, inputs = closure(MODES[mode])
    primals = tuple(t.detach() for t in inputs)
    tangents = tuple(torch.randn_like(t) for t in primals)
    _, got = torch.func.jvp(call, primals, tangents)
    _, expected = torch.func.jvp(composed(MODES[mode]), primals, tangents)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert got.any()


def test_dual_numbers_outside_functorch() -> None:
    call, inputs = closure(TINY)
    values = [t.detach() for t in inputs]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(values[1], torch.ones_like(values[1]))
        y = call(values[0], dual, *values[2:])
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert tangent is not None and tangent.any()


def test_vmap_over_inputs_and_over_weights() -> None:
    x = torch.randn(3, 2, 2, 3, 4, 4).double()
    ws, wt = torch.randn(3, 3, 2, 1, 3, 3).double(), torch.randn(2, 3, 3, 1, 1).double()

    def call(x: Tensor, ws: Tensor) -> Tensor:
        return conv2plus1d(x, ws, wt, padding=1)

    for dims, each in (
        ((0, None), [call(a, ws[0]) for a in x]),
        ((None, 0), [call(x[0], b) for b in ws]),
        ((0, 0), [call(a, b) for a, b in zip(x, ws, strict=True)]),
    ):
        args = (x if dims[0] == 0 else x[0], ws if dims[1] == 0 else ws[0])
        torch.testing.assert_close(torch.func.vmap(call, dims)(*args), torch.stack(each))


@pytest.mark.parametrize("mode", ["plain", "temporal-first", "frozen", "add, activations"])
def test_per_sample_gradients(mode: str) -> None:
    config = replace(MODES[mode], batch=3)
    call, inputs = closure(config)
    x, *rest = (t.detach() for t in inputs)

    def loss(weight: Tensor, sample: Tensor) -> Tensor:
        return call(sample[None], weight, *rest[1:]).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(rest[0], x)
    for i in range(3):
        weight = rest[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(weight, x[i]), weight)
        torch.testing.assert_close(got[i], expected)


def test_jacobian_and_hessian() -> None:
    x = torch.randn(1, 1, 2, 2, 2).double()
    ws, wt = torch.randn(2, 1, 1, 1, 1).double(), torch.randn(1, 2, 1, 1, 1).double()

    def ours(t: Tensor) -> Tensor:
        return conv2plus1d(t, ws, wt, activation="silu").sum()

    def true(t: Tensor) -> Tensor:
        return F.conv3d(F.silu(F.conv3d(t, ws)), wt).sum()

    torch.testing.assert_close(torch.func.hessian(ours)(x), torch.func.hessian(true)(x))
    torch.testing.assert_close(torch.func.jacrev(ours)(x), torch.func.jacfwd(true)(x))


# ---- is_grads_batched: the older vmap, over dy


@pytest.mark.parametrize("backend", ["auto", "aten"])
@pytest.mark.parametrize("mode", MODES)
def test_batched_gradients(mode: str, backend: str) -> None:
    """All vector-Jacobian products at once, and those of the double backward."""
    call, inputs = closure(MODES[mode])

    def products(function: Callable[..., Tensor], *, batched: bool) -> list[Tensor]:
        y = function(*inputs)
        dys = torch.linspace(-1, 2, 3 * y.numel(), dtype=y.dtype).view(3, *y.shape)
        dys.requires_grad_()
        found = list(derivatives(y, inputs, dys, batched=batched))
        grads = torch.autograd.grad(y.square().sum(), inputs[:2], create_graph=True)
        for g in grads:
            found += derivatives(g, inputs[:2], g.detach().expand(2, *g.shape), batched=batched)
        penalty = sum(g.square().sum() for g in found)
        return [*found, *torch.autograd.grad(penalty, (*inputs[:2], dys))]

    with fastst.use_backend(backend):
        got = products(call, batched=True)
    expected = products(composed(MODES[mode]), batched=False)
    for ours, true in zip(got, expected, strict=True):
        scale = max(1.0, true.abs().max().item())
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-10 * scale)


def derivatives(
    y: Tensor, inputs: list[Tensor], dys: Tensor, *, batched: bool
) -> tuple[Tensor, ...]:
    """J^T dy for several dy, which can be differentiated again."""
    if batched:
        return torch.autograd.grad(y, inputs, dys, is_grads_batched=True, create_graph=True)
    each = [torch.autograd.grad(y, inputs, dy, create_graph=True) for dy in dys]
    return tuple(map(torch.stack, zip(*each, strict=True)))


@pytest.mark.parametrize("norm", [None, "batch"])
def test_vectorised_jacobian_and_hessian(norm: str | None) -> None:
    layer = fastst.Conv2Plus1d(2, 2, 3, padding=1, norm=norm, activation="silu").double()
    parallel = fastst.ParallelConv2Plus1d(2, 2, 3, padding=1, activation="silu").double()
    x = torch.randn(1, 2, 3, 3, 3, dtype=torch.float64)
    for module in (layer, nn.Sequential(layer, nn.BatchNorm3d(2).double()), parallel):
        for each, end in (
            (torch.autograd.functional.jacobian, (1, 2, 3, 4)),
            (torch.autograd.functional.hessian, (0, 1, 2, 3, 4)),
        ):

            def call(z: Tensor, m: nn.Module = module, end: tuple[int, ...] = end) -> Tensor:
                return m(z).pow(3).mean(end)

            got, expected = (each(call, x, vectorize=v) for v in (True, False))
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


# ---- checkpointing, layouts, threads


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["batch", "cat"])
def test_checkpointing(mode: str, reentrant: bool) -> None:
    call, inputs = closure(MODES[mode])
    plain = torch.autograd.grad(call(*inputs).square().sum(), inputs)
    for t in inputs:
        t.grad = None
    checkpoint(call, *inputs, use_reentrant=reentrant).square().sum().backward()
    for t, expected in zip(inputs, plain, strict=True):
        torch.testing.assert_close(t.grad, expected)


def test_gradient_of_a_broadcast_output() -> None:
    """`.sum()` sends a gradient of stride 0 in every axis."""
    for backend in ("aten", "reference"):
        config = replace(TINY, norm="batch", size=(4, 5, 5), dtype=torch.float32)
        with fastst.use_backend(backend):
            call, inputs = closure(config)
            y = call(*inputs)
            got = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
            dense = torch.autograd.grad(y, inputs, torch.ones_like(y))
        for a, b in zip(got, dense, strict=True):
            torch.testing.assert_close(a, b)


def test_two_threads_at_once() -> None:
    """Forward and backward from several threads give what one gives."""
    configs = [MODES[m] for m in ("batch", "temporal-first", "cat", "groups")]
    pairs = [closure(replace(c, size=(4, 6, 6))) for c in configs]
    expected = [torch.autograd.grad(f(*t).square().sum(), t) for f, t in pairs]
    failures: list[str] = []

    def work(which: int) -> None:
        call, inputs = pairs[which % len(pairs)]
        try:
            for _ in range(10):
                grads = torch.autograd.grad(call(*inputs).square().sum(), inputs)
                for a, b in zip(grads, expected[which % len(pairs)], strict=True):
                    torch.testing.assert_close(a, b)
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_running_statistics_get_no_gradient() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    x = torch.randn(2, 2, 3, 4, 4, requires_grad=True)
    ws, wt = torch.randn(3, 2, 1, 1, 1), torch.randn(2, 3, 1, 1, 1)
    conv2plus1d(x, ws, wt, norm=BatchNorm(mean, var, training=True)).sum().backward()
    assert mean.any() and not mean.requires_grad and mean.grad_fn is None
    assert parallel_conv2plus1d(x.detach(), ws[:2], wt[:, :2]).grad_fn is None


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [
    lambda: fastst.Conv2Plus1d(4, 4, 3, padding=1),
    lambda: fastst.Conv2Plus1d(4, 4, 3, padding=1, norm="batch"),
    lambda: fastst.ParallelConv2Plus1d(4, 4, 3, padding=1), lambda: fastst.Conv3d(4, 4, 3),
], ids=["pair", "norm", "parallel", "conv3d"])  # fmt: skip
def test_outputs_may_be_written_to(
    layer: Any, dtype: torch.dtype, channels_last: bool, backend: str
) -> None:
    """And views of them: PyTorch forbids it of a view that a custom function has given."""
    module, x = layer().to(dtype), torch.randn(2, 4, 4, 6, 6, dtype=dtype, requires_grad=True)
    given = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
    with fastst.use_backend(backend):
        wanted = (3 * module(given)).transpose(1, 2) * 2
        found = module(given).mul_(3).transpose(1, 2).mul_(2)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), x), torch.autograd.grad(wanted.sum(), x)
        )
