"""C3D (arXiv 1412.0767), a CNN with an LSTM (arXiv 1411.4389), two streams (arXiv 1406.2199)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_weights
from .resnet import Stage, VideoResNet, Weights, check_positive

# Channels of the convolutions between poolings; the first pooling leaves time as it is.
_C3D = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class C3D(nn.Module):
    """Eight 3×3×3 convolutions, five poolings, three linear layers.

    Args:
        num_classes: outputs of the classifier.
        in_channels: C of the input.
        dropout: after each of the first two linear layers.

    Shape:
        (N, C, 16, 112, 112) to (N, num_classes): the linear layers fix the size.
    """

    def __init__(self, num_classes: int, in_channels: int, dropout: float) -> None:
        super().__init__()
        check_positive("num_classes", num_classes)
        check_positive("in_channels", in_channels)
        width, modules = in_channels, []
        for i, group in enumerate(_C3D):
            for channels in group:
                modules += [nn.Conv3d(width, channels, 3, padding=1), nn.ReLU(inplace=True)]
                width = channels
            frames = 1 if i == 0 else 2
            padding = (0, 1, 1) if i == len(_C3D) - 1 else 0
            modules.append(nn.MaxPool3d((frames, 2, 2), padding=padding))
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Sequential(
            nn.Linear(width * 4 * 4, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class CnnLstm(VideoResNet):
    """A 2D ResNet-18 for each frame, an LSTM over the frames, a classifier of its last output.

    Args:
        num_classes: outputs of the classifier.
        in_channels: C of the input.
        width: channels of the ResNet's first stage; the LSTM has eight times as many.

    Shape:
        (N, C, T, H, W) to (N, num_classes).
    """

    def __init__(self, num_classes: int, in_channels: int, width: int) -> None:
        check_positive("width", width)
        stages = [Stage("2d", width * 2**i, 2, 1 if i == 0 else 2) for i in range(4)]
        super().__init__("2d", stages, num_classes, in_channels=in_channels)
        self.avgpool = nn.AdaptiveAvgPool3d((None, 1, 1))
        self.lstm = nn.LSTM(8 * width, 8 * width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x)).flatten(2)  # (N, K, T)
        outputs, _ = self.lstm(x.transpose(1, 2))
        return self.fc(outputs[:, -1])


class TwoStream(nn.Module):
    """Late fusion of two networks: the mean of their class probabilities.

    Args:
        appearance: from (N, 3, T, H, W), RGB, to (N, classes).
        motion: from (N, 2, T, H, W), optical flow, to (N, classes).
        motion_weight: share of the motion network in the mean, within (0, 1).

    Shape:
        (N, 3, T, H, W) and (N, 2, T, H, W) to (N, classes): logarithms of probabilities, which
        serve as logits.

    Raises:
        ValueError: a share outside of (0, 1).
    """

    def __init__(
        self, appearance: nn.Module, motion: nn.Module, motion_weight: float = 0.5
    ) -> None:
        super().__init__()
        if not 0 < motion_weight < 1:
            raise ValueError(f"motion_weight must be within (0, 1), got {motion_weight!r}")
        self.appearance, self.motion, self.motion_weight = appearance, motion, motion_weight

    def forward(self, rgb: Tensor, flow: Tensor) -> Tensor:
        a = F.log_softmax(self.appearance(rgb), 1) + math.log(1 - self.motion_weight)
        b = F.log_softmax(self.motion(flow), 1) + math.log(self.motion_weight)
        return torch.logaddexp(a, b)


def c3d(
    num_classes: int = 400, *, in_channels: int = 3, dropout: float = 0.5, weights: Weights = None
) -> C3D:
    """C3D (Tran et al., 2015).

    79,634,576 parameters, 38.5 GFLOPs at 16×112².

    Args:
        num_classes: outputs of the classifier.
        in_channels: C of the input, (N, C, 16, 112, 112).
        dropout: after each of the first two linear layers.
        weights: path of a state_dict, or None.

    Raises:
        ValueError: a count that is no positive int, or a file that does not fit the network.
    """
    model = C3D(num_classes, in_channels, dropout)
    if weights is not None:
        load_weights(model, weights)
    return model


def cnn_lstm(
    num_classes: int = 400, *, in_channels: int = 3, width: int = 64, weights: Weights = None
) -> CnnLstm:
    """A 2D ResNet-18 for each frame, then an LSTM (Donahue et al., 2015).

    13,482,960 parameters, 27.6 GFLOPs at 16×112².

    Args:
        num_classes: outputs of the classifier.
        in_channels: C of the input, (N, C, T, H, W).
        width: channels of the ResNet's first stage; the LSTM has eight times as many.
        weights: path of a state_dict, or None.

    Raises:
        ValueError: a count that is no positive int, or a file that does not fit the network.
    """
    model = CnnLstm(num_classes, in_channels, width)
    if weights is not None:
        load_weights(model, weights)
    return model
