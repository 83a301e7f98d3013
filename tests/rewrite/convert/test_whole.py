"""Convolutions that are no half of a pair: alone, with what ends them, as one operation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fastst
from fastst import dispatch
from tests.backends.cpu.test_cpu import built

pytestmark = built


class Block(nn.Module):
    """A residual block of an R3D or an MC3."""

    def __init__(self, channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        padding = tuple(k // 2 for k in kernel)
        self.one = nn.Conv3d(channels, channels, kernel, padding=padding, bias=False)
        self.two = nn.Conv3d(channels, channels, kernel, padding=padding, bias=False)
        self.norm, self.norm2 = nn.BatchNorm3d(channels), nn.BatchNorm3d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.two(self.relu(self.norm(self.one(x)))))
        y += x
        return self.relu(y)


def network(kernel: tuple[int, int, int] = (3, 3, 3)) -> nn.Sequential:
    torch.manual_seed(0)
    stem = nn.Conv3d(8, 16, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
    model = nn.Sequential(stem, nn.BatchNorm3d(16), nn.ReLU(), Block(16, kernel))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm3d):
            nn.init.normal_(m.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(m.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3)])
def test_inference_ends_in_the_convolution(kernel: tuple[int, int, int]) -> None:
    model, x = network(kernel).eval(), torch.randn(1, 8, 4, 20, 20)
    served = fastst.optimize_for_inference(model)
    with torch.no_grad(), dispatch.recording() as calls:
        y = served(x) + 0.0
    ends = [(c.chosen, c.problem.spec.activation, c.problem.residual) for c in calls]  # type: ignore[union-attr]
    assert ends == [("cpu", "relu", False)] * 2 + [("cpu", "relu", True)]
    assert y.abs().max() > 0.1
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
    assert list(served.state_dict()) == list(model.state_dict())


def test_norms_in_training_take_the_statistics_of_the_kernel() -> None:
    model, x = network(), torch.randn(2, 8, 4, 16, 16)
    converted = copy.deepcopy(model)
    fastst.convert(converted)
    with dispatch.recording() as calls:
        converted(x).square().sum().backward()
    forward = [c.problem.spec.output_statistics for c in calls if c.phase == "forward"]  # type: ignore[union-attr]
    assert forward == [True] * 3 and {c.chosen for c in calls} == {"cpu"}
    model(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), converted.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=1e-4 * scale, msg=name)
    for (name, b), c in zip(model.named_buffers(), converted.buffers(), strict=True):
        torch.testing.assert_close(c, b, msg=name)


def test_filters_hooks_and_revert() -> None:
    model, x = network().eval(), torch.randn(1, 8, 4, 16, 16)
    with torch.no_grad():
        for settings, expected in (
            (dict(), 3), (dict(only="0"), 1), (dict(skip="3.*"), 1), (dict(skip="*"), 0),
        ):  # fmt: skip
            converted = copy.deepcopy(model)
            fastst.convert(converted, **settings)  # type: ignore[arg-type]
            with dispatch.recording() as calls:
                y = converted(x) + 0.0
            assert len(calls) == expected, settings
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
        fastst.convert(converted := copy.deepcopy(model))
        converted[0].register_forward_hook(lambda *_: None)
        with dispatch.recording() as calls:
            converted(x)
        assert len(calls) == 2
        assert len(fastst.revert(converted)) == 3
        with dispatch.recording() as calls:
            converted(x)
        assert not calls


def test_where_no_kernel_runs_nothing_changes() -> None:
    """float64 on a CPU: PyTorch's convolution, as it did, without a warning."""
    model, x = network().double().eval(), torch.randn(1, 8, 4, 16, 16).double()
    fastst.convert(converted := copy.deepcopy(model))
    with torch.no_grad(), dispatch.recording() as calls:
        assert torch.equal(converted(x), model(x))
    assert not calls


def test_what_pytorch_refuses_it_still_refuses() -> None:
    model = network().eval()
    fastst.convert(model)
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(1, 4, 4, 16, 16))


def test_a_thin_stem_stays_with_pytorch() -> None:
    stem, x = nn.Conv3d(3, 16, (3, 7, 7)).eval(), torch.randn(1, 3, 4, 16, 16)
    expected = stem(x)
    fastst.convert(stem)
    with dispatch.recording() as calls:
        assert torch.equal(stem(x), expected)
    assert not calls
