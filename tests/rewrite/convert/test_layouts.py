"""Strides of what operations give: those of the separate calls, whatever is mixed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst
from fastst.rewrite.convert import endings
from tests.backends.cpu.test_cpu import built
from tests.rewrite.convert.test_readings import Net
from tests.support.blocks import Block

pytestmark = built
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last_3d}
LAST = torch.channels_last_3d

PAIRS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "pair": lambda m, x: m.t(F.relu(m.n(m.s(x)))),
    "laid out between": lambda m, x: m.t(F.relu(m.s(x).contiguous(memory_format=LAST))),
    "padded": lambda m, x: m.t(F.pad(m.s(x), (0, 0, 0, 0, 1, 1), mode="replicate")),
    "turned": lambda m, x: m.t(m.n(m.s(x.transpose(3, 4)))),
}
PADS = ("constant", "replicate", "reflect", "circular")
CHAINS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "norm": lambda m, x: m.two(F.silu(m.group(m.one(x)))),
    "cache": lambda m, x: m.two(torch.cat([x.contiguous(), m.silu(m.l2(m.one(x)))], 2)),
    "other cache": lambda m, x: m.two(torch.cat([x, m.silu(m.l2(m.one(x.contiguous())))], 2)),
    "shortcut": lambda m, x: m.three(m.silu(m.one(x))) + x,
    "to a shortcut": lambda m, x: x + m.three(m.silu(m.one(x))),
    "to a turned one": lambda m, x: x.transpose(3, 4) + m.three(m.silu(m.one(x))),
}


def same_strides(plain: Any, x: Tensor) -> None:
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    wanted, found = plain(x), converted(x)
    assert found.stride() == wanted.stride()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("clip", "weight"), list(itertools.product(FORMATS, repeat=2)))
@pytest.mark.parametrize("batch", [2, 1])  # oneDNN's convolution, or PyTorch's own
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, training: bool, batch: int, clip: str, weight: str) -> None:
    plain = Block(PAIRS[name]).train(training)
    for conv, fmt in ((plain.s, weight), (plain.t, clip)):
        conv.weight.data = conv.weight.data.contiguous(memory_format=FORMATS[fmt])
    same_strides(plain, torch.randn(batch, 4, 5, 6, 6).to(memory_format=FORMATS[clip]))


@pytest.mark.parametrize("clip", FORMATS)
@pytest.mark.parametrize("batch", [2, 1])
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, batch: int, clip: str) -> None:
    x = torch.randn(batch, 8, 4, 6, 6).to(memory_format=FORMATS[clip])
    with torch.no_grad():
        same_strides(Net(CHAINS[name]).eval(), x)


class Pixels(nn.Module):
    """Frames, then pixels by time: views between them have an axis of size 1, of a single clip."""

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.Conv2d(4, 4, 3, padding=1)
        self.time = nn.Conv2d(4, 4, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, h, w = x.shape
        u = F.relu(self.space(x.transpose(1, 2).flatten(0, 1))).unflatten(0, (n, t))
        y: Tensor = self.time(u.transpose(1, 2).flatten(3))
        return y.unflatten(3, (h, w))


@pytest.mark.parametrize("clip", FORMATS)
@pytest.mark.parametrize("batch", [2, 1])
def test_frames_and_pixels(batch: int, clip: str) -> None:
    same_strides(Pixels(), torch.randn(batch, 4, 5, 6, 6).to(memory_format=FORMATS[clip]))


def test_gradients_pass_a_change_of_layout() -> None:
    plain, grads = Block(PAIRS["pair"]), []
    x = torch.randn(2, 4, 5, 6, 6).to(memory_format=LAST)
    for _ in range(2):
        plain.zero_grad()
        plain(x).square().sum().backward()
        grads.append([p.grad.clone() for p in plain.parameters() if p.grad is not None])
        fastst.convert(plain)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs as the operation writes them."""
    monkeypatch.setattr(endings, "as_separate", lambda y, *_: y)
    with pytest.raises(AssertionError):
        test_pairs("pair", False, 1, "channels-last", "contiguous")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_weights_that_are_in_either_format(groups: int, training: bool, dtype: Any) -> None:
    """One channel a group: contiguous, and channels-last to PyTorch, which goes by the strides."""
    plain = nn.Sequential(
        nn.Conv3d(4, 8, (1, 3, 1), padding=(0, 1, 0), groups=groups), nn.BatchNorm3d(8), nn.ReLU(),
        nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0), groups=8), nn.ReLU(), nn.Conv3d(8, 8, 3),
    ).to(dtype).train(training)  # fmt: skip
    for first in (plain, plain[:4], plain[3:]):
        first.to(memory_format=LAST)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                same_strides(first, torch.randn(2, first[0].in_channels, 5, 6, 6, dtype=dtype))


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_clips(fmt: str) -> None:
    plain = Block(PAIRS["pair"]).eval()
    for body in (PAIRS["pair"], lambda m, x: m.t(x), lambda m, x: m.s(x[:, :4])):
        plain.body = body
        with torch.no_grad():
            same_strides(
                plain,
                torch.randn(0, 6 if body is not PAIRS["pair"] else 4, 4, 6, 6).to(
                    memory_format=FORMATS[fmt]
                ),
            )


@pytest.mark.parametrize("how", ["as it runs", "compiled"])
@pytest.mark.parametrize("mode", PADS)
def test_dtypes_of_pads_under_autocast(mode: str, how: str) -> None:
    """Autocast pads in float32 by some modes on a CPU; a pair is a pair there, too."""
    torch.manual_seed(0)
    seen: list[torch.dtype] = []

    def body(m: Any, x: Tensor) -> Tensor:
        z = F.pad(F.relu(m.s(x)), (0, 0, 0, 0, 1, 1), mode=mode)
        seen.append(z.dtype)
        y: Tensor = F.conv3d(z, m.t.weight, m.t.bias) + z.to(torch.bfloat16)[:, :4, 2:]
        return y

    plain = Block(body).eval()
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    outputs, x = [], torch.randn(1, 4, 4, 6, 6)
    for model in (plain, converted):
        run = model if how == "as it runs" else torch.compile(model, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            outputs.append(run(x))
    assert seen[0] == seen[-1]
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(*outputs, rtol=5e-2, atol=5e-2)
