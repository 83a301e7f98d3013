"""The operators ``torch.ops.fastst``: schemas, fakes, autograd."""

from .autograd import batch_norm, conv2plus1d, parallel_conv2plus1d
from .registered import first_pass

__all__ = ["batch_norm", "conv2plus1d", "first_pass", "parallel_conv2plus1d"]
