"""The end of a residual block in its last pair, of served copies: where it may be."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst
from tests.rewrite.test_optimize import settle

Ending = tuple[bool, str]  # residual, outer activation


def endings(model: nn.Module, x: Tensor) -> list[Ending]:
    """What each op of a call takes in."""
    with fastst.dispatch.recording() as calls, torch.no_grad():
        model(x).detach()
    pairs = [c.problem for c in calls if c.problem is not None]
    return [(p.residual, p.spec.outer_activation) for p in pairs]  # type: ignore[union-attr]


def pair(c: int, k: int | None = None, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(c, 6, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
        nn.BatchNorm3d(6),
        nn.ReLU(inplace=True),
        nn.Conv3d(6, k or c, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
    )


class Block(nn.Module):
    """A pair and its norm, ended by a function of it, of x and of the block."""

    def __init__(self, end: Callable[..., Tensor]) -> None:
        super().__init__()
        self.pair, self.bn, self.relu, self.drop = pair(4), nn.BatchNorm3d(4), nn.ReLU(), nn.ReLU6()
        self.leaky = nn.LeakyReLU(0.3)
        self.shortcut = nn.Conv3d(4, 4, 1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.end = end

    def forward(self, x):
        return self.end(self, x)


class Flat(nn.Module):
    """The same without a module for the pair: its convolutions are called in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_s, self.norm, self.relu, self.conv_t = pair(4)
        self.bn = nn.BatchNorm3d(4)

    def forward(self, x):
        out = self.bn(self.conv_t(self.relu(self.norm(self.conv_s(x)))))
        out += x
        return self.relu(out)


def y(m: Block, x: Tensor) -> Tensor:
    return m.bn(m.pair(x))


def _in_place_sum(m, x):
    out = y(m, x)
    out += x
    return m.relu(out)


def _downsampled(m, x):
    out = y(m, x)  # the shortcut is computed after the pair
    return F.relu(out + m.shortcut(x))


FUSED: dict[str, tuple[Callable[..., Tensor], Ending]] = {
    "x + y": (lambda m, x: m.relu(x + y(m, x)), (True, "relu")),
    "y + x": (lambda m, x: F.relu(y(m, x) + x), (True, "relu")),
    "out += x": (_in_place_sum, (True, "relu")),
    "add_": (lambda m, x: y(m, x).add_(x).relu_(), (True, "relu")),
    "torch.add": (lambda m, x: torch.relu(torch.add(x, y(m, x))), (True, "relu")),
    "shortcut after": (_downsampled, (True, "relu")),
    "no activation": (lambda m, x: y(m, x) + x, (True, "none")),
    "no sum": (lambda m, x: F.silu(y(m, x)), (False, "silu")),
    "slope": (lambda m, x: m.leaky(y(m, x) + x), (True, "leaky_relu")),
    "relu before the sum": (lambda m, x: F.relu(y(m, x)) + x, (False, "relu")),
    "relu6 after the sum": (lambda m, x: m.drop(y(m, x) + x), (True, "none")),
}


def _used_later(m, x):
    out = y(m, x)
    return F.relu(out + x) + out


def _sum_used_twice(m, x):
    total = y(m, x) + x
    return F.relu(total) * total


def _sum_into_shortcut(m, x):
    x = x * 1
    total = x.add_(y(m, x))
    return F.relu(total) + x


def _input_changes(m, x):
    x = x * 1
    out = y(m, x)
    x.mul_(2)
    return F.relu(out + x)


def _new_input_changes(m, x):
    x = m.shortcut(x)
    out = y(m, x)
    x.mul_(2)
    return F.relu(out + x)


def _new_input_changes_before_the_activation(m, x):
    x = m.shortcut(x)
    out = y(m, x)
    x.mul_(2)
    return F.relu(out)


def _input_changes_in_a_module(m, x):
    x = x * 1
    out = y(m, x)
    return F.relu(out + m.shortcut(F.relu(x, inplace=True)))


def _alias_changes(m, x):
    x = x * 1
    alias = x.view(-1)
    out = y(m, x)
    alias += 1
    return out + x


def _shortcut_changes_later(m, x):
    shortcut = x * 1
    out = F.relu(y(m, x) + shortcut)
    shortcut.zero_()
    return out + shortcut


# What remains of the sum and the activation for the op to take in.
TRAPS: dict[str, tuple[Callable[..., Tensor], Ending]] = {
    "output used later": (_used_later, (False, "none")),
    "sum used twice": (_sum_used_twice, (True, "none")),
    "sum into the shortcut": (_sum_into_shortcut, (False, "none")),
    "input changes before the sum": (_input_changes, (False, "none")),
    "new input changes": (_new_input_changes, (False, "none")),
    "new input changes, no sum": (_new_input_changes_before_the_activation, (False, "none")),
    "input changes in a module": (_input_changes_in_a_module, (False, "none")),
    "alias of the input changes": (_alias_changes, (False, "none")),
    "shortcut changes later": (_shortcut_changes_later, (True, "relu")),
    "alpha": (lambda m, x: F.relu(torch.add(y(m, x), x, alpha=2)), (False, "none")),
    "difference": (lambda m, x: F.relu(y(m, x) - x), (False, "none")),
    "number": (lambda m, x: F.relu(y(m, x) + 1), (False, "none")),
    "twice itself": (lambda m, x: (lambda out: F.relu(out + out))(y(m, x)), (False, "none")),
    "relu6": (lambda m, x: m.drop(y(m, x)), (False, "none")),
    "scaled": (lambda m, x: F.relu(y(m, x) * m.scale + x), (False, "none")),
    # Only a call can tell: the op is not used for the sum then.
    "broadcast shortcut": (lambda m, x: F.relu(y(m, x) + x.mean((2, 3, 4), True)), (False, "none")),
    "larger shortcut": (lambda m, x: F.relu(y(m, x) + x.unsqueeze(0)), (False, "none")),
    "other dtype": (lambda m, x: F.relu(y(m, x) + x.float()), (False, "none")),
    "dtype kept": (lambda m, x: y(m, x).add_(x.to(torch.complex64).real), (False, "none")),
    "number from a tensor": (lambda m, x: F.relu(y(m, x) + x.shape[0]), (False, "none")),
}
ENDS = FUSED | TRAPS


@pytest.mark.parametrize("end", ENDS)
def test_end(end: str) -> None:
    function, told = ENDS[end]
    torch.manual_seed(0)
    model = settle(Block(function).double())
    x = torch.randn(2, 4, 5, 8, 7, dtype=torch.float64)
    wanted = model(x.clone())
    optimised = fastst.optimize_for_inference(model)
    before = x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastst.FallbackWarning)
        warnings.filterwarnings("ignore", "conv2plus1d runs its")  # float64 is PyTorch's
        found = optimised(x)
    assert torch.equal(x, before)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    if "used" in end:  # which shows by and by
        for _ in range(8):
            endings(optimised, x)
        told = (False, "none")
    assert endings(optimised, x) == [told]


def test_slopes_that_differ() -> None:
    """The op has one slope for both activations."""
    model = settle(Block(lambda m, x: m.leaky(y(m, x) + x)).double())
    model.pair[2] = nn.LeakyReLU(0.1)
    x = torch.randn(1, 4, 3, 5, 5, dtype=torch.float64)
    optimised = fastst.optimize_for_inference(model)
    torch.testing.assert_close(optimised(x), model(x))
    assert endings(optimised, x) == [(True, "none")]
    model.pair[2] = nn.LeakyReLU(0.3)
    assert endings(fastst.optimize_for_inference(model), x) == [(True, "leaky_relu")]


def test_flat_block() -> None:
    model = settle(Flat().double())
    x = torch.randn(1, 4, 3, 5, 5, dtype=torch.float64)
    optimised = fastst.optimize_for_inference(model)
    torch.testing.assert_close(optimised(x), model(x))
    assert endings(optimised, x) == [(True, "relu")]


def test_two_pairs_meet() -> None:
    """The shortcut is a pair as well."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = pair(4, 5, 2), pair(4, 5, 2)
            self.left_bn, self.right_bn = nn.BatchNorm3d(5), nn.BatchNorm3d(5)

        def forward(self, x):
            return F.relu(self.left_bn(self.left(x)) + self.right_bn(self.right(x)))

    model = settle(Two().double())
    x = torch.randn(1, 4, 5, 8, 8, dtype=torch.float64)
    optimised = fastst.optimize_for_inference(model)
    torch.testing.assert_close(optimised(x), model(x))
    assert len(endings(optimised, x)) == 2


def test_a_hook_of_what_a_shortcut_was_added_to() -> None:
    """In a copy for inference whose weights need gradients again."""
    model = nn.Sequential(nn.Conv3d(3, 6, (1, 3, 3)), nn.ReLU(), nn.Conv3d(6, 4, (3, 1, 1))).eval()
    served = fastst.optimize_for_inference(model)
    served[0].weight.requires_grad_()
    y = served(torch.randn(1, 3, 5, 6, 6))
    z = y + torch.ones(y.shape)
    y.register_hook(lambda g: 0 * g)
    z.sum().backward()
    assert not served[0].weight.grad.any()
