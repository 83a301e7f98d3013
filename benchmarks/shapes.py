"""Named shapes of real networks, and the least work that each of them asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastst.problem.spec import (
    PairSpec,
    PairTensors,
    ParallelSpec,
    ParallelTensors,
    Problem,
    Triple,
    default_mid_channels,
    in_execution_order,
)

# inference: norm folded into the spatial weights of every contender. eval: batch norm on its
# running statistics, as it stands in a model. training-*: forward and backward.
MODES = ("inference", "eval", "training-bn", "training")


class Work(NamedTuple):
    """Least work of one call: what a roofline is drawn from."""

    flops: int
    bytes: int  # every input read once, every output written once


@dataclass(frozen=True)
class Case:
    """One layer at one input size. Letters as in ``fastst.problem.spec``."""

    name: str
    family: str
    batch: int
    channels: Triple  # C, M, K; M is unused by the parallel layer
    size: Triple  # T, H, W of x
    kernel: Triple = (3, 3, 3)
    stride: Triple = (1, 1, 1)
    depthwise: bool = False
    activation: str = "relu"
    norm: bool = True  # whether the network has a batch norm between the two convolutions
    order: str = "spatial-first"
    causal: bool = False
    combine: str | None = None  # "add" or "cat": the parallel layer
    x_grad: bool = True  # False for a first layer: nothing needs the gradient of a clip

    @property
    def padding(self) -> Triple:
        t, h, w = (k // 2 for k in self.kernel)
        return (0 if self.causal else t, h, w)

    @property
    def groups(self) -> int:
        return self.channels[0] if self.depthwise else 1

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that mean something for this layer."""
        return MODES if self.norm else ("inference", "training")

    @property
    def label(self) -> str:
        """Channels, input size and what is special, as tables show it."""
        c, m, k = self.channels
        t, h, w = self.size
        pair = f"{c}→{k} {self.combine}" if self.combine else f"{c}→{m}→{k}"
        space = f"{h}²" if h == w else f"{h}×{w}"
        stride = "" if self.stride == (1, 1, 1) else " s" + ",".join(map(str, self.stride))
        taps = "" if self.kernel == (3, 3, 3) else f" k{self.kernel[0]}×{self.kernel[1]}²"
        return f"{pair}{taps}{stride}, {self.batch}×{t}×{space}"

    def at_batch(self, batch: int) -> Case:
        return replace(self, batch=batch)

    def tiny(self) -> Case:
        """The same kind of layer at a size that a dry run affords."""
        c, m, _ = self.channels
        small = (8, 8, 8) if self.depthwise else (min(c, 4), 13 if m % 8 else 8, 8)
        t, h, w = self.size
        return replace(self, batch=1, channels=small, size=(min(t, 4), min(h, 12), min(w, 12)))

    def problem(self, dtype: torch.dtype = torch.float32) -> Problem:
        """The call as the library describes it, computed on no device."""
        c, m, k = self.channels
        kt, kh, kw = self.kernel
        ends: tuple[Any, Any] = ((c, m), (m, k))
        if self.combine:
            half = (k + 1) // 2 if self.combine == "cat" else k
            ends = ((c, half), (c, k - half if self.combine == "cat" else k))
        elif self.order == "temporal-first":
            ends = ends[::-1]
        (cs, ks), (ct, k_t) = ends

        def meta(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, g = meta(self.batch, c, *self.size), self.groups
        ws, wt = meta(ks, cs // g, 1, kh, kw), meta(k_t, ct // g, kt, 1, 1)
        pt, ph, pw = self.padding
        before = kt - 1 if self.causal else pt
        sides = (before, pt, ph, ph, pw, pw)
        stride, one, groups, modes = self.stride, (1, 1, 1), (g, g), ("zeros", "zeros")
        if self.combine:
            spec = ParallelSpec(
                stride, sides, one, groups, modes, activation=self.activation, combine=self.combine
            )
            return Problem.of(ParallelTensors(x, ws, wt), spec)
        norm = "batch" if self.norm else "none"
        pair = PairSpec(
            stride, sides, one, groups, modes, self.activation, norm=norm, order=self.order
        )
        return Problem.of(PairTensors(x, *in_execution_order(self.order, ws, wt)), pair)

    def work(self, mode: str, dtype: torch.dtype = torch.float32) -> Work:
        """Operations and bytes that no implementation can do without.

        Forward: x and weights are read, y is written. Training adds the gradients of both
        convolutions' inputs and weights (x, dy and weights read; dx and gradients of weights
        written); what is computed again or kept for backward is an implementation's choice.
        """
        p = self.problem(dtype)
        flops, forward = p.flops(), p.bytes(0)
        if not mode.startswith("training"):
            return Work(flops, forward)
        size = dtype.itemsize
        x = self.batch * self.channels[0] * math.prod(self.size) * size
        y = math.prod(p.out_shape) * size
        weights = forward - x - y
        backward = 2 * flops
        if not self.x_grad:
            backward -= p.passes[0].flops(self.batch * math.prod(p.pass_sizes[0]))
        moved = x + y + 2 * weights + (x if self.x_grad else 0)
        return Work(flops + backward, forward + moved)


def _r2plus1d(family: str, frames: int, batch: int) -> tuple[Case, ...]:
    """The eight distinct pairs of an R(2+1)D network on 112² clips, mids per convolution."""
    t = frames
    stem = Case(
        "stem", family, batch, (3, 45, 64), (t, 112, 112), (3, 7, 7), (1, 2, 2), x_grad=False
    )
    cases = [stem]
    c, size = 64, (t, 56, 56)
    for k in (64, 128, 256, 512):
        if k != c:
            m = default_mid_channels(c, k, (3, 3, 3))
            cases.append(Case(f"{c}-{m}-{k}-s2", family, batch, (c, m, k), size, stride=(2, 2, 2)))
            size = (-(-size[0] // 2), -(-size[1] // 2), -(-size[2] // 2))
        m = default_mid_channels(k, k, (3, 3, 3))
        cases.append(Case(f"{k}-{m}-{k}", family, batch, (k, m, k), size))
        c = k
    return tuple(cases)


R2PLUS1D_18 = _r2plus1d("r2plus1d-18", 16, 32)
R2PLUS1D_34 = _r2plus1d("r2plus1d-34", 32, 16)

# torchvision computes one width per block and uses it for both of its convolutions.
TORCHVISION = (
    Case("128-230-128", "r2plus1d-18-torchvision", 32, (128, 230, 128), (8, 28, 28)),
    Case("256-460-256", "r2plus1d-18-torchvision", 32, (256, 460, 256), (4, 14, 14)),
    Case("512-921-512", "r2plus1d-18-torchvision", 32, (512, 921, 512), (2, 7, 7)),
)


def _tokenizer(c: int, space: int) -> Case:
    """A factorized causal pair of a video tokenizer, nothing between its convolutions."""
    return Case(
        f"tokenizer-{c}", "tokenizer", 1, (c, c, c), (17, space, space), activation="none",
        norm=False, causal=True,
    )  # fmt: skip


def _depthwise(c: int, space: int, k: int, activation: str) -> Case:
    """A depthwise pair as in MoViNet and X3D."""
    return Case(
        f"depthwise-{c}-k{k}", "depthwise", 8, (c, c, c), (16, space, space), (k, k, k),
        depthwise=True, activation=activation,
    )  # fmt: skip


def _latents(c: int, space: int) -> Case:
    """A pseudo-3D pair of a diffusion model on 2D latents."""
    return Case(
        f"latents-{c}", "latents", 2, (c, c, c), (16, space, space), activation="none", norm=False
    )


def _parallel(c: int, size: Triple, combine: str) -> Case:
    """The parallel layer of arXiv 2407.16514."""
    return Case(
        f"parallel-{combine}-{c}", "parallel-4d", 8, (c, c, c), size, norm=False, combine=combine
    )


TOKENIZER = (_tokenizer(128, 256), _tokenizer(256, 128), _tokenizer(512, 64))

DEPTHWISE = (
    _depthwise(24, 112, 3, "silu"),
    _depthwise(54, 56, 3, "silu"),
    _depthwise(80, 40, 5, "hardswish"),
    _depthwise(108, 28, 5, "silu"),
    _depthwise(216, 14, 3, "silu"),
    _depthwise(432, 7, 5, "silu"),
)

LATENTS = (_latents(320, 64), _latents(640, 32), _latents(1280, 16))

PARALLEL = (
    _parallel(64, (16, 56, 56), "add"),
    _parallel(64, (16, 56, 56), "cat"),
    _parallel(256, (4, 14, 14), "add"),
    _parallel(256, (4, 14, 14), "cat"),
)

_LAYER1 = (64, 144, 64)
ODD = (
    Case("batch-7", "odd", 7, _LAYER1, (16, 56, 56)),
    Case("batch-25", "odd", 25, _LAYER1, (16, 56, 56)),
    Case("one-frame", "odd", 8, _LAYER1, (1, 56, 56)),
    Case("17-frames", "odd", 8, _LAYER1, (17, 56, 56)),
    Case("mid-45", "odd", 8, (64, 45, 64), (16, 56, 56)),
    Case("113x97", "odd", 8, _LAYER1, (16, 113, 97)),
    Case("temporal-first", "odd", 8, (64, 64, 64), (16, 56, 56), order="temporal-first"),
)

# In the order of what a reader wants to know first.
ALL = (
    *R2PLUS1D_18, *DEPTHWISE, *TOKENIZER, *LATENTS, *TORCHVISION, *PARALLEL, *ODD, *R2PLUS1D_34,
)  # fmt: skip
