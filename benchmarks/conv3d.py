"""``conv3d`` on shapes of real networks, side by side with PyTorch's own modules.

``python -m benchmarks.conv3d [--families r3d wan] [--modes inference training stream]`` prints
ratios of medians (above 1: fastst is faster) and of peak memory (below 1: fastst needs less);
``--networks r3d_18 mc3_18 [--dtype bf16]`` those of whole networks, plain, converted and optimised,
each held to float64 first, with ``--engines`` beside OpenVINO and ONNX Runtime.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastst

from . import engines, models
from .measure import Clock, Spread, Timed, interleave, observe, precision, ratios
from .record import place


class Shape(NamedTuple):
    """A block and what it reads."""

    family: str
    name: str
    size: tuple[int, int, int, int, int]
    out: int
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)


SHAPES = (
    Shape("r3d", "stem 3→64", (1, 3, 16, 112, 112), 64, (3, 7, 7), (1, 2, 2)),
    Shape("r3d", "64→64", (1, 64, 16, 56, 56), 64),
    Shape("r3d", "64→128 s2", (1, 64, 16, 56, 56), 128, stride=(2, 2, 2)),
    Shape("r3d", "128→128", (1, 128, 8, 28, 28), 128),
    Shape("r3d", "128→256 s2", (1, 128, 8, 28, 28), 256, stride=(2, 2, 2)),
    Shape("r3d", "256→256", (1, 256, 4, 14, 14), 256),
    Shape("r3d", "256→512 s2", (1, 256, 4, 14, 14), 512, stride=(2, 2, 2)),
    Shape("r3d", "512→512", (1, 512, 2, 7, 7), 512),
    Shape("mc3", "64→64 1×3×3", (1, 64, 16, 56, 56), 64, (1, 3, 3)),
    Shape("mc3", "256→256 1×3×3", (1, 256, 16, 14, 14), 256, (1, 3, 3)),
    Shape("wan", "96", (1, 96, 5, 64, 64), 96),
    Shape("wan", "192", (1, 192, 5, 64, 64), 192),
)


class Eager(nn.Module):
    """A convolution as people write it; of Wan a residual block of two causal ones."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wan = shape.family == "wan"
        c, kernel = shape.size[1], shape.kernel
        padding = (0 if self.wan else kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.norms = nn.ModuleList(nn.RMSNorm(c, eps=1e-6) for _ in range(2 * self.wan))
        self.convs = nn.ModuleList(
            nn.Conv3d(c, shape.out, kernel, shape.stride, padding, bias=self.wan)
            for _ in range(1 + self.wan)
        )

    def forward(self, x: Tensor, past: tuple[Tensor, ...] | None = None) -> Any:
        if not self.wan:
            return self.convs[0](x)
        y, kept = x, []
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            # As in diffusers: √C·x/‖x‖·γ over the channels; cached frames are concatenated.
            gamma: Tensor = norm.weight.view(-1, 1, 1, 1)  # type: ignore[operator]
            z = F.silu(F.normalize(y, dim=1) * y.shape[1] ** 0.5 * gamma)
            z = F.pad(z, (0, 0, 0, 0, 2, 0)) if past is None else torch.cat((past[i], z), 2)
            kept.append(z[:, :, -2:].clone())
            y = conv(z)
        return y + x if past is None else (y + x, tuple(kept))


class Fused(nn.Module):
    """The same by ``fastst.Conv3d``."""

    def __init__(self, eager: Eager) -> None:
        super().__init__()
        self.wan = eager.wan
        layers = []
        for i, conv in enumerate(eager.convs):
            assert isinstance(conv, nn.Conv3d)
            extra: dict[str, Any] = {}
            if self.wan:
                norm = copy.deepcopy(eager.norms[i])
                extra = dict(input_norm=norm, input_activation="silu", causal=True)
            layer = fastst.Conv3d(
                conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                bias=self.wan, **extra,
            )  # fmt: skip
            layer.load_state_dict(conv.state_dict(), strict=False)
            layers.append(layer)
        self.convs = nn.ModuleList(layers)

    def forward(self, x: Tensor, past: tuple[Tensor, ...] | None = None) -> Any:
        if not self.wan:
            return self.convs[0](x)
        first, second = self.convs
        if past is None:
            return second(first(x), x)
        y, (one,) = first.stream(x, past[:1])  # type: ignore[operator]
        y, (other,) = second.stream(y, past[1:], x)  # type: ignore[operator]
        return y, (one, other)


def _inference(model: nn.Module, x: Tensor) -> Callable[[int], Any]:
    def call(_: int) -> Any:
        with torch.no_grad():
            return model(x)

    return call


def _training(model: nn.Module, x: Tensor) -> Callable[[int], Any]:
    leaf = x.clone().requires_grad_()

    def call(_: int) -> Any:
        leaf.grad = None
        model.zero_grad()
        model(leaf).sum().backward()
        return leaf.grad

    return call


def _stream(model: nn.Module, x: Tensor) -> Callable[[int], Any]:
    def call(_: int) -> Any:
        past, out = (x.new_zeros(*x.shape[:2], 2, *x.shape[3:]),) * 2, []
        with torch.no_grad():
            for frame in x.split(1, 2):
                y, past = model(frame, past)
                out.append(y)
        return torch.cat(out, 2)

    return call


MODES = {"inference": _inference, "training": _training, "stream": _stream}


def compare_layers(shape: Shape, mode: str, seconds: float) -> tuple[Spread, float]:
    """Quartiles of eager's time over fastst's, and fastst's peak memory over eager's.

    Raises:
        AssertionError: the two do not agree.
    """
    torch.manual_seed(0)
    x, device = torch.randn(shape.size), torch.device("cpu")
    eager = Eager(shape)
    models = {"eager": eager, "fastst": Fused(eager)}
    calls = {name: MODES[mode](model, x) for name, model in models.items()}
    torch.testing.assert_close(calls["fastst"](0), calls["eager"](0), rtol=2e-3, atol=2e-3)
    times = interleave(Clock(device), {n: Timed(c) for n, c in calls.items()}, seconds, 1, 0, 60)
    peaks = {n: observe(lambda c=c: c(0), device).peak_bytes for n, c in calls.items()}  # type: ignore[misc]
    return ratios(times["eager"], times["fastst"]), peaks["fastst"] / max(1, peaks["eager"])


def compare_network(
    name: str, mode: str, dtype: str, seconds: float, peers: Sequence[str]
) -> list[str]:
    """A line for each way to run a network at 16×112²: against the plain one's time and memory."""
    clip, device = models.Clip(1, model=name), torch.device("cpu")
    with precision(dtype):
        rows = models.compare(
            clip, device, dtype, mode == "training", "none", seconds, 60, engines=peers
        )
    plain = rows[0]["peak_bytes"]
    lines = []
    for row in rows:
        told = f"{name:10} {mode:10} {dtype} {row['contender']:24}"
        if row["refused"] is not None:
            lines.append(f"{told} refused: {row['refused']}")
            continue
        spread, peak = row["vs_users"], row["peak_bytes"]  # which is not known of engines
        memory = "" if peak is None else f"  peak {peak / max(1, plain):.2f}"
        lines.append(f"{told} {spread.median:5.2f}× ({spread.q25:.2f}–{spread.q75:.2f}){memory}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=["r3d", "mc3", "wan"])
    parser.add_argument("--networks", nargs="*", default=[], help="of fastst.models, instead")
    engines.add_argument(parser)
    parser.add_argument("--dtype", default="fp32", help="of whole networks: fp32, bf16 or fp16")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each shape and mode")
    options = parser.parse_args()
    peers = engines.chosen(parser, options)
    print(place(torch.device("cpu")), f"{torch.get_num_threads()} threads")
    for name in options.networks:
        for mode in options.modes:
            if mode != "stream":
                lines = compare_network(name, mode, options.dtype, options.seconds, peers)
                print(*lines, sep="\n", flush=True)
    for shape in SHAPES if not options.networks else ():
        for mode in options.modes:
            if shape.family not in options.families or (mode == "stream" and shape.family != "wan"):
                continue
            spread, memory = compare_layers(shape, mode, options.seconds)
            print(
                f"{shape.family:4} {shape.name:16} {mode:10} {spread.median:5.2f}× "
                f"({spread.q25:.2f}–{spread.q75:.2f})  peak {memory:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
