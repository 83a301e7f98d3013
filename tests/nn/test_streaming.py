"""Causal layers chunk by chunk: any cutting gives what the whole clip gives."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastst
from fastst import dispatch
from tests.support import fuzz

LAYERS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "stride 2": dict(stride=(2, 1, 2)),
    "stride 3 beyond the kernel": dict(kernel_size=(2, 3, 3), stride=(3, 1, 1)),
    "stride 4, one tap": dict(kernel_size=(1, 3, 3), stride=(4, 2, 1)),
    "dilation": dict(dilation=(3, 1, 1)),
    "strided padding": dict(causal="strided", stride=(2, 2, 2)),
    "strided, no padding left": dict(causal="strided", stride=(3, 1, 1)),
    "frozen norm": dict(norm="batch", activation="silu"),
    "groups, no bias": dict(groups=2, bias=False, mid_channels=6),
}


def build(order: str, mode: str, settings: dict[str, Any]) -> fastst.Conv2Plus1d:
    arguments = dict(kernel_size=3, padding=(0, 1, 1), causal=True, padding_mode=("zeros", mode))
    layer = fastst.Conv2Plus1d(4, 6, order=order, **(arguments | settings)).double().eval()
    if isinstance(layer.norm, nn.BatchNorm3d):
        nn.init.normal_(layer.norm.running_mean)
        nn.init.uniform_(layer.norm.running_var, 0.5, 2)
    return layer


def cut(frames: int, rng: random.Random) -> list[int]:
    """A random composition of the number of frames."""
    chunks = []
    while sum(chunks) < frames:
        chunks.append(rng.randint(1, min(4, frames - sum(chunks))))
    return chunks


@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
@pytest.mark.parametrize("name", LAYERS)
def test_any_cutting_equals_the_whole_clip(name: str, mode: str, order: str) -> None:
    layer = build(order, mode, LAYERS[name])
    frames = 11
    x = torch.randn(2, 4, frames, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        rng = random.Random(fuzz.SEED)
        cuttings = [[1] * frames, [frames], [1, frames - 1], *(cut(frames, rng) for _ in range(4))]
        for chunks in cuttings:
            state, out = None, []
            for piece in x.split(chunks, 2):
                y, state = layer.stream(piece, state)
                assert isinstance(state, tuple) and all(isinstance(s, Tensor) for s in state)
                out.append(y)
            torch.testing.assert_close(torch.cat(out, 2), whole, rtol=1e-10, atol=1e-10)


def test_output_comes_as_soon_as_it_can() -> None:
    """Frame i·st completes output i; nothing is held back for a later chunk."""
    layer = build("spatial-first", "zeros", dict(stride=(3, 1, 1)))
    state, seen = None, []
    for frame in torch.randn(1, 4, 8, 5, 5, dtype=torch.float64).split(1, 2):
        y, state = layer.stream(frame, state)
        assert y.shape[:2] == (1, 6) and y.shape[3:] == (5, 5)
        seen.append(y.shape[2])
    assert seen == [1, 0, 0, 1, 0, 0, 1, 0]


def test_state_is_passed_and_never_kept() -> None:
    """Two streams through one layer, interleaved; an old state continues from where it was."""
    layer = build("spatial-first", "replicate", {})
    before = copy.deepcopy(layer.__dict__)
    a, b = torch.randn(2, 1, 4, 6, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        sa = sb = None
        got_a, got_b = [], []
        for i in range(6):
            ya, sa = layer.stream(a[:, :, i : i + 1], sa)
            yb, sb = layer.stream(b[:, :, i : i + 1], sb)
            got_a.append(ya)
            got_b.append(yb)
        torch.testing.assert_close(torch.cat(got_a, 2), layer(a))
        torch.testing.assert_close(torch.cat(got_b, 2), layer(b))
        kept = [s.clone() for s in sa or ()]
        first, _ = layer.stream(a[:, :, :1], sa)
        again, _ = layer.stream(a[:, :, :1], sa)
        assert torch.equal(first, again)
        assert all(torch.equal(s, k) for s, k in zip(sa or (), kept, strict=True))
    assert layer.__dict__.keys() == before.keys()


def test_state_is_no_longer_than_the_kernel_reaches() -> None:
    layer = build("spatial-first", "zeros", dict(dilation=(2, 1, 1)))
    state = None
    for chunk in torch.randn(1, 4, 30, 5, 5, dtype=torch.float64).split(7, 2):
        _, state = layer.stream(chunk, state)
        assert state is not None and sum(s.shape[2] for s in state) <= 2 * 2
        # A view would keep the whole chunk alive.
        assert all(s.untyped_storage().nbytes() == s.numel() * s.itemsize for s in state)


def test_gradients_flow_through_the_state() -> None:
    layer = build("spatial-first", "zeros", {})
    x = torch.randn(1, 4, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    state, loss = None, torch.zeros((), dtype=torch.float64)
    for chunk in x.split(2, 2):
        y, state = layer.stream(chunk, state)
        loss = loss + y.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_refusals() -> None:
    layer = build("spatial-first", "zeros", {})
    x = torch.randn(1, 4, 2, 5, 5, dtype=torch.float64)
    _, state = layer.stream(x)
    with pytest.raises(ValueError, match=r"requires a layer with causal=True, got causal=False"):
        fastst.Conv2Plus1d(4, 4, 3).stream(x)
    with pytest.raises(ValueError, match=r"x must be \(N, C, t, H, W\).*got \(4, 2, 5, 5\)"):
        layer.stream(x[0])
    with pytest.raises(ValueError, match=r"4 channels, got \(1, 3, 2, 5, 5\)"):
        layer.stream(x[:, :3])
    with pytest.raises(ValueError, match=r"t of at least 1, got \(1, 4, 0, 5, 5\)"):
        layer.stream(x[:, :, :0])
    for odd, came in (([1], "a list"), (state[0], "a Tensor"), (state * 2, "2")):
        with pytest.raises(TypeError, match=f"state must be a tuple of one tensor, got {came}$"):
            layer.stream(x, odd)  # type: ignore[arg-type]
    for wrong in (
        state[0][..., :4], state[0][:, :2], state[0][:, :, 1:], torch.cat(state * 2, 2),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"state must be \(1, \d+, t, 5, 5\).*got \("):
            layer.stream(x, (wrong,))
    with pytest.raises(TypeError, match=r"state must be torch.float64 on cpu, got torch.float32"):
        layer.stream(x, (state[0].float(),))
    batch = fastst.Conv2Plus1d(4, 4, 3, causal=True, norm="batch").double()
    with pytest.raises(ValueError, match=r"BatchNorm3d without fixed statistics"):
        batch.stream(x)


class Shuffled(nn.Module):
    """A group norm of each frame, as causal tokenizers have it."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.inner = nn.GroupNorm(groups, channels)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.inner(x.transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class FrameByFrame(Shuffled):
    frame_by_frame = True


class OverFrames(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.std((1, 2, 3, 4), keepdim=True)


SEES = {  # what looks across frames, and what does not
    "group": (nn.GroupNorm(2, 6), False),
    "instance": (nn.InstanceNorm3d(6), False),
    "layer": (nn.LayerNorm((4, 5, 5)), False),
    "rms": (nn.RMSNorm((6, 4, 5, 5)), False),
    "within": (nn.Sequential(nn.Identity(), nn.GroupNorm(2, 6)), False),
    "softmax": (nn.Softmax(2), False),
    "tracked instance": (nn.InstanceNorm3d(6, track_running_stats=True), True),
    "layer, of frames": (nn.LayerNorm((5, 5)), True),
    "softmax of channels": (nn.Softmax(1), True),
    "local response": (nn.LocalResponseNorm(3), True),
    "says so": (FrameByFrame(2, 6), True),
}


@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
@pytest.mark.parametrize("name", SEES)
@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
def test_norms_across_frames_are_refused_and_others_stream(name: str, order: str) -> None:
    norm, causal = SEES[name]
    layer = build(order, "zeros", dict(norm=norm, mid_channels=6))
    x = torch.randn(1, 4, 4, 5, 5, dtype=torch.float64)
    if not causal:
        for call in (layer, layer.stream):
            with pytest.raises(ValueError, match="see each frame by itself, got a"):
                call(x)
        return
    state, out = None, []
    for piece in x.split(1, 2):
        y, state = layer.stream(piece, state)
        out.append(y)
    torch.testing.assert_close(torch.cat(out, 2), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [Shuffled(2, 6), OverFrames()])
@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
def test_a_stream_wants_the_word_of_norms_that_nobody_knows(norm: nn.Module) -> None:
    layer = build("spatial-first", "zeros", dict(norm=norm, mid_channels=6))
    x = torch.randn(1, 4, 2, 5, 5, dtype=torch.float64)
    layer(x)
    with pytest.raises(ValueError, match=r"does not say what it does; .* frame_by_frame = True"):
        layer.stream(x)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm3d(4)])
@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
def test_causal_branches_refuse_them_too(norm: nn.Module) -> None:
    layer = fastst.ParallelConv2Plus1d(4, 4, 3, padding=(0, 1, 1), causal=True, norm=norm)
    with pytest.raises(ValueError, match="see each frame by itself"):
        layer(torch.randn(1, 4, 3, 5, 5))


@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
def test_each_convolution_is_one_operation(order: str) -> None:
    """Norm and activation belong to the second; a hook on a child makes them separate modules."""
    layer = build(order, "zeros", dict(norm="batch", activation="silu")).float()
    x = torch.randn(1, 4, 2, 6, 6)
    _, state = layer.stream(x)
    with torch.no_grad(), dispatch.recording() as calls:
        y, _ = layer.stream(x, state)
    assert [c.what for c in calls] == ["conv3d"] * 2
    specs = [c.problem.spec for c in calls]  # type: ignore[union-attr]
    assert [(s.norm, s.input_activation) for s in specs] == [("none", "none"), ("frozen", "silu")]
    temporal = calls[order == "spatial-first"].problem
    assert temporal is not None and temporal.past == 2  # type: ignore[attr-defined]
    layer.norm.register_forward_hook(lambda *_: None)
    with torch.no_grad(), dispatch.recording() as calls:
        torch.testing.assert_close(layer.stream(x, state)[0], y, rtol=1e-5, atol=1e-5)
    assert not calls


def test_a_stream_is_a_call_of_the_layer() -> None:
    """As of ``Conv3d``: what hooks do before a call, such as gathering weights, is done."""
    layer = build("spatial-first", "zeros", {})
    weight, x = layer.spatial.weight, torch.randn(1, 4, 2, 5, 5, dtype=torch.float64)
    expected, _ = layer.stream(x)
    whole, weight.data = weight.data, torch.empty(0, dtype=torch.float64)

    def gather(module: Any, args: Any) -> None:
        weight.data = whole

    layer.register_forward_pre_hook(gather)
    torch.testing.assert_close(layer.stream(x)[0], expected)
