"""Batch norms of promises: which the rules take, and when statistics are counted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import fastst
from tests.support.blocks import Block, compute_pair


def test_a_norm_that_was_called_before() -> None:
    """PyTorch's backward of that call has saved the running statistics, and checks versions."""
    plain = Block(compute_pair).double()
    converted = copy.deepcopy(plain)
    fastst.convert(converted)
    x, found = torch.randn(2, 4, 5, 6, 6, dtype=torch.float64), []
    for m in (plain, converted):
        v = m.n(torch.cat([x, x[:, :2]], 1) * m.s.bias.view(1, 6, 1, 1, 1))
        (m(x).square().sum() + v.square().sum()).backward()
        found.append([p.grad for p in m.parameters()] + list(m.buffers()))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_statistics_counted_after_an_operation_has_read_them() -> None:
    """Without a sign in their version counters: PyTorch's norms and pairs leave none."""
    block = Block(compute_pair).double().eval()
    fastst.convert(block)
    x = torch.randn(2, 4, 5, 6, 6, dtype=torch.float64)
    v = block.n(block.s(x))
    block.t(F.relu(v)).sum()
    wanted = block.n(block.s(x) + 0)
    block.train()(x).sum()
    torch.testing.assert_close(v + 0, wanted)


@pytest.mark.parametrize(("eps", "training"), [(0.0, True), (-1e-5, True), (-1e-5, False)])
def test_an_eps_that_pytorch_refuses(eps: float, training: bool) -> None:
    block = Block(compute_pair).train(training)
    block.n.eps = eps
    x = torch.randn(2, 4, 5, 6, 6)
    errors = []
    for convert in (False, True):
        if convert:
            fastst.convert(block)
        try:
            block(x).sum()
        except ValueError as error:
            errors.append(str(error))
    assert len(errors) in (0, 2)  # older versions of PyTorch compute
