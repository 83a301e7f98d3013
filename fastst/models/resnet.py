"""Residual video networks of arXiv 1711.11248, their stages described by data.

Modules, names and initialisation are those of torchvision's video ResNets, so that its checkpoint
files load: ``stem.{0,1,3,4}``, ``layerL.B.conv{1,2}.{0,1}``, ``layerL.B.downsample.{0,1}``, ``fc``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..shapes import default_mid_channels
from .checkpoint import load_weights


class Stage(NamedTuple):
    """Blocks of one resolution; the first of them takes the stride."""

    channels: int
    blocks: int
    stride: int  # in time, height and width alike


R2PLUS1D_18 = (Stage(64, 2, 1), Stage(128, 2, 2), Stage(256, 2, 2), Stage(512, 2, 2))


class BasicBlock(nn.Module):
    """Two (2+1)D convolutions and a shortcut: relu(bn(conv2(relu(bn(conv1(x))))) + shortcut(x)).

    Both convolutions have the mid channels of the first one's channels, as torchvision has it.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        mid = default_mid_channels(in_channels, channels, (3, 3, 3))
        self.conv1 = nn.Sequential(
            _conv2plus1d(in_channels, mid, channels, stride),
            nn.BatchNorm3d(channels),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(
            _conv2plus1d(channels, mid, channels, 1), nn.BatchNorm3d(channels)
        )
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv3d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm3d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(self.conv2(self.conv1(x)) + shortcut)


class VideoResNet(nn.Module):
    """Stem, stages of residual blocks, global average pool and classifier.

    Args:
        stages: of the network, in order.
        num_classes: outputs of the classifier.

    Shape:
        (N, 3, T, H, W) to (N, num_classes). Time is halved as often as space, but not in the stem.
    """

    def __init__(self, stages: Sequence[Stage], num_classes: int = 400) -> None:
        super().__init__()
        width = 64
        self.stem = nn.Sequential(
            nn.Conv3d(3, 45, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False),
            nn.BatchNorm3d(45),
            nn.ReLU(inplace=True),
            nn.Conv3d(45, width, (3, 1, 1), 1, (1, 0, 0), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )
        self.stages = [f"layer{i}" for i in range(1, len(stages) + 1)]
        for name, stage in zip(self.stages, stages, strict=True):
            blocks = []
            for i in range(stage.blocks):
                blocks.append(BasicBlock(width, stage.channels, stage.stride if i == 0 else 1))
                width = stage.channels
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool3d((1, 1, 1))
        self.fc = nn.Linear(width, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as torchvision does: He normal over the fan out, classifier σ = 0.01."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(x).flatten(1))


def r2plus1d_18(
    num_classes: int = 400, *, weights: str | os.PathLike[str] | None = None
) -> VideoResNet:
    """R(2+1)D-18 (arXiv 1711.11248) with torchvision's rules and state_dict keys.

    Args:
        num_classes: outputs of the classifier; with 400 the network has 31,505,325 parameters.
        weights: path of a checkpoint file such as torchvision's ``r2plus1d_18-*.pth``, or None for
            random initialisation.

    Raises:
        FileNotFoundError: no file at ``weights``.
        ValueError: ``num_classes`` is not positive, or the file does not fit the network.
    """
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise ValueError(f"r2plus1d_18: num_classes must be a positive int, got {num_classes!r}")
    model = VideoResNet(R2PLUS1D_18, num_classes)
    if weights is not None:
        load_weights(model, weights)
    return model


def _conv2plus1d(in_channels: int, mid: int, out_channels: int, stride: int) -> nn.Sequential:
    """Spatial convolution, batch norm, ReLU, temporal convolution."""
    return nn.Sequential(
        nn.Conv3d(in_channels, mid, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
        nn.BatchNorm3d(mid),
        nn.ReLU(inplace=True),
        nn.Conv3d(mid, out_channels, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
    )
