"""Random blocks of pairs, near-pairs and traps: the same before and after conversion."""

from __future__ import annotations

import copy
import os
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst
from fastst.rewrite.convert import converter, tail
from tests.rewrite.convert.test_converter import step
from tests.rewrite.test_optimize import settle
from tests.support import fuzz

BLOCKS = int(os.environ.get("FASTST_FUZZ", "0")) or 80
ACTIVATIONS = (
    nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Tanh, nn.Identity, lambda: nn.LeakyReLU(0.2),
    lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.1, inplace=True),
)  # fmt: skip
FUNCTIONS = (F.relu, F.silu, F.gelu, torch.tanh, F.hardswish, torch.relu_)
PADS = ((0, 0, 0, 0, 2, 0), (1, 1, 1, 1, 0, 0), (0, 0, 0, 0, 0, 0), (1, 0, 0, 1, 1, 1))
KINDS = {
    "spatial": 6, "temporal": 6, "full": 1, "norm": 4, "act": 4, "function": 3, "pad": 1,
    "residual": 1, "used": 1, "again": 1, "inplace": 1, "dropout": 1, "keep": 2, "sum": 3,
    "touch": 1, "block": 2,
}  # fmt: skip
SUMS = ("x + y", "y + x", "x += y", "y += x", "x - y", "add", "add_", "alpha")


class RandomBlock(nn.Module):
    """A line of random steps, and a shortcut that begins at one of them and is added at others."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = rng = random.Random(seed)
        self.plan: list[tuple[Any, ...]] = []
        self.channels = rng.choice((2, 4))
        self.eval()
        x = torch.randn(2, self.channels, 6, 9, 8)
        shortcut = x
        for i in range(rng.randint(3, 14)):
            before = len(self.plan)
            self.draw(f"m{i}", x.shape[1], x.shape == shortcut.shape)
            for told in self.plan[before:]:
                x, shortcut = self.run(told, x.clone(), shortcut.clone())

    def draw(self, name: str, c: int, fits: bool) -> None:
        """One more step on c channels; ``fits`` says whether the shortcut can be added."""
        rng = self.rng
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind in ("spatial", "temporal", "full"):
            self.add(name, self.conv(kind, c, rng.choice((2, 4, c))))
        elif kind == "norm":
            make = rng.choice((nn.BatchNorm3d,) * 4 + (nn.InstanceNorm3d,))
            batch = make is nn.BatchNorm3d
            momentum, affine = rng.choice((0.1, None, 0.6)), rng.random() < 0.7
            track = batch and rng.random() < 0.8
            eps = rng.choice((1e-5, 1e-2))
            self.add(name, make(c, eps, momentum if batch else 0.1, affine, track))
        elif kind == "act":
            self.add(name, rng.choice(ACTIVATIONS)())
        elif kind == "dropout":
            self.add(name, nn.Dropout(0.0))
        elif kind == "block":
            self.draw_block(name, c)
        elif kind == "again":
            made = [(n, m) for n, m in self.named_children() if self.keeps_channels(m, c)]
            if made:
                self.plan.append(("module", rng.choice(made)[0]))
        elif kind == "function":
            self.plan.append((kind, rng.choice(FUNCTIONS)))
        elif kind == "pad":
            self.plan.append((kind, rng.choice(PADS), rng.choice(("constant", "replicate"))))
        elif kind != "sum":
            self.plan.append((kind,))
        elif fits:
            self.plan.append((kind, rng.choice(SUMS)))

    def draw_block(self, name: str, c: int) -> None:
        """A pair that keeps sizes and, mostly, what residual blocks have around it."""
        rng = self.rng
        convs = [
            nn.Conv3d(c, 3, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(3, c, (3, 1, 1), 1, (1, 0, 0)),
        ]
        if rng.random() < 0.3:
            convs = [
                nn.Conv3d(c, 3, (3, 1, 1), 1, (1, 0, 0)),
                nn.Conv3d(3, c, (1, 3, 3), 1, (0, 1, 1)),
            ]
        parts: list[Any] = [
            ("keep",), convs[0], nn.BatchNorm3d(3), rng.choice(ACTIVATIONS)(), convs[1],
            nn.BatchNorm3d(c), ("touch",), ("sum", rng.choice(SUMS)), rng.choice(ACTIVATIONS)(),
        ]  # fmt: skip
        odds = (0.6, 1, 0.5, 0.5, 1, 0.5, 0.3, 0.7, 0.7)
        for i, part in enumerate(
            part for part, p in zip(parts, odds, strict=True) if rng.random() < p
        ):
            if isinstance(part, nn.Module):
                self.add(f"{name}_{i}", part)
            elif part[0] != "sum" or any(told == ("keep",) for told in self.plan[-i - 1 :]):
                self.plan.append(part)

    @staticmethod
    def keeps_channels(m: nn.Module, c: int) -> bool:
        if isinstance(m, nn.Conv3d):
            return m.in_channels == m.out_channels == c
        return getattr(m, "num_features", c) == c

    def add(self, name: str, module: nn.Module) -> None:
        self.add_module(name, module.eval())
        self.plan.append(("module", name))

    def conv(self, kind: str, c: int, k: int) -> nn.Conv3d:
        rng = self.rng
        kernel = {"spatial": (1, 3, rng.choice((2, 3))), "temporal": (rng.choice((2, 3)), 1, 1)}
        size = kernel.get(kind, (2, 2, 2))
        stride = tuple(rng.choice((1, 1, 1, 1, 1, 2)) if n > 1 else 1 for n in size)
        padding = tuple(n // 2 for n in size)
        if rng.random() < 0.05:
            padding = (1, 1, 1)
        mode = rng.choice(("zeros",) * 4 + ("replicate",))
        groups = rng.choice((1, 1, 2))
        return nn.Conv3d(c, k, size, stride, padding, 1, groups, rng.random() < 0.5, mode)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        for told in self.plan:
            x, shortcut = self.run(told, x, shortcut)
        return x

    def run(self, told: tuple[Any, ...], x: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
        kind = told[0]
        if kind == "module":
            x = getattr(self, told[1])(x)
        elif kind == "function":
            x = told[1](x)
        elif kind == "pad":
            x = F.pad(x, told[1], mode=told[2])
        elif kind == "residual":
            x = x + torch.sigmoid(x)
        elif kind == "used":
            x = x * x.mean((2, 3, 4), keepdim=True)
        elif kind == "inplace":
            x = (x * 1).mul_(2)
        elif kind == "keep":
            shortcut = x
        elif kind == "touch":
            shortcut.mul_(2)
        else:
            x, shortcut = self.sum(told[1], x, shortcut)
        return x, shortcut

    @staticmethod
    def sum(how: str, x: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
        if how == "x += y":
            x += shortcut
        elif how == "y += x":
            shortcut += x
            x = shortcut
        elif how == "add_":
            x = x.add_(shortcut)
        elif how == "add":
            x = torch.add(x, shortcut)
        elif how == "alpha":
            x = torch.add(x, shortcut, alpha=2)
        elif how == "x - y":
            x = x - shortcut
        else:
            x = x + shortcut if how == "x + y" else shortcut + x
        return x, shortcut


def block(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = RandomBlock(seed).double().train()
    return nn.Sequential(model, nn.Identity()) if seed % 3 == 0 else model


def clip(model: nn.Module) -> Tensor:
    c = next(m for m in model.modules() if isinstance(m, RandomBlock)).channels
    return torch.randn(2, c, 6, 9, 8, dtype=torch.float64)


def close(a: Any, b: Any, seed: int) -> None:
    # Norms of few values amplify rounding: by at most their 1/sqrt(eps) each.
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m: f"seed {seed}: {m}")


@pytest.mark.parametrize("part", range(4))
def test_random_blocks(part: int) -> None:
    replaced = left = 0
    for seed in range(fuzz.SEED + part, fuzz.SEED + BLOCKS, 4):
        model = block(seed)
        original = copy.deepcopy(model)
        report = fastst.convert(model)
        replaced, left = replaced + len(report.replaced), left + len(report.left)
        x = clip(model)
        for training in (True, False):
            try:
                wanted = step(original, x * 1, training)
            except (ValueError, RuntimeError):  # one value per channel, x changed before backward
                break
            close(step(model, x * 1, training), wanted, seed)
        fastst.revert(model)
        assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]
    assert replaced > 5
    assert left > 5


def check_inference(seeds: range) -> int:
    """How many endings of blocks became part of an op."""
    ends = 0
    for seed in seeds:
        model = settle(block(seed))
        x = clip(model)
        optimised = fastst.optimize_for_inference(model)
        given = x.clone()
        with torch.no_grad(), fastst.dispatch.recording() as calls:
            found = optimised(given)
        ends += sum(
            c.problem.residual or c.problem.spec.outer_activation != "none"
            for c in calls
            if c.problem is not None
        )
        same = x.clone()
        with torch.no_grad():
            close(found, model(same), seed)
        close(given, same, seed)
    return ends


@pytest.mark.parametrize("part", range(4))
def test_random_blocks_for_inference(part: int) -> None:
    """Outputs, and what the block writes to its input."""
    assert check_inference(range(fuzz.SEED + part, fuzz.SEED + BLOCKS // 2, 4)) > 0


@pytest.mark.parametrize(
    ("name", "wrong", "seed"),  # one of the seeds whose block has what the bug is about
    [
        ("why_apart", lambda chain, modules: None, 27),
        ("_other", lambda node, one: next((a for a in node.args if a is not one), None), 58),
    ],
)
def test_sees_a_planted_bug(
    name: str, wrong: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for home in (tail, converter):
        if hasattr(home, name):
            monkeypatch.setattr(home, name, wrong)
    with pytest.raises(AssertionError, match="seed"):
        check_inference(range(seed, seed + 1))
