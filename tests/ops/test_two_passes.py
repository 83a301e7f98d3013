"""A pair whose first convolution runs before the second is known: the same as in one call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastst
from fastst.functional import BatchNorm, begin, check, conv2plus1d
from fastst.problem.spec import PairTensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def step(backend: str, halves: bool, groups: int, order: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()

    c, m, k = 8, 16, 8
    spatial_first = order == "spatial-first"
    x, gamma, beta = draw(2, c, 4, 6, 5), draw(m), draw(m)
    ws = draw(*((m, c) if spatial_first else (k, m)), 1, 3, 3)
    wt = draw(*((k, m) if spatial_first else (m, c)), 3, 1, 1)
    if groups > 1:
        ws, wt = (w[:, : w.shape[1] // groups].detach().requires_grad_() for w in (ws, wt))
    bs, bt = draw(ws.shape[0]), draw(wt.shape[0])
    running = [torch.zeros(m, device=DEVICE), torch.ones(m, device=DEVICE)]
    norm = BatchNorm(*running, gamma, beta, training=True)
    settings = {
        "stride": (1, 1, 1), "padding": (1, 1, 1), "dilation": (1, 1, 1),
        "groups": (groups, groups), "padding_mode": ("zeros", "zeros"), "order": order,
    }  # fmt: skip
    with fastst.use_backend(backend):
        begun = None
        if halves:
            guess = [torch.empty_like(w) for w in (ws, wt)]
            guessed = (x, ws, guess[1], bs) if spatial_first else (x, wt, guess[0], bt)
            tensors = PairTensors(*guessed, None, gamma, beta)
            how = settings | {"activation": "silu", "negative_slope": 0.01}
            begun = begin(tensors, check(tensors, norm, **how), norm)
            assert begun is not None
        y = conv2plus1d(x, ws, wt, bs, bt, norm=norm, activation="silu", begun=begun, **settings)
        grads = torch.autograd.grad(y.sin().sum(), [x, ws, wt, bs, bt, gamma, beta])
    return [y.detach(), *grads, *running]


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu", "aten"])
def test_the_same_as_in_one_call(backend: str, groups: int, order: str) -> None:
    try:
        whole = step(backend, False, groups, order)
    except fastst.BackendError as error:
        pytest.skip(str(error))
    for a, b in zip(step(backend, True, groups, order), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
