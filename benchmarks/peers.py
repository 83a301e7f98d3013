"""The same layer as people write it with PyTorch, and in every other way that might be faster.

All are modules with the children ``spatial``, ``norm``, ``activation`` and ``temporal``, so that
state, gradients and running statistics compare by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst

from .shapes import Case

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish}


class Eager(nn.Module):
    """What users have: two ``nn.Conv3d`` with norm and activation between."""

    def __init__(self, case: Case, norm: bool) -> None:
        super().__init__()
        c, m, k = case.channels
        kt, kh, kw = case.kernel
        st, sh, sw = case.stride
        pt, ph, pw = case.padding
        spatial, temporal = ((c, m), (m, k)) if case.order == "spatial-first" else ((m, k), (c, m))
        inner, outer = (1, sh, sw), (st, 1, 1)
        if case.combine:
            half = (k + 1) // 2 if case.combine == "cat" else k
            spatial, temporal = (c, half), (c, k - half if case.combine == "cat" else k)
            inner = outer = case.stride
        g, bias = case.groups, not norm
        self.spatial = nn.Conv3d(*spatial, (1, kh, kw), inner, (0, ph, pw), groups=g, bias=bias)
        self.norm = nn.BatchNorm3d(m) if norm else None
        self.activation = ACTIVATIONS[case.activation]()
        self.temporal = nn.Conv3d(*temporal, (kt, 1, 1), outer, (pt, 0, 0), groups=g, bias=bias)
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        if self.case.combine:
            a, b = self.conv(self.spatial, x), self.conv(self.temporal, x)
            return self.activation(a + b if self.case.combine == "add" else torch.cat((a, b), 1))
        first, second = self.spatial, self.temporal
        if self.case.order == "temporal-first":
            first, second = second, first
        u = self.conv(first, x)
        v = u if self.norm is None else self.normalise(u)
        return self.conv(second, self.activation(v))

    def conv(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        if self.case.causal and conv is self.temporal:
            x = F.pad(x, (0, 0, 0, 0, conv.kernel_size[0] - 1, 0))
        return conv(x)

    def normalise(self, u: Tensor) -> Tensor:
        assert self.norm is not None
        return self.norm(u)


class Reshape4d(Eager):
    """The 4D path (arXiv 2407.16514): ``conv2d`` over (N·T, C, H, W) and over (N, M, T, H·W).

    In channels_last_3d none of the views is a copy, nor is any weight.
    """

    def conv(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        n = x.shape[0]
        st, sh, sw = conv.stride
        pt, ph, pw = (int(p) for p in conv.padding)
        if conv is self.spatial:
            x = x[:, :, ::st]
            frames = x.transpose(1, 2).flatten(0, 1)
            w4 = conv.weight[:, :, 0]
            y = self.conv2d(frames, w4, conv.bias, (sh, sw), (ph, pw), conv.groups)
            return y.unflatten(0, (n, x.shape[2])).transpose(1, 2)
        if self.case.causal:
            x = F.pad(x, (0, 0, 0, 0, conv.kernel_size[0] - 1, 0))
        x = x[..., ::sh, ::sw]
        w4, hw = conv.weight[..., 0], x.shape[3:]
        y = self.conv2d(x.flatten(3), w4, conv.bias, (st, 1), (pt, 0), conv.groups)
        return y.unflatten(3, hw)

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)

    def normalise(self, u: Tensor) -> Tensor:
        assert self.norm is not None
        n = self.norm
        frames = u.transpose(1, 2).flatten(0, 1)
        if n.training and n.num_batches_tracked is not None:
            n.num_batches_tracked.add_(1)
        v = F.batch_norm(
            frames, n.running_mean, n.running_var, n.weight, n.bias, n.training, n.momentum or 0.0,
            n.eps,
        )  # fmt: skip
        return v.unflatten(0, (u.shape[0], u.shape[2])).transpose(1, 2)


class CudnnRelu3d(Eager):
    """cuDNN's convolution + bias + ReLU in one call, then the temporal convolution."""

    def forward(self, x: Tensor) -> Tensor:
        c = self.spatial
        z = torch.cudnn_convolution_relu(
            x, c.weight, c.bias, c.stride, [int(p) for p in c.padding], c.dilation, c.groups
        )
        return self.conv(self.temporal, z)


class CudnnRelu4d(Reshape4d):
    """The same on the 4D path."""

    def __init__(self, case: Case, norm: bool) -> None:
        super().__init__(case, norm)
        self.activation = nn.Identity()

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        if weight.shape[-2:] != self.spatial.weight.shape[-2:]:
            return super().conv2d(x, weight, bias, stride, padding, groups)
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, (1, 1), groups)


class Full3d(nn.Module):
    """One kt×kh×kw convolution of (by the default mid channels) as many parameters.

    Another function: what a (2+1)D pair was put in place of.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        c, _, k = case.channels
        self.full = nn.Conv3d(c, k, case.kernel, case.stride, case.padding, groups=case.groups)
        self.left = case.kernel[0] - 1 if case.causal else 0

    def forward(self, x: Tensor) -> Tensor:
        return self.full(F.pad(x, (0, 0, 0, 0, self.left, 0)) if self.left else x)


@dataclass(frozen=True)
class Contender:
    """One way to run a case.

    ``kind``: "fastst"; "peer"; "control" (the baseline once more, whose ratio is the noise);
    "other" (another function, not compared with the reference).
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    channels_last: bool = False
    backend: str | None = None
    compile_mode: str | None = None

    def context(self) -> AbstractContextManager[object]:
        return nullcontext() if self.backend is None else fastst.use_backend(self.backend)


BASELINE = "eager"  # what users have: every ratio "× users" is against it
LEVELS = ("short", "core", "compiled", "all")
# PyTorch's own ways, whose errors are the yardstick of everybody else's.
YARDSTICKS = (BASELINE, "eager channels-last", "4D")


def pad_mid(model: Eager, multiple: int) -> Eager:
    """The same function with mid channels rounded up; the added ones are zero throughout."""
    case = model.case
    c, m, k = case.channels
    rounded = replace(case, channels=(c, -(-m // multiple) * multiple, k))
    wide = type(model)(rounded, model.norm is not None)
    state = wide.state_dict()
    for name, small in model.state_dict().items():
        big = state[name]
        if big.dim():
            big.zero_()
            big[tuple(slice(n) for n in small.shape)] = small
        else:
            big.copy_(small)
    wide.load_state_dict(state)
    return wide.train(model.training)


def layer(model: Eager, recompute: bool = False) -> nn.Module:
    """This library's layer with the state of an eager one."""
    case = model.case
    c, m, k = case.channels
    args = (c, k, case.kernel, case.stride, case.padding, 1, case.groups, model.norm is None)
    if case.combine:
        ours: nn.Module = fastst.ParallelConv2Plus1d(
            *args, combine=case.combine, activation=case.activation, causal=case.causal
        )
    else:
        ours = fastst.Conv2Plus1d(
            *args, mid_channels=m, norm=None if model.norm is None else "batch",
            activation=case.activation, order=case.order, causal=case.causal, recompute=recompute,
        )  # fmt: skip
    ours.load_state_dict(model.state_dict())
    return ours.train(model.training)


def own_contenders(model: Eager, backends: list[str], mode: str) -> Iterator[Contender]:
    """This library on each backend, from contiguous and from channels_last_3d input."""
    for backend in backends:
        for channels_last in (False, True):
            name = f"fastst {backend}" + (" channels-last" if channels_last else "")
            yield Contender(name, "fastst", lambda: layer(model), channels_last, backend)
        if mode.startswith("training") and not model.case.combine:
            name = f"fastst {backend} recompute"
            yield Contender(name, "fastst", lambda: layer(model, True), True, backend)


def peer_contenders(model: Eager, mode: str, cuda: bool, level: str) -> Iterator[Contender]:
    """The peers, by level.

    "short": the two eager layouts and the 4D path. "core": also aligned mids, cuDNN's fused call
    and the full 3D convolution. "compiled": also torch.compile of the short ones. "all":
    torch.compile of every one, in its default and its max-autotune mode.
    """
    case = model.case
    plain: list[Contender] = []

    def add(name: str, build: Callable[[], nn.Module], channels_last: bool) -> None:
        plain.append(Contender(name, "peer", build, channels_last))

    def four() -> Eager:
        path = Reshape4d(case, model.norm is not None)
        path.load_state_dict(model.state_dict())
        return path.train(model.training)

    add(BASELINE, lambda: model, False)
    yield from plain
    yield Contender("eager again", "control", lambda: model)
    add("eager channels-last", lambda: model, True)
    add("4D", four, True)
    if level == "short":
        yield from plain[1:]
        return
    if not case.depthwise and not case.combine:
        m = case.channels[1]
        for multiple in (8, 64):
            if m % multiple:

                def pad_path(path: Callable[[], Eager], n: int = multiple) -> nn.Module:
                    return pad_mid(path(), n)

                eager = partial(pad_path, lambda: model)
                add(f"eager mid/{multiple}", eager, False)
                add(f"eager channels-last mid/{multiple}", eager, True)
                add(f"4D mid/{multiple}", partial(pad_path, four), True)
    yield from plain[1:]
    fused = case.activation == "relu" and case.order == "spatial-first" and not case.combine
    if cuda and mode == "inference" and fused:
        for name, kind in (("cudnn conv+relu", CudnnRelu3d), ("cudnn conv+relu 4D", CudnnRelu4d)):

            def fuse(kind: type[Eager] = kind) -> Eager:
                module = kind(case, False)
                module.load_state_dict(model.state_dict())
                return module.eval()

            yield Contender(name, "peer", fuse, True)
    if not case.combine:
        yield Contender("conv3d k×k×k", "other", lambda: Full3d(case), False)
        yield Contender("conv3d k×k×k channels-last", "other", lambda: Full3d(case), True)
    short = [c for c in plain if c.name in YARDSTICKS]
    compiled = {
        "compiled": [("default", short)],
        "all": [("default", plain), ("max-autotune", plain)],
    }
    for compile_mode, which in compiled.get(level, []):
        for c in which:
            yield replace(c, name=f"{c.name} compiled {compile_mode}", compile_mode=compile_mode)


def prepare(c: Contender, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A contender's own copy of its module; norms stay float32, as under autocast."""
    module = copy.deepcopy(c.build()).to(device)
    for child in module.children():
        if isinstance(child, nn.Conv3d):
            child.to(dtype)
    if c.channels_last:
        module = module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if c.compile_mode is not None:
        module.compile(mode=c.compile_mode)
    return module
