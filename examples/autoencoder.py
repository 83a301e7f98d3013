"""Decode latents of a video by a Wan-type decoder: PyTorch's modules, fastst's, and frame by frame.

    python examples/autoencoder.py [--frames 5] [--size 32] [--width 32] [--checkpoint decoder.pt]

Without a checkpoint (of this file's ``Decoder``: ``torch.save(decoder.state_dict(), path)``) the
weights are random. The keys of both decoders are the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

import torch
from checkpoints import CheckpointError, read_checkpoint
from options import whole
from torch import Tensor, nn
from torch.nn import functional as F

import fastst

State = list[tuple[Tensor, ...] | None]


class CausalConv3d(nn.Conv3d):
    """Norm over the channels, SiLU and a 3×3×3 convolution of this and the last two frames."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=(0, 1, 1))
        self.input_norm = nn.RMSNorm(channels)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = F.silu(self.input_norm(x.movedim(1, -1)).movedim(-1, 1))
        y = super().forward(F.pad(z, (0, 0, 0, 0, 2, 0)))
        return y if residual is None else y + residual


class Decoder(nn.Module):
    """Residual blocks and a last convolution to pixels, with modules or with ``fastst.Conv3d``."""

    def __init__(self, width: int, blocks: int = 2, fused: bool = False) -> None:
        super().__init__()

        def conv(out_channels: int) -> nn.Conv3d:
            if not fused:
                return CausalConv3d(width, out_channels)
            return fastst.Conv3d(
                width, out_channels, 3, padding=(0, 1, 1), causal=True,
                input_norm=nn.RMSNorm(width), input_activation="silu",
            )  # fmt: skip

        self.convs = nn.ModuleList([*(conv(width) for _ in range(2 * blocks)), conv(3)])

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.convs[:-1:2], self.convs[1::2], strict=True):
            x = second(first(x), x)
        return self.convs[-1](x)

    def stream(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """The next frames, of a decoder of ``fastst.Conv3d``."""
        old, new = state or [None] * len(self.convs), []
        for i in range(0, len(self.convs) - 1, 2):
            y, first = self.convs[i].stream(x, old[i])
            x, second = self.convs[i + 1].stream(y, old[i + 1], x)
            new += [first, second]
        y, last = self.convs[-1].stream(x, old[-1])
        return y, [*new, last]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=whole(1), default=5)
    parser.add_argument("--size", type=whole(1), default=32)
    parser.add_argument("--width", type=whole(1), default=32)
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    plain, fused = Decoder(options.width), Decoder(options.width, fused=True)
    if options.checkpoint:
        try:
            plain.load_state_dict(read_checkpoint(options.checkpoint))
        except (CheckpointError, RuntimeError) as error:
            parser.error(f"--checkpoint: {shorten(str(error), 300)}")
    fused.load_state_dict(plain.state_dict())
    latents = torch.randn(1, options.width, options.frames, options.size, options.size)
    results = {}
    with torch.no_grad():
        for name, decoder in (("PyTorch", plain), ("fastst", fused)):
            decoder(latents)
            start = time.perf_counter()
            results[name] = decoder(latents)
            print(f"{name:24} {1e3 * (time.perf_counter() - start):7.1f} ms")
        start, state, frames = time.perf_counter(), None, []
        for latent in latents.split(1, 2):
            y, state = fused.stream(latent, state)
            frames.append(y)
        print(f"{'fastst, frame by frame':24} {1e3 * (time.perf_counter() - start):7.1f} ms")
    results["frame by frame"] = torch.cat(frames, 2)
    for name in ("fastst", "frame by frame"):
        difference = (results[name] - results["PyTorch"]).abs().max() / results[
            "PyTorch"
        ].abs().max()
        print(f"{name}: largest difference {difference:.1e} of the largest value")


if __name__ == "__main__":
    main()
