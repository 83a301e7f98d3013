"""Inflated networks equal the 2D ones frame by frame, and learn along time."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import fastst
from tests.support.peers import torchvision_video


def frame_by_frame(model: nn.Module, clip: torch.Tensor) -> torch.Tensor:
    """(N, C, T, H, W) through a 2D network."""
    return torch.stack([model(frame) for frame in clip.unbind(2)], 2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 5, 2, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding="same", groups=4, padding_mode="replicate")
        self.short = nn.Conv2d(8, 8, 1)
        self.avg = nn.AvgPool2d(2, count_include_pad=False)
        self.drop = nn.Dropout2d(0.5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.drop(self.avg(self.relu(self.conv2(x) + self.short(x))))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("kt", [1, 3, 5])
def test_block(kt, depthwise):
    torch.manual_seed(0)
    model = Block().double().eval()
    inflated = fastst.inflate(model, temporal_kernel=kt, depthwise=depthwise)
    clip = torch.randn(2, 3, 4, 33, 30, dtype=torch.float64)
    torch.testing.assert_close(inflated(clip), frame_by_frame(model, clip), rtol=1e-10, atol=1e-10)
    assert type(inflated.conv1) is fastst.Conv2Plus1d
    assert type(inflated.short) is nn.Conv3d
    assert inflated.conv1.temporal.weight.shape == (8, 1 if depthwise else 8, kt, 1, 1)
    assert isinstance(model.conv1, nn.Conv2d)
    inflated(clip).sum().backward()
    assert kt == 1 or inflated.conv1.temporal.weight.grad[:, :, 0].abs().max() > 0


def test_training_has_the_statistics_of_all_frames():
    model = Block().double().train()
    model.drop.p = 0.0
    inflated = fastst.inflate(model)
    clip = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)
    flat = model(clip.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(inflated(clip), flat, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inflated.bn1.running_var, model.bn1.running_var)


def test_convolution():
    conv = nn.Conv2d(3, 6, 3, 2, 1, dilation=2).double()
    layer = fastst.inflate(conv)
    clip = torch.randn(1, 3, 5, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(clip), frame_by_frame(conv, clip), rtol=1e-10, atol=1e-10)
    assert isinstance(layer, fastst.Conv2Plus1d)
    assert layer.stride == (1, 2, 2)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_resnet(name):
    torchvision_video()
    torch.manual_seed(0)
    model = getattr(importlib.import_module("torchvision.models"), name)(num_classes=5).eval()
    inflated = fastst.inflate(model)
    clip = torch.randn(1, 3, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            inflated(clip), frame_by_frame(model, clip).mean(2), rtol=1e-3, atol=1e-3
        )
        optimised = fastst.optimize_for_inference(inflated)
        torch.testing.assert_close(optimised(clip), inflated(clip), rtol=1e-3, atol=1e-3)
    keys = set(inflated.state_dict())
    assert {"conv1.spatial.weight", "conv1.temporal.weight", "layer2.0.downsample.0.weight"} <= keys


class ResNetD(nn.Module):
    """As timm writes it: deep stem, average-pooled shortcut, a pooling module with options."""

    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)

        def forward(self, x):
            return self.flatten(self.pool(x))

    def __init__(self):
        super().__init__()

        def conv(c, k, stride=1, groups=1):
            return nn.Conv2d(c, k, 3, stride, 1, groups=groups, bias=False)

        self.conv1 = nn.Sequential(
            conv(3, 4, 2), nn.BatchNorm2d(4), nn.ReLU(True), conv(4, 8), nn.BatchNorm2d(8)
        )
        self.act1, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)
        self.conv2, self.bn2, self.drop_block = conv(8, 16, 2, 4), nn.BatchNorm2d(16), nn.Identity()
        self.aa, self.se, self.act2 = None, None, nn.SiLU(inplace=True)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
            nn.Conv2d(8, 16, 1, bias=False),
            nn.BatchNorm2d(16),
        )
        self.global_pool, self.fc = self.Pool(), nn.Linear(16, 5)

    def forward(self, x):
        x = self.maxpool(self.act1(self.conv1(x)))
        shortcut = x
        x = self.drop_block(self.bn2(self.conv2(x)))
        if self.se is not None:
            x = self.se(x)
        x += self.downsample(shortcut)
        return self.fc(self.global_pool(self.act2(x)))


@pytest.mark.parametrize("size", [33, 64])
def test_timm_style_resnet(size):
    torch.manual_seed(0)
    model = ResNetD().double().eval()
    inflated = fastst.inflate(model)
    clip = torch.randn(2, 3, 4, size, size, dtype=torch.float64)
    wanted = frame_by_frame(model, clip).mean(2)
    torch.testing.assert_close(inflated(clip), wanted, rtol=1e-10, atol=1e-10)
    optimised = fastst.optimize_for_inference(inflated)
    torch.testing.assert_close(optimised(clip), wanted, rtol=1e-10, atol=1e-10)


class MeansOverSpace(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class Gated(nn.Module):
    """Squeeze-and-excitation of a branch that starts at 0: by a norm, a scale or a convolution."""

    def __init__(self, start, dims=(2, 3)):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.scale = nn.BatchNorm2d(8), nn.Parameter(torch.ones(()))
        self.register_buffer("gate", torch.full((1,), float(start != "buffer")))
        nn.init.zeros_({"norm": self.norm, "conv": self.conv}.get(start, self.norm).weight)
        if start == "scale":
            nn.init.ones_(self.norm.weight)
            nn.init.zeros_(self.scale)
        if start == "statistics":
            nn.init.ones_(self.norm.weight)
            self.norm.running_var.fill_(1e30)
        self.dims = dims

    def forward(self, x):
        y = self.norm(self.conv(x))
        gate = self.gate * torch.sigmoid(self.fc(y.mean(self.dims, keepdim=True)))
        return x + self.scale * y * gate


@pytest.mark.parametrize("start", ["norm", "scale", "conv", "statistics", "buffer"])
def test_what_starts_at_zero_hides_nothing(start):
    stem = nn.Conv2d(3, 8, 3, padding=1)
    with pytest.raises(ValueError, match="not equal to the 2D one frame by frame"):
        fastst.inflate(nn.Sequential(stem, Gated(start)))
    model = nn.Sequential(stem, Gated(start, (-2, -1))).double().eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    inflated = fastst.inflate(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(inflated[1].conv.spatial.weight[:, :, 0], model[1].conv.weight)
    clip = torch.randn(1, 3, 4, 12, 10, dtype=torch.float64)
    torch.testing.assert_close(inflated(clip), frame_by_frame(model, clip), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frames", [1, 3])
def test_frames_that_are_all_the_same_hide_nothing(frames):
    """A group norm of a clip is not one of each frame."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    with pytest.raises(ValueError, match="not equal to the 2D one frame by frame"):
        fastst.inflate(model, example=torch.randn(1, 3, 16, 16).expand(frames, 3, 16, 16))


class InTraining(nn.Module):
    """Something else in training mode."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x) if self.training else x


@pytest.mark.parametrize("training", [False, True])
def test_training_mode_is_checked(training):
    stem, wrong = nn.Conv2d(3, 8, 3), InTraining(lambda x: x - x.mean((2, 3), keepdim=True))
    with pytest.raises(ValueError, match="not equal to the 2D one frame by frame"):
        fastst.inflate(nn.Sequential(stem, wrong).train(training))
    right = InTraining(lambda x: x - x.mean((-2, -1), keepdim=True))
    fastst.inflate(nn.Sequential(stem, right).train(training))


def targets_are_missing(x):
    raise ValueError("requires targets")


@pytest.mark.parametrize(
    "change", [lambda x: x * torch.rand(()), lambda x: (x, x), targets_are_missing]
)
def test_training_is_not_compared_where_it_cannot_be(change):
    fastst.inflate(nn.Sequential(nn.Conv2d(3, 8, 3), InTraining(change)))


def test_heads_with_a_batch_norm_have_other_batches_in_training():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), InTraining(torch.abs), nn.AdaptiveAvgPool2d(1), nn.Flatten(1),
        nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 5),
    )  # fmt: skip
    fastst.inflate(model)


def test_square_roots_of_buffers_are_numbers():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("variances", torch.ones(1, 8))

        def forward(self, x):
            return x / self.variances.sqrt().view(-1, *(1,) * (x.dim() - 2))

    fastst.inflate(nn.Sequential(nn.Conv2d(3, 8, 3), Scaled()))


def test_what_is_frozen_stays_so_and_what_is_shared():
    convs = [nn.Conv2d(4, 4, kernel, padding="same") for kernel in (3, 3, 1, 1)]
    model = nn.Sequential(*convs)
    model[1].weight, model[3].bias = model[0].weight, model[2].bias
    for p in (model[0].bias, model[1].bias, model[2].weight):
        p.requires_grad_(False)
    inflated = fastst.inflate(model)
    spatial = [m.spatial if isinstance(m, fastst.Conv2Plus1d) else m for m in inflated]
    for was, now in zip(model, spatial, strict=True):
        assert torch.equal(now.weight[:, :, 0], was.weight)
        assert torch.equal(now.bias, was.bias)
        assert was.weight.dim() == 4
        for name in ("weight", "bias"):
            assert getattr(was, name).requires_grad == getattr(now, name).requires_grad
    assert spatial[0].weight is spatial[1].weight
    assert spatial[2].bias is spatial[3].bias


def test_weights_that_others_read_are_refused():
    conv, table = nn.Conv2d(4, 4, 3), nn.Identity()
    table.known = conv.weight
    with pytest.raises(ValueError, match=r"0\.weight is also 1\.known, of a Identity"):
        fastst.inflate(nn.Sequential(conv, table))


def test_numbers_that_are_none_prove_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(ValueError, match="not equal"):
        fastst.inflate(model)


class Own(nn.Conv2d):
    pass


def hooked():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    return model


def replaced():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    method = model[0]._conv_forward
    model[0]._conv_forward = lambda x, weight, bias: method(x, 2 * weight, bias)
    return model


def on_meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (hooked(), "0 has hooks"),
        (replaced(), "0 has a _conv_forward that is not of its class"),
        (on_meta(), r"0\.weight is on the meta device"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), "0 is lazy"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
            "0 is parametrized",
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 65)), "does not run on frames .* give an example"),
        (MeansOverSpace(), "not equal to the 2D one frame by frame"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)), "1 is a InstanceNorm2d"),
        (nn.Sequential(Own(3, 4, 3)), "0 is a Own, of which no 3D form is known"),
        (nn.Sequential(nn.Linear(3, 4)), "has no nn.Conv2d"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(3844, 2)), "does not run"),
    ],
)
def test_refused(model, told):
    with pytest.raises(ValueError, match=told):
        fastst.inflate(model)


def test_bad_arguments():
    conv = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="temporal_kernel must be odd, got 2"):
        fastst.inflate(conv, temporal_kernel=2)
    with pytest.raises((TypeError, ValueError), match="temporal_kernel"):
        fastst.inflate(conv, temporal_kernel=0)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        fastst.inflate(3)
    with pytest.raises(ValueError, match=r"example must be \(T, C, H, W\)"):
        fastst.inflate(conv, example=torch.zeros(3, 8, 8))
