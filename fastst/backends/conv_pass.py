"""One convolution as ``nn.Conv3d`` computes it, by PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ..machine import exactness
from ..problem.spec import Pass, pad_index

_PAD_MODE = {"zeros": "constant"}


def pad(x: Tensor, padding: Sequence[int], mode: str, frame_mode: str | None = None) -> Tensor:
    """Pad (N, C, T, H, W) by (before, after) of t, h, w; pads nothing that is 0.

    ``frame_mode``: the mode of t, where it is another one.
    """
    t0, t1, h0, h1, w0, w1 = padding
    if not any(padding):
        return x
    if frame_mode not in (None, mode):
        x, t0, t1 = pad(x, (t0, t1, 0, 0, 0, 0), str(frame_mode)), 0, 0
    return F.pad(x, (w0, w1, h0, h1, t0, t1), _PAD_MODE.get(mode, mode))


def unpad(g: Tensor, size: Sequence[int], padding: Sequence[int], modes: Sequence[str]) -> Tensor:
    """Gradient of padding to (T, H, W) of ``size``: what was copied is summed, what was zero is
    dropped."""
    for i, mode in enumerate(modes):
        axis, (before, after) = 2 + i, padding[2 * i : 2 * i + 2]
        if mode == "zeros":
            g = g.narrow(axis, before, size[i])
        elif before or after:
            index = pad_index(mode, size[i], before, after, g.device)
            shape = list(g.shape)
            shape[axis] = size[i]
            g = g.new_zeros(shape).index_add_(axis, index, g)
    return g


def prepare(x: Tensor, p: Pass) -> tuple[Tensor, tuple[int, int, int], Pass]:
    """What PyTorch's convolution is to read for one pass, its padding, and the pass it then runs.

    Zeros, as many before as after, are left to it; axes with one tap are subsampled before.
    """
    steps, seen = p.subsampling()
    t0, t1, h0, h1, w0, w1 = p.padding
    padding = (t0, h0, w0)
    strided = any(step > 1 and pad for step, pad in zip(steps, padding, strict=True))
    if set(p.modes) != {"zeros"} or padding != (t1, h1, w1) or strided:
        x, padding = pad(x, p.padding, p.padding_mode, p.frame_mode), (0, 0, 0)
    st, sh, sw = steps
    return x[:, :, ::st, ::sh, ::sw], padding, seen


def conv_pass(x: Tensor, weight: Tensor, bias: Tensor | None, p: Pass) -> Tensor:
    """One pass as ``nn.Conv3d`` computes it; of 16 bits on CPUs, where oneDNN's is wrong, wider."""
    if exactness.is_required():
        return _module(x, weight, bias, p)
    if x.device.type == "cpu" and x.dtype.itemsize == 2:
        wide = conv_pass(x.float(), weight.float(), None if bias is None else bias.float(), p)
        return wide.to(x.dtype)
    if x.device.type == "cpu":
        # oneDNN's gradients of strided channels-last 3D convolutions read out of bounds.
        x, weight = x.contiguous(), weight.contiguous()
    x, padding, p = prepare(x, p)
    return F.conv3d(x, weight, bias, p.stride, padding, p.dilation, p.groups)


def _module(x: Tensor, weight: Tensor, bias: Tensor | None, p: Pass) -> Tensor:
    """The very call that ``nn.Conv3d`` makes, whatever PyTorch makes of it."""
    t0, t1, h0, h1, w0, w1 = p.padding
    padding = (t0, h0, w0)
    if set(p.modes) != {"zeros"} or padding != (t1, h1, w1):
        x, padding = pad(x, p.padding, p.padding_mode, p.frame_mode), (0, 0, 0)
    return F.conv3d(x, weight, bias, p.stride, padding, p.dilation, p.groups)
