"""Blocks as other people's repositories write them, in small; whole networks in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst
from tests.rewrite.convert.test_converter import step
from tests.rewrite.test_optimize import settle
from tests.support.peers import pytorchvideo, torchvision_video


class Conv2plus1d(nn.Module):
    """mmaction2: kernels, strides and padding split, also those of a 1×1×1 shortcut."""

    def __init__(self, c: int, k: int, kernel: tuple, stride: tuple, padding: tuple) -> None:
        super().__init__()
        m, (kt, kh, kw), (st, sh, sw), (pt, ph, pw) = c + 1, kernel, stride, padding
        self.conv_s = nn.Conv3d(c, m, (1, kh, kw), (1, sh, sw), (0, ph, pw), bias=False)
        self.bn_s, self.relu = nn.BatchNorm3d(m), nn.ReLU(inplace=True)
        self.conv_t = nn.Conv3d(m, k, (kt, 1, 1), (st, 1, 1), (pt, 0, 0), bias=False)

    def forward(self, x):
        return self.conv_t(self.relu(self.bn_s(self.conv_s(x))))


class ConvModule(nn.Module):
    """mmcv: what runs is said by a tuple of names and by flags."""

    def __init__(self, c, k, kernel, stride, padding, act=True) -> None:
        super().__init__()
        self.order, self.with_activation = ("conv", "norm", "act"), act
        self.conv, self.norm_name = Conv2plus1d(c, k, kernel, stride, padding), "bn"
        self.add_module("bn", nn.BatchNorm3d(k, eps=1e-3, momentum=0.9))
        self.activate = nn.ReLU(inplace=True) if act else None

    @property
    def norm(self):
        return getattr(self, self.norm_name)

    def forward(self, x, activate=True, norm=True):
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.with_activation:
                x = self.activate(x)
        return x


class MMBlock(nn.Module):
    def __init__(self, c: int, k: int, stride: int) -> None:
        super().__init__()
        s, one, around = (stride,) * 3, (1,) * 3, (1, 1, 1)
        self.conv1 = ConvModule(c, k, (3,) * 3, s, around)
        self.conv2 = ConvModule(k, k, (3,) * 3, one, around, act=False)
        self.downsample = ConvModule(c, k, one, s, (0,) * 3, False) if stride > 1 else None
        self.relu, self.with_cp = nn.ReLU(inplace=True), False

    def forward(self, x):
        def inner(x):
            identity = x
            out = self.conv2(self.conv1(x))
            if self.downsample is not None:
                identity = self.downsample(x)
            return out + identity

        return self.relu(inner(x))


class MMBackbone(nn.Module):
    """The stages are looked up by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = ConvModule(4, 6, (3, 7, 7), (1, 2, 2), (1, 3, 3))
        self.layer1, self.layer2 = nn.Sequential(MMBlock(6, 6, 1)), nn.Sequential(MMBlock(6, 8, 2))
        self.layers, self.out_indices = ["layer1", "layer2"], (1,)

    def forward(self, x):
        x = self.conv1(x)
        outs = []
        for i, name in enumerate(self.layers):
            x = getattr(self, name)(x)
            if i in self.out_indices:
                outs.append(x)
        return outs[0] if len(outs) == 1 else tuple(outs)


class CausalConv(nn.Conv3d):
    """diffusers' Cosmos: a convolution that pads with its first frame."""

    def __init__(self, c: int, k: int, kernel: tuple, space: int) -> None:
        super().__init__(c, k, kernel)
        self.temporal_pad, self.spatial_pad = kernel[0] - 1, (space,) * 4

    def forward(self, x):
        before = x[:, :, :1, ...].repeat(1, 1, self.temporal_pad, 1, 1)
        x = torch.cat([before, x], dim=2)
        return super().forward(F.pad(x, (*self.spatial_pad, 0, 0), mode="constant", value=0.0))


class Projection(nn.Module):
    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.conv_s, self.conv_t = CausalConv(c, k, (1, 3, 3), 1), CausalConv(k, k, (3, 1, 1), 0)

    def forward(self, x):
        return self.conv_t(self.conv_s(x))


class CosmosBlock(nn.Module):
    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(1, c), Projection(c, k)
        self.norm2, self.conv2 = nn.GroupNorm(1, k), Projection(k, k)
        self.shortcut = CausalConv(c, k, (1, 1, 1), 0) if c != k else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(x)


class ConvBlock3D(nn.Module):
    """MoViNet: Conv2d with norm and activation twice, TensorFlow's padding, a stream's state."""

    def __init__(self, c, k, kernel, stride=(1, 1, 1), same=False, causal=False) -> None:
        super().__init__()

        def conv(c, k, kernel, stride, padding):
            one = nn.Conv2d(c, k, kernel, stride, padding, bias=False)
            return nn.Sequential(one, nn.BatchNorm2d(k), nn.Hardswish())

        kt, *space = kernel
        self.kernel, self.stride, self.same, self.state, self.causal = (
            space,
            stride,
            same,
            None,
            causal,
        )
        self.conv_1 = conv(c, k, space, stride[1:], 0 if same else 1)
        self.conv_2 = conv(k, k, (kt, 1), (stride[0], 1), (0 if causal else kt // 2, 0))

    def forward(self, x):
        if self.same:
            pads = []
            for n, k, s in zip(
                x.shape[3:][::-1], self.kernel[::-1], self.stride[:0:-1], strict=True
            ):
                total = max(k - s, 0) if n % s == 0 else max(k - n % s, 0)
                pads += [total // 2, total - total // 2]
            x = F.pad(x, pads)
        n, c, t, h, w = x.shape
        x = self.conv_1(x.permute(0, 2, 1, 3, 4).reshape(n * t, c, h, w))
        x = x.reshape(n, t, *x.shape[1:]).permute(0, 2, 1, 3, 4)
        if self.causal:
            state = x.new_zeros(*x.shape[:2], 2, *x.shape[3:]) if self.state is None else self.state
            x = torch.cat([state, x], 2)
            self.state = x[:, :, -2:].detach()
        w = x.shape[-1]
        return self.conv_2(x.flatten(3)).unflatten(3, (-1, w))


class P3D(nn.Module):
    """The three ways of Pseudo-3D blocks; a pair only when one follows the other."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.relu = way, nn.ReLU(inplace=True)
        self.conv1, self.bn1 = nn.Conv3d(4, 3, 1, bias=False), nn.BatchNorm3d(3)
        self.conv2 = nn.Conv3d(3, 3, (1, 3, 3), padding=(0, 1, 1), bias=False)
        self.conv3 = nn.Conv3d(3, 3, (3, 1, 1), padding=(1, 0, 0), bias=False)
        self.bn2, self.bn3 = nn.BatchNorm3d(3), nn.BatchNorm3d(3)
        self.conv4, self.bn4 = nn.Conv3d(3, 4, 1, bias=False), nn.BatchNorm3d(4)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        if self.way == "A":
            y = self.relu(self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y))))))
        elif self.way == "B":
            y = self.relu(self.bn3(self.conv3(y))) + self.relu(self.bn2(self.conv2(y)))
        else:
            y = self.relu(self.bn2(self.conv2(y)))
            y = y + self.relu(self.bn3(self.conv3(y)))
        y = self.bn4(self.conv4(y))
        y += x
        return self.relu(y)


class FlatBlock(nn.Module):
    """3D-ResNets-PyTorch: everything flat, one ReLU for all, the sum in place."""

    def __init__(self) -> None:
        super().__init__()
        for i in (1, 2):
            setattr(self, f"conv{i}_s", nn.Conv3d(4, 5, (1, 3, 3), 1, (0, 1, 1), bias=False))
            setattr(self, f"conv{i}_t", nn.Conv3d(5, 4, (3, 1, 1), 1, (1, 0, 0), bias=False))
            setattr(self, f"bn{i}_s", nn.BatchNorm3d(5))
            setattr(self, f"bn{i}_t", nn.BatchNorm3d(4))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        residual = x
        out = self.relu(self.bn1_s(self.conv1_s(x)))
        out = self.relu(self.bn1_t(self.conv1_t(out)))
        out = self.relu(self.bn2_s(self.conv2_s(out)))
        out = self.bn2_t(self.conv2_t(out))
        out += residual
        return self.relu(out)


class PreActivated(nn.Module):
    """Stochastic depth and dropout, which run in training only, around a pair in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu, self.drop = nn.BatchNorm3d(4), nn.ReLU(inplace=True), nn.Dropout3d(0.5)
        self.conv = Conv2plus1d(4, 4, (3, 3, 3), (1, 1, 1), (1, 1, 1))

    def forward(self, x):
        out = self.conv(self.relu(self.bn(x)))
        if self.training:
            out = out * (torch.rand(out.shape[0], 1, 1, 1, 1) > 0.2)
        return x + self.drop(out)


# How many pairs run as one operation in a call of the converted block.
PEOPLE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mmaction2": (MMBackbone, 6),
    "cosmos": (lambda: nn.Sequential(CosmosBlock(4, 4), CosmosBlock(4, 6)), 4),
    "movinet": (lambda: ConvBlock3D(4, 6, (3, 3, 3), (1, 2, 2)), 1),
    "movinet, same": (lambda: ConvBlock3D(4, 6, (3, 3, 5), same=True), 1),
    "movinet, same, strided": (lambda: ConvBlock3D(4, 6, (3, 3, 3), (1, 2, 2), same=True), 1),
    "p3d a": (lambda: P3D("A"), 1),
    "p3d b": (lambda: P3D("B"), 0),
    "p3d c": (lambda: P3D("C"), 1),
    "flat": (lambda: nn.Sequential(FlatBlock(), FlatBlock()), 4),
    "pre-activated": (lambda: nn.Sequential(PreActivated(), PreActivated()), 2),
}


@pytest.mark.parametrize("name", PEOPLE)
def test_block(name: str) -> None:
    build, pairs = PEOPLE[name]
    torch.manual_seed(0)
    model = settle(build()).double()
    original = copy.deepcopy(model)
    fastst.convert(model)
    x = torch.randn(2, 4, 5, 9, 8, dtype=torch.float64)
    optimised = fastst.optimize_for_inference(model)
    torch.testing.assert_close(optimised(x), original.eval()(x), rtol=1e-10, atol=1e-10)
    for training in (True, False):
        found = []
        for m in (model, original):
            torch.manual_seed(1)
            found.append(step(m, x, training))
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    for m in (model.eval(), optimised):
        with fastst.dispatch.recording() as calls, torch.no_grad():
            m(x).sum()
        assert sum(c.problem is not None for c in calls) == pairs


NETWORKS = {
    "r2plus1d": (16, "blocks.1.res_blocks.0.branch2.conv_b.conv_t"),
    "x3d": (1, "blocks.0.conv.conv_t"),
    "slowfast": (25, "blocks.1.multipathway_blocks.1.res_blocks.0.branch2.conv_a"),
}


def network(name: str) -> nn.Module:
    if name == "r2plus1d":
        return pytorchvideo("models.r2plus1d").create_r2plus1d(
            stem_dim_out=8, model_num_class=3, head_pool_kernel_size=(1, 1, 1)
        )  # fmt: skip
    if name == "x3d":
        return pytorchvideo("models.x3d").create_x3d(
            input_clip_length=4, input_crop_size=32, model_num_class=3, width_factor=0.5,
            depth_factor=1.0, head_dim_out=16,
        )  # fmt: skip
    return pytorchvideo("models.slowfast").create_slowfast(
        stem_dim_outs=(16, 2), model_num_class=3, head_pool_kernel_sizes=((1, 1, 1), (4, 1, 1))
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_pytorchvideo_network(name: str) -> None:
    count, first = NETWORKS[name]
    torch.manual_seed(0)
    model = settle(network(name)).double()
    model.blocks[-1] = nn.Identity()  # the head would hide differences in a softmax
    original = copy.deepcopy(model)
    keys = list(model.state_dict())
    report = fastst.convert(model)
    assert len(report.replaced) == count, str(report)
    assert first in [r.first for r in report.replaced]
    assert list(model.state_dict()) == keys
    x = torch.randn(1, 3, 4, 32, 32, dtype=torch.float64)

    def run(m: nn.Module) -> Tensor:
        with torch.no_grad():
            return m([x[:, :, ::4].clone(), x.clone()] if name == "slowfast" else x)

    wanted = run(original)
    for m in (model, fastst.optimize_for_inference(original)):
        assert (run(m) - wanted).norm() <= 1e-10 * wanted.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("r2plus1d_18", 17), ("s3d", 20), ("mc3_18", 0)])
def test_torchvision_network(name: str, count: int) -> None:
    torch.manual_seed(0)
    model = settle(getattr(torchvision_video(), name)(num_classes=3)).double()
    if name == "s3d":
        model.avgpool = nn.AdaptiveAvgPool3d(1)  # its own asks for 224 pixels
    original = copy.deepcopy(model)
    report = fastst.convert(model)
    assert len(report.replaced) == count
    assert bool(report.left) == (name == "mc3_18")
    if not count:
        return
    x = torch.randn(1, 3, 8 if name == "s3d" else 4, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        wanted = original(x)
        assert wanted.norm() > 1e-3
        for m in (model, fastst.optimize_for_inference(original)):
            assert (m(x) - wanted).norm() <= 1e-9 * wanted.norm()


@pytest.mark.slow
def test_torchvision_training() -> None:
    """A step of R(2+1)D-18: the loss, all gradients, all statistics."""
    torch.manual_seed(0)
    model = torchvision_video().r2plus1d_18(num_classes=3).double()
    original = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (model, original)]
    report = fastst.convert(model)
    assert len(report.replaced) == 17
    x = torch.randn(2, 3, 4, 32, 32, dtype=torch.float64)
    found = []
    for m, optimizer in zip((model, original), optimizers, strict=True):
        found.append(step(m, x, True))
        optimizer.step()
        found[-1].extend(p.detach() for p in m.parameters())
    for a, b in zip(*found, strict=True):
        assert (a - b).double().norm() <= 1e-7 * b.double().norm() + 1e-12
