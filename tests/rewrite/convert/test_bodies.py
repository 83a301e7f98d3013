"""Whatever a forward does with a promise: the converted module gives what the plain one gives."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastst
from tests.support.blocks import Block, Reverse, compute_pair, results


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def hooked(m: Any, x: Tensor) -> Tensor:
    u = m.s(x)
    if u.requires_grad:
        u.register_hook(lambda g: 3 * g)
    return m.t(F.relu(m.n(u)))


def twice(m: Any, x: Tensor) -> Tensor:
    z = F.relu(m.n(m.s(x)))
    return m.t(z) + m.t(z).sin() + z.mean()


def in_place(m: Any, x: Tensor) -> Tensor:
    u = m.n(m.s(x))
    alias = u
    F.relu(u, inplace=True)
    return m.t(alias) + u.mean()


def written(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    u = m.n(m.s(x))
    x.add_(100)
    return m.t(F.relu(u))


def viewed_then_written(m: Any, x: Tensor) -> Tensor:
    u = m.s(x)
    v = u.view(-1)
    w = F.silu(u)
    v.mul_(2)
    return m.t(w) + m.t(u)


def written_under_a_view(m: Any, x: Tensor) -> Tensor:
    u = m.s(x)
    v = u.transpose(3, 4)
    u.add_(1)
    return m.t(v.transpose(3, 4))


def kept(m: Any, x: Tensor) -> Tensor:
    u = m.n(m.s(x))
    m.kept.append(u)
    return m.t(F.relu(u)) + m.kept.pop()[:, :4]


def no_grad_first(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        u = m.s(x)
    return m.t(F.relu(u))


def no_grad_second(m: Any, x: Tensor) -> Tensor:
    u = m.n(m.s(x))
    with torch.no_grad():
        y = m.t(F.relu(u))
    return y + u.mean()


def frozen(m: Any, x: Tensor) -> Tensor:
    m.n.eval()
    return m.t(F.relu(m.n(m.s(x))))


def dropped(m: Any, x: Tensor) -> Tensor:
    m.n(m.s(x))
    return m.t(m.s(x))


def statistics_read(m: Any, x: Tensor) -> Tensor:
    u = m.n(m.s(x))
    return m.t(F.relu(u)) * m.n.running_mean.sum()


def other_stride(m: Any, x: Tensor) -> Tensor:
    return F.conv3d(F.relu(m.s(x)), m.t.weight, m.t.bias, (1, 2, 2), (1, 1, 0))


def autocast_first(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        u = m.s(x)
    return m.t(u.float())


def autocast_second(m: Any, x: Tensor) -> Tensor:
    u = m.s(x)
    with torch.autocast("cpu", torch.bfloat16):
        return m.t(u).float()


class Twice(TorchFunctionMode):
    """Sees each function, and doubles what some of them give."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return 2 * y if func in (F.conv3d, torch.conv3d, F.relu) else y


class TwiceBelow(TorchDispatchMode):
    """The same of operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return 2 * y if "convolution.default" in str(func) else y


def under(mode: Any, first: bool) -> Callable[[Any, Tensor], Tensor]:
    """Both convolutions, or the second one alone, in a mode of the user's."""

    def body(m: Any, x: Tensor) -> Tensor:
        with mode() if first else contextlib.nullcontext():
            u = m.s(x)
        with mode():
            return m.t(F.relu(m.n(u)))

    return body


def on_a_device(m: Any, x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return m.t(F.relu(m.s(x)))


def frozen_between(m: Any, x: Tensor) -> Tensor:
    u = m.s(x)
    m.s.requires_grad_(False)
    y = u.sin()
    m.s.requires_grad_(True)
    return m.t(y)


def thawed_between(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = x * 1
    m.s.requires_grad_(False)
    u = m.s(x)
    m.s.requires_grad_(True)
    return m.t(u.sin())


def cast_between(m: Any, x: Tensor) -> Tensor:
    """Weights are those values again, in another dtype."""
    with torch.no_grad():
        m.s.weight.data = m.s.weight.data.bfloat16().to(x.dtype)
        u = m.s(x)
        m.s.bfloat16()
        v = u * 1
        m.s.to(x.dtype)
    return m.t(v)


def turned_in_place(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        u = m.s(x)
        u.transpose_(3, 4)
        return m.t(u) + u.shape[3]


def shorter_in_place(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        u = m.s(x)
        u.resize_(2, 6, 5, 6, 4)
        return m.t(u) + u.numel()


def other_memory(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        u = m.s(x)
        u.data = torch.ones(2, 6, 3, 6, 6, dtype=u.dtype)
        return m.t(u) + u.shape[2]


def detached_in_place(m: Any, x: Tensor) -> Tensor:
    u = m.s(x)
    u.detach_()
    return m.t(u)


def dirty(m: Any, x: Tensor) -> Tensor:
    u = m.s(x)
    return m.t(Dirty.apply(u)) + u.mean()


def read_by_nobody(m: Any, x: Tensor) -> Tensor:
    """No gradient comes back: parameters have none, not zeros."""
    return m.t(checkpoint(lambda u: u.detach() + 0 * m.n.weight.sum(), m.s(x), use_reentrant=True))


def written_in_a_checkpoint(m: Any, x: Tensor) -> Tensor:
    """The convolution runs in there, without recording what is recorded outside."""
    u = m.s(x)
    m.s.weight = nn.Parameter(m.s.weight.detach())

    def inner(v: Tensor) -> Tensor:
        with torch.no_grad():
            u.mul_(1.5)
        return v

    return m.t(checkpoint(inner, u, use_reentrant=False).sin())


def swish(m: Any, x: Tensor) -> Tensor:
    u = m.n(m.s(x))
    return m.t(u * torch.sigmoid(u))


BODIES: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {  # with how many pairs
    "pair": (compute_pair, 1),
    "bare": (lambda m, x: m.t(m.s(x)), 1),
    "act first": (lambda m, x: m.t(m.n(F.relu(m.s(x)))), 0),
    "relu6": (lambda m, x: m.t(F.relu6(m.s(x))), 0),
    "detach": (lambda m, x: m.t(m.s(x).detach()), 0),
    "reverse": (lambda m, x: m.t(Reverse.apply(m.n(m.s(x)))), 0),
    "hook": (hooked, 0),
    "twice": (twice, 2),
    "in place": (in_place, 1),
    "written": (written, 0),
    "viewed": (viewed_then_written, 0),
    "kept": (kept, 1),
    "written under a view": (written_under_a_view, 0),
    "no grad first": (no_grad_first, 0),
    "no grad second": (no_grad_second, 0),
    "frozen": (frozen, 1),
    "dropped": (dropped, 1),
    "statistics read": (statistics_read, 1),
    "other stride": (other_stride, 0),
    "autocast first": (autocast_first, 0),
    "autocast second": (autocast_second, 0),
    "swish": (swish, 0),
    "read by nobody": (read_by_nobody, 0),
    "written in a checkpoint": (written_in_a_checkpoint, 0),
    "under a mode": (under(Twice, True), 0),
    "into a mode": (under(Twice, False), 0),
    "under a mode of operators": (under(TwiceBelow, True), 0),
    "into a mode of operators": (under(TwiceBelow, False), 0),
    "on a device": (on_a_device, 1),
    "frozen between": (frozen_between, 0),
    "thawed between": (thawed_between, 0),
    "cast between": (cast_between, 0),
    "turned in place": (turned_in_place, 0),
    "shorter in place": (shorter_in_place, 0),
    "other memory": (other_memory, 0),
    "detached in place": (detached_in_place, 0),
    "dirty": (dirty, 0),
    "split": (lambda m, x: m.t(torch.cat(m.s(x).chunk(2, 1), 1)), 0),
    "compared": (lambda m, x: m.t(torch.where(m.s(x) > 0, m.s(x), -m.s(x))), 0),
    "checkpoint": (
        lambda m, x: checkpoint(lambda y: m.t(F.relu(m.n(m.s(y)))), x, use_reentrant=False), 0,
    ),
    "reentrant": (lambda m, x: m.t(checkpoint(m.s, x, use_reentrant=True)), 0),
    "nested reentrant": (
        lambda m, x: checkpoint(
            lambda y: checkpoint(lambda z: m.t(F.relu(m.s(z))), y, use_reentrant=True),
            x, use_reentrant=True,
        ), 1,
    ),
    "checkpoint between": (
        lambda m, x: m.t(checkpoint(lambda z: F.relu(z), m.s(x), use_reentrant=False)), 0,
    ),
    "pad": (lambda m, x: m.t(F.pad(m.n(m.s(x)), (0, 0, 0, 0, 1, 0))), 1),
    "pad in space": (lambda m, x: m.t(F.pad(m.s(x), (1, 1))), 0),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BODIES)
def test_as_the_plain_module(name: str, training: bool) -> None:
    body, pairs = BODIES[name]
    torch.manual_seed(0)
    plain = Block(body).double().train(training)
    if "autocast" in name:
        plain.float()
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    x = torch.randn(2, 4, 5, 6, 6, dtype=plain.s.weight.dtype)
    try:
        wanted = results(plain, x)
    except RuntimeError:  # x was written before backward could read it: the forward still counts
        plain = copy.deepcopy(converted)
        fastst.revert(plain)
        with torch.no_grad():
            wanted = [plain(x.clone()), *plain.buffers()]
            for a, b in zip([converted(x.clone()), *converted.buffers()], wanted, strict=True):
                torch.testing.assert_close(a, b)
        return
    with fastst.dispatch.recording() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore", fastst.FallbackWarning)  # float64 has no kernels here
        found = results(converted, x)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9 if a.dtype == torch.float64 else 1e-2,
                                   atol=1e-9 if a.dtype == torch.float64 else 1e-2)  # fmt: skip
    assert sum(c.phase == "forward" and c.problem is not None for c in calls) >= pairs


@pytest.mark.parametrize("name", BODIES)
def test_in_inference_mode(name: str) -> None:
    if name in ("hook", "checkpoint", "reentrant", "nested reentrant", "checkpoint between") or (
        name in ("read by nobody", "written in a checkpoint")
    ):
        pytest.skip("needs gradients")
    plain = Block(BODIES[name][0]).eval()
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    with torch.inference_mode():
        x = torch.randn(2, 4, 5, 6, 6)
        y, z = plain(x * 1), converted(x * 1)
        torch.testing.assert_close(z, y, rtol=1e-2, atol=1e-2)
        assert torch.is_inference(z) == torch.is_inference(y)


def test_a_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promise that does not look whether x was written to."""
    from fastst.rewrite.convert.kept import Kept

    monkeypatch.setattr(Kept, "same", property(lambda self: True))
    with pytest.raises(AssertionError):
        test_in_inference_mode("written")
