"""The operators ``torch.ops.fastst``: schemas, fakes, autograd."""

from .autograd import batch_norm, conv2plus1d, parallel_conv2plus1d

__all__ = ["batch_norm", "conv2plus1d", "parallel_conv2plus1d"]
