"""Residual video networks of arXiv 1711.11248, their stages described by data.

Modules, names and initialisation are those of torchvision's video ResNets, so that its checkpoint
files load: ``stem.{0,1,3,4}``, ``layerL.B.conv{1,2}.{0,1}``, ``layerL.B.downsample.{0,1}``, ``fc``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..nn.layers import ParallelConv2Plus1d
from ..problem.spec import default_mid_channels

Weights = str | os.PathLike[str] | None

_CONVS = ("2d", "3d", "2+1d", "add", "cat")
_MIDS = ("torchvision", "paper")


class Stage(NamedTuple):
    """Blocks of one resolution; the first of them takes the stride."""

    conv: str  # "2d", "3d", "2+1d", or the 4D path's "add" and "cat" (arXiv 2407.16514)
    channels: int
    blocks: int
    stride: int  # in height and width; in time too, unless conv is "2d"

    @property
    def strides(self) -> tuple[int, int, int]:
        return (1 if self.conv == "2d" else self.stride, self.stride, self.stride)


class Rules(NamedTuple):
    """In what published networks of the same stages differ."""

    mids: str = "torchvision"  # or "paper": mid channels of each (2+1)D convolution by its own ends
    eps: float = 1e-5  # of batch norms
    bottleneck: bool = False

    @property
    def expansion(self) -> int:
        return 4 if self.bottleneck else 1


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut: relu(bn(conv2(relu(bn(conv1(x))))) + shortcut(x)).

    By torchvision's rule both have the mid channels of the first one's ends.
    """

    def __init__(self, in_channels: int, stage: Stage, first: bool, rules: Rules) -> None:
        super().__init__()
        channels = stage.channels
        strides = stage.strides if first else (1, 1, 1)
        mid = default_mid_channels(in_channels, channels, (3, 3, 3))
        mid2 = mid if rules.mids == "torchvision" else _own_mid(channels)
        self.conv1 = nn.Sequential(
            conv3(stage.conv, in_channels, channels, strides, mid, rules.eps),
            nn.BatchNorm3d(channels, rules.eps),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(
            conv3(stage.conv, channels, channels, (1, 1, 1), mid2, rules.eps),
            nn.BatchNorm3d(channels, rules.eps),
        )
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, channels, strides, rules)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv2(self.conv1(x)) + shortcut)


class Bottleneck(nn.Module):
    """A convolution between two pointwise ones, the last to four times the channels; shortcut."""

    def __init__(self, in_channels: int, stage: Stage, first: bool, rules: Rules) -> None:
        super().__init__()
        channels, out = stage.channels, stage.channels * rules.expansion
        strides = stage.strides if first else (1, 1, 1)
        mid = _own_mid(channels)
        if rules.mids == "torchvision":
            mid = default_mid_channels(in_channels, channels, (3, 3, 3))
        self.conv1 = nn.Sequential(
            nn.Conv3d(in_channels, channels, 1, bias=False),
            nn.BatchNorm3d(channels, rules.eps),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(
            conv3(stage.conv, channels, channels, strides, mid, rules.eps),
            nn.BatchNorm3d(channels, rules.eps),
            nn.ReLU(inplace=True),
        )
        self.conv3 = nn.Sequential(
            nn.Conv3d(channels, out, 1, bias=False), nn.BatchNorm3d(out, rules.eps)
        )
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out, strides, rules)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv3(self.conv2(self.conv1(x))) + shortcut)


class VideoResNet(nn.Module):
    """Stem, stages of residual blocks, global average pool and classifier.

    Args:
        stem: kind of its 7×7 convolution, to as many channels as the first stage has: "2d", "3d",
            "2+1d", or "flat", which reads all frames at once and leaves one.
        stages: of the network, in order.
        num_classes: outputs of the classifier.
        in_channels: C of the input; 2 for optical flow.
        frames: T of the input; only with the stem "flat", which fixes it.
        rules: in what published networks of the same stages differ.

    Shape:
        (N, C, T, H, W) to (N, num_classes).

    Raises:
        ValueError: an argument that does not fit; at call, another number of frames than a "flat"
            stem reads.
    """

    def __init__(
        self,
        stem: str,
        stages: Sequence[Stage],
        num_classes: int = 400,
        *,
        in_channels: int = 3,
        frames: int | None = None,
        rules: Rules = Rules(),  # noqa: B008 -- immutable
    ) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("in_channels", in_channels)
        if rules.mids not in _MIDS:
            raise ValueError(f"mids must be one of {_MIDS}, got {rules.mids!r}")
        if stem == "flat":
            check_positive("frames", frames)
        width = stages[0].channels
        self.frames = frames
        self.stem = _stem(stem, in_channels, width, frames or 1, rules.eps)
        self.stages = [f"layer{i}" for i in range(1, len(stages) + 1)]
        for name, stage in zip(self.stages, stages, strict=True):
            blocks, width = residual_stage(width, stage, rules)
            self.add_module(name, blocks)
        self.avgpool = nn.AdaptiveAvgPool3d((1, 1, 1))
        self.fc = nn.Linear(width, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torchvision does: He normal over the fan out, classifier σ = 0.01."""
        initialise(self)

    def features(self, x: Tensor) -> Tensor:
        """(N, C, T, H, W) to what the last stage gives, (N, K, T', H', W')."""
        if self.frames is not None and x.shape[-3] != self.frames:
            raise ValueError(
                f"this network requires {self.frames} frames, got {x.shape[-3]} in {tuple(x.shape)}"
            )
        x = self.stem(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.avgpool(self.features(x)).flatten(1))


def conv3(
    kind: str,
    in_channels: int,
    out_channels: int,
    stride: tuple[int, int, int],
    mid: int = 0,
    eps: float = 1e-5,
) -> nn.Module:
    """A convolution of three taps along each axis that its kind reaches, without bias.

    Args:
        mid, eps: mid channels, and of their batch norm, of "2+1d".
    """
    if kind == "2d":
        return nn.Conv3d(in_channels, out_channels, (1, 3, 3), stride, (0, 1, 1), bias=False)
    if kind == "3d":
        return nn.Conv3d(in_channels, out_channels, 3, stride, 1, bias=False)
    if kind == "2+1d":
        return nn.Sequential(
            nn.Conv3d(in_channels, mid, (1, 3, 3), (1, *stride[1:]), (0, 1, 1), bias=False),
            nn.BatchNorm3d(mid, eps),
            nn.ReLU(inplace=True),
            nn.Conv3d(mid, out_channels, (3, 1, 1), (stride[0], 1, 1), (1, 0, 0), bias=False),
        )
    if kind in ("add", "cat"):
        return ParallelConv2Plus1d(
            in_channels, out_channels, 3, stride, 1, bias=False, combine=kind
        )
    raise ValueError(f"the kind of a stage's convolutions must be one of {_CONVS}, got {kind!r}")


def residual_stage(
    in_channels: int,
    stage: Stage,
    rules: Rules = Rules(),  # noqa: B008 -- immutable
) -> tuple[nn.Sequential, int]:
    """The blocks of a stage, and the channels that they give."""
    block = Bottleneck if rules.bottleneck else BasicBlock
    out = stage.channels * rules.expansion
    blocks = [
        block(in_channels if i == 0 else out, stage, i == 0, rules) for i in range(stage.blocks)
    ]
    return nn.Sequential(*blocks), out


def initialise(model: nn.Module) -> None:
    """He normal over the fan out for convolutions, σ = 0.01 for linear layers, norms to one."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def check_positive(name: str, value: int | None) -> None:
    """
    Raises:
        ValueError: no positive int.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def _own_mid(channels: int) -> int:
    return default_mid_channels(channels, channels, (3, 3, 3))


def _stem(kind: str, in_channels: int, width: int, frames: int, eps: float) -> nn.Sequential:
    """A convolution of stride (1, 2, 2) over 7×7, batch norm and ReLU."""
    space = (1, 2, 2), (0, 3, 3)
    if kind == "2d":
        convs: list[nn.Module] = [nn.Conv3d(in_channels, width, (1, 7, 7), *space, bias=False)]
    elif kind == "3d":
        convs = [nn.Conv3d(in_channels, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)]
    elif kind == "flat":
        convs = [nn.Conv3d(in_channels, width, (frames, 7, 7), *space, bias=False)]
    elif kind == "2+1d":
        mid = 45 * width // 64  # 45 by publication, not by the rule for blocks
        convs = [
            nn.Conv3d(in_channels, mid, (1, 7, 7), *space, bias=False),
            nn.BatchNorm3d(mid, eps),
            nn.ReLU(inplace=True),
            nn.Conv3d(mid, width, (3, 1, 1), 1, (1, 0, 0), bias=False),
        ]
    else:
        raise ValueError(f"stem must be '2d', '3d', '2+1d' or 'flat', got {kind!r}")
    return nn.Sequential(*convs, nn.BatchNorm3d(width, eps), nn.ReLU(inplace=True))


def _shortcut(
    in_channels: int, out_channels: int, strides: tuple[int, int, int], rules: Rules
) -> nn.Sequential | None:
    if strides == (1, 1, 1) and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv3d(in_channels, out_channels, 1, strides, bias=False),
        nn.BatchNorm3d(out_channels, rules.eps),
    )
