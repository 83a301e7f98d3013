"""Modules run as one operation where nobody can tell, else one after the other with the reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastst
from fastst import Conv2Plus1d, ParallelConv2Plus1d
from tests.nn.test_layers import FLOAT, eager


def foreign_cases() -> dict[str, tuple[Callable[[], Conv2Plus1d], str]]:
    def base(**settings: Any) -> Conv2Plus1d:
        return Conv2Plus1d(4, 4, 3, padding=1, **({"mid_channels": 6} | settings))

    def hooked(child: str, register: str) -> Callable[[], Conv2Plus1d]:
        def make() -> Conv2Plus1d:
            layer = base(norm="batch")
            getattr(getattr(layer, child), register)(lambda *_: None)
            return layer

        return make

    def weight_norm() -> Conv2Plus1d:
        layer = base()
        parametrizations.weight_norm(layer.spatial)
        return layer

    def spectral_norm() -> Conv2Plus1d:
        layer = base()
        parametrizations.spectral_norm(layer.temporal)
        return layer.eval()  # in training each call iterates its vectors

    def pruned() -> Conv2Plus1d:
        layer = base()
        prune.l1_unstructured(layer.temporal, "weight", 0.5)
        return layer

    def subclassed() -> Conv2Plus1d:
        class Scaled(nn.Conv3d):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        layer = base()
        layer.temporal = Scaled(6, 4, (3, 1, 1), padding=(1, 0, 0))
        return layer

    def replaced() -> Conv2Plus1d:
        layer = base()
        forward = layer.spatial.forward
        layer.spatial.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]
        return layer

    def by_method() -> Conv2Plus1d:  # as seamless tiling and LoRA tools do
        layer = base()
        method = layer.spatial._conv_forward
        layer.spatial._conv_forward = lambda x, w, b: method(x, 2 * w, b)  # type: ignore[method-assign]
        return layer

    return {
        "forward hook": (hooked("temporal", "register_forward_hook"), "temporal convolution has"),
        "pre-hook": (hooked("spatial", "register_forward_pre_hook"), "spatial convolution has"),
        "backward hook": (hooked("norm", "register_full_backward_hook"), "norm has hooks"),
        "hook of the activation": (hooked("activation", "register_forward_hook"), "activation has"),
        "weight norm": (weight_norm, "spatial convolution is a ParametrizedConv3d"),
        "spectral norm": (spectral_norm, "temporal convolution is a ParametrizedConv3d"),
        "pruning": (pruned, "temporal convolution has hooks"),
        "subclass": (subclassed, "temporal convolution is a Scaled"),
        "replaced forward": (replaced, "spatial convolution has a forward that is not"),
        "replaced _conv_forward": (by_method, "spatial convolution has a _conv_forward that"),
        "group norm": (lambda: base(norm=nn.GroupNorm(2, 6)), "norm is a GroupNorm"),
        "instance norm": (lambda: base(norm=nn.InstanceNorm3d(6)), "norm is a InstanceNorm3d"),
        "parameters": (lambda: base(activation=nn.PReLU(6)), "activation is a PReLU"),
        "softplus": (lambda: base(activation=nn.Softplus()), "activation is a Softplus"),
    }  # fmt: skip


@pytest.mark.parametrize("name", foreign_cases())
@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
def test_foreign_children_are_composed_with_the_reason(name: str) -> None:
    make, reason = foreign_cases()[name]
    layer = make()
    found = fastst.explain(layer, torch.randn(2, 4, 4, 5, 5))
    assert found.backend == "composed"
    assert reason in str(found.why_composed), found.why_composed
    x = torch.randn(2, 4, 4, 5, 5)
    torch.testing.assert_close(layer(x), eager(layer, x), **FLOAT)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Conv3d, "forward"), (nn.Conv3d, "_conv_forward"), (nn.BatchNorm3d, "forward"),
        (nn.Module, "_call_impl"), (nn.functional, "conv3d"), (nn.functional, "batch_norm"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Conv2Plus1d, ParallelConv2Plus1d])
@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
def test_a_layer_follows_what_was_replaced_on_classes(
    kind: Any, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = dict(norm="batch") if kind is Conv2Plus1d else dict(branch_norm="batch")
    layer, calls = kind(4, 4, 3, padding=1, **settings).eval(), []
    before, x = getattr(owner, name), torch.randn(1, 4, 3, 5, 5)
    y = layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **kw: (calls.append(0), before(*args, **kw))[1])
        torch.testing.assert_close(layer(x), y)
    seen = len(calls)
    assert seen > 0
    layer(x)
    assert len(calls) == seen


@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
def test_hooks_are_called_with_what_eager_gives_them() -> None:
    layer = Conv2Plus1d(4, 4, 3, padding=1, mid_channels=6)
    seen: list[Tensor] = []
    handle = layer.spatial.register_forward_hook(lambda m, args, out: seen.append(out))
    x = torch.randn(1, 4, 4, 5, 5)
    layer(x)
    assert len(seen) == 1 and seen[0].shape == (1, 6, 4, 5, 5)
    handle.remove()
    assert fastst.explain(layer, x).backend != "composed"
    layer(x)
    assert len(seen) == 1


def test_hooks_of_the_layer_itself_need_no_composing() -> None:
    layer = Conv2Plus1d(4, 4, 3)
    seen = []
    layer.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    layer.register_full_backward_hook(lambda m, i, o: seen.append(o[0].shape))
    x = torch.randn(1, 4, 4, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert len(seen) == 2
    assert fastst.explain(Conv2Plus1d(4, 4, 3), x).backend != "composed"


def test_hooks_on_parameters_and_frozen_parameters() -> None:
    layer = Conv2Plus1d(4, 4, 3, norm="batch")
    layer.spatial.requires_grad_(False)
    layer.temporal.weight.register_hook(lambda g: g * 0)
    layer(torch.randn(2, 4, 4, 5, 5)).sum().backward()
    assert layer.spatial.weight.grad is None and layer.norm.weight.grad is not None
    assert not layer.temporal.weight.grad.any()


@pytest.mark.filterwarnings("ignore::fastst.FallbackWarning")
def test_removing_a_parametrization_brings_the_op_back() -> None:
    layer = Conv2Plus1d(4, 4, 3)
    parametrizations.weight_norm(layer.spatial)
    x = torch.randn(1, 4, 4, 5, 5)
    before = layer(x)
    parametrize.remove_parametrizations(layer.spatial, "weight")
    assert fastst.explain(layer, x).backend != "composed"
    torch.testing.assert_close(layer(x), before, **FLOAT)


def test_global_hooks() -> None:
    layer = Conv2Plus1d(4, 4, 3)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        fastst.dispatch.selection._warned.clear()
        with pytest.warns(fastst.FallbackWarning, match="global module hooks"):
            layer(torch.randn(1, 4, 4, 5, 5))
    finally:
        handle.remove()
    assert seen.count(nn.Conv3d) == 2


def test_sync_batch_norm() -> None:
    layer = Conv2Plus1d(4, 4, 3, norm="batch")
    nn.init.normal_(layer.norm.running_mean)
    x = torch.randn(2, 4, 4, 5, 5)
    expected = layer.eval()(x)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert type(synced.norm) is nn.SyncBatchNorm
    torch.testing.assert_close(synced(x), expected)
    assert fastst.explain(synced, x).backend != "composed"
    # One process: the statistics of its batch, also where PyTorch's own class wants a GPU.
    plain = copy.deepcopy(synced)
    plain.norm.__class__ = nn.BatchNorm3d
    torch.testing.assert_close(synced.train()(x), plain.train()(x))
    torch.testing.assert_close(synced.norm.running_var, plain.norm.running_var)
    assert fastst.explain(synced, x).backend != "composed"
