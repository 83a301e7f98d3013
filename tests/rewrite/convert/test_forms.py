"""Pairs as other people write them: small stand-ins, one for each form."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastst
from fastst.rewrite.convert import Replaced
from tests.rewrite.convert.test_converter import assert_same
from tests.support.peers import pytorchvideo


class TwoAttributes(nn.Module):
    """Attributes named after the other kind of convolution, order chosen by a flag."""

    def __init__(self, swap: bool, norm: bool = True):
        super().__init__()
        spatial = nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1), bias=False)
        temporal = nn.Conv3d(6, 5, (3, 1, 1), padding=(1, 0, 0), groups=1)
        if swap:
            spatial = nn.Conv3d(6, 5, (1, 3, 3), padding=(0, 1, 1))
            temporal = nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0))
        self.conv_t, self.conv_s = (temporal, spatial) if swap else (spatial, temporal)
        self.norm = nn.BatchNorm3d(6, eps=1e-3, momentum=None) if norm else None
        self.act = nn.SiLU()

    def forward(self, x):
        x = self.conv_t(x)
        x = self.norm(x) if self.norm else x
        return self.conv_s(self.act(x))


class ConvModule(nn.Module):
    """Convolution, norm and activation in one module, so that a pair lies across two."""

    def __init__(self, c, k, kernel, stride, padding, act=True):
        super().__init__()
        self.conv = nn.Conv3d(c, k, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm3d(k)
        self.act = nn.ReLU(inplace=True) if act else None

    def forward(self, x):
        x = self.bn(self.conv(x))
        return x if self.act is None else self.act(x)


class Factorized(nn.Module):
    """Stem, block and shortcut, all of them factorized."""

    def __init__(self):
        super().__init__()
        self.stem_s = ConvModule(4, 5, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.stem_t = ConvModule(5, 6, (3, 1, 1), 1, (1, 0, 0))
        self.short_s = ConvModule(6, 7, 1, (1, 2, 2), 0)
        self.short_t = ConvModule(7, 8, 1, (2, 1, 1), 0, act=False)
        self.conv_s = ConvModule(6, 7, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.conv_t = ConvModule(7, 8, (3, 1, 1), (2, 1, 1), (1, 0, 0), act=False)

    def forward(self, x):
        x = self.stem_t(self.stem_s(x))
        out = self.conv_t(self.conv_s(x))
        out += self.short_t(self.short_s(x))
        return F.relu(out)


class Flat(nn.Module):
    """Pairs flat in a forward with functional and shared activations, and an optional argument."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv3d(4, 6, (3, 1, 1), padding="same", bias=False)
        self.a_bn = nn.BatchNorm3d(6)
        self.b = nn.Conv3d(6, 4, (1, 3, 5), padding="same", padding_mode="replicate")
        self.c = nn.Conv3d(4, 8, (1, 3, 3), padding=(0, 2, 2), dilation=(1, 2, 2), groups=2)
        self.d = nn.Conv3d(8, 4, (3, 1, 1), padding=(1, 0, 0), groups=4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, scale=None):
        assert isinstance(x, torch.Tensor)
        y = self.relu(x + self.b(F.leaky_relu(self.a_bn(self.a(x)), 0.2)))
        y = y + self.d(F.gelu(self.c(y), approximate="tanh"))
        if scale is not None:
            y = y * scale
        return self.relu(y)


class CausalConv(nn.Module):
    """Replicated first frames and zero padding in space, as video tokenizers do."""

    def __init__(self, c, k, kernel, stride):
        super().__init__()
        self.time_pad = kernel[0] - 1 + 1 - stride[0]
        self.space = (kernel[2] // 2,) * 2 + (kernel[1] // 2,) * 2
        self.conv3d = nn.Conv3d(c, k, kernel, stride)

    def forward(self, x):
        before = x[:, :, :1, ...].repeat(1, 1, self.time_pad, 1, 1)
        x = torch.cat([before, x], dim=2)
        return self.conv3d(F.pad(x, self.space + (0, 0), mode="constant", value=0.0))


class PaddedConv(nn.Conv3d):
    """A convolution that is a class of its own, causal with zeros."""

    def forward(self, x):
        return super().forward(F.pad(x, (0, 0, 0, 0, self.kernel_size[0] - 1, 0)))


class Untraceable(nn.Module):
    """Branches on a size, but calls a block that can be traced."""

    def __init__(self):
        super().__init__()
        self.block = TwoAttributes(False)

    def forward(self, x):
        return self.block(x) if x.shape[2] > 1 else x


class Pseudo(nn.Module):
    """Conv2d over frames, then Conv1d over time; images pass through the first only."""

    def __init__(self):
        super().__init__()
        self.spatial_conv = nn.Conv2d(4, 6, 3, padding=1)
        self.temporal_conv = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x, enable_time=True):
        is_video = x.ndim == 5
        b, _, *_, h, w = x.shape
        if is_video:
            x = x.transpose(1, 2).flatten(0, 1)
        x = self.spatial_conv(x)
        if not (is_video and enable_time):
            return x.unflatten(0, (b, -1)).transpose(1, 2) if is_video else x
        k = x.shape[1]
        x = x.unflatten(0, (b, -1)).permute(0, 3, 4, 2, 1).flatten(0, 2)
        return self.temporal_conv(x).view(b, h, w, k, -1).permute(0, 3, 4, 1, 2)


class Flattened(nn.Module):
    """Conv2d k×k and Conv2d k×1, each with norm and activation, causal with zeros."""

    def __init__(self):
        super().__init__()
        self.conv_1 = nn.Sequential(
            nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.Hardswish()
        )
        self.conv_2 = nn.Sequential(
            nn.Conv2d(6, 6, (3, 1), groups=6, bias=False), nn.BatchNorm2d(6), nn.Hardswish()
        )

    def forward(self, x):
        n, _, t, *_ = x.shape
        x = self.conv_1(x.permute(0, 2, 1, 3, 4).reshape(n * t, *x.shape[1:2], *x.shape[3:]))
        h, w = x.shape[-2:]
        x = x.reshape(n, t, -1, h, w).permute(0, 2, 1, 3, 4)
        x = torch.cat([x.new_zeros(n, x.shape[1], 2, h, w), x], 2)
        return self.conv_2(x.flatten(3)).unflatten(3, (h, w))


class Branching(nn.Module):
    """Two Conv3d in a forward that branches on the rank."""

    def __init__(self):
        super().__init__()
        self.t = nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0))
        self.s = nn.Conv3d(6, 5, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x):
        if x.dim() != 5:
            raise ValueError("video only")
        return self.s(F.relu(self.t(x)))


def causal():
    return nn.Sequential(
        CausalConv(4, 6, (1, 3, 3), (1, 2, 2)), CausalConv(6, 5, (3, 1, 1), (2, 1, 1))
    )


def depthwise():
    return nn.Sequential(
        nn.Conv3d(4, 8, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False),
        nn.Conv3d(8, 8, (5, 1, 1), padding=(2, 0, 0), groups=8, bias=False),
    )


def subclassed():
    return nn.Sequential(
        nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), nn.Identity(), PaddedConv(6, 5, (3, 1, 1))
    )


def padded():
    return nn.Sequential(
        nn.ReplicationPad3d((1, 1, 2, 0, 0, 0)),
        nn.Conv3d(4, 6, (1, 3, 3)),
        nn.BatchNorm3d(6, affine=False),
        nn.Hardswish(),
        nn.ConstantPad3d((0, 0, 0, 0, 2, 0), 0.0),
        nn.Conv3d(6, 5, (3, 1, 1), padding=(1, 0, 0)),
    )


FORMS = {
    "attributes": (lambda: TwoAttributes(False), ["conv_t → conv_s, spatial, norm silu"]),
    "swapped": (lambda: TwoAttributes(True, False), ["conv_t → conv_s, temporal, silu"]),
    "factorized": (
        Factorized,
        [
            "stem_s.conv → stem_t.conv, spatial, stem_s.bn relu",
            "short_s.conv → short_t.conv, spatial, short_s.bn relu",
            "conv_s.conv → conv_t.conv, spatial, conv_s.bn relu",
        ],
    ),
    "flat": (Flat, ["a → b, temporal, a_bn leaky_relu", "c → d, spatial, gelu_tanh"]),
    "causal": (causal, ["0.conv3d → 1.conv3d, spatial, "]),
    "depthwise": (depthwise, ["0 → 1, spatial, "]),
    "subclassed": (subclassed, ["0 → 2, spatial, "]),
    "padded": (padded, ["1 → 5, spatial, 2 hardswish"]),
    "pseudo": (Pseudo, ["spatial_conv → temporal_conv, spatial, "]),
    "flattened": (Flattened, ["conv_1.0 → conv_2.0, spatial, conv_1.1 hardswish"]),
    "branching": (Branching, ["t → s, temporal, relu"]),
    "untraceable": (Untraceable, ["block.conv_t → block.conv_s, spatial, block.norm silu"]),
}


def brief(r: Replaced) -> str:
    between = [n for n in (r.norm, r.activation) if n not in (None, "none")]
    return f"{r.first} → {r.second}, {r.order.removesuffix('-first')}, {' '.join(between)}"


@pytest.mark.parametrize("form", FORMS)
def test_form(form):
    torch.manual_seed(0)
    build, told = FORMS[form]
    model = build().double()
    original = copy.deepcopy(model)
    report = fastst.convert(model)
    assert list(map(brief, report.replaced)) == told
    assert report.left == []
    assert_same(model, original, torch.randn(2, 4, 5, 8, 7, dtype=torch.float64))
    again = fastst.convert(model)
    assert (again.replaced, again.already) == ([], report.replaced)
    fastst.revert(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def test_arguments_with_defaults():
    model = Flat().eval()
    original = copy.deepcopy(model)
    fastst.convert(model)
    x = torch.randn(1, 4, 3, 6, 6)
    torch.testing.assert_close(model(x=x), original(x))
    torch.testing.assert_close(model(x, None), original(x))
    with pytest.warns(fastst.FallbackWarning, match="its argument 'scale' is given"):
        torch.testing.assert_close(model(x, torch.tensor(3.0)), original(x, 3.0))


def test_images_through_a_module_for_both():
    model = nn.Sequential(Pseudo())
    original = copy.deepcopy(model)
    assert len(fastst.convert(model).replaced) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastst.FallbackWarning)
        x = torch.randn(2, 4, 6, 6)
        torch.testing.assert_close(model(x), original(x), rtol=0, atol=0)
    x = torch.randn(2, 4, 3, 6, 6)
    with pytest.warns(fastst.FallbackWarning, match="'enable_time' is given"):
        torch.testing.assert_close(model[0](x, enable_time=False), original[0](x, False))


def test_pytorchvideo_conv2plus1d():
    layers = pytorchvideo("layers.convolutions")
    for first in (False, True):
        torch.manual_seed(0)
        model = layers.create_conv_2plus1d(
            in_channels=4, out_channels=6, inner_channels=5, conv_xy_first=first, bias=True
        ).double()
        original = copy.deepcopy(model)
        report = fastst.convert(model)
        assert [r.order for r in report.replaced] == [
            "spatial-first" if first else "temporal-first"
        ]
        assert_same(model, original, torch.randn(2, 4, 5, 8, 8, dtype=torch.float64))
