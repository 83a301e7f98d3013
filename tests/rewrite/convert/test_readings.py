"""Norms, activations, pads and cached frames before a convolution: what it takes in."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst
from fastst import dispatch
from tests.backends.cpu.test_cpu import built

pytestmark = built


class WrittenOut(nn.Module):
    """diffusers' RMS norm of the last dimension, of LTX."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + 1e-6) * self.weight


class Chunked(nn.Module):
    """diffusers' group norm of frames, of Mochi, in chunks of two."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(2, 8)
        nn.init.normal_(self.norm_layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        x = x.permute(0, 2, 1, 3, 4).flatten(0, 1)
        y = torch.cat([self.norm_layer(chunk) for chunk in x.split(3, dim=0)], dim=0)
        return y.unflatten(0, (batch, -1)).permute(0, 2, 1, 3, 4)


def last(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A norm of the last dimension, of the channels."""
    return norm(x.movedim(1, -1)).movedim(-1, 1)


class Net(nn.Module):
    """Two convolutions with a function of the test's between and behind them."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.one = nn.Conv3d(8, 8, 3, padding=1)
        self.two = nn.Conv3d(8, 8, 3, padding=(0, 1, 1))
        self.three = nn.Conv3d(8, 8, 3, padding=1, padding_mode="replicate")
        self.batch, self.group = nn.BatchNorm3d(8), nn.GroupNorm(2, 8)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)
        self.beta = nn.Parameter(torch.randn(8, 1, 1, 1))
        self.silu, self.dropout = nn.SiLU(), nn.Dropout(0.5)
        self.layer, self.rms = nn.LayerNorm(8), nn.RMSNorm(8)
        self.written_out, self.chunked = WrittenOut(), Chunked()
        nn.init.normal_(self.layer.weight)
        nn.init.normal_(self.rms.weight)
        nn.init.normal_(self.batch.running_mean)  # type: ignore[arg-type]
        self.body = body

    def l2(self, x: Tensor) -> Tensor:
        """As diffusers has it."""
        return F.normalize(x, dim=1).to(x.dtype) * math.sqrt(8) * self.gamma + 0.0

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _wan(m: Any, x: Tensor) -> Any:
    """A residual block with a cache, of which a chunk comes after another."""
    out, cache = [], x.new_zeros(*x.shape[:2], 2, *x.shape[3:])
    for chunk in x.split(2, 2):
        h = m.one(chunk)
        z = m.dropout(m.silu(m.l2(h)))
        kept = z[:, :, -2:, :, :].clone()
        out.append(m.two(F.pad(torch.cat([cache.to(z.device), z], 2), (0,) * 6)) + h)
        kept.mul_(1.0)
        cache = kept
    return torch.cat(out, 2), cache


def _hunyuan(m: Any, x: Tensor) -> Tensor:
    h = m.one(x).contiguous()
    z = F.pad(m.silu(m.group(h)), (0, 0, 0, 0, 2, 0), mode="replicate")
    return m.two(z) + h


def _first_frames(m: Any, x: Tensor) -> Tensor:
    z = F.gelu(m.group(m.one(x)))
    return m.two(torch.cat([z[:, :, :1]] * 2 + [z], 2))


def _both_ends(m: Any, x: Tensor) -> Tensor:
    """LTX, not causal."""
    z = m.silu(last(m.written_out, m.one(x)))
    before, after = z[:, :, :1].repeat((1, 1, 2, 1, 1)), z[:, :, -1:].repeat((1, 1, 1, 1, 1))
    return m.two(torch.concatenate([before, z, after], dim=2))


def _pieces_kept(m: Any, x: Tensor) -> Tensor:
    y = m.one(x)
    variance = y.pow(2).mean(1, keepdim=True)
    return m.two(F.silu(y * torch.rsqrt(variance + 1e-5))) + variance.sum()


def _frames_in_another_order(m: Any, x: Tensor) -> Tensor:
    y = m.one(x).permute(0, 2, 1, 3, 4).flatten(0, 1)
    y = torch.cat([m.group(part) for part in y.split(3)][::-1])
    return m.two(y.unflatten(0, (x.shape[0], -1)).permute(0, 2, 1, 3, 4))


def _frames_with_two_norms(m: Any, x: Tensor) -> Tensor:
    a, b, c = m.one(x).permute(0, 2, 1, 3, 4).flatten(0, 1).split(3)
    y = torch.cat([m.group(a), m.chunked.norm_layer(b), m.group(c)])
    return m.two(y.unflatten(0, (x.shape[0], -1)).permute(0, 2, 1, 3, 4))


def _moved_and_written(m: Any, x: Tensor) -> Tensor:
    y = m.one(x)
    v = y.movedim(1, -1)
    z = m.layer(v).movedim(-1, 1)
    v.mul_(2)
    return m.two(m.silu(z)) + y[:, :, :2]


def _written(m: Any, x: Tensor) -> Tensor:
    h = m.one(x)
    z = m.silu(m.group(h))
    h.abs_()
    return m.two(z) + m.two(h)


def _weight_written(m: Any, x: Tensor) -> Tensor:
    z = m.group(m.one(x))
    m.group.weight.data.mul_(2)
    y = m.two(z)
    m.group.weight.data.div_(2)
    return y


def _part_written(m: Any, x: Tensor) -> Tensor:
    z = m.silu(m.l2(m.one(x)))
    z[:, :, -2:].mul_(2)
    return m.two(z)


def _left(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        z = m.group(m.one(x))
    return m.two(z)


def _in_place(m: Any, x: Tensor) -> Tensor:
    h = m.one(x)
    k = h
    F.silu(h, inplace=True)
    return m.two(h) + k.mean()


def _view_then_written(m: Any, x: Tensor) -> Any:
    y = m.one(x)
    last, whole = y[:, :, -2:], y.contiguous()
    y += x
    return y, last, whole


# A body, and of each call of the operation: norm, activation, cached frames, residual.
Took = tuple[str, str, int, bool]
PLAIN: Took = ("none", "none", 0, False)
BODIES: dict[str, tuple[Callable[[Any, Tensor], Any], list[Took]]] = {
    "cache": (_wan, [PLAIN, ("l2", "silu", 2, True)] * 2),
    "replicated": (_hunyuan, [PLAIN, ("group", "silu", 0, True)]),
    "first frames": (_first_frames, [PLAIN, ("group", "gelu", 0, False)]),
    "frozen": (
        lambda m, x: m.two(F.leaky_relu(m.batch(m.one(x)), 0.2)),
        [PLAIN, ("frozen", "leaky_relu", 0, False)],
    ),
    "instance": (
        lambda m, x: m.three(F.instance_norm(m.one(x))), [PLAIN, ("group", "none", 0, False)],
    ),
    "β": (
        lambda m, x: m.two(F.silu(m.l2(m.one(x)) + m.beta)), [PLAIN, ("l2", "silu", 0, False)],
    ),
    "activation alone": (lambda m, x: m.two(m.one(x).relu()), [PLAIN, ("none", "relu", 0, False)]),
    "in place": (_in_place, [PLAIN, ("none", "silu", 0, False)]),
    "layer": (
        lambda m, x: m.two(m.silu(last(m.layer, m.one(x)))), [PLAIN, ("layer", "silu", 0, False)],
    ),
    "rms": (
        lambda m, x: m.two(last(lambda v: m.silu(m.rms(v)), m.one(x))) + x[:, :, :2],
        [PLAIN, ("rms", "silu", 0, True)],
    ),
    "rms by permute": (
        lambda m, x: m.two(
            m.rms(m.one(x).permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
        ), [PLAIN, ("rms", "none", 0, False)],
    ),
    "rms written out": (
        lambda m, x: m.two(m.silu(last(m.written_out, m.one(x)))),
        [PLAIN, ("rms", "silu", 0, False)],
    ),
    "rms of dimension 1": (
        lambda m, x: m.two(
            torch.rsqrt((y := m.one(x)).square().mean(1, True) + 1e-5) * y * m.gamma + m.beta
        ), [PLAIN, ("rms", "none", 0, False)],
    ),
    "l2 of the last": (
        lambda m, x: m.two(last(lambda v: F.normalize(v, dim=-1) * math.sqrt(8), m.one(x))),
        [PLAIN, ("l2", "none", 0, False)],
    ),
    "frames in chunks": (
        lambda m, x: m.two(m.silu(m.chunked(m.one(x)))), [PLAIN, ("group", "silu", 0, False)],
    ),
    "both ends": (_both_ends, [PLAIN, ("rms", "silu", 0, False)]),
    "pieces kept": (_pieces_kept, [PLAIN, ("rms", "silu", 0, False)]),
    "twice": (
        lambda m, x: m.two(z := m.silu(m.group(m.one(x)))) + m.two(z).sin() + z.mean(),
        [PLAIN, *[("group", "silu", 0, False), ("group", "silu", 0, True)]],
    ),
    # What computes.
    "moved, not back": (lambda m, x: m.layer(m.one(x).movedim(1, -1)), [PLAIN]),
    "rms of another": (
        lambda m, x: m.two(
            (y := m.one(x)) * torch.rsqrt(m.three(x).pow(2).mean(1, keepdim=True) + 1e-5)
        ) + y.mean(), [PLAIN] * 3,
    ),
    "mean of other axes": (
        lambda m, x: m.two((y := m.one(x)) * torch.rsqrt(y.pow(2).mean((1, 2), True) + 1e-5)),
        [PLAIN] * 2,
    ),
    "cubes": (
        lambda m, x: m.two((y := m.one(x)) * torch.rsqrt(y.pow(4).mean(1, keepdim=True) + 1e-5)),
        [PLAIN] * 2,
    ),
    "frames in another order": (_frames_in_another_order, [PLAIN] * 2),
    "frames with two norms": (_frames_with_two_norms, [PLAIN] * 2),
    # The shortcut is one of two views, of which the other may be exported.
    "moved and written": (_moved_and_written, [*[PLAIN] * 2, ("layer", "silu", 0, False)]),
    "read between": (lambda m, x: m.two(m.group(m.one(x)).sin()), [PLAIN] * 2),
    "two activations": (lambda m, x: m.two(F.silu(F.relu(m.one(x)))), [PLAIN] * 2),
    "activation first": (lambda m, x: m.two(m.group(F.relu(m.one(x)))), [PLAIN] * 2),
    "two norms": (lambda m, x: m.two(m.batch(m.group(m.one(x)))), [PLAIN] * 2),
    "not √C": (lambda m, x: m.two(F.normalize(m.one(x)) * 2.0), [PLAIN] * 2),
    "not scaled": (lambda m, x: m.two(F.relu(F.normalize(m.one(x)))), [PLAIN] * 2),
    "padded before": (
        lambda m, x: m.two(F.relu(F.pad(m.group(m.one(x)), (1, 1, 1, 1, 1, 1)))), [PLAIN] * 2,
    ),
    "padded by two modes": (
        lambda m, x: m.three(F.pad(m.group(m.one(x)), (1, 1))), [PLAIN] * 2,
    ),
    "padded, then a cache": (
        lambda m, x: m.two(torch.cat([x, F.pad(m.silu(m.one(x)), (0,) * 6)], 2)), [PLAIN] * 2,
    ),
    "γ of a cache, too": (
        lambda m, x: m.two(torch.cat([x, F.normalize(m.one(x)) * math.sqrt(8)], 2) * m.gamma),
        [PLAIN] * 2,
    ),
    "β of pads, too": (
        lambda m, x: m.two(F.pad(m.l2(m.one(x)), (0, 0, 0, 0, 2, 0)) + m.beta), [PLAIN] * 2,
    ),
    "view, then written": (_view_then_written, [PLAIN]),
    "written": (_written, [*[PLAIN] * 3, ("group", "silu", 0, True)]),  # the first one runs again
    "weight written": (_weight_written, [PLAIN] * 2),
    "part written": (_part_written, [PLAIN] * 2),
    "mode left": (_left, [PLAIN] * 2),
}  # fmt: skip


def settled(y: Any) -> list[Tensor]:
    """What was returned, read."""
    return [t + 0 for t in (y if isinstance(y, tuple) else (y,))]


def compared(m: Net, x: Tensor) -> list[Took]:
    """What each operation of the converted module took in; it computes what the plain one does."""
    with torch.no_grad():
        wanted = settled(m(x.clone()))
        converted = copy.deepcopy(m)
        fastst.convert(converted)
        with dispatch.recording() as calls:
            found = settled(converted(x.clone()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    specs = [(c.problem.spec, c.problem) for c in calls if c.problem is not None]
    took = [(s.norm, s.input_activation, p.past, p.residual) for s, p in specs]  # type: ignore[union-attr]
    return sorted(took)


@pytest.mark.parametrize("name", BODIES)
def test_as_the_plain_module(name: str) -> None:
    torch.manual_seed(0)
    body, took = BODIES[name]
    assert compared(Net(body).eval(), torch.randn(2, 8, 4, 6, 7)) == sorted(took)


def _activation_kept(m: Any, x: Tensor) -> Any:
    z = m.silu(m.group(m.one(x)))
    y = m.two(z)
    x.zero_()
    return y, z


def _cache_kept(m: Any, x: Tensor) -> Any:
    cache = x[:, :, :2] + 1
    z = torch.cat([cache, m.silu(m.group(m.one(x)))], 2)
    y = m.two(z)
    cache.zero_()
    return y, z


def _read_before(m: Any, x: Tensor) -> Any:
    y = m.one(x)
    z, mean = m.silu(m.group(y)), y.mean()
    x.zero_()
    return m.two(z), mean


def _value_written(m: Any, x: Tensor) -> Any:
    y = m.one(x)
    mean, z = y.mean(), m.group(y)
    y.data.mul_(2)
    return m.two(z), mean


def _value_of_a_chain_written(m: Any, x: Tensor) -> Any:
    y = m.one(x)
    z = m.silu(m.group(y))
    w = m.two(m.silu(m.l2(y)))
    y.mul_(2)
    return m.two(z), w, y


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("body", [_value_written, _value_of_a_chain_written])
def test_a_value_that_is_written_under_its_chains(body: Any, inference: bool) -> None:
    with torch.inference_mode(inference):
        compared(Net(body).eval(), torch.randn(1, 8, 4, 6, 6))


@pytest.mark.parametrize("inference", [False, True])
def test_several_readers_of_a_chain_run_what_is_before_it_once(inference: bool) -> None:
    """In inference mode tensors have no version counter that tells of writes."""

    def body(m: Any, x: Tensor) -> Tensor:
        z = m.silu(m.group(m.one(x)))
        return m.two(z) + m.two(z) + m.two(m.silu(m.l2(z)))

    with torch.inference_mode(inference):
        took = compared(Net(body).eval(), torch.randn(1, 8, 4, 6, 6))
    assert len(took) == 4


@pytest.mark.parametrize("body", [_activation_kept, _cache_kept, _read_before])
def test_what_inference_mode_writes_to_afterwards(body: Any) -> None:
    """Tensors made there have no version counter."""
    with torch.inference_mode():
        compared(Net(body).eval(), torch.randn(1, 8, 4, 6, 6))


@pytest.mark.parametrize("body", [
    lambda m, x: m.one(x),
    lambda m, x: m.one.space(x),
])  # fmt: skip
def test_memory_that_numpy_writes_to(body: Any) -> None:
    """Its tensors are told of no write: what is returned may be read after the next clip came."""
    net = Net(body).eval()
    net.one.space = nn.Conv3d(8, 8, (1, 3, 3))  # type: ignore[assignment]
    outputs = []
    for convert in (False, True):
        if convert:
            fastst.convert(net)
        clip = np.zeros((1, 8, 4, 6, 6), np.float32)
        with torch.no_grad():
            found = []
            for i in range(3):
                clip[:] = i
                found.append(net(torch.from_numpy(clip)))
        outputs.append(torch.stack(found))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_training_and_gradients_compute() -> None:
    torch.manual_seed(0)
    m, x = Net(lambda m, x: m.two(m.silu(m.group(m.one(x))))), torch.randn(1, 8, 4, 6, 6)
    assert compared(m, x)[0][0] == "group"
    converted = copy.deepcopy(m)
    fastst.convert(converted)
    with dispatch.recording() as calls:
        converted(x).sum().backward()
    assert {c.problem.spec.norm for c in calls} == {"none"}  # type: ignore[union-attr]
    m(x).sum().backward()
    grads = [[p.grad for p in n.parameters()] for n in (converted, m)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
    m.body = lambda m, x: m.two(m.batch(m.one(x)))  # a norm in training
    assert compared(m.train(), x) == [PLAIN] * 2


def test_the_report_says_what_was_taken_in() -> None:
    m = Net(_hunyuan).eval()
    report = fastst.convert(m, torch.randn(1, 8, 4, 6, 6))
    assert [str(entry) for entry in report.alone] == [
        "one: alone", "two: with group norm, silu, padding; then the residual",
    ]  # fmt: skip
    assert "one operation each: 2" in str(report)


def test_an_empty_batch_is_refused_where_the_plain_module_refuses_it() -> None:
    """Before a norm behind it counts a batch."""
    m = nn.Sequential(nn.Conv3d(8, 8, 3), nn.InstanceNorm3d(8, affine=True), nn.BatchNorm3d(8))
    for convert in (False, True):
        if convert:
            fastst.convert(m)
        with torch.no_grad(), pytest.raises(IndexError):
            m(torch.randn(0, 8, 4, 6, 6))
    assert m[2].num_batches_tracked == 0


def test_errors_are_those_of_the_plain_module() -> None:
    m = Net(lambda m, x: m.two(F.group_norm(m.one(x), 3)))
    fastst.convert(m.eval())
    with torch.no_grad(), pytest.raises(RuntimeError, match="num_groups"):
        m(torch.randn(1, 8, 4, 6, 6))


def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that does not look whether the output before it was written to."""
    from fastst.rewrite.convert.kept import Kept

    monkeypatch.setattr(Kept, "same", property(lambda self: True))
    with pytest.raises(AssertionError, match="not close"):
        test_as_the_plain_module("written")
