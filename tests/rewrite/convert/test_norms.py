"""A batch norm that follows a pair in another module's forward than the pair's own."""

from __future__ import annotations

import copy
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastst
from fastst.backends.cpu.library import load
from fastst.models import r2plus1d_18
from fastst.models.resnet import Stage, VideoResNet
from fastst.nn import pair_of_modules
from fastst.rewrite.convert import fused
from tests.nn.test_outer_norm import compare, reads_of_statistics
from tests.rewrite.convert.test_people import MMBackbone

native = pytest.mark.skipif(isinstance(load(), str), reason="the cpu backend cannot run here")
SHAPE, OUT = (2, 3, 3, 6, 5), (2, 8, 3, 6, 5)


def pair(c: int, k: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(c, 9, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(9), nn.ReLU(),
        nn.Conv3d(9, k, (3, 1, 1), padding=(1, 0, 0)),
    )  # fmt: skip


def layer() -> nn.Module:
    return fastst.Conv2Plus1d(3, 8, 3, padding=1, norm="batch", activation="silu")


class Listed(nn.Module):
    """The parts stand in a list and have arguments with defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([pair(3, 8), nn.BatchNorm3d(8), nn.ReLU()])
        self.scale = 1.0

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        for part in self.parts[: 1 if skip else 3]:
            x = part(x)
        return x * self.scale


class Padded(nn.Module):
    """What is traced holds more than a pair, but ends in one."""

    def __init__(self) -> None:
        super().__init__()
        self.before, (self.s, self.n, self.a, self.t) = nn.Conv3d(3, 3, 1), pair(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.t(self.a(self.n(self.s(self.before(x)))))


class Branching(nn.Module):
    """No trace shows what it computes: it is recognised as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Conv3d(3, 9, (3, 1, 1), padding=(1, 0, 0))
        self.s = nn.Conv3d(9, 8, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5:
            raise ValueError("video only")
        return self.s(nn.functional.relu(self.t(x)))


NESTED: dict[str, Callable[[], nn.Module]] = {
    "child": lambda: nn.Sequential(pair(3, 8), nn.BatchNorm3d(8), nn.ReLU()),
    "grandchild": lambda: nn.Sequential(
        nn.Sequential(nn.Sequential(pair(3, 8))), nn.BatchNorm3d(8), nn.ReLU()
    ),
    "layer": lambda: nn.Sequential(layer(), nn.BatchNorm3d(8, momentum=None), nn.ReLU()),
    "list": Listed,
    "more than a pair": lambda: nn.Sequential(Padded(), nn.BatchNorm3d(8), nn.ReLU()),
    "a whole": lambda: nn.Sequential(Branching(), nn.BatchNorm3d(8), nn.ReLU()),
    "norm of its own list": lambda: nn.Sequential(
        pair(3, 8), nn.Sequential(nn.BatchNorm3d(8), nn.ReLU())
    ),
    "between pairs": lambda: nn.Sequential(
        layer(), nn.BatchNorm3d(8), *pair(8, 8), nn.BatchNorm3d(8), nn.ReLU()
    ),
}


def followed(report: fastst.Report) -> list[str | None]:
    """The norm after each pair."""
    return [entry.outer_norm for entry in (*report.replaced, *report.already)]


@contextmanager
def passes(of: int) -> Iterator[Counter[str]]:
    """Reads, by operator, of tensors of this many values; batch norm in training reads twice."""
    seen: Counter[str] = Counter()

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            name = func._schema.name.split("::")[1]
            if args and isinstance(args[0], Tensor) and args[0].numel() == of:
                twice = "batch_norm" in name and "backward" not in name and args[5] is True
                seen[name] += 1 + twice
            return func(*args, **(kwargs or {}))

    with Mode():
        yield seen


@native
@pytest.mark.parametrize("name", NESTED)
def test_the_norm_takes_the_statistics(name: str) -> None:
    torch.manual_seed(0)
    model = NESTED[name]()
    original = copy.deepcopy(model)
    state = {k: id(t) for k, t in model.state_dict(keep_vars=True).items()}
    first = fastst.convert(model)
    assert {k: id(t) for k, t in model.state_dict(keep_vars=True).items()} == state
    kinds = [type(m) for m in model.modules()]
    again = fastst.convert(model, only="nothing")
    assert (again.replaced, again.already) == ([], first.replaced)
    assert [type(m) for m in model.modules()] == kinds
    trained = copy.deepcopy(model)
    x = torch.randn(SHAPE)
    with reads_of_statistics() as seen:
        trained(x).sum().backward()
    assert seen == []
    told = str(fastst.explain(model, x)).count("statistics for the batch norm after it")
    assert told == 1 + (name == "between pairs")
    for backend, training in (("cpu", True), ("cpu", False), ("aten", True), ("cpu", True)):
        model.train(training), original.train(training)
        compare(model, original, backend, torch.float32, SHAPE, OUT)
    fastst.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


@native
@pytest.mark.parametrize("spoilt", [False, True])
def test_y_is_read_once(spoilt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NESTED["child"]()[:2]
    x = torch.randn(SHAPE)
    y = x.numel() // 3 * 8
    with passes(y) as separate:
        model(x)
    assert sum(separate.values()) == 2
    fastst.convert(model)
    if spoilt:  # the measure would see it
        monkeypatch.setattr(pair_of_modules, "_needs_statistics", lambda *_: False)
    with passes(y) as ours:
        model(x)
    assert sum(ours.values()) == 1 + spoilt


@native
def test_a_step_of_r2plus1d_18() -> None:
    """Nobody forms statistics of y but the norms of the three shortcuts, which follow no pair."""
    model = r2plus1d_18(num_classes=3, width=8)
    assert all(followed(fastst.convert(model)))
    x = torch.randn(2, 3, 4, 32, 32)
    with reads_of_statistics() as seen:
        model(x).square().sum().backward()
    assert len(seen) == 3
    assert all(m.num_batches_tracked == 1 for m in model.modules() if type(m) is nn.BatchNorm3d)


def test_blocks_of_other_people() -> None:
    report = fastst.convert(MMBackbone())
    assert followed(report)
    assert followed(report) == [e.first.replace("conv.conv_s", "bn") for e in report.replaced]


@native
@pytest.mark.parametrize("place", ["0", "0.0", "0.0.1", "0.0.3", "1", "2", ""])
def test_hooks_see_the_right_tensors(place: str) -> None:
    """Wherever somebody looks, he sees what the separate modules give, and nothing warns."""
    torch.manual_seed(0)
    model = NESTED["grandchild"]().requires_grad_(False)
    model[0] = model[0][0]
    original = copy.deepcopy(model)
    fastst.convert(model)
    x = torch.randn(SHAPE)
    found: list[list[Tensor]] = []
    handles = []
    for m in (model, original):
        seen: list[Tensor] = []
        found.append(seen)
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            handles.append(getattr(m.get_submodule(place), register)(
                lambda _, args, *out, seen=seen: seen.extend(t.clone() for t in (*args, *out))
            ))  # fmt: skip
    inside = place in ("0.0.1", "0.0.3")  # of the pair, which then runs as separate operators
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if inside else "error", fastst.FallbackWarning)
        torch.testing.assert_close(model(x), original(x), rtol=1e-5, atol=1e-5)
    assert len(found[1]) == 3
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    told = str(fastst.explain(model, x))
    alone = place in ("2", "")  # what is before and after matters to nobody
    assert ("composed" in told) != alone
    assert ("statistics for the batch norm after it" in told) == alone
    if place in ("0.0", "1"):
        assert f"({place} has hooks)" in str(fastst.convert(model))
    for handle in handles:
        handle.remove()
    assert "statistics for the batch norm after it" in str(fastst.explain(model, x))


@native
def test_changes_after_conversion() -> None:
    """Parts are exchanged, modes change, attributes change: as PyTorch, and quietly."""
    changes: list[Callable[[Any], Any]] = [
        lambda m: setattr(m[1], "momentum", None),
        lambda m: m[1].eval(),
        lambda m: m[1].requires_grad_(False),
        lambda m: m[0].requires_grad_(False),
        lambda m: m.__setitem__(1, nn.BatchNorm3d(8, affine=False)),
        lambda m: m.__setitem__(1, nn.GroupNorm(2, 8)),
        lambda m: m.__setitem__(0, nn.Conv3d(3, 8, 3, padding=1)),
        lambda m: m.append(nn.Sigmoid()),
        lambda m: setattr(m, "note", 3),
        lambda m: setattr(m, "note", 4),
        lambda m: m.__setitem__(2, nn.Identity()),
    ]
    model = NESTED["child"]()
    original = copy.deepcopy(model)
    fastst.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastst.FallbackWarning)
        for change in changes:
            for m in (model, original):
                torch.manual_seed(1)
                change(m.train())
            compare(model, original, "cpu" if fused.is_converted(model[0]) else "auto",
                    torch.float32, SHAPE, OUT)  # fmt: skip


@pytest.mark.parametrize("case", ["shared norm", "norm twice", "y used twice", "not selected"])
def test_norms_that_are_left(case: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.norm = pair(3, 8), nn.BatchNorm3d(8)
            self.other = nn.Sequential(self.norm) if case == "shared norm" else None

        def forward(self, x: Tensor) -> Tensor:
            y = self.pair(x)
            z = self.norm(y)
            z = self.norm(z) if case == "norm twice" else z
            return z + y if case == "y used twice" else z

    model = NESTED["layer"]() if case == "not selected" else Odd()
    original = copy.deepcopy(model)
    report = fastst.convert(model, skip="0" if case == "not selected" else None)
    assert followed(report) == ([] if case == "not selected" else [None])
    assert type(model) is type(original)
    x = torch.randn(SHAPE)
    torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)


def test_copies() -> None:
    model = NESTED["grandchild"]()
    fastst.convert(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        assert again[1] is not model[1]
        again[1].eval()
        again(torch.randn(SHAPE))
    assert model[1].num_batches_tracked == 0


@pytest.mark.slow
def test_compile_fullgraph() -> None:
    torch.manual_seed(0)
    layer = fastst.Conv2Plus1d(8, 8, 3, padding=1)
    model = nn.Sequential(*NESTED["grandchild"](), layer, nn.BatchNorm3d(8))
    original = copy.deepcopy(model)
    assert followed(fastst.convert(model)) == ["1"]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for size in (6, 8):  # static, then dynamic
        x = torch.randn(2, 3, 3, size, size)
        torch.testing.assert_close(compiled(x), original(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.state_dict(), original.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    model = NESTED["grandchild"]().eval()
    original = copy.deepcopy(model)
    fastst.convert(model)
    x = torch.randn(SHAPE)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), original(x), rtol=1e-4, atol=1e-4)


def test_synchronised_afterwards() -> None:
    """The norm is exchanged for one that needs what other ranks have: it is called."""
    model = NESTED["child"]()
    fastst.convert(model)
    synced: Any = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()
    assert isinstance(synced[1], nn.SyncBatchNorm)
    fastst.revert(original := copy.deepcopy(synced))
    x = torch.randn(SHAPE)
    torch.testing.assert_close(synced(x), original(x), rtol=1e-4, atol=1e-4)


@native
def test_gradients_of_a_network_in_rows_of_channels() -> None:
    """On one thread, where PyTorch's own convolutions leave planes, whose norms are more exact."""
    torch.manual_seed(0)
    network = VideoResNet("2+1d", [Stage("2+1d", 16, 1, 1)], 8)
    clips, label = [torch.randn(2, 3, 8, 32, 32) for _ in range(3)], torch.tensor([1, 5])
    layout = torch.channels_last_3d

    def gradients(model: nn.Module, x: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), label)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])

    converted = copy.deepcopy(network)
    fastst.convert(converted)
    converted.to(memory_format=layout)  # type: ignore[call-overload]
    threads = torch.get_num_threads()
    errors: list[list[float]] = [[], []]
    try:
        torch.set_num_threads(1)
        for x in clips:
            true = gradients(copy.deepcopy(network).double(), x.double())
            found = (
                gradients(converted, x.contiguous(memory_format=layout)),
                gradients(network, x),
            )
            for of, got in zip(errors, found, strict=True):
                of.append(float((got - true).norm() / true.norm()))
    finally:
        torch.set_num_threads(threads)
    # Rounding that turns the sign of one ReLU's input moves a gradient by more than rounding does.
    assert sorted(errors[0])[1] <= 2 * max(errors[1])
