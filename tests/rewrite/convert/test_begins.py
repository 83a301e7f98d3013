"""How a convolution goes on where its promises come to nothing."""

from __future__ import annotations

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
