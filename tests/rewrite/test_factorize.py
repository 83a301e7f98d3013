"""Pairs by singular values: exact where the rank suffices, best where not, and well reported."""

from __future__ import annotations

import copy
import math
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastst


def build(**options):
    torch.manual_seed(0)
    return nn.Conv3d(4, 6, 3, **{"padding": 1, **options}).double()


@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": (2, 1, 2), "bias": False},
        {"kernel_size": (3, 5, 2), "padding": (1, 2, 0), "dilation": (2, 1, 1)},
        {"groups": 2},
        {"padding": "same", "padding_mode": "replicate"},
        {"padding": (1, 1, 1), "padding_mode": "reflect", "stride": 2},
    ],
)
def test_exact_at_full_rank(order, options):
    options = dict(options)
    kernel = options.pop("kernel_size", 3)
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 6, kernel, **{"padding": 1, **options}).double()
    made = fastst.factorize(conv, mid_channels=10_000, order=order)
    (layer,) = made.layers
    x = torch.randn(2, 4, 7, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(made.module(x), conv(x), rtol=1e-10, atol=1e-10)
    assert layer.mid_channels == layer.full_rank == made.module.mid_channels
    assert layer.error < 1e-7
    assert layer.parameters[1] == sum(p.numel() for p in made.module.parameters())
    assert layer.parameters[0] == sum(p.numel() for p in conv.parameters())
    by_energy = fastst.factorize(conv, energy=1.0, order=order).layers[0]
    assert by_energy.mid_channels == layer.full_rank


@pytest.mark.parametrize("groups", [1, 2])
def test_exact_where_the_rank_suffices(groups):
    conv = build(groups=groups)
    pair = fastst.Conv2Plus1d(
        4, 6, 3, padding=1, groups=groups, mid_channels=4, activation=None, bias=False
    ).double()
    s, t = pair.spatial.weight, pair.temporal.weight
    g, m, n = groups, 4 // groups, 6 // groups
    with torch.no_grad():
        product = torch.einsum("gkmt,gmchw->gkcthw", t.view(g, n, m, 3), s.view(g, m, 4 // g, 3, 3))
        conv.weight.copy_(product.reshape(conv.weight.shape))
    for options in ({"mid_channels": 4}, {"energy": 1.0}):
        made = fastst.factorize(conv, **options)
        assert made.layers[0].mid_channels == 4
        x = torch.randn(1, 4, 5, 6, 6, dtype=torch.float64)
        torch.testing.assert_close(made.module(x), conv(x), rtol=1e-10, atol=1e-10)


def test_error_is_the_least_possible():
    """Eckart and Young: what is lost are the smallest singular values."""
    conv = build(bias=False)
    matrix = conv.weight.detach().permute(0, 2, 1, 3, 4).reshape(18, 36)
    s = torch.linalg.svdvals(matrix)
    for m in (1, 5, 12):
        made = fastst.factorize(conv, mid_channels=m)
        pair, layer = made.module, made.layers[0]
        s_weight, t_weight = (w.detach() for w in (pair.spatial.weight, pair.temporal.weight))
        product = torch.einsum("kmt,mchw->kcthw", t_weight[..., 0, 0], s_weight[:, :, 0])
        error = float((product - conv.weight.detach()).norm() / conv.weight.detach().norm())
        least = math.sqrt(float(s[m:].square().sum() / s.square().sum()))
        assert layer.error == pytest.approx(least, rel=1e-9)
        assert error == pytest.approx(least, rel=1e-9)


def test_energy_takes_the_fewest_mid_channels():
    conv = build()
    for energy in (0.3, 0.9, 0.999):
        m = fastst.factorize(conv, energy=energy).layers[0].mid_channels
        errors = [fastst.factorize(conv, mid_channels=n).layers[0].error for n in (m, m - 1) if n]
        assert 1 - errors[0] ** 2 >= energy - 1e-12
        assert len(errors) == 1 or 1 - errors[1] ** 2 < energy


def test_model():
    torch.manual_seed(0)
    shared = nn.Conv3d(6, 6, 3, padding=1)
    model = nn.Sequential(build().float(), nn.ReLU(), shared, shared, nn.Conv3d(6, 6, 1)).eval()
    hooked = build().float()
    hooked.register_forward_hook(lambda m, a, out: None)
    model.insert(0, nn.Conv3d(3, 4, (1, 3, 3)))
    model.append(nn.Sequential(nn.Conv3d(6, 4, 1), hooked))
    original = copy.deepcopy(model)
    made = fastst.factorize(model, energy=1.0)
    assert [layer.name for layer in made.layers] == ["1", "3"]
    assert made.left == {"6.1": "it has hooks"}
    assert made.module[3] is made.module[4]
    assert type(model[1]) is nn.Conv3d
    x = torch.randn(1, 3, 4, 8, 8)
    torch.testing.assert_close(made.module(x), original(x), rtol=1e-4, atol=1e-5)
    text = str(made)
    assert "factorized: 2" in text
    assert "6.1: it has hooks" in text
    assert str(made.layers[0]) in text
    trained = copy.deepcopy(made.module).train()
    trained(x).sum().backward()
    assert trained[1].spatial.weight.grad is not None


def test_flops_per_output_position():
    conv = build(stride=(2, 1, 1), bias=False)
    layer = fastst.factorize(conv, mid_channels=5).layers[0]
    assert layer.flops == (2 * 4 * 6 * 27, 2 * (5 * 4 * 9 * 2 + 6 * 5 * 3))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "exactly one of mid_channels and energy"),
        ({"mid_channels": 3, "energy": 0.5}, "exactly one of mid_channels and energy"),
        ({"mid_channels": 0}, "mid_channels must be a positive int"),
        ({"mid_channels": 2.5}, "mid_channels must be a positive int"),
        ({"mid_channels": True}, "mid_channels must be a positive int"),
        ({"energy": "half"}, "energy must be above 0"),
        ({"energy": math.nan}, "energy must be above 0"),
        ({"energy": 0.0}, "energy must be above 0"),
        ({"energy": 1.5}, "energy must be above 0"),
        ({"energy": 0.5, "order": "sideways"}, "order"),
    ],
)
def test_bad_arguments(options, told):
    with pytest.raises(ValueError, match=told):
        fastst.factorize(build(), **options)


def test_left_with_the_reason():
    nan, lazy = nn.Conv3d(3, 4, 3), nn.LazyConv3d(4, 3)
    nan.weight.data[0, 0, 0, 0, 0] = math.nan
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv3d(3, 4, 3))
    with torch.device("meta"):
        meta = nn.Conv3d(3, 4, 3)
    own = type("Own", (nn.Conv3d,), {})(3, 4, 3)
    made = fastst.factorize(nn.ModuleList([nan, lazy, parametrized, meta, own]), energy=0.5)
    assert made.left == {
        "0": "its weight is not finite",
        "1": "1 is lazy: it has no weights before its first call",
        "2": "2 is parametrized",
        "3": "3.weight is on the meta device",
        "4": "it is a tests.rewrite.test_factorize.Own, not a plain nn.Conv3d",
    }


def test_what_cannot_be_factorized():
    with pytest.raises(ValueError, match="not both spatial and temporal"):
        fastst.factorize(nn.Conv3d(3, 4, (1, 3, 3)), energy=0.5)
    with pytest.raises(ValueError, match="multiple of the 2 groups"):
        fastst.factorize(build(groups=2), mid_channels=3)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        fastst.factorize(None, energy=0.5)
    made = fastst.factorize(nn.Sequential(nn.Linear(3, 3)), energy=0.5)
    assert (made.layers, made.left) == ([], {})
    assert str(made) == "factorized: 0"


def tiled(self, x, weight, bias):
    return F.conv3d(F.pad(x, (1, 1, 1, 1, 1, 1), mode="circular"), weight, bias)


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
def test_what_somebody_has_replaced_is_left(method):
    model = nn.Sequential(build())
    setattr(model[0], method, MethodType(tiled, model[0]))
    made = fastst.factorize(model, energy=1.0)
    assert made.left == {"0": f"it has a {method} that is not of its class"}


def test_what_convert_has_put_on_is_no_replacement():
    model = nn.Sequential(build())
    fastst.convert(model)
    assert "_conv_forward" in vars(model[0])
    assert len(fastst.factorize(model, energy=1.0).layers) == 1


def test_methods_of_the_class_count(monkeypatch):
    monkeypatch.setattr(nn.Conv3d, "_conv_forward", tiled)
    assert list(fastst.factorize(nn.Sequential(build()), energy=1.0).left) == ["0"]


@pytest.mark.parametrize("order", ["spatial-first", "temporal-first"])
@pytest.mark.parametrize(("weight", "bias"), [(False, True), (True, False)])
def test_what_is_frozen_stays_so(order, weight, bias):
    conv = build()
    conv.weight.requires_grad_(weight), conv.bias.requires_grad_(bias)
    layer = fastst.factorize(conv, energy=1.0, order=order).module
    last = layer.temporal if order == "spatial-first" else layer.spatial
    assert last.bias.requires_grad == bias
    assert {layer.spatial.weight.requires_grad, layer.temporal.weight.requires_grad} == {weight}
    assert last.bias is not conv.bias


def test_shared_parameters_stay_shared():
    first, second = (nn.Conv3d(4, 4, 3, padding=1) for _ in range(2))
    second.weight, second.bias = first.weight, first.bias
    pairs = fastst.factorize(nn.Sequential(first, second), energy=1.0).module
    for name, p in pairs[0].named_parameters():
        assert pairs[1].get_parameter(name) is p


def test_weights_that_others_read_are_left():
    convs = [nn.Conv3d(4, 4, 3, padding=1) for _ in range(2)]
    hooked = nn.Conv3d(4, 4, 3, padding=1)
    hooked.register_forward_hook(lambda m, args, y: None)
    grouped = nn.Conv3d(8, 4, 3, padding=1, groups=2)
    table = nn.Module()
    table.known = nn.Parameter(torch.zeros_like(convs[1].weight))
    hooked.weight = grouped.weight = convs[0].weight
    convs[1].weight = table.known
    made = fastst.factorize(nn.ModuleList([*convs, hooked, grouped, table]), energy=1.0)
    assert made.left == {
        "0": "its weight is also that of 2, which stays as it is",
        "1": "its weight is also that of 4, which stays as it is",
        "2": "it has hooks",
        "3": "its weight is also that of 0, which stays as it is",
    }
    assert made.module[0].weight is made.module[2].weight
