"""A batch norm behind the pair, which is normalised with statistics from the pair's own kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastst
from fastst import dispatch
from fastst.backends import cpu, triton
from fastst.backends.cpu.library import load
from fastst.functional import BatchNorm, conv2plus1d
from fastst.nn.pair_of_modules import Ending, pair_forward
from tests.support import fuzz

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPE, OUT = (2, 3, 3, 4, 4), (2, 5, 3, 4, 4)
NATIVE = pytest.mark.skipif(isinstance(load(), str) or DEVICE != "cpu", reason="no native library")
ALL = pytest.mark.parametrize("backend", ["triton", pytest.param("cpu", marks=NATIVE), "aten"])


class Block(nn.Module):
    """A pair and a norm, as separate modules or as one operation."""

    def __init__(self, outer: nn.Module, fused: bool = True, **settings: Any) -> None:
        super().__init__()
        self.pair = fastst.Conv2Plus1d(3, 5, 3, padding=1, **{"norm": "batch", **settings})
        self.outer, self.fused = outer, fused

    def forward(self, x: Tensor, ending: Ending | None = None) -> Tensor:
        p = self.pair
        if self.fused:
            return pair_forward(
                x, p.spatial, p.norm, p.activation, p.temporal, outer_norm=self.outer, ending=ending
            )
        y = self.outer(p.temporal(p.activation((p.norm or nn.Identity())(p.spatial(x)))))
        return y if ending is None else ending.apply(y)


def twins(outer: nn.Module, **settings: Any) -> tuple[Block, Block]:
    """The same block fused and separate."""
    block = Block(outer, **settings).to(DEVICE)
    with torch.no_grad():
        for p in outer.parameters():
            p.add_(torch.randn_like(p) / 4)
    other = copy.deepcopy(block)
    other.fused = False
    return block, other


def results(block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = block(x)
    parameters = {n: p for n, p in block.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return {
        "y": y.detach(), **dict(zip(("x", *parameters), grads, strict=True)),
        **{n: b.detach().clone() for n, b in block.named_buffers()},
    }  # fmt: skip


def compare(
    block: nn.Module, separate: nn.Module, backend: str, dtype: torch.dtype,
    shape: Sequence[int] = SHAPE, out: Sequence[int] = OUT,
) -> None:  # fmt: skip
    """Twice PyTorch's own error, and a few ulps of what enters: the rule of the fuzz tests."""
    x, dy = torch.randn(shape), torch.randn(out)
    true = results(copy.deepcopy(separate).double(), x.to(dtype).double(), dy.to(dtype).double())
    args = x.to(DEVICE, dtype), dy.to(DEVICE, dtype)
    with fastst.use_backend(backend):
        ours = results(block.to(dtype), *args)
    own = results(separate.to(dtype), *args)
    for name, expected in true.items():
        got, peer = ours[name], own[name]
        assert (got.dtype, got.stride()) == (peer.dtype, peer.stride())
        if not got.is_floating_point():
            assert torch.equal(got, peer)
            continue
        # Gradients before a batch norm cancel: what enters is as large as those that do not.
        scale = max(float(expected.abs().max()), 1.0)
        weight = true.get(name.replace("bias", "weight"))
        if weight is not None and weight.dim() == 5:  # the bias of a convolution
            scale = max(scale, float(weight.abs().max()))
        bound = 2 * fuzz.rule.error(peer, expected) + 12 * torch.finfo(dtype).eps * scale
        assert fuzz.rule.error(got, expected) <= bound, name


NORMS = {
    "plain": {}, "cumulative": {"momentum": None}, "no affine": {"affine": False},
    "no running statistics": {"track_running_stats": False}, "eps": {"eps": 0.1, "momentum": 0.7},
}  # fmt: skip


@ALL
@pytest.mark.parametrize("norm", NORMS)
def test_is_that_of_the_modules(norm: str, backend: str) -> None:
    block, separate = twins(nn.BatchNorm3d(5, **NORMS[norm]))
    for _ in range(2):  # the second step starts from running statistics of the first
        compare(block, separate, backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"norm": None}])
def test_every_dtype(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    compare(*twins(nn.BatchNorm3d(5), activation="silu", **settings), "triton", dtype)


@pytest.mark.slow
def test_training_and_evaluation_take_turns() -> None:
    block, separate = twins(nn.BatchNorm3d(5))
    for train, frozen in ((True, False), (False, False), (True, True), (True, False)):
        for b in (block, separate):
            b.train(train)
            b.outer.train(train and not frozen)
        compare(block, separate, "triton", torch.float32)


@contextmanager
def reads_of_statistics() -> Iterator[list[str]]:
    """PyTorch's operators that form statistics of a tensor."""
    seen: list[str] = []

    class Mode(TorchDispatchMode):
        knows_operations = True  # converted models run theirs under it

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            name = str(func)
            in_training = "batch_norm" in name and "backward" not in name and args[5] is True
            if "var" in name.split(".")[1] or in_training:
                seen.append(name)
            return func(*args, **(kwargs or {}))

    with Mode():
        yield seen


def test_nothing_reads_y_for_its_statistics() -> None:
    block, separate = twins(nn.BatchNorm3d(5))
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    with fastst.use_backend("triton"), reads_of_statistics() as seen:
        block(x).sum().backward()
    assert seen == []
    with reads_of_statistics() as seen:
        separate(x)
    assert len(seen) == 2  # the measure sees them
    block.requires_grad_(False)
    with fastst.use_backend("triton"), torch.no_grad(), reads_of_statistics() as seen:
        block(x)  # collecting running statistics without gradients
    assert seen == []
    assert block.outer.num_batches_tracked == 2


@pytest.mark.parametrize("watched", ["hook", "global hook", "subclass", "SyncBatchNorm"])
def test_what_more_than_normalises_is_called(watched: str) -> None:
    calls: list[object] = []

    class Mine(nn.BatchNorm3d):
        def forward(self, u: Tensor) -> Tensor:
            calls.append(u)
            return super().forward(u)

    def seen(module: nn.Module, *_: Any) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_features == 5:
            calls.append(module)

    norm: Any = Mine(5) if watched == "subclass" else nn.BatchNorm3d(5)
    block = Block(norm).to(DEVICE)
    handle = None
    if watched == "hook":
        norm.register_forward_hook(seen)
    elif watched == "global hook":
        handle = nn.modules.module.register_module_forward_hook(seen)
    elif watched == "SyncBatchNorm":
        block.outer = nn.SyncBatchNorm(5).to(DEVICE)
        block.outer.register_forward_pre_hook(seen)
    try:
        if watched == "global hook":
            with pytest.warns(fastst.FallbackWarning):
                block(torch.randn(SHAPE, device=DEVICE))
        else:
            block(torch.randn(SHAPE, device=DEVICE))
    finally:
        if handle is not None:
            handle.remove()
    assert len(calls) == 1


def test_second_derivatives() -> None:
    block, separate = twins(nn.BatchNorm3d(5), activation="gelu", norm=None)
    x = torch.randn(1, 3, 2, 3, 3, dtype=torch.float64, device=DEVICE)
    found = []
    for b in (block.double(), separate.double()):
        with fastst.use_backend("triton"):
            leaves = [x.detach().requires_grad_(), *b.parameters()]
            first = torch.autograd.grad(b(leaves[0]).pow(3).sum(), leaves, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    largest = max(float(t.abs().max()) for t in found[1])  # that of a bias before a norm is 0
    for ours, true in zip(*found, strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-9, atol=1e-12 * largest)


@ALL
def test_the_end_of_a_residual_block(backend: str) -> None:
    block, separate = twins(nn.BatchNorm3d(5))
    x, r = torch.randn(SHAPE, device=DEVICE), torch.randn(OUT, device=DEVICE)
    with fastst.use_backend(backend):
        got = block(x, Ending(r, "relu", 0.01, False))
    torch.testing.assert_close(got, separate(x, Ending(r, "relu", 0.01, False)))


def arguments() -> tuple[list[Tensor], BatchNorm]:
    tensors = [torch.randn(s, device=DEVICE) for s in (SHAPE, (4, 3, 1, 3, 3), (5, 4, 3, 1, 1))]
    one = torch.ones(5, device=DEVICE)
    return tensors, BatchNorm(one * 0, one.clone(), one, one, training=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", [*dispatch.BACKENDS, "auto"])
def test_the_function_on_every_backend(backend: str, training: bool) -> None:
    tensors, norm = arguments()
    norm = norm._replace(training=training)
    residual = torch.randn(OUT, device=DEVICE)
    y = F.conv3d(F.relu(F.conv3d(tensors[0], tensors[1], padding=(0, 1, 1))), tensors[2],
                 padding=(1, 0, 0))  # fmt: skip
    kept = [t.clone() for t in norm[:2]]  # type: ignore[union-attr]
    expected = F.silu(F.batch_norm(y, *kept, *norm[2:6]) + residual)
    with fastst.use_backend(backend):
        try:
            got = conv2plus1d(
                *tensors, padding=1, outer_norm=norm, residual=residual, outer_activation="silu"
            )
        except fastst.BackendError:
            pytest.skip(f"{backend} does not run here")
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(list(norm[:2]), kept)


@pytest.mark.slow
def test_compiled_and_transformed() -> None:
    tensors, norm = arguments()

    def call(x: Tensor) -> Tensor:
        own = norm._replace(running_mean=None, running_var=None)
        return conv2plus1d(x, *tensors[1:], padding=1, outer_norm=own)

    expected = call(tensors[0])
    torch.testing.assert_close(
        torch.compile(call, fullgraph=True, backend="aot_eager")(tensors[0]), expected
    )
    _, slope = torch.func.jvp(call, (tensors[0],), (torch.ones_like(tensors[0]),))
    assert slope.any()


def test_norms_that_cannot_be() -> None:
    tensors, norm = arguments()
    for wrong, kind, message in (
        (nn.BatchNorm3d(5), TypeError, "outer_norm must be a fastst.functional.BatchNorm or None"),
        (norm._replace(weight=torch.ones(4)), ValueError, "outer_norm.weight"),
        (norm._replace(running_mean=None, training=False), ValueError, "outer_norm requires runn"),
    ):
        with pytest.raises(kind, match=message):
            conv2plus1d(*tensors, padding=1, outer_norm=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"more than 1 value per channel, got the output"):
        conv2plus1d(tensors[0][:1, :, :3, :3, :3], *tensors[1:], outer_norm=norm)


@pytest.mark.parametrize("wrong", ["unbiased", "of the rounded"])
def test_wrong_statistics_are_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = triton.pair.moments

    def planted(partial: Tensor, rows: int, total: int) -> tuple[Tensor, Tensor]:
        mean, var = real(partial, rows, total)
        return (mean, var * total / (total - 1)) if wrong == "unbiased" else (mean * 1.01, var)

    monkeypatch.setattr(triton.pair, "moments", planted)
    with pytest.raises(AssertionError):
        compare(*twins(nn.BatchNorm3d(5)), "triton", torch.float32)


@NATIVE
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(2, 37, 8, 24, 24), (1, 5, 1, 3, 300), (3, 16, 2, 1, 1)])
def test_native_gradients_of_a_norm_in_rows_of_channels(shape: Any, threads: int) -> None:
    """As close to float64 as PyTorch's in planes, which are ten times closer than its in rows."""
    torch.manual_seed(0)
    own = torch.get_num_threads()
    rows = torch.channels_last_3d
    y, dv = (torch.randn(shape).contiguous(memory_format=rows) for _ in range(2))
    dv = torch.cat((dv, dv), 1).contiguous(memory_format=rows)[:, : shape[1]]  # of another pitch
    weight, bias = torch.rand(shape[1]) + 0.5, torch.zeros(shape[1])
    var, mean = torch.var_mean(y.double(), (0, 2, 3, 4), correction=0)

    def eager(dtype: torch.dtype) -> tuple[Tensor, ...]:
        at = [t.to(dtype).contiguous().requires_grad_() for t in (y, weight, bias)]
        v = F.batch_norm(at[0], None, None, *at[1:], training=True)
        return torch.autograd.grad(v, at, dv.to(dtype).contiguous())

    try:
        torch.set_num_threads(threads)
        args = dv, y, mean.float(), var.float()
        ours = cpu.norm_backward(*args, weight, 1e-5, (True,) * 3)
        bare = cpu.norm_backward(*args, None, 1e-5, (False, True, True))
    finally:
        torch.set_num_threads(own)
    assert ours is not None
    assert bare is not None
    assert bare[0] is None
    torch.testing.assert_close(bare[1:], ours[1:], rtol=0, atol=0)
    for got, peer, true in zip(ours, eager(torch.float32), eager(torch.float64), strict=True):
        assert got is not None
        scale = float(true.abs().max())
        bound = 2 * fuzz.rule.error(peer, true) + 4 * torch.finfo(torch.float32).eps * scale
        assert fuzz.rule.error(got, true) <= bound < fuzz.rule.error(got * 1.00001, true)
    assert ours[0] is not None
    assert ours[0].stride() == y.stride()
    assert cpu.norm_backward(dv.contiguous(), *args[1:], weight, 1e-5, (True,) * 3) is None


# ---- in converted models


def sequence() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(3, 4, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(4), nn.ReLU(),
        nn.Conv3d(4, 5, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(5, momentum=None), nn.ReLU(),
    ).to(DEVICE)  # fmt: skip


def test_conversion_takes_the_norm_behind_a_pair() -> None:
    model = sequence()
    original = copy.deepcopy(model)
    fastst.convert(model)
    assert list(model.state_dict()) == list(original.state_dict())
    x = torch.randn(SHAPE, device=DEVICE)
    for training in (True, True, False, True):
        model.train(training)
        original.train(training)
        with fastst.use_backend("triton"), reads_of_statistics() as seen:
            y = model(x)
        assert seen == []
        torch.testing.assert_close(y, original(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), original.state_dict())


def test_what_becomes_of_the_norm_after_conversion() -> None:
    model, x = sequence(), torch.randn(SHAPE, device=DEVICE)
    fastst.convert(model)
    calls: list[nn.Module] = []
    handle = model[4].register_forward_hook(lambda m, *_: calls.append(m))
    original = copy.deepcopy(model)
    fastst.revert(original)
    with fastst.use_backend("triton"):
        torch.testing.assert_close(model(x), original(x), rtol=1e-5, atol=1e-5)
        handle.remove()
        assert calls == [model[4], original[4]]
        model[4] = nn.GroupNorm(1, 5).to(DEVICE)
        original[4] = model[4]
        torch.testing.assert_close(model(x), original(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", ["output twice", "norm twice"])
def test_norms_that_conversion_leaves(used: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = sequence()

        def forward(self, x: Tensor) -> Tensor:
            p = self.parts
            y = p[3](p[2](p[1](p[0](x))))
            return p[4](y) + y if used == "output twice" else p[4](p[4](y))

    model, x = Odd(), torch.randn(SHAPE, device=DEVICE)
    original = copy.deepcopy(model)
    assert len(fastst.convert(model).replaced) == 1
    torch.testing.assert_close(model(x), original(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), original.state_dict())
