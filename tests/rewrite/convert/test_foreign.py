"""Modules and tensors of other kinds than PyTorch's plain ones: left alone, with the reason."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fastst

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.ao")


def spatial() -> nn.Conv3d:
    return nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1))


def temporal() -> nn.Conv3d:
    return nn.Conv3d(6, 4, (3, 1, 1), padding=(1, 0, 0))


class Pair(nn.Module):
    def __init__(self, first: nn.Module | None = None, second: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = first or spatial(), second or temporal()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class OnValues(nn.Conv3d):
    """A convolution that no trace can look into."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if x.sum() < 1e9 else y


class Tagged(Tensor):
    pass


class Doubled(Tensor):
    """A weight that is not what it says, as those of quantisation libraries."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Doubled:
        made = Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)  # type: ignore[attr-defined]
        made.data_held = data
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data_held)
        plain = lambda a: a.data_held * 2 if isinstance(a, cls) else a  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(plain, (args, kwargs or {}))
        return function(*args, **kwargs)


def with_weight(change: Callable[[Tensor], Tensor]) -> Pair:
    model = Pair()
    model.a.weight = nn.Parameter(change(model.a.weight.detach()), requires_grad=False)
    return model


def aware() -> nn.Module:
    """Of quantisation-aware training: rounds its weight."""
    config = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.nn.qat.Conv3d(4, 6, (1, 3, 3), qconfig=config)


def quantised() -> Pair:
    made = torch.ao.nn.quantized.Conv3d
    return Pair(made(4, 6, (1, 3, 3)), made(6, 4, (3, 1, 1)))


class Integers(Pair):
    """Weights that the forward itself makes of integers."""

    def __init__(self) -> None:
        super().__init__()
        weight = self.a.weight.detach()
        del self.a.weight
        self.a.register_buffer("weight", (weight * 100).to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.conv3d(x, self.a.weight.float() / 100, self.a.bias, padding=(0, 1, 1)))


class Fills(Pair):
    """Makes a tensor of the size of its input, in C++: a proxy must not be taken for a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(x.size(0), 4, 1, 1, 1) + 1


class Expands(Pair):
    """Gives a size of its input to a method of a plain tensor."""

    one = torch.ones(1, 1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.one.expand(x.size(0), -1, -1, -1, -1)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "on values": (lambda: Pair(OnValues(4, 6, (1, 3, 3))), "its convolution a is a OnValues"),
    "quantisation-aware": (lambda: Pair(aware()), "a is a torch.ao.nn.qat.modules.conv.Conv3d"),
    "quantised": (quantised, "torch.ao.nn.quantized.modules.conv.Conv3d, not an nn.Conv3d"),
    "integers": (Integers, "the model (Integers) was left"),
    "subclass": (lambda: with_weight(lambda w: w.as_subclass(Tagged)), "of another class"),
    "wrapper": (lambda: with_weight(Doubled), "a.weight is quantised or a tensor of another class"),
    "spectral norm": (lambda: Pair(nn.utils.spectral_norm(spatial())), "has hooks"),
    "scripted part": (
        lambda: Pair(torch.jit.script(spatial())),
        "a: it is a torch.jit._script.RecursiveScriptModule, not an nn.Conv3d",
    ),
    "scripted": (lambda: torch.jit.script(Pair()), "the model (RecursiveScriptModule) was left"),
    "graph": (lambda: fx.symbolic_trace(Pair()), "the model (Pair) was left: its class is its"),
    "fills": (Fills, "tracing its forward raised TypeError: zeros()"),
    "expands": (Expands, "tracing its forward raised TypeError: expand()"),
    "list": (lambda: nn.ModuleList([spatial(), temporal()]), "0: no forward that could be traced"),
    "dictionary": (lambda: nn.ModuleDict({"s": spatial(), "t": temporal()}), "s: no forward"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    build, told = LEFT[name]
    torch.manual_seed(0)
    model = build().eval()
    kinds = [type(m) for m in model.modules()]
    report = fastst.convert(model)
    assert told in str(report)
    assert report.replaced == []
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m.training for m in model.modules())
    if name in ("scripted", "scripted part", "quantisation-aware", "on values", "integers"):
        x = torch.randn(2, 4, 3, 6, 6)
        optimised = fastst.optimize_for_inference(model)
        torch.testing.assert_close(optimised(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")], ids=["replicas", "lazy"]
)
def test_wrapped_models_are_converted(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(Pair().eval())
    x = torch.randn(2, 4, 3, 6, 6)
    wanted = model(x)
    assert len(fastst.convert(model).replaced) == 1
    torch.testing.assert_close(model(x), wanted)


class Aliases(nn.Module):
    """Modules, and parts of them, under several names."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.a, self.free = Pair(), Pair()
        self.b = nn.Sequential(self.a if whole else self.a.a, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.a(x) + self.b(x).mean())


@pytest.mark.parametrize("whole", [False, True])
def test_aliases(whole: bool) -> None:
    """Reported once, by their first name."""
    model = Aliases(whole).double()
    original = copy.deepcopy(model)
    report = fastst.convert(model)
    assert [entry.first for entry in report.replaced] == ["free.a"]
    (left,) = report.left
    assert (left.name, left.second) == ("a.a", "a.b")
    assert "2 times" in left.reason
    x = torch.randn(2, 4, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), original(x))


def test_proxies_pass_for_tensors_only_while_a_model_is_traced() -> None:
    """Whoever asks, also in a namespace that is no module's; and nothing is left behind."""
    space: dict[str, object] = {"Pair": Pair, "Tensor": Tensor, "__name__": "nowhere"}
    exec(
        "class Asks(Pair):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x if isinstance(x, (list, Tensor)) else x[0])\n",
        space,
    )
    before = {name: set(vars(m)) for name, m in sys.modules.items() if name.startswith("test")}
    model = space["Asks"]()  # type: ignore[operator]
    assert len(fastst.convert(model).replaced) == 1
    assert "isinstance" not in space
    for name, names in before.items():
        assert set(vars(sys.modules[name])) == names
    assert "isinstance" not in vars(torch)
