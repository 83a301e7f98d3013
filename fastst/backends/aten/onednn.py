"""float32 inference on the CPU: three ways through oneDNN, one rule that picks.

``aten`` comes here for calls that keep nothing for backward. A frozen norm is folded into the first
weights where these are smaller than u.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...machine import choices
from ...problem import activations
from ...problem.memory import is_shared, lazy_clone
from ...problem.spec import PairProblem, PairTensors, Pass
from .rows import lay_out

# Stages of oneDNN's convolutions with what comes after them; Inductor's own, so they may move.
_pointwise = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_pointwise_ = getattr(torch.ops.mkldnn, "_convolution_pointwise_", None)

# Frames that the Winograd way transforms together: what it makes of them stays in the caches.
_FRAMES = 2


class _FoldedWeights(NamedTuple):
    """The two passes in order, ready to run; ``scale`` and ``shift`` where nothing was folded."""

    first: tuple[Tensor, Tensor | None]
    second: tuple[Tensor, Tensor | None]
    scale: Tensor | None
    shift: Tensor | None


def why_not(problem: PairProblem) -> str | None:
    """Why this module cannot run the problem forward, or None."""
    if problem.device.type != "cpu" or problem.dtype != torch.float32:
        return "runs float32 on the CPU only"
    if _pointwise is None or _pointwise_ is None or not torch.backends.mkldnn.is_available():
        return "needs a PyTorch with oneDNN"
    if not torch.backends.mkldnn.enabled:
        return "is off with torch.backends.mkldnn.enabled"
    if problem.spec.norm == "batch":
        return "runs without statistics of the batch only"
    for p in problem.passes:
        if p.groups != 1 or max(p.dilation) > 1 or max(p.stride) > 2:
            # oneDNN's channels-last convolutions read out of bounds in some of these.
            return "runs passes without groups and dilation, of stride 1 or 2 only"
        if any(p.padding) and (p.padding_mode != "zeros" or p.padding[::2] != p.padding[1::2]):
            return "pads with zeros and on both sides alike only"
    return None


def ways(problem: PairProblem) -> tuple[str, ...]:
    """Names of the ways that can run the problem."""
    return ("blocked", "rows", *(["winograd"] if _winograd_fits(problem) else []))


def rule(problem: PairProblem) -> str:
    """The way that is taken without a measurement.

    oneDNN's blocked layout for contiguous tensors: it reads and writes them as fast as it copies,
    and no tensor of ours is transposed. Rows for channels_last, which they are. Winograd's saving
    of a third of the spatial multiplications outweighs its passes over frames only where these are
    large, and its transformed weights where they are small.
    """
    large = problem.mid_size[1] * problem.mid_size[2] >= 28 * 28
    thin = 32 <= problem.passes[0].in_channels <= 128
    if _winograd_fits(problem) and problem.channels_last and large and thin:
        return "winograd"
    return "rows" if problem.channels_last else "blocked"


def conv2plus1d(problem: PairProblem, tensors: PairTensors) -> Tensor:
    """y of a problem that ``why_not`` lets through."""
    way = choices.choice("aten", problem, "forward")
    return run(way if way in ways(problem) else rule(problem), problem, tensors)


def run(way: str, problem: PairProblem, tensors: PairTensors) -> Tensor:
    weights = _prepare(problem, tensors)
    # relu comes with the convolution only if no NaN can arise, because oneDNN's makes 0 of it, and
    # where the passes that this saves are longer than those that find it out.
    cheap = _mid_elements(problem) > tensors.x.numel() + weights.first[0].numel()
    relu = problem.spec.activation == "relu" and weights.scale is None
    finite = (way == "winograd" or (relu and cheap)) and _stays_finite(tensors.x, *weights.first)
    if finite:
        weights = _pad(weights)
    elif way == "winograd":
        way = "rows"  # Winograd's differences make NaN of infinities
    y = _WAYS[way](problem, tensors.x, weights, "relu" if relu and finite else "none")
    out = problem.empty_output(y)
    return y if y.stride() == out.stride() else out.copy_(y)


def _run_blocked(problem: PairProblem, x: Tensor, weights: _FoldedWeights, fused: str) -> Tensor:
    """3D convolutions of contiguous tensors; u stays in oneDNN's layout unless it is activated."""

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None, p: Pass, fused: str) -> Tensor:
        weight = lay_out(weight, torch.contiguous_format)
        return _convolve(x, weight, bias, p.padding[::2], p.stride, fused)

    x = lay_out(x, torch.contiguous_format)
    bare = problem.spec.activation == "none" and weights.scale is None
    if fused != "none" or bare:
        # Which reads as if it wrote: x would move.
        clone = lazy_clone(x) if is_shared(x) else None
        x = (x if clone is None else clone).to_mkldnn()
    u = conv(x, *weights.first, problem.passes[0], fused)
    if not u.is_mkldnn:
        u = _activate(problem, u, weights, 1)
    y = conv(u, *weights.second, problem.passes[1], "none")
    return y.to_dense() if y.is_mkldnn else y


def _rows(problem: PairProblem, x: Tensor, weights: _FoldedWeights, fused: str) -> Tensor:
    """2D convolutions of (N, T, H, W, C), seen as frames and as pixels."""
    first, second = problem.passes
    u = _conv_rows(x.permute(0, 2, 3, 4, 1).contiguous(), *weights.first, first, fused)
    z = u if fused != "none" else _activate(problem, u, weights, -1)
    return _conv_rows(z, *weights.second, second).permute(0, 4, 1, 2, 3)


def _winograd(problem: PairProblem, x: Tensor, weights: _FoldedWeights, fused: str) -> Tensor:
    """Rows with F(2, 3) along the height of the spatial pass (Winograd; arXiv 1509.09308).

    Two output rows come from four products of 1×kw convolutions instead of six::

        u[2i]   = m0 + m1 + m2      m0 = (x[2i-1] − x[2i+1]) ∗ g0   m1 = (x[2i] + x[2i+1]) ∗ g1
        u[2i+1] = m1 − m2 + m3      m3 = (x[2i+2] − x[2i]) ∗ g3     m2 = (x[2i+1] − x[2i]) ∗ g2

    Even and odd rows stay apart, in two halves of the batch, until y is written.
    """
    first, second = problem.passes
    (w1, b1), (w2, b2) = weights.first, weights.second
    rows = x.permute(0, 2, 3, 4, 1).contiguous().flatten(0, 1)  # (N·T, H, W, C)
    frames, height, width, c = rows.shape
    g = _winograd_weights(w1)
    geometry = ((0, first.padding[4]), (1, first.stride[2]))
    n, (t, h, w), m = problem.batch, problem.mid_size, w1.shape[0]
    u = rows.new_empty(2, frames, h // 2, w, m)
    buffer = rows.new_empty(_FRAMES, height // 2, width, c)
    for start in range(0, frames, _FRAMES):
        chunk = rows[start : start + _FRAMES]
        even, odd, v = chunk[:, 0::2], chunk[:, 1::2], buffer[: chunk.shape[0]]
        v4 = v.permute(0, 3, 1, 2)
        top, bottom = (half[start : start + _FRAMES] for half in u)
        torch.add(even, odd, out=v)
        m1 = _convolve(v4, g[1], b1, *geometry).permute(0, 2, 3, 1)
        torch.sub(odd, even, out=v)
        m2 = _convolve(v4, g[2], None, *geometry).permute(0, 2, 3, 1)
        torch.add(m1, m2, out=top)
        torch.sub(m1, m2, out=bottom)
        torch.sub(odd[:, :-1], odd[:, 1:], out=v[:, 1:])
        torch.neg(odd[:, 0], out=v[:, 0])
        _convolve_into(top.permute(0, 3, 1, 2), v4, g[0], *geometry, fused)
        torch.sub(even[:, 1:], even[:, :-1], out=v[:, :-1])
        torch.neg(even[:, -1], out=v[:, -1])
        _convolve_into(bottom.permute(0, 3, 1, 2), v4, g[3], *geometry, fused)
    z = u.view(2 * n, t, h // 2, w, m)
    if fused == "none":
        z = _activate(problem, z, weights, -1)
    halves = _conv_rows(z, w2, b2, second).unflatten(0, (2, n))  # (2, N, T', H'/2, W', K)
    out = problem.empty_output(x)
    out.unflatten(3, (h // 2, 2)).copy_(halves.permute(1, 5, 2, 3, 0, 4))
    return out


def _winograd_fits(problem: PairProblem) -> bool:
    p = problem.passes[0]
    return (
        p.kind == "spatial"
        and (p.kernel[1], p.stride[1], p.padding[2]) == (3, 1, 1)
        and problem.size[1] % 2 == 0
        and problem.size[2] >= p.kernel[2]
    )


def _winograd_weights(w: Tensor) -> list[Tensor]:
    """g0 … g3, each (M, C, 1, kw) in channels_last, of (M, C, 1, 3, kw)."""
    w0, w1, w2 = w[:, :, 0].permute(2, 0, 3, 1).contiguous()  # (3, M, kw, C)
    mean, half = (w0 + w2).mul_(0.5), w1 * 0.5
    return [g.unsqueeze(1).permute(0, 3, 1, 2) for g in (w0, mean + half, mean - half, w2)]


_WAYS: dict[str, Callable[[PairProblem, Tensor, _FoldedWeights, str], Tensor]] = {
    "blocked": _run_blocked, "rows": _rows, "winograd": _winograd,
}  # fmt: skip


def _prepare(problem: PairProblem, t: PairTensors) -> _FoldedWeights:
    """Weights in the order of the passes, the norm folded in where that is the shorter pass."""
    _, w1, w2, b1, b2, *_ = t
    scale = shift = None
    if t.mean is not None and t.var is not None:
        scale = (t.var.float() + problem.spec.eps).rsqrt()
        if t.norm_weight is not None:
            scale = scale * t.norm_weight
        shift = -t.mean * scale
        if t.norm_bias is not None:
            shift = shift + t.norm_bias
        scale, shift = scale.float(), shift.float()
    if w1.numel() > _mid_elements(problem):
        return _FoldedWeights((w1, b1), (w2, b2), scale, shift)
    if scale is not None and shift is not None:
        w1 = w1 * scale.view(-1, 1, 1, 1, 1)
        b1 = shift if b1 is None else torch.addcmul(shift, scale, b1)
    return _FoldedWeights((w1, b1), (w2, b2), None, None)


def _pad(weights: _FoldedWeights) -> _FoldedWeights:
    """Mid channels in whole blocks of 16; for finite x only, since 0 · inf is NaN."""
    (w1, b1), (w2, b2) = weights.first, weights.second
    extra = -w1.shape[0] % 16
    if not extra or weights.scale is not None:
        return weights
    w1 = F.pad(w1, (0, 0) * 4 + (0, extra))
    b1 = None if b1 is None else F.pad(b1, (0, extra))
    return _FoldedWeights((w1, b1), (F.pad(w2, (0, 0) * 3 + (0, extra)), b2), None, None)


def _mid_elements(problem: PairProblem) -> int:
    return problem.batch * problem.mid_channels * math.prod(problem.mid_size)


def _stays_finite(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether neither a sum of products nor Winograd's terms can leave the range of float32."""
    bound = 4.0 * _largest(x) * _largest(weight) * weight[0].numel()
    return bound + (0.0 if bias is None else _largest(bias)) < 1e38  # False for NaN


def _largest(t: Tensor) -> float:
    low, high = torch.aminmax(t)
    return max(-low.item(), high.item())


def _activate(problem: PairProblem, u: Tensor, weights: _FoldedWeights, dim: int) -> Tensor:
    """act(norm(u)) in place where it can be; channels along ``dim``."""
    if weights.scale is not None and weights.shift is not None:
        shape = [-1 if d == dim % 5 else 1 for d in range(5)]
        u = u.mul_(weights.scale.view(shape)).add_(weights.shift.view(shape))
    spec = problem.spec
    return activations.apply(spec.activation, u, spec.slope, inplace=True)


def _conv_rows(
    rows: Tensor, weight: Tensor, bias: Tensor | None, p: Pass, fused: str = "none"
) -> Tensor:
    """One pass from (N, T, H, W, C) to (N, T', H', W', C'), as a 2D convolution."""
    n, t, h, w, _ = rows.shape
    if p.kind == "spatial":
        x, weight = rows.flatten(0, 1), weight[:, :, 0]
        padding, stride = p.padding[2::2], p.stride[1:]
    else:
        x, weight = rows.flatten(2, 3), weight[..., 0]
        padding, stride = (p.padding[0], 0), (p.stride[0], 1)
    narrow = x.shape[1] < weight.shape[2] or x.shape[2] < weight.shape[3]
    # oneDNN's channels-last convolutions read out of bounds over frames narrower than the kernel.
    layout = torch.contiguous_format if narrow else torch.channels_last
    x, weight = lay_out(x.permute(0, 3, 1, 2), layout), lay_out(weight, layout)
    y = _convolve(x, weight, bias, padding, stride, fused).permute(0, 2, 3, 1).contiguous()
    return y.unflatten(0, (n, t)) if p.kind == "spatial" else y.unflatten(2, (h, w))


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    stride: Sequence[int],
    fused: str = "none",
) -> Tensor:
    assert _pointwise is not None
    ones = [1] * len(stride)
    y: Tensor = _pointwise(x, weight, bias, padding, stride, ones, 1, fused, [], "")
    return y


def _convolve_into(
    y: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int], stride: Sequence[int], fused: str
) -> None:
    """y = act(y + convolution of x), in place."""
    assert _pointwise_ is not None
    act = None if fused == "none" else fused
    _pointwise_.binary(y, x, weight, None, padding, stride, [1, 1], 1, "add", 1.0, act, [], "")
