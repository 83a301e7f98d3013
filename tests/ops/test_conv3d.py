"""``conv3d``: gradients of every order, functorch, what is kept, the compiler, autocast."""

from __future__ import annotations

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
from fastst.functional import BatchNorm, Norm, Statistics, conv3d
from fastst.ops.schema import encode_spec
from fastst.problem import conv3d_checks
from fastst.problem.conv3d import ConvTensors
from tests.support import fuzz
from tests.support.fuzz import ConvConfig

OPS = torch.ops.fastst
TINY = ConvConfig(
    channels=4, out=2, size=(3, 3, 2), kernel=(2, 3, 2), padding=1, dtype=torch.float64,
    input_activation="silu", residual=True, activation="gelu",
)  # fmt: skip
MODES = {
    "plain": replace(TINY, residual=False, input_activation="none", activation="none"),
    **{kind: replace(TINY, norm=kind, norm_groups=2) for kind in fuzz.CONV_NORMS[1:]},
    "per frame": replace(TINY, norm="group", norm_groups=2, per_frame=True),
    "no affine": replace(TINY, norm="rms", affine=False, bias=False),
    "causal, past": replace(TINY, norm="layer", causal=True, padding=(0, 1, 1), past=1),
    "modes": replace(TINY, padding_mode=("reflect", "replicate"), padding=((0, 2), (1, 0), 1)),
    "groups": replace(TINY, groups=2, stride=(2, 1, 2), norm="batch"),
}


def closure(config: ConvConfig, call: Callable[..., Any]) -> tuple[Any, list[Tensor]]:
    """The call as a function of the tensors that need a gradient."""
    tensors, _ = fuzz.make_conv(config)
    running = {n: t for n, t in tensors.items() if n.startswith("running")}
    names = [n for n in tensors if n not in running]

    def run(*values: Tensor) -> Tensor:
        # Statistics cloned: gradcheck calls many times, and frozen ones must stay.
        kept = {n: t.clone() for n, t in running.items()}
        y = call(config, dict(zip(names, values, strict=True)) | kept)
        return y[0] if isinstance(y, tuple) else y

    return run, [tensors[n].detach().requires_grad_() for n in names]


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    call, inputs = closure(MODES[mode], fuzz.call_conv)
    assert gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_second_order_is_that_of_the_composition(mode: str) -> None:
    """All entries, where gradgradcheck projects; silent zeros would be caught here."""
    call, inputs = closure(MODES[mode], fuzz.call_conv)
    composed, _ = closure(MODES[mode], fuzz.compose_conv)

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y = function(*inputs)
        weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
        grads = torch.autograd.grad((y * y * weight).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    for ours, true in zip(second(call), second(composed), strict=True):
        scale = max(1.0, true.abs().max().item())
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-9 * scale)


def test_gradgradcheck() -> None:
    call, inputs = closure(MODES["group"], fuzz.call_conv)
    assert gradgradcheck(call, inputs, fast_mode=True)


def test_functorch() -> None:
    x = torch.randn(3, 2, 4, 3, 4, 4, dtype=torch.float64)
    w = torch.randn(5, 4, 2, 3, 3, dtype=torch.float64)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        norm = Norm("group", groups=2)
        return conv3d(x, w, padding=1, input_norm=norm, input_activation="silu").square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x)
    for i, one in enumerate(x):
        leaf = w.clone().requires_grad_()
        torch.testing.assert_close(each[i], torch.autograd.grad(loss(leaf, one), leaf)[0])
    y, tangent = torch.func.jvp(lambda w: conv3d(x[0], w), (w,), (w,))
    torch.testing.assert_close(y, tangent)


def test_backward_over_many_dys() -> None:
    call, inputs = closure(MODES["rms"], fuzz.call_conv)
    y = call(*inputs)
    dys = torch.randn(3, *y.shape, dtype=y.dtype)
    many = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for batched, one in zip(
            many, torch.autograd.grad(y, inputs, dy, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(batched[i], one)


# ---- what is kept


def _kept(norm: Any) -> tuple[int, Tensor]:
    x = torch.randn(2, 8, 4, 6, 6, requires_grad=True)
    w = torch.randn(8, 8, 3, 3, 3, requires_grad=True)
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = conv3d(x, w, padding=1, input_norm=norm, input_activation="silu", residual=x)
    own = {t.untyped_storage().data_ptr() for t in (x, w)}
    return sum(n for p, n in seen.items() if p not in own), y


@pytest.mark.parametrize(
    ("norm", "floats"),
    [
        (None, 0),
        (BatchNorm(None, None, training=True), 2 * 8),
        (Norm("group", groups=4), 2 * 2 * 4),
        (Norm("instance", per_frame=True), 2 * 2 * 8 * 4),
        (Norm("layer"), 2 * 2 * 4 * 6 * 6),
        (Norm("rms"), 2 * 4 * 6 * 6),
    ],
    ids=lambda v: getattr(v, "kind", None),
)
def test_only_x_and_statistics_are_kept(norm: Any, floats: int) -> None:
    held, y = _kept(norm)
    assert held == 4 * floats
    y.sum().backward()


def test_checkpoint() -> None:
    call, inputs = closure(MODES["group"], fuzz.call_conv)
    plain = torch.autograd.grad(call(*inputs).sum(), inputs)
    again = torch.autograd.grad(checkpoint(call, *inputs, use_reentrant=False).sum(), inputs)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_statistics_of_one_are_the_norm_of_the_next() -> None:
    """conv → batch norm → relu → conv without reading y for its statistics again."""
    x = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    w1, w2 = (torch.randn(s, dtype=torch.float64) for s in ((6, 3, 3, 3, 3), (4, 6, 3, 3, 3)))
    leaves = [t.requires_grad_() for t in (x, w1, w2)]
    means = [(torch.zeros(6).double(), torch.ones(6).double()) for _ in range(2)]

    def norm(i: int) -> BatchNorm:
        return BatchNorm(*means[i], None, None, True, 0.2)

    u, statistics = conv3d(x, w1, padding=1, output_statistics=True)
    assert isinstance(statistics, Statistics)
    y = conv3d(
        u, w2, padding=1, input_norm=norm(0), input_activation="relu", input_statistics=statistics
    )
    v = F.batch_norm(F.conv3d(x, w1, padding=1), *means[1], training=True, momentum=0.2)
    true = F.conv3d(v.relu(), w2, padding=1)
    torch.testing.assert_close(y, true)
    torch.testing.assert_close(means[0], means[1])
    grads = (torch.autograd.grad(r.square().sum(), leaves) for r in (y, true))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# ---- the compiler


def _op_calls(config: ConvConfig) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator that a call may reach, with the arguments it gets."""
    t, dy = fuzz.make_conv(config)
    x, w, bias, past = (t.get(n) for n in ("x", "weight", "bias", "past"))
    norm = None if config.norm == "none" else Norm(config.norm, groups=config.norm_groups)
    tensors = ConvTensors(x, w, bias, past=past)  # type: ignore[arg-type]
    spec = conv3d_checks.conv3d(
        tensors, None, norm, config.stride, config.padding, config.dilation, config.groups,
        config.padding_mode, config.causal, "silu", None, 0.01, False,
    )  # fmt: skip
    args = (*tensors, *encode_spec(spec), "auto")
    mean, var = (*[None] * 2, *OPS.conv3d_train(*args)[1:])[-2:]
    needs = [t is not None for t in tensors]
    calls = [
        (OPS.conv3d, args), (OPS.conv3d_train, args),
        (OPS.conv3d_backward, (dy, mean, var, *args, needs)),
    ]  # fmt: skip
    return calls


def test_opcheck() -> None:
    config = ConvConfig(
        norm="group", norm_groups=2, past=2, causal=True, padding=(0, 1, 1), stride=(2, 2, 1),
        x_layout="channels_last", weight_layout="sliced",
    )  # fmt: skip
    for op, args in _op_calls(config):
        torch.library.opcheck(op, args)


class Block(nn.Module):
    """Norm, activation, causal convolution, residual: the block of a video autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = fastst.Conv3d(
            4, 4, 3, padding=(0, 1, 1), input_norm=nn.RMSNorm(4), input_activation="silu",
            causal=True,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, x)


@pytest.mark.slow
def test_compile_and_export() -> None:
    block, x = Block(), torch.randn(1, 4, 3, 6, 6, requires_grad=True)
    plain = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, plain)
    grads = (
        torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) for y in (compiled, plain)
    )
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    exported = torch.export.export(block.eval(), (x.detach(),))
    assert "fastst.conv3d" in str(exported.graph)
    torch.testing.assert_close(exported.module()(x.detach()), block(x.detach()))


@pytest.mark.slow
def test_streams_compile_and_export() -> None:
    block, x = Block().eval(), torch.randn(1, 4, 3, 6, 6)

    class Step(nn.Module):
        def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> Any:
            return block.conv.stream(x, state)

    step, (_, state) = Step(), block.conv.stream(x)
    step.conv = block.conv
    y, after = step(x, state)
    for other in (
        torch.compile(step, fullgraph=True, backend="aot_eager"),
        torch.export.export(step, (x, state)).module(),
    ):
        ours, state_after = other(x, state)
        torch.testing.assert_close(ours, y)
        torch.testing.assert_close(state_after, after)


def test_autocast() -> None:
    block = Block()
    x = torch.randn(2, 4, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = block.conv(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), block.conv(x), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert block.conv.weight.grad is not None and block.conv.weight.grad.dtype == torch.float32


def test_empty_batch() -> None:
    x = torch.randn(0, 4, 3, 6, 6, requires_grad=True)
    y = conv3d(x, torch.randn(2, 4, 3, 3, 3), padding=1)
    assert y.shape == (0, 2, 3, 6, 6)
    y.sum().backward()


def test_meta() -> None:
    x, w = torch.empty(2, 4, 3, 6, 6, device="meta"), torch.empty(6, 4, 3, 3, 3, device="meta")
    assert conv3d(x, w, padding=1).shape == (2, 6, 3, 6, 6)


def test_one_value_for_each_statistic_is_refused() -> None:
    x, w = torch.randn(1, 4, 1, 1, 1), torch.randn(4, 4, 1, 1, 1)
    u, statistics = conv3d(x, w, output_statistics=True)
    norm = BatchNorm(torch.zeros(4), torch.ones(4), training=True)
    for known in (None, statistics):
        with pytest.raises(ValueError, match="requires more than 1 value"):
            conv3d(u, w, input_norm=norm, input_statistics=known)
    with pytest.raises(ValueError, match=r"output_norm.running_mean must be \(4,\), got \(3,\)"):
        conv3d(x, w, output_norm=BatchNorm(torch.zeros(3), torch.ones(3)))


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_the_reference_is_right_for_any_stride_of_one_clip(norm: str) -> None:
    # As of frames.permute(3, 0, 1, 2)[None]: PyTorch's own batch norm backward is not.
    frames = torch.randn(4, 5, 6, 8)
    x, w = frames.permute(3, 0, 1, 2)[None], torch.randn(6, 8, 3, 3, 3)
    dy = torch.randn(1, 6, 4, 5, 6)
    running = (None, None) if norm == "batch" else (torch.randn(8), torch.rand(8) + 0.5)

    def gradients(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, gamma = x.to(dtype).requires_grad_(), torch.ones(8, dtype=dtype, requires_grad=True)
        found = BatchNorm(*(t if t is None else t.to(dtype) for t in running), gamma, None)
        y = conv3d(x, w.to(dtype), padding=1, input_norm=found._replace(training=norm == "batch"))
        return torch.autograd.grad(y, (x, gamma), dy.to(dtype))

    with fastst.use_backend("reference"):
        true = gradients(x.clone(memory_format=torch.contiguous_format), torch.float64)
        for ours, expected in zip(gradients(x.detach(), torch.float32), true, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)
