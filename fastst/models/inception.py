"""Networks of Inception modules: I3D (arXiv 1705.07750) and ECO Lite (arXiv 1804.09066)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checkpoint import load_weights
from .resnet import Rules, Stage, Weights, check_positive, conv3, initialise, residual_stage

_EPS = 1e-3  # of all batch norms of both networks


class Inception(nn.Module):
    """Four branches over the same input, their outputs concatenated.

    Args:
        in_channels: C.
        widths: channels of the 1×1 branch, of the 3×3 branch before and after, of the branch for
            larger reach before and after, and of the pooling branch.
        dims: 2 or 3, of all convolutions.
        double: the branch for larger reach has two 3×3 convolutions instead of one.
        average: the pooling branch takes the mean instead of the maximum.
    """

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, int, int, int, int, int],
        dims: int,
        *,
        double: bool = False,
        average: bool = False,
    ) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pooled = widths
        pools = {2: (nn.MaxPool2d, nn.AvgPool2d), 3: (nn.MaxPool3d, nn.AvgPool3d)}[dims]
        again = [unit(dims, five, five, 3)] if double else []
        self.branches = nn.ModuleList(
            [
                unit(dims, in_channels, one, 1),
                nn.Sequential(unit(dims, in_channels, reduce3, 1), unit(dims, reduce3, three, 3)),
                nn.Sequential(
                    unit(dims, in_channels, reduce5, 1), unit(dims, reduce5, five, 3), *again
                ),
                nn.Sequential(pools[average](3, 1, 1), unit(dims, in_channels, pooled, 1)),
            ]
        )
        self.out_channels = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def unit(
    dims: int, in_channels: int, out_channels: int, kernel: int, stride: int = 1
) -> nn.Sequential:
    """Convolution that keeps the size but for its stride, batch norm, ReLU."""
    conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[dims - 2]
    return nn.Sequential(
        conv(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
        norm(out_channels, _EPS),
        nn.ReLU(inplace=True),
    )


class Pool(NamedTuple):
    """Maximum over windows of frames and pixels that halve the size, time only where it says so."""

    frames: int
    pixels: int = 3

    def module(self) -> nn.MaxPool3d:
        strides = (1 if self.frames == 1 else 2, 2, 2)
        kernel = (self.frames, self.pixels, self.pixels)
        padding = ((self.frames - 1) // 2, (self.pixels - 1) // 2, (self.pixels - 1) // 2)
        return nn.MaxPool3d(kernel, strides, padding)


_I3D: tuple[Pool | tuple[int, int, int, int, int, int], ...] = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    Pool(3),
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    Pool(2, 2),
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)


class I3D(nn.Module):
    """Inception-V1 with every kernel inflated to three dimensions.

    Args:
        num_classes: outputs of the classifier.
        in_channels: C of the input; 2 for optical flow.
        dropout: before the classifier.

    Shape:
        (N, C, T, H, W) to (N, num_classes).
    """

    def __init__(self, num_classes: int, in_channels: int, dropout: float) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("in_channels", in_channels)
        self.stem = nn.Sequential(
            unit(3, in_channels, 64, 7, 2),
            Pool(1).module(),
            unit(3, 64, 64, 1),
            unit(3, 64, 192, 3),
            Pool(1).module(),
        )
        width = 192
        modules: list[nn.Module] = []
        for entry in _I3D:
            if isinstance(entry, Pool):
                modules.append(entry.module())
                continue
            module = Inception(width, entry, 3)
            modules.append(module)
            width = module.out_channels
        self.body = nn.Sequential(*modules)
        self.avgpool = nn.AdaptiveAvgPool3d((1, 1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.body(self.stem(x)))
        return self.fc(self.dropout(x.flatten(1)))


class EcoLite(nn.Module):
    """The first part of a 2D Inception for each frame, then a residual network over all of them.

    Args:
        num_classes: outputs of the classifier.
        conv: kind of the second part's convolutions: "add", "cat" or "3d".
        in_channels: C of the input.
        dropout: before the classifier.

    Shape:
        (N, C, T, H, W) to (N, num_classes).
    """

    def __init__(self, num_classes: int, conv: str, in_channels: int, dropout: float) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("in_channels", in_channels)
        first = Inception(192, (64, 64, 64, 64, 96, 32), 2, double=True, average=True)
        second = Inception(256, (64, 64, 96, 64, 96, 64), 2, double=True, average=True)
        self.frames = nn.Sequential(
            unit(2, in_channels, 64, 7, 2),
            nn.MaxPool2d(3, 2, 1),
            unit(2, 64, 64, 1),
            unit(2, 64, 192, 3),
            nn.MaxPool2d(3, 2, 1),
            first,
            second,
            unit(2, second.out_channels, 64, 1),
            unit(2, 64, 96, 3),
            unit(2, 96, 96, 3),
        )
        width, modules = 128, []
        self.entry = nn.Sequential(
            conv3(conv, 96, width, (1, 1, 1), 0, _EPS),
            nn.BatchNorm3d(width, _EPS),
            nn.ReLU(inplace=True),
        )
        for stage in (Stage(conv, 128, 1, 1), Stage(conv, 256, 2, 2), Stage(conv, 512, 2, 2)):
            blocks, width = residual_stage(width, stage, Rules("paper", _EPS))
            modules.append(blocks)
        self.clip = nn.Sequential(*modules)
        self.avgpool = nn.AdaptiveAvgPool3d((1, 1, 1))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(width, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[0], x.shape[2]
        x = self.frames(x.transpose(1, 2).flatten(0, 1))  # (N·T, 96, H / 8, W / 8)
        x = x.unflatten(0, (n, t)).transpose(1, 2)
        x = self.avgpool(self.clip(self.entry(x)))
        return self.fc(self.dropout(x.flatten(1)))


def i3d(
    num_classes: int = 400, *, in_channels: int = 3, dropout: float = 0.5, weights: Weights = None
) -> I3D:
    """I3D (Carreira and Zisserman, 2017): inflated Inception-V1.

    12,697,264 parameters, 111.2 GFLOPs at 64×224². Padding is symmetric, and the average before the
    classifier is over all of space and time.

    Args:
        num_classes: outputs of the classifier.
        in_channels: C of the input, (N, C, T, H, W); 2 for optical flow.
        dropout: before the classifier.
        weights: path of a state_dict, or None.

    Raises:
        ValueError: a count that is no positive int, or a file that does not fit the network.
    """
    model = I3D(num_classes, in_channels, dropout)
    if weights is not None:
        load_weights(model, weights)
    return model


def eco_lite(
    num_classes: int = 400,
    *,
    conv: str = "add",
    in_channels: int = 3,
    dropout: float = 0.3,
    weights: Weights = None,
) -> EcoLite:
    """ECO Lite (Zolfaghari et al., 2018) with the 4D path of arXiv 2407.16514 for its 3D part.

    15,443,920 parameters, 29.0 GFLOPs at 16×224².

    Where a 3×3×3 convolution has 27 taps, "add" has 9 + 3 in parallel, each to all outputs, and
    "cat" the same to half of the outputs each, 6 on average: 14.3 and 7.2 million parameters
    instead of 32.2.

    Args:
        num_classes: outputs of the classifier.
        conv: "add", "cat", or the original's "3d".
        in_channels: C of the input, (N, C, T, H, W).
        dropout: before the classifier.
        weights: path of a state_dict, or None.

    Raises:
        ValueError: a count that is no positive int, an unknown kind of convolution, or a file that
            does not fit the network.
    """
    if conv not in ("add", "cat", "3d"):
        raise ValueError(f"conv must be 'add', 'cat' or '3d', got {conv!r}")
    model = EcoLite(num_classes, conv, in_channels, dropout)
    if weights is not None:
        load_weights(model, weights)
    return model
