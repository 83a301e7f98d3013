"""Causal layers fed chunk by chunk; the state goes in and out, nothing is kept.

The state is a buffer of the frames that the temporal convolution reads (z when spatial-first, x
when temporal-first). The next window begins ``skip`` frames into it, where ``skip`` is 0 unless the
stride is longer than the kernel reaches; so the buffer's length alone says where in the stride the
stream stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import functional
from ..backends.conv_pass import pad
from ..functional import BatchNorm
from ..problem.geometry import left_padding


class CausalPair(Protocol):
    """What is read of a layer, most of all of ``Conv2Plus1d``."""

    in_channels: int
    order: str
    causal: Any
    spatial: Any
    norm: Any
    activation: Any
    temporal: Any


def check_frame_by_frame(owner: str, *modules: nn.Module | None, strict: bool = False) -> None:
    """Refuse norms and activations that make a frame of (N, M, T, H, W) depend on later ones.

    Batch norms do so in training only, where clips are whole. Modules of other people are taken
    for what a causal network needs; ``strict`` wants their word for it: ``frame_by_frame = True``,
    which counts for all that they contain, too.

    Raises:
        ValueError: one that looks across frames, or does not say.
    """
    for module in modules:
        why = None if module is None else _across_frames(module, strict)
        if why is not None:
            raise ValueError(
                f"{owner}: requires a norm and an activation that see each frame by itself, got "
                f"{why}; one that does sets frame_by_frame = True"
            )


def _across_frames(module: nn.Module, strict: bool) -> str | None:
    kind = type(module)
    if getattr(module, "frame_by_frame", False) is True:
        return None
    looks = False
    if isinstance(module, nn.GroupNorm):
        looks = True
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        clips = isinstance(module, nn.modules.batchnorm._BatchNorm) and not strict
        looks = not clips and module.running_mean is None
        if strict and module.training:
            return f"a {kind.__name__} without fixed statistics (call layer.eval())"
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        looks = len(module.normalized_shape) > 2
    elif isinstance(module, (nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.GLU)):
        looks = module.dim in (2, -3)
    if looks:
        return f"a {kind.__name__} that looks at all frames"
    if not kind.__module__.startswith(("torch.nn.", "fastst.")):
        return f"a {kind.__name__} that does not say what it does" if strict else None
    found = (_across_frames(child, strict) for child in module.children())
    return next((why for why in found if why is not None), None)


def advance(
    past: Tensor,
    fresh: Tensor,
    stride: int,
    reach: int,
    run: Callable[[Tensor, Tensor | None], Tensor],
    read: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """What a chunk completes, or None if that is nothing, and the state after it.

    Args:
        past: the buffer, (N, C, P, H, W): frames as the convolution reads them.
        fresh: the chunk, as it comes.
        stride, reach: of the convolution, in frames.
        run: the convolution of fresh frames, with those before them.
        read: fresh frames as the convolution reads them.
    """
    skip, held = max(0, stride - reach), past.shape[2]
    count = max(0, (held + fresh.shape[2] - skip - reach) // stride + 1)
    y = None
    if count:
        window = past[:, :, skip:] if held > skip else None
        y = run(fresh[:, :, max(0, skip - held) :], window)
    kept = count * stride
    tail = [past[:, :, kept:]]
    if (later := max(0, kept - held)) < fresh.shape[2]:
        tail.append(read(fresh[:, :, later:]))
    return y, (torch.cat(tail, 2),)


class Through(NamedTuple):
    """Norm and activation of a pair that its second convolution may read through."""

    norm: BatchNorm | None
    activation: str
    slope: float


def _convolve(conv: Any, x: Tensor, past: Tensor | None = None, **before: Any) -> Tensor:
    """A convolution of the pair, by ``functional.conv3d``."""
    sides = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
    y: Tensor = functional.conv3d(
        x, conv.weight, conv.bias, conv.stride, sides, conv.dilation, conv.groups,
        padding_mode=conv.padding_mode, past=past, **before,
    )  # fmt: skip
    return y


def _stream_both(
    layer: CausalPair, x: Tensor, state: tuple[Tensor, ...] | None, through: Through
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """Both convolutions as operations of their own: no frame is concatenated for them, and neither
    v nor z is written but for the state."""
    temporal, spatial_first = layer.temporal, layer.order == "spatial-first"
    stride, reach = temporal.stride[0], temporal.dilation[0] * (temporal.kernel_size[0] - 1) + 1
    between: dict[str, Any] = dict(
        input_norm=through.norm, input_activation=through.activation,
        negative_slope=through.slope,
    )  # fmt: skip
    fresh = _convolve(layer.spatial, x) if spatial_first else x

    def read(frames: Tensor) -> Tensor:
        return _activate(layer, frames) if spatial_first else frames

    if state is None:
        before = frames_before(temporal.kernel_size[0], stride, temporal.dilation[0], layer.causal)
        shape = (*fresh.shape[:2], before, *fresh.shape[3:])
        zeros = temporal.padding_mode == "zeros"
        past = fresh.new_zeros(shape) if zeros else read(fresh[:, :, :1]).expand(shape)
    else:
        past = check_state(state, fresh, stride, reach)
    own: dict[str, Any] = between if spatial_first else {}
    y, after = advance(
        past, fresh, stride, reach, lambda f, window: _convolve(temporal, f, window, **own), read
    )
    if y is not None and not spatial_first:
        y = _convolve(layer.spatial, y, **between)
    return y, after


def stream(
    layer: CausalPair,
    x: Tensor,
    state: tuple[Tensor, ...] | None,
    through: Through | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See ``Conv2Plus1d.stream``.

    Args:
        through: what stands between the convolutions, where they may be called as functions.
    """
    check_chunk(layer.causal, layer.in_channels, x)
    check_frame_by_frame("stream", layer.norm, layer.activation, strict=True)
    temporal = layer.temporal
    stride = temporal.stride[0]
    reach = temporal.dilation[0] * (temporal.kernel_size[0] - 1) + 1
    skip = max(0, stride - reach)
    if through is not None:
        y, after = _stream_both(layer, x, state, through)
        if y is not None:
            return y, after
    if layer.order == "spatial-first":
        fresh = _activate(layer, layer.spatial(x))
    else:
        fresh = x
    if state is None:
        before = frames_before(temporal.kernel_size[0], stride, temporal.dilation[0], layer.causal)
        frames = pad(fresh, (before, 0, 0, 0, 0, 0), str(temporal.padding_mode))
    else:
        frames = torch.cat((check_state(state, fresh, stride, reach), fresh), 2)

    count = max(0, (frames.shape[2] - skip - reach) // stride + 1)
    end = skip + (count - 1) * stride + reach
    # At least one window is run, and dropped again, so that y has its shape also without frames.
    window = frames[:, :, skip:end] if count else frames.new_zeros(*_one(frames, reach))
    y = temporal(window)
    if layer.order == "temporal-first":
        y = layer.spatial(_activate(layer, y))
    kept = frames[:, :, count * stride :].clone()
    return y[:, :, :count], (kept,)


def check_chunk(causal: Any, in_channels: int, x: Any) -> None:
    """
    Raises:
        ValueError: a layer that is not causal, or a chunk that it does not take.
    """
    if not causal:
        raise ValueError("stream: requires a layer with causal=True, got causal=False")
    if not isinstance(x, Tensor) or x.dim() != 5 or x.shape[2] < 1:
        came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"stream: x must be (N, C, t, H, W) with t of at least 1, got {came}")
    if x.shape[1] != in_channels:
        raise ValueError(f"stream: x must have {in_channels} channels, got {tuple(x.shape)}")


def _one(frames: Tensor, reach: int) -> tuple[int, ...]:
    return (*frames.shape[:2], reach, *frames.shape[3:])


def _activate(layer: CausalPair, u: Tensor) -> Tensor:
    return layer.activation(u if layer.norm is None else layer.norm(u))


def frames_before(kernel: int, stride: int, dilation: int, causal: bool | str) -> int:
    """Frames of the buffer before the first chunk: padding, after those that are skipped."""
    skip = max(0, stride - dilation * (kernel - 1) - 1)
    return skip + left_padding(kernel, stride, dilation, causal)


def check_state(state: tuple[Tensor, ...], fresh: Tensor, stride: int, reach: int) -> Tensor:
    """
    Raises:
        TypeError, ValueError: no state that a layer of this temporal stride and reach leaves.
    """
    if not isinstance(state, tuple) or len(state) != 1 or not isinstance(state[0], Tensor):
        came = f"{len(state)}" if isinstance(state, tuple) else f"a {type(state).__name__}"
        raise TypeError(f"stream: state must be a tuple of one tensor, got {came}")
    (buffer,) = state
    n, c, _, h, w = fresh.shape
    fits = buffer.dim() == 5 and (*buffer.shape[:2], *buffer.shape[3:]) == (n, c, h, w)
    least, most = max(0, reach - stride), max(reach, stride) - 1
    if not fits or not least <= buffer.shape[2] <= most:
        length = str(most) if least == most else f"{least} to {most}"
        raise ValueError(
            f"stream: state must be ({n}, {c}, t, {h}, {w}), t being {length}, for this layer and "
            f"chunk, got {tuple(buffer.shape)}"
        )
    if buffer.dtype != fresh.dtype or buffer.device != fresh.device:
        raise TypeError(
            f"stream: state must be {fresh.dtype} on {fresh.device}, got {buffer.dtype} on "
            f"{buffer.device}"
        )
    return buffer
