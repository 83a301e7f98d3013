"""A promise that is read in another state than that in which it was made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastst
from tests.support.blocks import Block, compute_pair


def under_exact(m: Any, h: Tensor) -> Tensor:
    with fastst.exact():
        return m.t(h) + 0


def under_dual(m: Any, h: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return m.t(h) + 0


TRANSFORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "exact": under_exact,
    "dual": under_dual,
    "vmap": lambda m, h: torch.func.vmap(lambda a: m.t(h) * a)(torch.ones(2)),
    "grad": lambda m, h: torch.func.grad(lambda w: (h * w).sum())(torch.ones(())),
    "jvp": lambda m, h: torch.func.jvp(
        lambda w: (h * w).sum(), (torch.ones(()),), (torch.ones(()),)
    )[1],
    "vjp": lambda m, h: torch.func.vjp(lambda w: (h * w).sum(), torch.ones(()))[0],
    "grad of the second": lambda m, h: torch.func.grad(
        lambda w: torch.func.functional_call(m.t, {"weight": w}, (h,)).sum()
    )(m.t.weight.detach()),
    "vjp of the second": lambda m, h: torch.func.vjp(
        lambda w: torch.func.functional_call(m.t, {"weight": w}, (h,)), m.t.weight.detach()
    )[0],
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("named", ["u", "v"])
@pytest.mark.parametrize("call", TRANSFORMS.values(), ids=TRANSFORMS)
def test_read_in_a_transform(call: Any, named: str, grad: bool) -> None:
    """What was promised before it; statistics are counted once."""
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        block = Block(lambda m, x: m.n(m.s(x)))
        if converted:
            fastst.convert(block)
        x = torch.randn(2, 4, 4, 6, 6)
        with torch.set_grad_enabled(grad):
            u = block.s(x)
            y = call(block, u if named == "u" else F.relu(block.n(u)))
        found.append([y.detach(), *block.n.buffers()])
    torch.testing.assert_close(*found)


def test_an_inference_tensor_is_refused_where_the_plain_module_refuses_it() -> None:
    block = Block(compute_pair)
    fastst.convert(block)
    with torch.inference_mode():
        x = torch.randn(1, 4, 5, 6, 6)
        with torch.enable_grad():  # records nothing
            block(x).sum()
    counted = block.n.num_batches_tracked.clone()  # type: ignore[operator, union-attr]
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        block(x)
    assert block.n.num_batches_tracked == counted


def test_statistics_written_in_a_checkpoint_that_has_ended() -> None:
    """Backward of the plain module reads them as they are then."""
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        block = Block(compute_pair).eval()
        if converted:
            fastst.convert(block)

        def inner(x: Tensor, m: Any = block) -> Tensor:
            u = m.n(m.s(x))
            m.n.running_var.mul_(1.5)
            return u

        y = checkpoint(inner, torch.randn(1, 4, 5, 6, 6), use_reentrant=False)
        y.square().sum().backward()
        found.append([y, block.s.weight.grad, *block.buffers()])
    torch.testing.assert_close(*found)
