"""What is held between forward and backward, in bytes of unique storages."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastst


def held(call: Callable[[], Tensor], *own: Tensor) -> int:
    """Bytes that autograd keeps for backward, parameters not counted."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)  # alive, so that no address is used twice
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    for t in own:
        storages.pop(t.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return sum(storages.values())


def pair(**settings: Any) -> tuple[fastst.Conv2Plus1d, Tensor]:
    layer = fastst.Conv2Plus1d(64, 64, 3, padding=1, bias=False, **settings)
    assert layer.mid_channels == 144
    return layer, torch.randn(1, 64, 4, 14, 14, requires_grad=True)


def eager(layer: Any) -> nn.Sequential:
    return nn.Sequential(
        layer.spatial, layer.norm or nn.Identity(), layer.activation, layer.temporal
    )


def share(layer: Any, x: Tensor) -> float:
    parameters = list(layer.parameters())
    ours = held(lambda: layer(x), *parameters)
    peer = held(lambda: eager(layer)(x), *parameters)
    assert peer >= 4 * (64 + 2 * 144) * x[0, 0].numel()  # x, u and z: else the measure is wrong
    return ours / peer


@pytest.mark.parametrize("channels_last", [False, True])
def test_batch_norm_keeps_x_and_u(channels_last: bool) -> None:
    layer, x = pair(norm="batch")
    if channels_last:
        x = x.detach().to(memory_format=torch.channels_last_3d).requires_grad_()
    assert share(layer, x) <= 0.60


def test_recompute_keeps_only_x() -> None:
    assert share(*pair(norm="batch", recompute=True)) <= 0.20


def test_without_a_norm_only_x_is_kept() -> None:
    layer, x = pair(norm=None)
    assert held(lambda: layer(x), *layer.parameters()) == x.numel() * 4
    layer.recompute = False
    assert held(lambda: layer(x), *layer.parameters()) > x.numel() * 4


def test_frozen_norm_keeps_no_more() -> None:
    layer, x = pair(norm="batch")
    assert share(layer.eval(), x) <= 0.60


def test_parallel_keeps_only_x() -> None:
    layer = fastst.ParallelConv2Plus1d(32, 32, 3, padding=1, branch_activation="relu")
    x = torch.randn(1, 32, 4, 14, 14, requires_grad=True)
    parameters = list(layer.parameters())
    assert held(lambda: layer(x), *parameters) == x.numel() * 4


def test_nothing_is_kept_that_nobody_needs() -> None:
    layer, x = pair(norm="batch")
    layer.requires_grad_(False)
    with torch.no_grad():
        y = layer(x)
    assert y.grad_fn is None


def test_the_measure_sees_a_tensor_that_is_kept() -> None:
    """Plant: saving z as well would break the limit."""
    layer, x = pair(norm="batch")
    z = torch.randn(1, 144, 4, 14, 14, requires_grad=True)
    extra = held(lambda: z.exp())
    assert extra == z.numel() * 4
    parameters = list(layer.parameters())
    peer = held(lambda: eager(layer)(x), *parameters)
    assert (held(lambda: layer(x), *parameters) + extra) / peer > 0.60


def test_backward_releases_what_was_kept() -> None:
    layer, x = pair(norm="batch")
    y = layer(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


# ---- which pairs recompute


def test_the_environment_says_what_no_argument_says(monkeypatch: pytest.MonkeyPatch) -> None:
    lean, fat = share(*pair(norm="batch", recompute=True)), share(*pair(norm="batch"))
    for value, unsaid in (("1", lean), ("0", fat), ("", fat)):
        monkeypatch.setenv("FASTST_RECOMPUTE", value)
        assert share(*pair(norm="batch")) == unsaid
        assert share(*pair(norm="batch", recompute=False)) == fat
        assert share(*pair(norm="batch", recompute=True)) == lean


class Network(nn.Module):
    """Three pairs: plain modules, a layer, and a layer that has been told."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Sequential(
            nn.Conv3d(4, 9, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(9, momentum=None),
            nn.ReLU(), nn.Conv3d(9, 8, (3, 1, 1), padding=(1, 0, 0)),
        )  # fmt: skip
        self.layer = fastst.Conv2Plus1d(8, 16, 3, (1, 2, 2), padding=1, norm="batch")
        self.told = fastst.Conv2Plus1d(16, 4, 3, padding=1, recompute=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.told(self.layer(self.plain(x)))


def network() -> tuple[Network, Tensor]:
    model = Network()
    fastst.convert(model)
    return model, torch.randn(2, 4, 3, 8, 8)


@pytest.mark.parametrize("budget", [1.0, 0.7, 0.5, 0.0])
def test_a_budget_saves_the_bytes_that_it_says(budget: float) -> None:
    model, x = network()
    own = [*model.parameters(), *model.buffers()]
    before = held(lambda: model(x), *own)
    model.zero_grad()
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    state = {n: t.clone() for n, t in model.state_dict().items()}
    plan = fastst.set_memory_budget(model, budget, x)
    assert plan is not None
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    for m in (model, copy.deepcopy(model)):
        saved = before - held(lambda m=m: m(x), *m.parameters(), *m.buffers())
        assert saved == plan.total - plan.kept
    told = 2 * 3 * 4 * 4 * 40 * 4  # u of the pair that keeps it whatever the budget
    assert plan.kept <= max(budget * plan.total, told)
    assert set(plan.recomputed) <= {"plain.0", "layer.spatial"}
    got = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert fastst.set_memory_budget(model, None) is None
    assert held(lambda: model(x), *own) == before


def test_the_cheapest_pairs_recompute_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations per byte of u are the fewer the thinner the input: 9·4 of the first pair."""
    monkeypatch.setenv("FASTST_RECOMPUTE", "1")  # a choice goes before it
    model, x = network()
    plan = fastst.set_memory_budget(model, 0.8, x)
    assert plan is not None
    assert plan.recomputed == ("plain.0",)


class Makes(nn.Module):
    """A forward that makes tensors, and may read one."""

    def __init__(self, reads: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        self.pair = fastst.Conv2Plus1d(4, 4, 3, padding=1, norm="batch")
        self.table = torch.linspace(0, 1, 4)  # no buffer
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.arange(x.shape[2], dtype=x.dtype)[:, None, None]
        mask = torch.ones(x.shape[0], 1, 1, 1, 1) * self.table[:, None, None, None]
        if torch.tensor(3).item() == 3 and self.reads is not None:
            self.reads(x)
        return self.pair((x + frames) * mask + torch.zeros_like(x))


def test_models_may_make_tensors() -> None:
    model, x = Makes(), torch.randn(1, 4, 4, 6, 6)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    plan = fastst.set_memory_budget(model, 0.5, x)
    assert plan is not None and plan.recomputed == ("pair.spatial",)
    assert type(model.table) is Tensor
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    model(x).sum().backward()


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.numpy(), lambda x: x[x > 0],
        lambda x: 1 if x.mean() > 0 else 2,
    ],
)  # fmt: skip
def test_models_that_read_values_are_refused(reads: Callable[[Tensor], Any]) -> None:
    model = Makes(reads)
    with pytest.raises(ValueError, match="shapes but no values, whose values its forward must"):
        fastst.set_memory_budget(model, 0.5, torch.randn(1, 4, 4, 6, 6))


class Streams(nn.Module):
    """A forward that keeps frames for its next call."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = fastst.Conv2Plus1d(4, 4, 3, padding=1, norm="batch")
        self.past: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pair(x if self.past is None else torch.cat([self.past, x], 2))
        self.past = x[:, :, -1:]
        return y


def test_what_a_forward_keeps_stays_as_it_was() -> None:
    model, x = Streams(), torch.randn(1, 4, 4, 6, 6)
    plan = fastst.set_memory_budget(model, 0.5, x)
    assert plan is not None and plan.recomputed == ("pair.spatial",)
    assert model.past is None
    model(x)
    past = model.past
    fastst.set_memory_budget(model, 0.5, x)
    assert model.past is past
    copy.deepcopy(model)


def test_models_that_cannot_be_copied_are_refused() -> None:
    model = Streams()
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"must be one that copy\.deepcopy takes: .* pickle"):
        fastst.set_memory_budget(model, 0.5, torch.randn(1, 4, 4, 6, 6))


def test_budgets_that_cannot_be() -> None:
    model, x = network()
    for wrong, kind, message in (
        ("half", TypeError, "must be a number or None, got 'half'"),
        (1.5, ValueError, "within 0 and 1, got 1.5"),
    ):
        with pytest.raises(kind, match=message):
            fastst.set_memory_budget(model, wrong, x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got int"):
        fastst.set_memory_budget(3, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="it runs none"):
        fastst.set_memory_budget(nn.ReLU(), 0.5, x)
    fastst.set_memory_budget(model, 0.0, x)
    before = held(lambda: model(x), *model.parameters(), *model.buffers())
    with pytest.raises(ValueError, match="to have 4 channels"):
        fastst.set_memory_budget(model, 1.0, x[:, :2])
    assert held(lambda: model(x), *model.parameters(), *model.buffers()) == before
