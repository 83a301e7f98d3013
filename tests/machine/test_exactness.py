"""``fastst.exact``: the bits of PyTorch's separate modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastst
from fastst.machine.exactness import WHY


def _same(fused: Any, modules: Any, x: Tensor) -> None:
    """Output, every gradient and the running statistics, to the last bit."""
    results = []
    for run in (fused, modules):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_a_pair(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = fastst.Conv2Plus1d(8, 16, 3, padding=1, norm="batch", activation="silu").to(dtype)
    other = fastst.Conv2Plus1d(8, 16, 3, padding=1, norm="batch", activation="silu").to(dtype)
    other.load_state_dict(layer.state_dict())
    modules = nn.Sequential(other.spatial, other.norm, other.activation, other.temporal)
    x = torch.randn(2, 8, 4, 12, 12, dtype=dtype).to(memory_format=memory_format)
    with fastst.exact():
        _same(layer, modules, x)
    for (name, ours), theirs in zip(layer.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    for (name, p), q in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]


def test_a_convolution() -> None:
    torch.manual_seed(0)
    norm, plain = nn.GroupNorm(2, 8), nn.Conv3d(8, 8, 3, padding=1, padding_mode="replicate")
    layer = fastst.Conv3d(
        8, 8, 3, padding=1, padding_mode="replicate", input_norm=norm, input_activation="silu"
    )
    layer.load_state_dict(
        plain.state_dict() | {f"input_norm.{n}": p for n, p in norm.named_parameters()}
    )
    with fastst.exact():
        _same(layer, nn.Sequential(norm, nn.SiLU(), plain), torch.randn(2, 8, 4, 12, 12))


def test_a_convolution_behind_a_norm_of_instances() -> None:
    norm = nn.InstanceNorm3d(8, affine=True)
    layer = fastst.Conv3d(8, 8, 3, padding=1, input_norm=norm)
    plain = nn.Conv3d(8, 8, 3, padding=1)
    plain.weight, plain.bias = layer.weight, layer.bias
    with fastst.exact():
        _same(layer, nn.Sequential(norm, plain), torch.randn(2, 8, 4, 6, 6))


@pytest.mark.parametrize("combine", ["add", "cat"])
@pytest.mark.parametrize("norms", [dict(branch_norm="batch"), dict(norm="batch")])
def test_parallel_branches(norms: dict[str, Any], combine: str) -> None:
    torch.manual_seed(0)
    m = fastst.ParallelConv2Plus1d(8, 8, 3, padding=1, activation="relu", combine=combine, **norms)
    x = torch.randn(2, 8, 4, 6, 6) * 3 + 1
    m(x)
    m.eval()

    def apart(x: Tensor) -> Tensor:
        a, b = m.spatial(x), m.temporal(x)
        if m.spatial_norm is not None and m.temporal_norm is not None:
            a, b = m.spatial_norm(a), m.temporal_norm(b)
        y = a + b if combine == "add" else torch.cat((a, b), 1)
        return m.activation(y if m.norm is None else m.norm(y))  # type: ignore[no-any-return]

    with fastst.exact():
        _same(m, apart, x)


def test_statistics_are_in_float32_at_least() -> None:
    x, w = torch.randn(1, 8, 2, 3, 3).bfloat16(), torch.randn(8, 8, 1, 1, 1).bfloat16()
    with fastst.exact():
        _, statistics = fastst.functional.conv3d(x, w, output_statistics=True)
    assert statistics.mean.dtype == statistics.var.dtype == torch.float32


def test_a_converted_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(8), nn.ReLU(),
        nn.Conv3d(8, 4, (3, 1, 1), padding=(1, 0, 0)), nn.BatchNorm3d(4),
    )  # fmt: skip
    converted = nn.Sequential(*model)
    x = torch.randn(1, 3, 4, 10, 10)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    y = model(x)
    model.load_state_dict(state)
    fastst.convert(converted)
    with fastst.exact():
        assert torch.equal(converted(x), y)


@pytest.mark.parametrize("kind", [fastst.Conv2Plus1d, fastst.Conv3d, fastst.ParallelConv2Plus1d])
def test_explain_says_so(kind: Any) -> None:
    with fastst.exact():
        found = fastst.explain(kind(8, 8, 3, padding=1).eval(), torch.randn(1, 8, 2, 4, 4))
    assert (found.backend, found.why_composed) == ("composed", WHY)


def test_holds_within_the_block_only() -> None:
    layer, x = fastst.Conv2Plus1d(4, 8, 3, padding=1), torch.randn(1, 4, 3, 9, 9)
    with fastst.use_backend("reference"):
        truth = layer(x)
        with fastst.exact(), fastst.exact(False):
            assert torch.equal(layer(x), truth)
        with fastst.exact():
            assert not torch.equal(layer(x), truth)  # which is rounded once
        assert torch.equal(layer(x), truth)
    fastst.exact()
    try:
        assert torch.equal(layer(x), nn.Sequential(layer.spatial, nn.ReLU(), layer.temporal)(x))
    finally:
        fastst.exact(False)
