"""Random blocks of pairs, near-pairs and traps: the same before and after conversion."""

from __future__ import annotations

import copy
import os
import random

import fuzz
import pytest
import torch
import torch.nn.functional as F
from test_convert import step
from torch import nn

import fastst

BLOCKS = int(os.environ.get("FASTST_FUZZ", "0")) or 120
ACTIVATIONS = (
    nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh, nn.Identity, lambda: nn.LeakyReLU(0.2),
    lambda: nn.ReLU(inplace=True),
)  # fmt: skip
FUNCTIONS = (F.relu, F.silu, F.gelu, torch.tanh, F.hardswish)
PADS = ((0, 0, 0, 0, 2, 0), (1, 1, 1, 1, 0, 0), (0, 0, 0, 0, 0, 0), (1, 0, 0, 1, 1, 1))


class RandomBlock(nn.Module):
    """A straight line of random steps on C channels that keeps what it needs for side paths."""

    def __init__(self, seed: int):
        super().__init__()
        self.rng = rng = random.Random(seed)
        self.plan: list[tuple] = []
        self.channels = c = rng.choice((2, 4))
        first = c
        for i in range(rng.randint(3, 10)):
            kind = rng.choices(
                ("spatial", "temporal", "full", "norm", "act", "function", "pad", "residual",
                 "used", "shared", "inplace", "dropout"),
                (6, 6, 1, 4, 4, 3, 1, 1, 1, 1, 1, 1),
            )[0]  # fmt: skip
            if kind in ("spatial", "temporal", "full"):
                out = rng.choice((2, 4))
                self.add(i, self.conv(kind, first, out))
                first = out
            elif kind == "norm":
                make = rng.choice((nn.BatchNorm3d,) * 4 + (nn.InstanceNorm3d,))
                momentum, affine = rng.choice((0.1, None, 0.6)), rng.random() < 0.7
                momentum = momentum or (0.1 if make is nn.InstanceNorm3d else None)
                track = make is nn.BatchNorm3d and rng.random() < 0.8
                self.add(i, make(first, rng.choice((1e-5, 1e-2)), momentum, affine, track))
            elif kind == "act":
                self.add(i, rng.choice(ACTIVATIONS)())
            elif kind == "shared" and self.plan:
                self.plan.append(rng.choice(self.plan) if first == c else ("function", F.relu))
                if self.plan[-1][0] == "module":
                    self.plan[-1] = ("function", F.relu)
            elif kind == "function":
                self.plan.append((kind, rng.choice(FUNCTIONS)))
            elif kind == "pad":
                self.plan.append((kind, rng.choice(PADS), rng.choice(("constant", "replicate"))))
            elif kind == "dropout":
                self.add(i, nn.Dropout(0.0))
            else:
                self.plan.append((kind,))

    def add(self, i: int, module: nn.Module) -> None:
        self.add_module(f"m{i}", module)
        self.plan.append(("module", f"m{i}"))

    def conv(self, kind: str, c: int, k: int) -> nn.Conv3d:
        rng = self.rng
        kernel = {"spatial": (1, 3, rng.choice((2, 3))), "temporal": (rng.choice((2, 3)), 1, 1)}
        size = kernel.get(kind, (2, 2, 2))
        stride = tuple(rng.choice((1, 1, 1, 2)) if n > 1 else 1 for n in size)
        padding = tuple(n // 2 for n in size)
        if rng.random() < 0.05:
            padding = (1, 1, 1)
        mode = rng.choice(("zeros",) * 4 + ("replicate",))
        groups = rng.choice((1, 1, 2))
        return nn.Conv3d(c, k, size, stride, padding, 1, groups, rng.random() < 0.5, mode)

    def forward(self, x):
        for step_ in self.plan:
            kind = step_[0]
            if kind == "module":
                x = getattr(self, step_[1])(x)
            elif kind == "function":
                x = step_[1](x)
            elif kind == "pad":
                x = F.pad(x, step_[1], mode=step_[2])
            elif kind == "residual":
                x = x + torch.sigmoid(x)
            elif kind == "used":
                x = x * x.mean((2, 3, 4), keepdim=True)
            elif kind == "inplace":
                x = (x * 1).mul_(2)
        return x


@pytest.mark.parametrize("part", range(4))
def test_random_blocks(part):
    replaced = left = 0
    for i in range(part, BLOCKS, 4):
        seed = fuzz.SEED + i
        torch.manual_seed(seed)
        model = RandomBlock(seed).double()
        if i % 3 == 0:
            model = nn.Sequential(model, nn.Identity())
        original = copy.deepcopy(model)
        report = fastst.convert(model)
        replaced, left = replaced + len(report.replaced), left + len(report.left)
        c = model.get_submodule("0" if i % 3 == 0 else "").channels
        x = torch.randn(2, c, 6, 9, 8, dtype=torch.float64)
        for training in (True, False):
            try:
                wanted = step(original, x, training)
            except (ValueError, RuntimeError):  # batch norm over one value, kernel above input
                break
            for a, b in zip(step(model, x, training), wanted, strict=True):
                # Norms of few values amplify rounding: by at most their 1/sqrt(eps) each.
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m: f"{seed}: {m}")  # noqa: B023
        fastst.revert(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert replaced > 5
    assert left > 5
