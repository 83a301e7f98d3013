"""``Conv3d``: an ``nn.Conv3d`` by keys and numbers, its norms, and its streams."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastst
from tests.nn.test_streaming import cut
from tests.support import fuzz

F64 = dict(rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(stride=(2, 1, 2), padding=1, dilation=(1, 2, 1), bias=False),
        dict(padding="same", padding_mode="replicate", groups=2),
        dict(padding=(1, 2, 0), padding_mode="circular"),
    ],
)
def test_is_nn_conv3d(settings: dict[str, Any]) -> None:
    plain = nn.Conv3d(4, 6, (2, 3, 3), **settings).double()
    layer = fastst.Conv3d(4, 6, (2, 3, 3), **settings).double()
    layer.load_state_dict(plain.state_dict())
    assert list(layer.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 4, 5, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), **F64)
    torch.testing.assert_close(layer(x[0]), plain(x[0]), **F64)
    plain.__class__ = fastst.Conv3d  # the whole migration of a module that is there
    torch.testing.assert_close(plain(x), layer(x), rtol=0, atol=0)
    assert repr(plain) == repr(layer)


def test_a_module_of_sizes_of_any_type_of_integers_becomes_one() -> None:
    plain = nn.Conv3d(4, 6, np.int64(3), padding=np.int64(1))  # as nn.Conv3d takes them
    x = torch.randn(1, 4, 3, 5, 5)
    y = plain(x)
    plain.__class__ = fastst.Conv3d
    torch.testing.assert_close(plain(x), y)


def _over_channels(norm: nn.Module, x: Tensor) -> Tensor:
    return norm(x.movedim(1, -1)).movedim(-1, 1)


NORMS: dict[str, tuple[Any, Any]] = {
    "batch": (lambda: nn.BatchNorm3d(4), None),
    "group": (lambda: nn.GroupNorm(2, 4), None),
    "instance": (lambda: nn.InstanceNorm3d(4, affine=True), None),
    "instance, tracked": (lambda: nn.InstanceNorm3d(4, track_running_stats=True), None),
    "layer": (lambda: nn.LayerNorm(4), _over_channels),
    "rms": (lambda: nn.RMSNorm(4), _over_channels),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_norms_are_those_of_the_modules(name: str, training: bool) -> None:
    make, call = NORMS[name]
    norms = make().double(), make().double()
    for norm in norms:
        for i, t in enumerate((*norm.parameters(), *norm.buffers())):
            if t.dim():
                nn.init.uniform_(t, 0.5 + i, 1.5 + i)
    norms[1].load_state_dict(norms[0].state_dict())
    layer = fastst.Conv3d(
        4, 6, 3, padding=1, input_norm=norms[0], input_activation=nn.LeakyReLU(0.2),
        activation="silu",
    ).double().train(training)  # fmt: skip
    norms[1].train(training)
    x, residual = torch.randn(2, 4, 3, 5, 5).double(), torch.randn(2, 6, 3, 5, 5).double()
    composed = name == "instance, tracked" and training
    with warnings.catch_warnings(), fastst.use_backend("auto" if composed else "aten"):
        warnings.simplefilter("ignore" if composed else "error", fastst.FallbackWarning)
        y = layer(x, residual)
    v = norms[1](x) if call is None else call(norms[1], x)
    true = F.conv3d(F.leaky_relu(v, 0.2), layer.weight, layer.bias, padding=1) + residual
    torch.testing.assert_close(y, F.silu(true), **F64)
    for ours, theirs in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **F64)


def test_per_frame() -> None:
    norm = nn.GroupNorm(2, 4).double()
    layer = fastst.Conv3d(4, 6, 3, input_norm=norm, norm_per_frame=True).double()
    x = torch.randn(2, 4, 3, 5, 5).double()
    frames = torch.stack([norm(frame) for frame in x.unbind(2)], 2)
    torch.testing.assert_close(layer(x), F.conv3d(frames, layer.weight, layer.bias), **F64)


class _Double(nn.Module):
    frame_by_frame = True

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_norm_that_nobody_knows_is_called(recwarn: pytest.WarningsRecorder) -> None:
    layer = fastst.Conv3d(4, 6, 3, input_norm=_Double())
    x = torch.randn(1, 4, 3, 5, 5)
    torch.testing.assert_close(layer(x), F.conv3d(2 * x, layer.weight, layer.bias))
    assert any("_Double, which no kernel knows" in str(w.message) for w in recwarn)
    hooked = fastst.Conv3d(4, 6, 3, input_norm=nn.GroupNorm(2, 4))
    hooked.input_norm.register_forward_hook(lambda *_: torch.zeros_like(x))
    torch.testing.assert_close(hooked(x), hooked.bias.view(1, -1, 1, 1, 1).expand(1, 6, 1, 3, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(padding=1, causal=True), "requires a temporal padding of 0"),
        (dict(padding_mode="mirror"), "padding_mode must be one of"),
        (dict(input_activation="sigmoid"), "input_activation must be one of"),
        (dict(activation=nn.Softmax()), "activation must be one of"),
        (dict(input_norm="batch"), "input_norm must be a module"),
        (dict(input_norm=nn.GroupNorm(1, 6)), "input_norm must have num_channels=4, the channels"),
        (dict(input_norm=nn.BatchNorm3d(6)), "input_norm must have num_features=4, the channels"),
        (
            dict(activation=nn.LeakyReLU(0.1), input_activation=nn.LeakyReLU(0.2)),
            "must have one slope",
        ),
    ],
)
def test_refuses_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fastst.Conv3d(4, 6, 3, **settings)


# ---- streams

STREAMS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "first frame": dict(padding_mode=("replicate", "replicate")),
    "stride 2": dict(stride=(2, 1, 2)),
    "stride 3 beyond the kernel": dict(kernel_size=(2, 3, 3), stride=(3, 1, 1)),
    "stride 4, one tap": dict(kernel_size=(1, 3, 3), stride=(4, 2, 1)),
    "dilation": dict(dilation=(3, 1, 1), groups=2),
    "strided padding": dict(causal="strided", stride=(2, 2, 2)),
    "rms": dict(input_norm=nn.RMSNorm(4), input_activation="silu"),
    "group per frame": dict(input_norm=nn.GroupNorm(2, 4), norm_per_frame=True),
    "frozen": dict(input_norm=nn.BatchNorm3d(4), activation="relu", padding=((0, 0), (0, 1), 1)),
}


@pytest.mark.parametrize("name", STREAMS)
def test_any_cutting_equals_the_whole_clip(name: str) -> None:
    settings = dict(kernel_size=3, padding=(0, 1, 1), causal=True) | STREAMS[name]
    layer = fastst.Conv3d(4, 6, **settings).double().eval()
    frames = 11
    x = torch.randn(2, 4, frames, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        rng = random.Random(fuzz.SEED)
        cuttings = [[1] * frames, [frames], [1, frames - 1], *(cut(frames, rng) for _ in range(3))]
        for chunks in cuttings:
            state, out = None, []
            for piece in x.split(chunks, 2):
                y, state = layer.stream(piece, state)
                assert isinstance(state, tuple) and all(isinstance(t, Tensor) for t in state)
                out.append(y)
            torch.testing.assert_close(torch.cat(out, 2), whole, **F64)


def test_streams_have_gradients_and_residuals() -> None:
    layer = fastst.Conv3d(4, 4, 3, padding=(0, 1, 1), input_activation="silu", causal=True).double()
    x = torch.randn(1, 4, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    state, out = None, []
    for piece in x.split(2, 2):
        y, state = layer.stream(piece, state, piece)
        out.append(y)
    leaves = [x, layer.weight]
    streamed = torch.autograd.grad(torch.cat(out, 2).square().sum(), leaves)
    for ours, true in zip(
        streamed, torch.autograd.grad(layer(x, x).square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, true, **F64)


@pytest.mark.parametrize(
    ("settings", "chunk", "state", "message"),
    [
        (dict(causal=False), (1, 4, 2, 5, 5), None, "requires a layer with causal=True"),
        (dict(), (1, 3, 2, 5, 5), None, "must have 4 channels"),
        (dict(), (4, 2, 5, 5), None, r"must be \(N, C, t, H, W\)"),
        (dict(), (1, 4, 2, 5, 5), (torch.zeros(1, 4, 3, 5, 5),), "t being 2, for this"),
        (dict(), (1, 4, 2, 5, 5), (torch.zeros(1, 4, 1, 5, 5),), "t being 2, for this"),
        (dict(stride=(2, 1, 1)), (1, 4, 2, 5, 5), (torch.zeros(1, 4, 0, 5, 5),), "t being 1 to 2"),
        (dict(), (1, 4, 2, 5, 5), (torch.zeros(1, 4, 2, 5, 6),), "state must be"),
        (dict(), (1, 4, 2, 5, 5), (torch.zeros(1, 4, 2, 5, 5).double(),), "must be torch.float32"),
        (dict(), (1, 4, 2, 5, 5), torch.zeros(1, 4, 2, 5, 5), "tuple of one tensor"),
        (dict(input_norm=nn.GroupNorm(2, 4)), (1, 4, 2, 5, 5), None, "GroupNorm that looks at all"),
        (dict(input_norm=nn.BatchNorm3d(4)), (1, 4, 2, 5, 5), None, "without fixed statistics"),
        (dict(input_norm=nn.InstanceNorm3d(4)), (1, 4, 2, 5, 5), None, "got a InstanceNorm3d"),
        # A norm of frames is one by groups or instances: a batch norm looks at the whole batch.
        (
            dict(input_norm=nn.BatchNorm3d(4), norm_per_frame=True),
            (1, 4, 2, 5, 5),
            None,
            "without fixed statistics",
        ),
    ],
)
def test_streams_refuse(settings: Any, chunk: Any, state: Any, message: str) -> None:
    layer = fastst.Conv3d(4, 6, 3, **(dict(causal=True, padding=(0, 1, 1)) | settings))
    with pytest.raises((ValueError, TypeError), match=message):
        layer.stream(torch.zeros(chunk), state)


def test_streams_run_the_hooks_of_the_layer() -> None:
    layer = fastst.Conv3d(4, 4, 3, padding=(0, 1, 1), causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(layer)
    x = torch.randn(1, 4, 5, 6, 6)
    with torch.no_grad():
        layer.weight_g.mul_(3)  # as an optimiser does
        streamed = layer.stream(x)[0]
        torch.testing.assert_close(streamed, layer(x))


def test_chunks_without_outputs_are_of_one_kind_with_others() -> None:
    layer = fastst.Conv3d(8, 8, 3, stride=(2, 1, 1), padding=(0, 1, 1), causal=True)
    frame = torch.randn(1, 8, 1, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        first, state = layer.stream(frame)
        second, _ = layer.stream(frame, state)
        assert (first.shape[2], second.shape[2]) == (1, 0)
        assert first.dtype == second.dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"shape of the output, \(1, 8, 0, 6, 6\), got"):
            layer.stream(frame, state, first)


@pytest.mark.parametrize("name", ["batch", "group", "layer", "rms"])
def test_norms_read_x_before_autocast_rounds_it(name: str) -> None:
    norm = {
        "batch": nn.BatchNorm3d(8), "group": nn.GroupNorm(2, 8), "layer": nn.LayerNorm(8),
        "rms": nn.RMSNorm(8),
    }[name]  # fmt: skip
    layer = fastst.Conv3d(8, 8, 3, padding=1, input_norm=norm, input_activation="relu")
    x = torch.randn(2, 8, 4, 6, 6) + (0 if name == "rms" else 100)
    true = copy.deepcopy(layer).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        z = layer._z_of(x)
        apart = F.conv3d(z, layer.weight, layer.bias, padding=1)
    assert y.dtype == torch.bfloat16
    ours, theirs = ((t.double() - true).abs().max() for t in (y, apart))
    assert ours <= 2 * theirs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_epsilon_that_nobody_gave(dtype: torch.dtype) -> None:
    norm = nn.RMSNorm(8).to(dtype)
    layer = fastst.Conv3d(8, 8, 1, input_norm=norm).to(dtype)
    x = (torch.randn(1, 8, 2, 5, 5) * 0.02).to(dtype)
    with torch.no_grad():
        apart = F.conv3d(_over_channels(norm, x), layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), apart, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "settings",
    [dict(padding_mode="replicate"), dict(padding="same", padding_mode="circular"), dict()],
)
def test_as_an_nn_conv3d_it_pads_as_well(settings: dict[str, Any]) -> None:
    layer = fastst.Conv3d(4, 4, 3, **(dict(padding=1) | settings))
    x = torch.randn(1, 4, 5, 6, 6)
    torch.testing.assert_close(nn.Conv3d.forward(layer, x), layer(x))


def test_flops_are_counted() -> None:
    found = []
    for layer in (nn.Conv3d(8, 8, 3, padding=1), fastst.Conv3d(8, 8, 3, padding=1)):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(1, 8, 4, 6, 6)).sum().backward()
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0
