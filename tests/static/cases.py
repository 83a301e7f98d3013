"""Calls of the Triton backend whose kernels are compiled: pairs of R(2+1)D-18, and odd ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastst.backends import triton as backend
from fastst.backends.contract import ConvBackward, PairBackward
from fastst.problem.conv3d import ConvProblem, ConvSpec, ConvTensors
from fastst.problem.spec import (
    PairSpec,
    PairTensors,
    ParallelSpec,
    ParallelTensors,
    Problem,
    in_execution_order,
)


@dataclass(frozen=True)
class Case:
    """One call of the backend whose kernels are compiled."""

    name: str
    channels: tuple[int, int, int]  # C, M, K
    size: tuple[int, int, int]
    kernel: tuple[int, int, int] = (3, 3, 3)
    stride: tuple[int, int, int] = (1, 1, 1)
    groups: int = 1
    temporal_groups: int = 0  # of the parallel op, where they are others
    dtype: torch.dtype = torch.bfloat16
    channels_last: bool = True
    norm: str = "batch"
    save: bool = True  # a training call
    recompute: bool = False
    activation: str = "relu"
    combine: str = ""  # of the parallel op
    branch_activation: str = "none"
    tf32: bool = True
    order: str = "spatial-first"
    way: str | None = None  # None: the one that is chosen

    def run(self, batch: int = 8) -> None:
        """The backend's host code on meta tensors."""

        def empty(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        c, m, k = self.channels
        x = empty(batch, c, *self.size)
        if self.channels_last:
            x = x.to(memory_format=torch.channels_last_3d)
        kt, kh, kw = self.kernel
        padding = (kt // 2, kt // 2, kh // 2, kh // 2, kw // 2, kw // 2)
        groups = (self.groups, self.temporal_groups or self.groups)
        common = {"stride": self.stride, "padding": padding, "groups": groups}
        if self.combine:
            weights = empty(k, c // groups[0], 1, kh, kw), empty(k, c // groups[1], kt, 1, 1)
            tensors = ParallelTensors(x, *weights, empty(k), empty(k))
            spec = ParallelSpec(
                **common, branch_activation=self.branch_activation, activation=self.activation,
                combine=self.combine,
            )  # fmt: skip
            problem = Problem.of(tensors, spec)
            y = backend.parallel_conv2plus1d(problem, tensors)
            backend.parallel_conv2plus1d_backward(problem, tensors, y, [True] * 5)
            return
        taps = in_execution_order(self.order, (1, kh, kw), (kt, 1, 1))
        weights = [
            empty(out, into // self.groups, *kernel)
            for (out, into), kernel in zip(((m, c), (k, m)), taps, strict=True)
        ]
        vectors = [empty(m, dtype=torch.float32) for _ in range(4)]
        if self.norm != "frozen":
            vectors[2:] = [None, None]
        if self.norm == "none":
            vectors[:2] = [None, None]
        tensors = PairTensors(x, *weights, None, empty(k), *vectors)
        spec = PairSpec(
            **common, activation=self.activation, norm=self.norm, order=self.order,
            recompute=self.recompute, output_statistics=self.save,
        )  # fmt: skip
        problem = Problem.of(tensors, spec)
        result = backend.pair.run(problem, tensors, self.save, self.way)
        if self.save:
            dy = torch.empty_like(result.y)
            needs = [t is not None for t in tensors]
            backend.BACKEND.conv2plus1d_backward(
                PairBackward(problem, tensors, [dy], result.u, result.mean, result.var, needs)
            )


@dataclass(frozen=True)
class ConvCase:
    """One call of ``conv3d`` on the backend."""

    name: str
    channels: tuple[int, int]  # C, K
    size: tuple[int, int, int]
    norm: str = "group"
    past: int = 0
    groups: int = 1
    training: bool = True
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = True

    def run(self, batch: int = 2) -> None:
        """The backend's host code on meta tensors."""

        def video(c: int, t: int, *plane: int) -> torch.Tensor:
            drawn = torch.empty((batch, c, t, *plane), dtype=self.dtype, device="meta")
            return drawn.to(memory_format=torch.channels_last_3d)

        (c, k), plane = self.channels, self.size[1:]
        weight = torch.empty(k, c // self.groups, 3, 3, 3, dtype=self.dtype, device="meta")
        one = torch.empty(c, dtype=self.dtype, device="meta")
        past = video(c, self.past, *plane) if self.past else None
        tensors = ConvTensors(video(c, *self.size), weight, one[:k], one, one, past=past)
        frames = (0, 0) if self.past else (1, 1)
        spec = ConvSpec(
            padding=(*frames, 1, 1, 1, 1), groups=(self.groups,), input_activation="silu",
            norm=self.norm, norm_groups=32 if self.norm == "group" else 1,
        )  # fmt: skip
        problem = ConvProblem.of(tensors, spec)
        result = backend.convolution.run(problem, tensors, problem)
        if self.training:
            needs = [t is not None for t in tensors]
            backend.convolution.conv3d_backward(
                ConvBackward(problem, tensors, result.y, result.mean, result.var, needs)
            )


HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64
# The pairs of R(2+1)D-18 in training and inference, other dtypes, thin and grouped ones.
SERVED: dict[str, Any] = {"norm": "frozen", "save": False}
TEMPORAL: dict[str, Any] = {"order": "temporal-first", **SERVED}
STEM: tuple[Any, ...] = ((3, 45, 64), (16, 112, 112), (3, 7, 7), (1, 2, 2))
CASES = (
    Case("stem", *STEM, channels_last=False),
    Case("stem inference", *STEM, **SERVED),
    Case("thin inference", (64, 64, 64), (16, 56, 56), dtype=HALF, **SERVED),
    Case("64-144-64", (64, 144, 64), (16, 56, 56)),
    Case("64-144-64 contiguous", (64, 144, 64), (16, 56, 56), channels_last=False),
    Case("64-230-128 s2", (64, 230, 128), (16, 56, 56), stride=(2, 2, 2)),
    Case(
        "64-230-128 s2 planes", (64, 230, 128), (16, 56, 56), stride=(2, 2, 2), channels_last=False,
        save=False,
    ),
    Case("128-288-128", (128, 288, 128), (8, 28, 28)),
    Case("256-576-256", (256, 576, 256), (4, 14, 14), activation="silu"),
    Case("512-1152-512", (512, 1152, 512), (2, 7, 7), norm="none", save=False, dtype=HALF),
    Case("tf32", (64, 144, 64), (16, 56, 56), dtype=SINGLE),
    Case("float32", (64, 144, 64), (16, 56, 56), dtype=SINGLE, tf32=False),
    Case("float64", (16, 32, 16), (4, 14, 14), dtype=DOUBLE),
    Case("parallel add", (64, 64, 64), (16, 56, 56), combine="add"),
    Case("parallel relu", (64, 64, 64), (16, 56, 56), combine="add", branch_activation="relu"),
    Case("one kernel", (64, 128, 128), (16, 56, 56), way="pair_conv", **SERVED),
    Case("one kernel tf32", *STEM, dtype=SINGLE, way="pair_conv", **SERVED),
    Case(
        "one kernel float32", (32, 32, 32), (16, 56, 56), (5, 3, 3), dtype=SINGLE, tf32=False,
        way="pair_conv", **SERVED,
    ),
    Case("depthwise", (108, 108, 108), (16, 56, 56), groups=108, **SERVED),
    Case("depthwise 5", (80, 80, 80), (16, 40, 40), (5, 5, 5), groups=80, **SERVED),
    Case("depthwise t-first", (108, 108, 108), (16, 56, 56), groups=108, **TEMPORAL),
    Case("depthwise batch", (64, 64, 64), (16, 56, 56), groups=64, channels_last=False),
    Case("grouped", (256, 256, 256), (16, 28, 28), groups=16, **SERVED),
    Case("grouped batch", (256, 256, 256), (16, 28, 28), groups=16),
    Case("grouped t-first", (256, 256, 256), (16, 28, 28), groups=16, dtype=HALF, **TEMPORAL),
    Case(
        "grouped float32", (64, 64, 64), (16, 28, 28), groups=4, dtype=SINGLE, tf32=False, **SERVED
    ),
    Case("thin groups", (64, 64, 64), (16, 28, 28), groups=16, **SERVED),
    Case("parallel cat s2", (64, 0, 96), (16, 56, 56), combine="cat", stride=(2, 2, 2), dtype=HALF),
    Case("parallel depthwise", (64, 64, 64), (16, 56, 56), groups=64, combine="add"),
    Case(
        "parallel grouped", (256, 256, 256), (16, 28, 28), groups=16, combine="add",
        branch_activation="silu",
    ),
    Case(
        "parallel apart", (64, 64, 64), (16, 56, 56), groups=64, temporal_groups=1, combine="add",
        branch_activation="relu",
    ),
    Case("gelu", (32, 96, 32), (8, 28, 28), norm="frozen", activation="gelu", dtype=HALF),
    ConvCase("conv3d", (128, 128), (5, 64, 64)),
    ConvCase("conv3d past", (96, 96), (1, 64, 64), norm="rms", past=2, training=False),
    ConvCase("conv3d depthwise past", (96, 96), (5, 64, 64), "batch", 2, 96, training=False),
)  # fmt: skip
