"""Convolutions, weights and containers of other kinds: converted they compute what they did."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import fastst
from fastst.rewrite.convert import begins


def spatial() -> nn.Conv3d:
    return nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1))


def temporal() -> nn.Conv3d:
    return nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0))


class Pair(nn.Module):
    def __init__(self, first: nn.Module | None = None, second: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = first or spatial(), second or temporal()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(F.relu(self.a(x)))
        return y


class OnValues(nn.Conv3d):
    """Its forward branches on numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if x.sum() < 1e9 else y


class Standardised(nn.Conv3d):
    """Convolves with another weight than its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Reflecting(nn.Conv3d):
    """Pads in a ``_conv_forward`` of its own."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv3d(F.pad(x, (1, 1, 1, 1, 0, 0), "reflect"), weight, bias)


class Tagged(Tensor):
    pass


class Doubled(Tensor):
    """A weight that is not what it says, as those of quantisation libraries."""

    held: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> Doubled:
        made: Doubled = Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)  # type: ignore[attr-defined]
        made.held = data
        return made

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].held)
        args, kwargs = tree_map(
            lambda a: a.held * 2 if isinstance(a, cls) else a, (args, kwargs or {})
        )
        return function(*args, **kwargs)


def with_weight(change: Callable[[Tensor], Tensor]) -> Pair:
    model = Pair()
    weight = change(model.a.weight.detach())  # type: ignore[union-attr, operator]
    model.a.weight = nn.Parameter(weight, requires_grad=False)
    return model


def aware() -> Pair:
    """Of quantisation-aware training: rounds its weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        return Pair(torch.ao.nn.qat.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1), qconfig=config))


class Integers(Pair):
    """The forward itself makes weights of integers."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.a.weight.detach()  # type: ignore[union-attr, operator]
        del self.a.weight
        self.a.register_buffer("weight", (weight * 100).to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight.float() / 100  # type: ignore[union-attr, operator]
        y: Tensor = self.b(F.conv3d(x, weight, self.a.bias, padding=(0, 1, 1)))  # type: ignore[arg-type]
        return y


class Sizes(Pair):
    """Makes tensors of the sizes of its input."""

    def forward(self, x: Tensor) -> Tensor:
        u = self.a(x)
        ones = torch.ones(1, 1, 1, 1, 1).expand(u.size(0), -1, *u.shape[2:])
        y: Tensor = self.b(u) + torch.zeros(u.size(0), 4, 1, 1, 1) + ones
        return y


class Held(nn.Module):
    """Parts in a list, a dictionary and under two names, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ModuleList([spatial(), temporal()])
        self.named = nn.ModuleDict({"s": spatial(), "t": temporal()})
        self.again = self.named["s"]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.list:
            x = part(x)
        y: Tensor = self.named["t"](self.named["s"](x) - self.again(2 * x))
        return y


def scripted_part() -> Pair:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Pair(torch.jit.script(spatial()))


# A model, and how many pairs run as one.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "on values": (lambda: Pair(OnValues(4, 6, (1, 3, 3))), 0),
    "standardised": (lambda: Pair(Standardised(4, 6, (1, 3, 3))), 1),
    "a padding of its own": (lambda: Pair(Reflecting(4, 6, (1, 3, 3))), 0),
    "a subclass as weight": (lambda: with_weight(lambda w: w.as_subclass(Tagged)), 0),
    "a wrapper as weight": (lambda: with_weight(Doubled), 0),
    "quantisation-aware": (aware, 1),
    "integers": (Integers, 0),
    "sizes": (Sizes, 1),
    "held": (Held, 1),
    "scripted part": (scripted_part, 0),
    "a graph of fx": (lambda: fx.symbolic_trace(Pair()), 1),
    "replicas": (lambda: nn.DataParallel(Pair()), 1),
    "synchronised": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(
            nn.Sequential(spatial(), nn.BatchNorm3d(6), temporal())
        ), 1,
    ),
}  # fmt: skip


def run(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("name", MODELS)
def test_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    build, pairs = MODELS[name]
    model, x = build().eval(), torch.randn(2, 4, 3, 6, 6)
    wanted = run(model, x)
    model.zero_grad()
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    fastst.convert(model)
    with begins.listening() as events:
        found = run(model, x)
    assert sum(event.why is None for event in events) == pairs
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert [type(m) for m in model.modules()] == kinds and list(model.state_dict()) == keys
    if "as weight" in name:
        return  # PyTorch does not copy those
    served = fastst.optimize_for_inference(model)
    torch.testing.assert_close(served(x) + 0, wanted[0], rtol=1e-4, atol=1e-4)


def test_scripted_as_a_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(Pair())
    assert fastst.convert(model).replaced == []


def test_lazy_and_without_values() -> None:
    """Lazy convolutions become plain ones at their first call, and pair from then on."""
    torch.manual_seed(0)
    lazy = nn.Sequential(nn.LazyConv3d(6, (1, 3, 3)), nn.LazyConv3d(4, (3, 1, 1)))
    fastst.convert(lazy)
    x = torch.randn(1, 4, 3, 6, 6)
    y = lazy(x) + 0
    fastst.revert(copied := copy.deepcopy(lazy))
    torch.testing.assert_close(y, copied(x), rtol=1e-4, atol=1e-4)
    with torch.device("meta"):
        meta = Pair()
        fastst.convert(meta)
        assert meta(torch.randn(1, 4, 3, 6, 6)).shape == (1, 4, 3, 6, 6)


@pytest.mark.parametrize("values", ["none", "of x", "of the first output"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_fake_mode_that_takes_tensors_with_values(
    values: str, training: bool, grad: bool
) -> None:
    """What is computed in it has none, whatever of its inputs has some."""
    plain = nn.Sequential(spatial(), nn.BatchNorm3d(6), nn.ReLU(), temporal()).train(training)
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    shapes = []
    with torch.set_grad_enabled(grad):
        for m in (plain, converted):
            given = torch.randn(2, 4, 4, 6, 6)
            u = m[0](given)
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                x = mode.from_tensor(given) if values == "none" else given
                y = m[1:](u) if values == "of the first output" else m(x)
                shapes.append((y.shape, y.stride(), (y + 1).shape))
    assert shapes[0] == shapes[1]
