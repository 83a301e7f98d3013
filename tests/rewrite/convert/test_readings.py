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
    "twice": (
        lambda m, x: m.two(z := m.silu(m.group(m.one(x)))) + m.two(z).sin() + z.mean(),
        [PLAIN, *[("group", "silu", 0, False), ("group", "silu", 0, True)]],
    ),
    # What computes.
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


def test_errors_are_those_of_the_plain_module() -> None:
    m = Net(lambda m, x: m.two(F.group_norm(m.one(x), 3)))
    fastst.convert(m.eval())
    with torch.no_grad(), pytest.raises(RuntimeError, match="num_groups"):
        m(torch.randn(1, 8, 4, 6, 6))


def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that does not look whether the output before it was written to."""
    from fastst.rewrite.convert.promise import Link

    monkeypatch.setattr(Link, "steady", property(lambda self: True))
    with pytest.raises(AssertionError, match="not close"):
        test_as_the_plain_module("written")
