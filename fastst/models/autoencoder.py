"""A causal video autoencoder of factorized convolutions, which streams.

In the manner of the causal video tokenizers (MAGVIT-v2, arXiv 2310.05737; Cosmos, arXiv
2501.03575): no output depends on a later frame, so that clips of any length pass through chunk by
chunk in constant memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import Tensor, nn

from ..nn.layers import Conv2Plus1d
from .checkpoint import load_weights
from .resnet import Weights, check_positive

State = tuple[Tensor, ...]


class ResidualPair(nn.Module):
    """x + conv(silu(conv(silu(x)))) with causal factorized convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.activation = nn.SiLU()
        self.conv1 = _causal(channels, channels)
        self.conv2 = _causal(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.activation(self.conv1(self.activation(x))))


class CausalAutoencoder(nn.Module):
    """Encoder and decoder; each stage halves, or doubles, time, height and width.

    Args:
        latent_channels: of the code.
        width: channels of the first stage; later ones have two, four, ... times as many.
        stages: how many times the size is halved.
        in_channels: C of the video.

    Shape:
        (N, C, T, H, W) to the same, for T, H and W divisible by 2^stages; the code is (N,
        latent_channels, T / 2^stages, H / 2^stages, W / 2^stages). Code frame i depends on no frame
        of the video after i · 2^stages.
    """

    def __init__(
        self, latent_channels: int = 16, width: int = 64, stages: int = 2, in_channels: int = 3
    ) -> None:
        super().__init__()
        for name, value in (
            ("latent_channels", latent_channels), ("width", width), ("stages", stages),
            ("in_channels", in_channels),
        ):  # fmt: skip
            check_positive(name, value)
        widths = [width * 2**i for i in range(stages + 1)]
        encoder: list[nn.Module] = [_causal(in_channels, width), ResidualPair(width)]
        for c, k in itertools.pairwise(widths):
            encoder += [_causal(c, k, stride=2), ResidualPair(k)]
        self.encoder = nn.Sequential(*encoder, nn.SiLU(), _causal(widths[-1], latent_channels))
        decoder: list[nn.Module] = [_causal(latent_channels, widths[-1]), ResidualPair(widths[-1])]
        for c, k in zip(widths[:0:-1], widths[-2::-1], strict=True):
            decoder += [nn.Upsample(scale_factor=2), _causal(c, k), ResidualPair(k)]
        self.decoder = nn.Sequential(*decoder, nn.SiLU(), _causal(width, in_channels))
        self.factor = 2**stages

    def encode(self, x: Tensor) -> Tensor:
        """The code of a clip.

        Raises:
            ValueError: T, H or W that 2^stages does not divide.
        """
        if any(n % self.factor for n in x.shape[-3:]):
            raise ValueError(
                f"requires T, H and W divisible by {self.factor}, got {tuple(x.shape)}"
            )
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """The clip of a code."""
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def stream(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the frames so far give, beyond what was given before; and the state to go on from.

        Outputs joined along time equal the run over the whole clip. They come when a code frame is
        complete, 2^stages at a time, so that a chunk may give none.

        Args:
            x: (N, C, t, H, W), the next t ≥ 1 frames.
            state: what the call before returned; None for the first.

        Raises:
            ValueError: H or W that 2^stages does not divide, or a chunk that does not fit.
        """
        if any(n % self.factor for n in x.shape[-2:]):
            raise ValueError(f"requires H and W divisible by {self.factor}, got {tuple(x.shape)}")
        before = None if state is None else iter(state)
        after: list[Tensor] = []
        for module in (*self.encoder, *self.decoder):
            x = _stream(module, x, before, after)
        return x, tuple(after)


def _causal(in_channels: int, out_channels: int, stride: int = 1) -> Conv2Plus1d:
    """A factorized 3×3×3 convolution without anything in between, as the tokenizers have it."""
    return Conv2Plus1d(
        in_channels, out_channels, 3, stride, (0, 1, 1), mid_channels=out_channels,
        activation=None, causal=True,
    )  # fmt: skip


def _stream(
    module: nn.Module, x: Tensor, before: Iterator[Tensor] | None, after: list[Tensor]
) -> Tensor:
    """Run one module on the frames there are, and hand on the states of its layers."""
    if isinstance(module, Conv2Plus1d):
        state = None if before is None else (next(before),)
        if x.shape[2]:
            x, (kept,) = module.stream(x, state)
        else:
            assert state is not None  # the first frame passes through every layer
            (kept,) = state
            x = x.new_empty(_sizes(module, x))
        after.append(kept)
        return x
    if isinstance(module, ResidualPair):
        y = x
        for part in (module.activation, module.conv1, module.activation, module.conv2):
            y = _stream(part, y, before, after)
        return x + y
    if isinstance(module, nn.Upsample) and not x.shape[2]:
        n, c, _, h, w = x.shape
        return x.new_empty(n, c, 0, 2 * h, 2 * w)
    return module(x)


def _sizes(layer: Conv2Plus1d, x: Tensor) -> tuple[int, ...]:
    """Shape of a layer's output for no frames."""
    h, w = ((n - 1) // s + 1 for n, s in zip(x.shape[3:], layer.stride[1:], strict=True))
    return (x.shape[0], layer.out_channels, 0, h, w)


def causal_autoencoder(
    latent_channels: int = 16,
    *,
    width: int = 64,
    stages: int = 2,
    in_channels: int = 3,
    weights: Weights = None,
) -> CausalAutoencoder:
    """A factorized causal video autoencoder that streams.

    5,465,537 parameters, 555.7 GFLOPs at 16×256².

    Args:
        latent_channels: of the code.
        width: channels of the first stage; later ones have two, four, ... times as many.
        stages: how many times time, height and width are halved.
        in_channels: C of the video, (N, C, T, H, W).
        weights: path of a state_dict, or None.

    Raises:
        ValueError: a count that is no positive int, or a file that does not fit the network.
    """
    model = CausalAutoencoder(latent_channels, width, stages, in_channels)
    if weights is not None:
        load_weights(model, weights)
    return model
