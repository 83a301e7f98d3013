"""Rows (N, T, H, W, C), the two 4D views of them, and PyTorch's convolutions over these.

How PyTorch's convolutions are called is decided here: no call reads or writes out of bounds.
``python -m tests.support.soak`` runs them under an allocator that checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor

from ...problem.spec import Pass, pad_index

aten = torch.ops.aten


def as_rows(x: Tensor) -> Tensor:
    """(N, C, T, H, W) of any strides as (N, T, H, W, C) contiguous; no copy if it is so already.

    The strides are those of a fresh tensor also along axes of size 1, where a contiguous tensor may
    have any: oneDNN believes them.
    """
    rows = x.permute(0, 2, 3, 4, 1)
    n, t, h, w, c = rows.shape
    if x.device.type == "cpu" and x.is_contiguous() and not rows.is_contiguous():
        # PyTorch transposes matrices in blocks, tensors of more dimensions element by element.
        rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for sample, matrix in zip(rows.view(n, t * h * w, c), x.flatten(2), strict=True):
            sample.copy_(matrix.t())
    rows = rows.contiguous()
    return rows.as_strided(rows.shape, (t * h * w * c, h * w * c, w * c, c, 1))


def leave(rows: Tensor, out: Tensor) -> Tensor:
    """Rows as (N, C, T, H, W) in the strides of ``out``; ``out`` is unused where they agree."""
    y = rows.permute(0, 4, 1, 2, 3)
    return y if y.stride() == out.stride() else out.copy_(y)


def as_frames(rows: Tensor) -> Tensor:
    """(N·T, C, H, W) view of rows, channels_last."""
    return rows.flatten(0, 1).permute(0, 3, 1, 2)


def from_frames(frames: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows of a (N·T, C, H, W) tensor."""
    n, t, _, _, c = shape
    return frames.permute(0, 2, 3, 1).contiguous().view(n, t, frames.shape[2], frames.shape[3], c)


def _own_padding(p: Pass) -> tuple[int, int, int]:
    """What the convolution pads itself: zeros, as many after as before, of axes it sees whole."""
    if p.padding_mode != "zeros":
        return 0, 0, 0
    steps, _ = p.subsampling()
    t, h, w = (
        min(p.padding[2 * i : 2 * i + 2]) if step == 1 else 0 for i, step in enumerate(steps)
    )
    return t, h, w


def _pad_rows(rows: Tensor, p: Pass) -> Tensor:
    """Rows padded as far as the convolution cannot pad itself."""
    t0, t1, h0, h1, w0, w1 = p.padding
    if p.padding_mode == "zeros":
        t, h, w = _own_padding(p)
        extra = (0, 0, w0 - w, w1 - w, h0 - h, h1 - h, t0 - t, t1 - t)
        return F.pad(rows, extra) if any(extra) else rows
    for axis, (before, after) in enumerate(((t0, t1), (h0, h1), (w0, w1)), start=1):
        if before or after:
            index = pad_index(p.padding_mode, rows.shape[axis], before, after, rows.device)
            rows = rows.index_select(axis, index)
    return rows


def _unpad_rows(g: Tensor, size: Sequence[int], p: Pass) -> Tensor:
    """Gradient of ``_pad_rows``: what was copied is summed, what was zero is dropped."""
    t0, t1, h0, h1, w0, w1 = p.padding
    own = _own_padding(p)
    for axis, (before, after) in enumerate(((t0, t1), (h0, h1), (w0, w1)), start=1):
        if p.padding_mode == "zeros":
            g = g.narrow(axis, before - own[axis - 1], size[axis])
        elif before or after:
            index = pad_index(p.padding_mode, size[axis], before, after, g.device)
            shape = list(g.shape)
            shape[axis] = size[axis]
            g = g.new_zeros(shape).index_add_(axis, index, g)
    return g.contiguous()


class _Conv4d:
    """One pass as a 2D convolution over a 4D view of rows."""

    def __init__(self, rows: Tensor, weight: Tensor, p: Pass) -> None:
        rows = _pad_rows(rows, p)
        n, *self.size, c = rows.shape
        self.steps, seen = p.subsampling()
        st, sh, sw = self.steps
        rows = rows[:, ::st, ::sh, ::sw]
        self.n, self.hw, self.p = n, rows.shape[2:4], p
        if p.kind == "spatial":
            self.x, self.weight = as_frames(rows), weight[:, :, 0]
            axes = slice(1, 3)
        else:
            self.x = rows.reshape(n, rows.shape[1], -1, c).permute(0, 3, 1, 2)
            self.weight = weight[..., 0]
            axes = slice(0, 2)  # of the second, one tap and no padding
        self.stride, self.dilation = seen.stride[axes], seen.dilation[axes]
        self.padding = _own_padding(p)[axes]
        self.layout = _layout(self.x, self.weight, seen)
        self.x, self.weight = lay_out(self.x, self.layout), lay_out(self.weight, self.layout)

    def rows(self, y: Tensor) -> Tensor:
        """Rows of an output of the 2D convolution, or of a gradient of its input."""
        y = y.permute(0, 2, 3, 1)
        if self.p.kind == "spatial":
            return y.reshape(self.n, -1 if self.n else self.x.shape[0], *y.shape[1:]).contiguous()
        return y.reshape(self.n, y.shape[1], *self.hw, y.shape[3]).contiguous()

    def unrows(self, g: Tensor) -> Tensor:
        """The 4D view, shaped as the convolution's output, of rows."""
        if self.p.kind == "spatial":
            return lay_out(as_frames(g), self.layout)
        return lay_out(g.flatten(2, 3).permute(0, 3, 1, 2), self.layout)

    def unstride(self, g: Tensor) -> Tensor:
        """Gradient of the subsampling of the axes with one tap."""
        st, sh, sw = self.steps
        if st == sh == sw == 1:
            return g
        full = g.new_zeros(self.n, *self.size, g.shape[-1])
        full[:, ::st, ::sh, ::sw] = g
        return full


def _layout(x: Tensor, weight: Tensor, p: Pass) -> torch.memory_format:
    """Memory format for a 4D convolution: channels_last, but for two cases on CPUs.

    oneDNN's channels-last convolutions read out of bounds over frames narrower than the kernel and,
    in some shapes, with groups, dilation or a stride over 2. And a contiguous weight that is larger
    than x, as in a network's last stage, costs more to convert, gradient included, than x does.
    """
    if x.device.type != "cpu":
        return torch.channels_last
    kh, kw = weight.shape[2:]
    narrow = x.shape[2] < kh or x.shape[3] < kw
    odd = narrow or p.groups > 1 or max(p.dilation) > 1 or max(p.stride) > 2
    heavy = weight.is_contiguous() and weight.numel() > x.numel()
    return torch.contiguous_format if odd or heavy else torch.channels_last


def lay_out(t: Tensor, layout: torch.memory_format) -> Tensor:
    """A tensor in a memory format, with the very strides that a fresh one has.

    Axes of size 1 may have any stride and still count, but oneDNN believes them.
    """
    c, *size = t.shape[1:]
    last = layout is torch.channels_last
    stride = list(accumulate(reversed([*size, c] if last else t.shape[1:]), mul, initial=1))[::-1]
    if last:
        stride.insert(1, stride.pop())
    if t.stride() == tuple(stride):
        return t
    return t.contiguous(memory_format=layout).as_strided(t.shape, stride)


def _half_on_cpu(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype.itemsize == 2


def _sound_in_half(rows: Tensor, p: Pass) -> bool:
    """Whether PyTorch's 16-bit convolution is right on CPUs. It is not in groups, nor dilated,
    over frames narrower than the kernel, or with a stride and a single output along an axis.
    """
    _, seen = p.subsampling()
    _, t, h, w, _ = rows.shape
    narrow = any(n < k for n, k in zip((t, h, w), p.kernel, strict=True))
    single = any(s > 1 == n for s, n in zip(seen.stride, p.out_size((t, h, w)), strict=True))
    plain = p.groups == 1 and max(seen.dilation) == 1 and max(seen.stride) <= 2
    return plain and not narrow and not single


def conv(rows: Tensor, weight: Tensor, bias: Tensor | None, p: Pass) -> Tensor:
    """One pass from rows to rows."""
    if _half_on_cpu(rows) and not _sound_in_half(rows, p):
        wide = conv(rows.float(), weight.float(), None if bias is None else bias.float(), p)
        return wide.to(rows.dtype)
    c = _Conv4d(rows, weight, p)
    y = F.conv2d(c.x, c.weight, bias, c.stride, c.padding, c.dilation, p.groups)
    return c.rows(y)


def conv_backward(
    dy: Tensor, rows: Tensor, weight: Tensor, p: Pass, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``_conv`` with respect to rows, weight (5D) and bias, where needed."""
    if not any(needs):
        return None, None, None
    if _half_on_cpu(rows):
        # oneDNN's 16-bit gradients are wrong in too many shapes to tell them apart.
        wide = conv_backward(dy.float(), rows.float(), weight.float(), p, needs)
        dx, dw, db = (None if g is None else g.to(rows.dtype) for g in wide)
        return dx, dw, db
    c = _Conv4d(rows, weight, p)
    dx, dw, _ = aten.convolution_backward(
        c.unrows(dy), c.x, c.weight, [weight.shape[0]], c.stride, c.padding, c.dilation,
        False, (0, 0), p.groups, [*needs[:2], False],
    )  # fmt: skip
    # oneDNN sums the bias gradient one by one, PyTorch pairwise.
    db = dy.sum((0, 1, 2, 3)) if needs[2] else None
    if needs[0]:
        dx = _unpad_rows(c.unstride(c.rows(dx)), rows.shape, p)
    if needs[1]:
        dw = dw.unsqueeze(2 if p.kind == "spatial" else 4)
    return dx if needs[0] else None, dw if needs[1] else None, db
