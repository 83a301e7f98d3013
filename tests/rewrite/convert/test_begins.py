"""How a convolution goes on where its promises come to nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst
from tests.support.blocks import Block


def test_a_convolution_that_never_pairs_is_asked_less_often() -> None:
    conv = nn.Sequential(nn.Conv3d(4, 6, (1, 3, 3)), nn.Conv3d(6, 4, (3, 1, 1)))
    fastst.convert(conv)
    x = torch.randn(1, 4, 3, 6, 6)
    kinds = []
    for _ in range(100):
        u = conv[0](x)
        kinds.append(type(u) is Tensor)
        u.sum()
    assert sum(kinds) > 80
    with fastst.dispatch.recording() as calls:
        for _ in range(130):
            conv(x)
    assert calls


def test_explain_says_what_became_of_a_promise() -> None:
    block = Block(lambda m, x: m.t(m.s(x).sin()) + m.t(F.relu(m.s(x)))).eval()
    fastst.convert(block)
    told = str(fastst.explain(block, torch.randn(1, 4, 3, 6, 6)))
    assert "s: composed of separate PyTorch operators, because its output goes to sin" in told
    assert "conv2plus1d (1, 4, 3, 6, 6)" in told


class Own(nn.Conv3d):
    """A class whose ``_conv_forward`` a test replaces."""


def network() -> nn.Sequential:
    """Pairs of both orders, padding by another mode, and a convolution of no pair."""
    return nn.Sequential(
        Own(4, 6, (1, 3, 3), padding=(0, 1, 1), padding_mode="replicate"), nn.BatchNorm3d(6),
        nn.ReLU(), Own(6, 4, (3, 1, 1), padding=(1, 0, 0)), nn.ReLU(), Own(4, 4, 3, padding=1),
    ).eval()  # fmt: skip


def counted(old: Any) -> tuple[list[None], Any]:
    """A function in the place of one of PyTorch's, and an element for each call."""
    calls: list[None] = []

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return 2 * old(*args, **kwargs)

    return calls, function


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("where", "name"), [
    (F, "conv3d"), (F, "pad"), (F, "batch_norm"), (F, "relu"), (torch, "batch_norm"),
    (torch, "relu"),
])  # fmt: skip
def test_functions_that_are_replaced_later(
    where: Any, name: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, x = network(), torch.randn(2, 4, 4, 6, 6)
    converted, served = copy.deepcopy(plain), fastst.optimize_for_inference(plain)
    fastst.convert(converted)
    calls, function = counted(getattr(where, name))
    with torch.set_grad_enabled(grad):
        before = plain(x)
        monkeypatch.setattr(where, name, function)
        wanted = plain(x)
        count = len(calls)
        for model in (converted, served):
            calls.clear()
            torch.testing.assert_close(model(x) + 0, wanted, rtol=1e-4, atol=1e-4)
            assert len(calls) == count > 0
        monkeypatch.undo()
        with fastst.dispatch.recording() as ran:
            torch.testing.assert_close(converted(x) + 0, before, rtol=1e-4, atol=1e-4)
        assert any(call.problem is not None for call in ran)


@pytest.mark.parametrize("which", [0, 3, 5])
def test_a_class_whose_method_is_replaced_later(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a first convolution of a pair, of a second one, or of one alone."""
    plain, x = network(), torch.randn(2, 4, 4, 6, 6)
    plain[which].__class__ = type("Later", (nn.Conv3d,), {})
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    converted(x)
    _, method = counted(nn.Conv3d._conv_forward)
    monkeypatch.setattr(type(plain[which]), "_conv_forward", method)
    torch.testing.assert_close(converted(x) + 0, plain(x), rtol=1e-4, atol=1e-4)


def test_a_graph_is_made_anew_where_a_function_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, x = network(), torch.randn(2, 4, 4, 6, 6)
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    compiled = torch.compile(converted, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(F, "conv3d", counted(F.conv3d)[1])
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
