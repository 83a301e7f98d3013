"""Published video networks in plain ``torch.nn`` modules, with the keys of their checkpoints."""

from .resnet import VideoResNet, r2plus1d_18

__all__ = ["VideoResNet", "r2plus1d_18"]
