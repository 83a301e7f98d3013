"""The networks of arXiv 1711.11248 (Tran et al., 2018).

Every factory takes

- ``num_classes``: outputs of the classifier;
- ``in_channels``: C of the input, 2 for optical flow;
- ``width``: channels of the first stage; the later ones have two, four and eight times as many;
- ``weights``: path of a checkpoint file such as torchvision's ``*.pth``, or None;
- ``eps``: of batch norms: torchvision's 1e-5, or 1e-3 as in the paper's own code,

and gives a ``VideoResNet`` from (N, in_channels, T, H, W) to (N, num_classes), or raises

- ``FileNotFoundError``: no file at ``weights``;
- ``ValueError``: a count that is no positive int, or a file that does not fit the network.

Parameters are counted with 400 classes; FLOPs are the papers': one for each multiplication with its
addition, for one clip of 8 or 16 frames of 112×112.
"""

from __future__ import annotations

from collections.abc import Sequence

from .checkpoint import load_weights
from .resnet import Rules, Stage, VideoResNet, Weights, check_positive

_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def _network(
    depth: int,
    convs: Sequence[str],
    num_classes: int,
    in_channels: int,
    width: int,
    weights: Weights,
    eps: float,
    mids: str = "torchvision",
    frames: int | None = None,
) -> VideoResNet:
    """The network of a depth; ``convs`` are the kinds of its stem and of its four stages."""
    check_positive("width", width)
    stages = [
        Stage(conv, width * 2**i, blocks, 1 if i == 0 else 2)
        for i, (conv, blocks) in enumerate(zip(convs[1:], _BLOCKS[depth], strict=True))
    ]
    rules = Rules(mids, eps, depth >= 50)
    model = VideoResNet(
        convs[0], stages, num_classes, in_channels=in_channels, frames=frames, rules=rules
    )
    if weights is not None:
        load_weights(model, weights)
    return model


def r2d_18(
    num_classes: int = 400,
    *,
    frames: int = 8,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
) -> VideoResNet:
    """R2D-18: a 2D ResNet whose stem reads all frames at once as channels.

    11,447,568 parameters, 1.9 GFLOPs at 8×112².

    Args:
        frames: T, which the stem fixes.
    """
    convs = ["flat", "2d", "2d", "2d", "2d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps, frames=frames)


def fr2d_18(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
) -> VideoResNet:
    """f-R2D-18: a 2D ResNet applied to each frame, averaged over frames at the end.

    11,381,712 parameters, 13.8 GFLOPs at 8×112².
    """
    convs = ["2d", "2d", "2d", "2d", "2d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps)


def r3d_18(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
) -> VideoResNet:
    """R3D-18: 3D convolutions throughout; torchvision's ``r3d_18``.

    33,371,472 parameters, 20.3 GFLOPs at 8×112².
    """
    convs = ["3d", "3d", "3d", "3d", "3d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps)


def mc2_18(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
) -> VideoResNet:
    """MC2-18: 3D in the stem only.

    11,400,528 parameters, 14.3 GFLOPs at 8×112².
    """
    convs = ["3d", "2d", "2d", "2d", "2d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps)


def mc3_18(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
) -> VideoResNet:
    """MC3-18: 3D in the stem and the first stage; torchvision's ``mc3_18``.

    11,695,440 parameters, 21.7 GFLOPs at 8×112².
    """
    convs = ["3d", "3d", "2d", "2d", "2d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps)


def mc4_18(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
) -> VideoResNet:
    """MC4-18: 3D in the stem and the first two stages.

    12,727,632 parameters, 20.0 GFLOPs at 8×112².
    """
    convs = ["3d", "3d", "3d", "2d", "2d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps)


def mc5_18(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
) -> VideoResNet:
    """MC5-18: 3D in all but the last stage.

    16,856,400 parameters, 20.0 GFLOPs at 8×112².
    """
    convs = ["3d", "3d", "3d", "3d", "2d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps)


def rmc2_18(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
) -> VideoResNet:
    """rMC2-18: 2D in the stem only.

    33,352,656 parameters, 19.9 GFLOPs at 8×112².
    """
    convs = ["2d", "3d", "3d", "3d", "3d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps)


def rmc3_18(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
) -> VideoResNet:
    """rMC3-18: 2D in the stem and the first stage.

    33,057,744 parameters, 12.5 GFLOPs at 8×112².
    """
    convs = ["2d", "2d", "3d", "3d", "3d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps)


def rmc4_18(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
) -> VideoResNet:
    """rMC4-18: 2D in the stem and the first two stages.

    32,025,552 parameters, 14.5 GFLOPs at 8×112².
    """
    convs = ["2d", "2d", "2d", "3d", "3d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps)


def rmc5_18(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
) -> VideoResNet:
    """rMC5-18: 2D in all but the last stage.

    27,896,784 parameters, 15.4 GFLOPs at 8×112².
    """
    convs = ["2d", "2d", "2d", "2d", "3d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps)


def r2plus1d_18(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-5,
    mids: str = "torchvision",
) -> VideoResNet:
    """R(2+1)D-18: (2+1)D convolutions throughout; torchvision's ``r2plus1d_18``.

    31,505,325 parameters, 20.3 GFLOPs at 8×112².

    Args:
        mids: "torchvision": both convolutions of a block have the mid channels of the first;
            "paper": each its own.
    """
    convs = ["2+1d", "2+1d", "2+1d", "2+1d", "2+1d"]
    return _network(18, convs, num_classes, in_channels, width, weights, eps, mids)


def r2plus1d_34(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-3,
    mids: str = "paper",
) -> VideoResNet:
    """R(2+1)D-34, as its authors train it.

    63,697,175 parameters, 38.1 GFLOPs at 8×112².

    Args:
        mids: "torchvision": both convolutions of a block have the mid channels of the first;
            "paper": each its own.
    """
    convs = ["2+1d", "2+1d", "2+1d", "2+1d", "2+1d"]
    return _network(34, convs, num_classes, in_channels, width, weights, eps, mids)


def r2plus1d_50(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-3,
    mids: str = "paper",
) -> VideoResNet:
    """R(2+1)D-50: bottleneck blocks with (2+1)D convolutions.

    46,985,057 parameters, 28.8 GFLOPs at 8×112².

    Args:
        mids: "torchvision": both convolutions of a block have the mid channels of the first;
            "paper": each its own.
    """
    convs = ["2+1d", "2+1d", "2+1d", "2+1d", "2+1d"]
    return _network(50, convs, num_classes, in_channels, width, weights, eps, mids)


def r2plus1d_101(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-3,
    mids: str = "paper",
) -> VideoResNet:
    """R(2+1)D-101: bottleneck blocks with (2+1)D convolutions.

    86,050,785 parameters, 44.1 GFLOPs at 8×112².

    Args:
        mids: "torchvision": both convolutions of a block have the mid channels of the first;
            "paper": each its own.
    """
    convs = ["2+1d", "2+1d", "2+1d", "2+1d", "2+1d"]
    return _network(101, convs, num_classes, in_channels, width, weights, eps, mids)


def r2plus1d_152(
    num_classes: int = 400,
    *,
    in_channels: int = 3,
    width: int = 64,
    weights: Weights = None,
    eps: float = 1e-3,
    mids: str = "paper",
) -> VideoResNet:
    """R(2+1)D-152: bottleneck blocks with (2+1)D convolutions.

    118,226,785 parameters, 63.0 GFLOPs at 8×112².

    Args:
        mids: "torchvision": both convolutions of a block have the mid channels of the first;
            "paper": each its own.
    """
    convs = ["2+1d", "2+1d", "2+1d", "2+1d", "2+1d"]
    return _network(152, convs, num_classes, in_channels, width, weights, eps, mids)
