"""Published video networks in plain modules, with the keys of their checkpoints.

Nothing in them is fused: ``fastst.convert`` does that, as with any other model.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .autoencoder import CausalAutoencoder, causal_autoencoder
from .classic import C3D, CnnLstm, TwoStream, c3d, cnn_lstm
from .inception import I3D, EcoLite, eco_lite, i3d
from .networks import (
    fr2d_18,
    mc2_18,
    mc3_18,
    mc4_18,
    mc5_18,
    r2d_18,
    r2plus1d_18,
    r2plus1d_34,
    r2plus1d_50,
    r2plus1d_101,
    r2plus1d_152,
    r3d_18,
    rmc2_18,
    rmc3_18,
    rmc4_18,
    rmc5_18,
)
from .resnet import VideoResNet

# Classifiers by name: factories that take the number of classes.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    f.__name__: f
    for f in (
        r2d_18, fr2d_18, r3d_18, mc2_18, mc3_18, mc4_18, mc5_18, rmc2_18, rmc3_18, rmc4_18,
        rmc5_18, r2plus1d_18, r2plus1d_34, r2plus1d_50, r2plus1d_101, r2plus1d_152, c3d, i3d,
        cnn_lstm, eco_lite,
    )
}  # fmt: skip

__all__ = [
    "NETWORKS",
    "C3D",
    "CausalAutoencoder",
    "CnnLstm",
    "EcoLite",
    "I3D",
    "TwoStream",
    "VideoResNet",
    "causal_autoencoder",
    *NETWORKS,
]
