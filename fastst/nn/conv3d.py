"""``Conv3d``: an ``nn.Conv3d`` with what comes before and after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import dispatch, functional
from ..functional import BatchNorm, Causal, IntOrTriple, Norm, PaddingArg, PaddingMode
from ..machine import exactness
from ..problem import activations, checks, geometry
from .layers import ActivationArg, check_width
from .pair_of_modules import NORMS, batch_norm_arguments, counts_batches, why_foreign
from .streaming import advance, check_chunk, check_frame_by_frame, check_state, frames_before


class Conv3d(nn.Conv3d):
    """3D convolution with the norm and activation before it and the residual after it::

        y = activation(conv3d(pad(input_activation(input_norm(x))), weight) + bias + residual)

    A subclass of ``nn.Conv3d`` with its parameters under its keys: without further arguments it
    computes the same, and a checkpoint of one loads into the other. The class of an ``nn.Conv3d``
    may be changed to it.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias: as of ``nn.Conv3d``.
        padding: the same; an entry of the triple may be a pair (before, after).
        padding_mode: "zeros", "replicate", "reflect", "circular"; or (of height and width, of
            time). Pads what the convolution reads, after norm and activation.
        device, dtype: of the parameters.
        input_norm: ``nn.BatchNorm3d``, ``nn.GroupNorm`` or ``nn.InstanceNorm3d``; ``nn.LayerNorm``
            or ``nn.RMSNorm`` of (C,), over the channels of each position; any other module is
            called before. A child of the layer.
        norm_per_frame: the group or instance norm sees each frame by itself.
        input_activation: "relu", "silu", "gelu" or another name that ``fastst.functional`` knows,
            a module of one of these, or None.
        activation: of y, after the residual; the same.
        causal: see ``functional.conv3d``; enables ``stream``.

    Shape:
        (N, C, T, H, W) or (C, T, H, W) to (N, K, T', H', W') or (K, T', H', W').

    Raises:
        TypeError, ValueError: arguments that do not fit, at construction.
    """

    # What holds for an ``nn.Conv3d`` whose class was changed to this one.
    input_activation = activation = "none"
    negative_slope = 0.01
    norm_per_frame = False
    causal: Causal = False
    padding_mode: Any
    kernel_size: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTriple,
        stride: IntOrTriple = 1,
        padding: PaddingArg = 0,
        dilation: IntOrTriple = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        input_norm: nn.Module | None = None,
        norm_per_frame: bool = False,
        input_activation: ActivationArg = None,
        activation: ActivationArg = None,
        causal: Causal = False,
    ) -> None:
        op = "Conv3d"
        kernel = geometry.triple(f"{op}: kernel_size", kernel_size, 1)
        found = geometry.resolve(
            op, kernel, stride, padding, dilation, groups, padding_mode, causal
        )
        super().__init__(
            in_channels, out_channels, kernel, found.stride, 0, found.dilation, groups, bias,
            "zeros", device, dtype,
        )  # fmt: skip
        sides = [found.padding[i : i + 2] for i in (0, 2, 4)]
        if causal:
            sides[0] = (0, 0)
        even = all(before == after for before, after in sides)
        self.padding: Any = padding if isinstance(padding, str) else tuple(sides)
        if even and not isinstance(padding, str):
            self.padding = tuple(before for before, _ in sides)
        self.padding_mode, self.causal = padding_mode, causal
        # Of nn.Conv3d, which pads by it where the mode is not "zeros": before and after w, h and t.
        self._reversed_padding_repeated_twice = [p for side in reversed(sides) for p in side]
        if input_norm is not None:
            if not isinstance(input_norm, nn.Module):
                raise TypeError(f"{op}: input_norm must be a module or None, got {input_norm!r}")
            check_width(f"{op}: input_norm", input_norm, in_channels)
            self.input_norm = input_norm
        self.norm_per_frame = norm_per_frame
        slopes = set()
        for label, given in (("input_activation", input_activation), ("activation", activation)):
            name, slope = _activation_name(f"{op}: {label}", given)
            setattr(self, label, name)
            slopes |= {slope} if name == "leaky_relu" else set()
        if len(slopes) > 1:
            raise ValueError(f"{op}: both leaky ReLUs must have one slope, got {sorted(slopes)}")
        self.negative_slope = slopes.pop() if slopes else self.negative_slope

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        streams: bool = False,
        state: tuple[Tensor, ...] | None = None,
    ) -> Any:
        """y of x; shapes as above, ``residual`` of exactly that of y. With ``streams`` what
        ``stream`` gives."""
        if streams:
            return self._advance(x, state, residual)
        checks.layer_input("Conv3d", x, self.in_channels)
        return self._run(x, residual, padding=self.padding, causal=self.causal)

    def stream(
        self,
        x: Tensor,
        state: tuple[Tensor, ...] | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The outputs that a chunk of frames completes, and the state for the next chunk.

        Outputs concatenated along time equal the run over the whole clip, for any cutting of it,
        one frame at a time included. With a temporal stride a chunk may complete no output: y then
        has no frames. The state holds the frames that the convolution reads again: it is read where
        it lies. It is a call of the layer: its hooks, which may set the weight, run.

        Args:
            x: (N, C, t, H, W), the next t ≥ 1 frames.
            state: what the call for the previous chunk returned; None for the first.
            residual: of the shape of y.

        Raises:
            TypeError, ValueError: the layer is not causal, its norm looks across frames, or a chunk
                or state does not fit.
        """
        y: tuple[Tensor, tuple[Tensor, ...]] = self(x, residual, streams=True, state=state)
        return y

    def _advance(
        self, x: Tensor, state: tuple[Tensor, ...] | None, residual: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_chunk(self.causal, self.in_channels, x)
        if not _sees_frames_apart(norm := self._norm(), self.norm_per_frame):
            check_frame_by_frame("stream", norm, strict=True)
        stride, reach = self.stride[0], self.dilation[0] * (self.kernel_size[0] - 1) + 1
        past = self._first_state(x) if state is None else check_state(state, x, stride, reach)

        def run(fresh: Tensor, window: Tensor | None) -> Tensor:
            return self._run(fresh, residual, padding=self._sides(), past=window)

        y, after = advance(past, x, stride, reach, run, self._z_of)
        return self._no_frames(x, residual) if y is None else y, after

    def _norm(self) -> Any:
        return self._modules.get("input_norm")

    def _run(self, x: Tensor, residual: Tensor | None, **geometry: Any) -> Tensor:
        norm, found = self._norm(), None
        if norm is not None and exactness.is_required():
            x = self._apply_norm(x)
        elif norm is not None:
            found, why = _norm_arguments(norm, x, self.norm_per_frame)
            if why is not None:
                dispatch.fall_back("the input norm of a Conv3d", why)
                x = self._apply_norm(x)
        y: Tensor = functional.conv3d(
            x, self.weight, self.bias, self.stride, dilation=self.dilation, groups=self.groups,
            padding_mode=self.padding_mode, input_norm=found,
            input_activation=self.input_activation, residual=residual, activation=self.activation,
            negative_slope=self.negative_slope, **geometry,
        )  # fmt: skip
        if isinstance(found, BatchNorm) and counts_batches(norm):
            norm.num_batches_tracked.add_(1)
        return y

    def _z_of(self, x: Tensor) -> Tensor:
        """z of x, by PyTorch's operators."""
        v = self._apply_norm(x)
        return activations.apply(self.input_activation, v, self.negative_slope).to(x.dtype)

    def _apply_norm(self, x: Tensor) -> Tensor:
        """The norm called as a module."""
        norm = self._norm()
        if norm is None:
            return x
        if x.dim() == 4:
            return self._apply_norm(x.unsqueeze(0)).squeeze(0)
        if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)) and len(norm.normalized_shape) == 1:
            return norm(x.movedim(1, -1)).movedim(-1, 1)
        if self.norm_per_frame:
            frames = x.transpose(1, 2).flatten(0, 1).unsqueeze(2)
            v = norm(frames).squeeze(2).unflatten(0, (x.shape[0], x.shape[2]))
            return v.transpose(1, 2)
        return norm(x)

    def _geometry(self) -> geometry.Geometry:
        return geometry.resolve(
            "Conv3d", self.kernel_size, self.stride, self.padding, self.dilation, self.groups,
            self.padding_mode, self.causal,
        )  # fmt: skip

    def _sides(self) -> Any:
        """Padding of a window of a stream: in space only."""
        _, _, *space = self._geometry().padding
        return ((0, 0), tuple(space[:2]), tuple(space[2:]))

    def _first_state(self, x: Tensor) -> Tensor:
        """The state before the first chunk: frames that the convolution reads as padding."""
        t = self.kernel_size[0], self.stride[0], self.dilation[0]
        shape = (*x.shape[:2], frames_before(*t, self.causal), *x.shape[3:])
        if self._geometry().padding_mode[1] == "zeros":
            return x.new_zeros(shape)
        return self._z_of(x[:, :, :1]).expand(shape)

    def _no_frames(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """y of a chunk that completes none."""
        sides = self._sides()
        size = (
            (x.shape[2 + i] + sum(sides[i]) - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // self.stride[i] + 1
            for i in (1, 2)
        )  # fmt: skip
        y = x.new_empty((x.shape[0], self.out_channels, 0, *size), dtype=functional.result_dtype(x))
        if residual is not None and residual.shape != y.shape:
            raise ValueError(
                f"stream: residual must have the shape of the output, {tuple(y.shape)}, got "
                f"{tuple(residual.shape)}"
            )
        return y

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        for label, usual in (
            ("input_activation", "none"), ("activation", "none"), ("norm_per_frame", False),
            ("causal", False),
        ):  # fmt: skip
            if (value := getattr(self, label)) != usual:
                parts.append(f"{label}={value!r}")
        return ", ".join(parts)


def _activation_name(what: str, activation: ActivationArg) -> tuple[str, float]:
    """Name and slope of an activation.

    Raises:
        ValueError: one that no kernel knows.
    """
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        activation = activation()
    if not isinstance(activation, nn.Module):
        return geometry.activation_name(what, activation), 0.01
    found = activations.from_module(activation)
    if found is None:
        raise ValueError(
            f"{what} must be one of {', '.join(activations.ACTIVATIONS)}, got a "
            f"{type(activation).__name__}"
        )
    return found


def _sees_frames_apart(norm: Any, per_frame: bool) -> bool:
    """Whether a norm has statistics of each frame, by ``norm_per_frame``."""
    if isinstance(norm, nn.InstanceNorm3d):
        return per_frame and norm.running_mean is None
    return per_frame and isinstance(norm, nn.GroupNorm)


def _norm_arguments(
    norm: Any, x: Tensor, per_frame: bool
) -> tuple[BatchNorm | Norm | None, str | None]:
    """The functional form of a norm module in the mode it is in; or why it has none."""
    why = why_foreign({}, {"norm": norm}, {}, NORMS)
    if why is not None:
        return None, why
    if isinstance(norm, nn.GroupNorm):
        affine = norm.weight, norm.bias
        return Norm("group", *affine, norm.num_groups, per_frame, norm.eps), None
    if isinstance(norm, nn.InstanceNorm3d):
        if norm.track_running_stats:
            if norm.training:
                return None, "it tracks statistics of each clip"
            running = norm.running_mean, norm.running_var
            return BatchNorm(*running, norm.weight, norm.bias, False, 0.0, norm.eps), None
        return Norm("instance", norm.weight, norm.bias, 1, per_frame, norm.eps), None
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        if tuple(norm.normalized_shape) != (x.shape[-4],):
            return None, f"it is over {tuple(norm.normalized_shape)}, not over the channels"
        if isinstance(norm, nn.LayerNorm):
            return Norm("layer", norm.weight, norm.bias, eps=norm.eps), None
        # PyTorch's default is that of the dtype in which it computes.
        computed = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(computed).eps if norm.eps is None else norm.eps
        return Norm("rms", norm.weight, eps=eps), None
    found = batch_norm_arguments(norm)
    return (found, None) if found is None or not found.group else (None, "it spans several ranks")
