"""``conv3d`` on PyTorch's own operators: what the convolution reads exists a few frames at a time.

Where x is read as it is and PyTorch pads, nothing is written but y. Else z, padded, is made chunk
by chunk; backward makes it whole, from x and the statistics that were kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...problem import activations, norms
from ...problem.conv3d import ConvProblem, ConvTensors
from ...problem.spec import Pass
from ..contract import ConvBackward, ConvResult, Gradients
from ..conv_pass import conv_pass, prepare, unpad

aten = torch.ops.aten

# Bytes of z that are made at once: enough for a GPU to be busy.
_CHUNK = 64 << 20


def conv3d(problem: ConvProblem, tensors: ConvTensors, train: bool = False) -> ConvResult:
    spec, t = problem.spec, tensors
    mean, var = t.mean, t.var
    if spec.norm != "none" and var is None:
        mean, var = norms.moments(spec.norm_form, t.x, problem.accumulate_dtype)
    chunks, y = list(_chunks(problem)), problem.empty_output(t.x)
    for chunk in chunks:
        z = _load_z(problem, t, mean, var, chunk)
        p = problem.conv._replace(padding=(*chunk.padding, *problem.conv.padding[2:]))
        part = conv_pass(z, t.weight, t.bias, p)
        if len(chunks) == 1 and part.stride() == y.stride():
            y = part
        else:
            y[chunk.clips, :, chunk.out] = part
    if t.output_table is not None:
        y = norms.apply_table(y, t.output_table)
    if t.residual is not None:
        y.add_(t.residual)
    y = activations.apply(spec.activation, y, spec.slope, inplace=True)
    result = ConvResult(y)
    if spec.output_statistics:
        out = norms.moments(norms.Norm("batch"), y, problem.accumulate_dtype)
        result = result._replace(out_mean=out[0], out_var=out[1])
    return result if t.var is not None else result._replace(mean=mean, var=var)


class _Chunk(NamedTuple):
    """Some clips, some frames of y, and what these read."""

    clips: slice
    out: slice
    read: tuple[int, int]  # frames of past and x together
    padding: tuple[int, int]  # frames before and after these


def _chunks(problem: ConvProblem) -> Iterator[_Chunk]:
    """Chunks whose z is of at most ``_CHUNK`` bytes where that can be, in order."""
    spec, p = problem.spec, problem.conv
    frames, (count, *_), (before, after) = problem.read_size[0], problem.out_size, p.padding[:2]
    stride, reach = p.stride[0], p.dilation[0] * (p.kernel[0] - 1) + 1
    frame = p.in_channels * math.prod(problem.size[1:]) * problem.dtype.itemsize
    clips, outs = problem.batch, count
    plain = spec.norm == spec.input_activation == "none" and not problem.past
    own = p.padding[::2] == p.padding[1::2] and set(p.modes) == {"zeros"}
    if not (plain and own) and problem.batch * frames * frame > _CHUNK:
        clips = max(1, _CHUNK // (frames * frame))
        # A window that lies in the padding has no frame; others mirror frames of other chunks.
        apart = p.modes[0] in ("zeros", "replicate") and max(before, after) < reach
        if frames * frame > _CHUNK and apart:
            outs = max(1, (_CHUNK // frame - reach) // stride + 1)
    for n in range(0, problem.batch, clips):
        for o in range(0, count, outs):
            last = min(o + outs, count)
            lo, hi = o * stride - before, (last - 1) * stride - before + reach
            if last == count:
                hi = frames + after
            read = max(0, lo), min(frames, hi)
            pads = (read[0] - lo, hi - read[1])
            yield _Chunk(slice(n, min(n + clips, problem.batch)), slice(o, last), read, pads)


def _load_z(
    problem: ConvProblem, t: ConvTensors, mean: Tensor | None, var: Tensor | None, chunk: _Chunk
) -> Tensor:
    """z of the clips and frames of a chunk."""
    (begin, end), past = chunk.read, problem.past
    parts = []
    if t.past is not None and begin < past:
        parts.append(t.past[chunk.clips, :, begin : min(end, past)])
    if end > past:
        frames = slice(max(0, begin - past), end - past)
        norm, x = problem.spec.norm_form, t.x[chunk.clips, :, frames]
        part = norms.part_of_statistics
        mean, var = (part(norm, s, chunk.clips, frames) for s in (mean, var))
        v = _apply_norm(problem, t, x, mean, var)
        owned = v is not x
        spec = problem.spec
        z = activations.apply(spec.input_activation, v, spec.slope, inplace=owned)
        parts.append(z.to(x.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _apply_norm(
    problem: ConvProblem, t: ConvTensors, x: Tensor, mean: Tensor | None, var: Tensor | None
) -> Tensor:
    """v, in the dtype of accumulation where there is a norm."""
    if var is None:
        return x
    return norms.apply(_norm(problem, t), x, mean, var, problem.accumulate_dtype)


def _norm(problem: ConvProblem, t: ConvTensors) -> norms.Norm:
    return problem.spec.norm_form._replace(weight=t.norm_weight, bias=t.norm_bias)


def conv3d_backward(call: ConvBackward) -> Gradients:
    problem, t, need = call.problem, call.tensors, call.need
    spec, wide = problem.spec, problem.accumulate_dtype
    v = _apply_norm(problem, t, t.x, call.mean, call.var)
    z = activations.apply(spec.input_activation, v, spec.slope).to(t.x.dtype)
    read = z if t.past is None else torch.cat((t.past, z), 2)
    del z
    of_norm = (need.x, need.norm_weight, need.norm_bias)
    needs = (any(of_norm) or need.past, need.weight, need.bias)
    dz, dw, db = conv_gradients(call.dy, read, t.weight, problem.conv, needs)
    del read
    dx = dgamma = dbeta = dpast = None
    if dz is not None and need.past:
        dpast = dz[:, :, : problem.past]
    if dz is not None and any(of_norm):
        dz = dz[:, :, problem.past :]
        dx = activations.grad(spec.input_activation, dz.to(v.dtype), v, spec.slope)
        if call.var is not None:
            norm = _norm(problem, t)
            dx, dgamma, dbeta = norms.gradient(norm, dx, t.x, call.mean, call.var, of_norm, wide)
    return dx, dw, db, dgamma, dbeta, None, None, dpast


def conv_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, p: Pass, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of ``conv_pass`` with respect to x, weight and bias, where needed."""
    if x.device.type == "cpu" and x.dtype.itemsize == 2:
        # oneDNN's 16-bit gradients are wrong in too many shapes to tell them apart.
        wide = conv_gradients(dy.float(), x.float(), weight.float(), p, needs)
        dx, dw, db = (None if g is None else g.to(x.dtype) for g in wide)
        return dx, dw, db
    # oneDNN sums the bias gradient one by one, PyTorch pairwise.
    db = dy.sum((0, 2, 3, 4)) if needs[2] else None
    if not any(needs[:2]):
        return None, None, db
    size, (seen, padding, conv) = x.shape[2:], prepare(x, p)
    if x.device.type == "cpu":  # whose gradients of channels-last ones read out of bounds
        seen, weight, dy = (t.contiguous() for t in (seen, weight, dy))
    dx, dw, _ = aten.convolution_backward(
        dy, seen, weight, None, conv.stride, padding, conv.dilation, False, (0, 0, 0), p.groups,
        [*needs[:2], False],
    )  # fmt: skip
    if not needs[0]:
        return None, dw, db
    pads = p.padding if padding == (0, 0, 0) else (0,) * 6  # what was padded before
    return _undo_prepare(dx, size, p, pads), dw if needs[1] else None, db


def _undo_prepare(g: Tensor, size: Sequence[int], p: Pass, pads: Sequence[int]) -> Tensor:
    """Gradient of what ``prepare`` does: strides are undone, and padding is."""
    steps, _ = p.subsampling()
    for i, step in enumerate(steps):
        if step > 1:
            axis, shape = 2 + i, list(g.shape)
            shape[axis] = size[i] + sum(pads[2 * i : 2 * i + 2])
            full = g.new_zeros(shape)
            full[(slice(None),) * axis + (slice(0, None, step),)] = g
            g = full
    return unpad(g, size, pads, p.modes)
