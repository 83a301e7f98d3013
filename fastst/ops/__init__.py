"""The operators ``torch.ops.fastst``: schemas, fakes, autograd."""

from .autograd import batch_norm, conv2plus1d, needs_grad, parallel_conv2plus1d
from .convolution import conv3d
from .registered import first_pass

__all__ = [
    "batch_norm",
    "conv2plus1d",
    "conv3d",
    "first_pass",
    "needs_grad",
    "parallel_conv2plus1d",
]
