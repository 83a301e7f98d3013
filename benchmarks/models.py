"""R(2+1)D-18 end to end: original, converted, optimised, and torch.compile of each, in one run.

Also the largest batch that trains in a given memory.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastst.models
from fastst import optimize_for_inference
from fastst.models.resnet import Stage, VideoResNet
from fastst.rewrite.convert import convert

from . import measure
from .engines import ENGINES, version
from .layers import arguments, open_record
from .measure import Spread
from .record import Record, progress

MODEL = "R(2+1)D-18"
GATED = 2  # clips of a batch that are compared with float64, which takes several times the memory


@dataclass(frozen=True)
class Clip:
    """Size of the input, and the network that it is for."""

    batch: int
    frames: int = 16
    space: int = 112
    classes: int = 400
    model: str = "r2plus1d_18"  # of fastst.models
    dry: bool = False  # the first two stages, a block each; compiled without generating code

    @property
    def named(self) -> str:
        return MODEL if self.model == "r2plus1d_18" else self.model

    @property
    def label(self) -> str:
        return f"{self.batch}×{self.frames}×{self.space}²"

    def network(self) -> nn.Module:
        if not self.dry:
            made: nn.Module = getattr(fastst.models, self.model)(self.classes)
            return made
        stages = [Stage("2+1d", 16, 1, 1), Stage("2+1d", 32, 1, 2)]
        return VideoResNet("2+1d", stages, self.classes)

    def compile(self, model: nn.Module) -> None:
        model.compile(backend="aot_eager" if self.dry else "inductor")


@dataclass(frozen=True)
class Variant:
    """One way to run the model."""

    model: str = "original"  # or "converted", or "optimised" for inference, or one of ENGINES
    channels_last: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        return self.model + " channels-last" * self.channels_last + " compiled" * self.compiled

    @property
    def kind(self) -> str:
        return "fastst" if self.model in ("converted", "optimised") else "peer"

    @property
    def engine(self) -> bool:
        """Whether it runs outside of PyTorch."""
        return self.model in ENGINES


def variants(training: bool, compiled: str, engines: Sequence[str] = ()) -> Iterator[Variant]:
    """The first one is what users have.

    Args:
        compiled: "none" of them by torch.compile, the "original" as well, or "all".
        engines: names in ENGINES, for inference.
    """
    each = [Variant(m, last) for m in ("original", "converted") for last in (False, True)]
    if not training:
        each.append(Variant("optimised"))  # chooses the layout of its weights itself
    yield from each
    if not training:
        yield from map(Variant, engines)
    if compiled != "none":
        of = each if compiled == "all" else each[:1]
        yield from (replace(v, compiled=True) for v in of)


class ModelStep:
    """One variant's inference, or its forward, loss and backward.

    16 bits are the model's own dtype in inference, and autocast's in training.
    """

    def __init__(
        self, base: nn.Module, variant: Variant, clips: Sequence[Tensor], targets: Tensor,
        training: bool, half: torch.dtype | None,
    ) -> None:  # fmt: skip
        self.training, self.targets = training, targets
        self.amp = half if training else None
        self.model = copy.deepcopy(base).train(training)
        if not (training or half is None or variant.engine):
            self.model, clips = self.model.to(half), [x.to(half) for x in clips]
        if variant.model == "optimised":
            self.model = optimize_for_inference(self.model, memory_format=torch.channels_last_3d)
        converted = variant.model == "converted"
        self.replaced = len(convert(self.model).replaced) if converted else 0
        fmt = torch.contiguous_format
        if variant.channels_last:
            fmt = torch.channels_last_3d
            self.model = self.model.to(memory_format=fmt)  # type: ignore[call-overload]
        self.clips = [x.contiguous(memory_format=fmt) for x in clips]
        self.engine = None
        if variant.engine:
            dtype = half or torch.float32
            self.engine = ENGINES[variant.model](self.model, self.clips[0], dtype)

    def __call__(self, i: int = 0) -> Tensor:
        return self.step(self.clips[i], self.targets)

    def step(self, clip: Tensor, targets: Tensor) -> Tensor:
        if self.engine is not None:
            self.logits = self.engine(clip)
            return self.logits
        device = clip.device.type
        with (
            torch.set_grad_enabled(self.training),
            torch.autocast(device, self.amp, enabled=self.amp is not None),
        ):
            logits: Tensor = self.model(clip)
            self.logits = logits.detach()
            if not self.training:
                return logits
            loss = F.cross_entropy(logits, targets)
        loss.backward()
        return loss.detach()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def outputs(self, i: int) -> dict[str, Tensor]:
        """Logits and, in training, all gradients as one vector, of the first clips of a batch."""
        self.clear()
        self.step(self.clips[i][:GATED], self.targets[:GATED])
        found = {"logits": self.logits}
        if self.training:
            grads = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
            found["gradient"] = torch.cat(grads)
        self.clear()
        return found


Errors = dict[str, list[float]]  # relative error on each clip


def _errors(step: ModelStep, truth: Sequence[dict[str, Tensor]]) -> Errors:
    each = [measure.errors(step.outputs(i), t) for i, t in enumerate(truth)]
    return {name: [e[name].l2 for e in each] for name in each[0]}


def _disagreement(found: Errors, yardsticks: Sequence[Errors], dtype: str) -> str | None:
    """More than twice PyTorch's own error and a few ulps, or None.

    Of whole vectors, because a deep network spreads every error. Rounding that turns the sign of
    one ReLU's input moves a gradient by far more than rounding does: so the median over the clips
    is held against the largest of PyTorch's own. What is wrong is wrong on every clip.
    """
    for name, values in found.items():
        own = max(max(y[name]) for y in yardsticks)
        got = statistics.median(values)
        if not got <= 2 * own + 4 * measure.EPSILON[dtype]:
            return f"{name}: relative error {got:.2g}, PyTorch's own {own:.2g}"
    return None


def compare(
    clip: Clip, device: torch.device, dtype: str, training: bool, compiled: str, seconds: float,
    rounds: int, seed: int = 0, engines: Sequence[str] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of every variant of the model in one mode."""
    torch.manual_seed(seed)
    half = None if dtype == "fp32" else measure.DTYPES[dtype]
    base = clip.network().to(device).train(training)
    size = (clip.batch, 3, clip.frames, clip.space, clip.space)
    clips = [torch.randn(size, device=device) for _ in range(3)]
    targets = torch.randint(clip.classes, (clip.batch,), device=device)
    exact = ModelStep(
        copy.deepcopy(base).double(), Variant(), [x.double() for x in clips],
        targets, training, None,
    )  # fmt: skip
    truth = [exact.outputs(i) for i in range(len(clips) if training else 1)]
    del exact
    gc.collect()
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, ModelStep] = {}
    yardsticks: list[Errors] = []
    for v in variants(training, compiled, engines):
        row: dict[str, Any] = {
            "model": clip.named, "clip": clip.label, "batch": clip.batch, "dtype": dtype,
            "mode": "training" if training else "inference", "contender": v.name, "kind": v.kind,
            "ms": None, "refused": None, "peak_bytes": None,
        }  # fmt: skip
        if v.engine:
            row["version"] = version(v.model)
        rows[v.name] = row
        try:
            step = ModelStep(base, v, clips, targets, training, half)
            if v.compiled:
                clip.compile(step.model)
            found = _errors(step, truth)
            row["error"] = {name: statistics.median(e) for name, e in found.items()}
            if v.kind == "peer" and not v.compiled and not v.engine:
                yardsticks.append(found)
            row["refused"] = _disagreement(found, yardsticks, dtype)
            if row["refused"] is None:
                if not v.engine:  # whose memory PyTorch's allocator does not see
                    row["peak_bytes"] = measure.observe(lambda s=step: s(0), device).peak_bytes  # type: ignore[misc]
                row["replaced"] = step.replaced
                step.clear()
                steps[v.name] = step
        except (RuntimeError, ValueError, ImportError) as e:
            row["refused"] = f"{type(e).__name__}: {str(e).strip().splitlines()[0][:200]}"
    timed = {name: measure.Timed(s, s.clear) for name, s in steps.items()}
    samples = measure.interleave(measure.Clock(device), timed, seconds, len(clips), seed, rounds)
    for name, values in samples.items():
        spread = Spread.of(values)
        rows[name] |= {
            "ms": spread.median,
            "ms_quartiles": (spread.q25, spread.q75),
            "samples": len(values),
            "clips_per_s": 1e3 * clip.batch / spread.median,
            "vs_users": measure.ratios(samples[next(iter(samples))], values),
        }
    if compiled != "none":
        torch._dynamo.reset()
    return list(rows.values())


def largest(fits: Callable[[int], bool], most: int = 4096) -> int:
    """The largest n up to ``most`` that fits, where all below it do; 0 if 1 does not."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def training_batches(
    clip: Clip,
    device: torch.device,
    dtype: str,
    limits_gib: Sequence[float],
    most: int,
    deadline: float | None = None,
) -> list[dict[str, Any]]:
    """Largest training batch within each limit of memory, original and converted.

    On CUDA the process is held to the limit and tries; on the CPU a batch fits when the model and
    the peak of a step do.
    """
    amp = None if dtype == "fp32" else measure.DTYPES[dtype]
    cuda = device.type == "cuda"
    search, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    base = clip.network().to(device)
    held = sum(p.nbytes for p in base.parameters())
    rows = []

    def train(n: int, v: Variant) -> int:
        """Train one step with n clips; its peak memory on the CPU."""
        x = torch.randn(n, 3, clip.frames, clip.space, clip.space, device=device)
        step = ModelStep(base, v, [x], torch.randint(clip.classes, (n,), device=device), True, amp)
        if cuda:
            step(0)
            torch.cuda.synchronize(device)
            return 0
        return measure.observe(lambda: step(0), device).peak_bytes + x.nbytes + held

    def fits(n: int, v: Variant, budget: int) -> bool:
        if not cuda:
            return train(n, v) <= budget
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(budget / total, 1.0), device)
        try:
            train(n, v)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return True

    for limit in limits_gib:
        for variant in (Variant(), Variant("converted")):
            if deadline is not None and time.monotonic() > deadline:
                break
            found = largest(partial(fits, v=variant, budget=int(limit * 2**30)), most)
            rows.append({
                "model": MODEL, "clip": f"{clip.frames}×{clip.space}²", "dtype": dtype,
                "contender": variant.name, "memory_gib": limit, "batch": found,
            })  # fmt: skip
    torch.backends.cudnn.benchmark = search
    return rows


def run(
    record: Record, clip: Clip, device: torch.device, dtypes: Sequence[str], modes: Sequence[str],
    compiled: str, seconds: float, rounds: int, deadline: float | None = None,
    engines: Sequence[str] = (),
) -> int:  # fmt: skip
    """Compare in each dtype and mode until the deadline; how many rows were refused."""
    wrong = 0
    units = [(d, m) for d in dtypes for m in modes]
    for dtype, mode in progress(units, desc="models", unit="mode"):
        if deadline is not None and time.monotonic() > deadline:
            record.set(not_run=[*record.data.get("not_run", []), f"models/{mode}/{dtype}"])
            continue
        with measure.precision(dtype):
            rows = compare(
                clip, device, dtype, mode == "training", compiled, seconds, rounds, engines=engines
            )
        done = [rows[0][k] for k in ("clip", "mode", "dtype")]
        kept = [
            r for r in record.data["models"] if [r[k] for k in ("clip", "mode", "dtype")] != done
        ]
        record.set(models=kept + rows)
        for r in rows:
            if r["refused"] is not None:
                wrong += r["kind"] == "fastst"
                print(f"REFUSED {MODEL} {mode} {dtype} {r['contender']}: {r['refused']}")
        gc.collect()
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.models", description=__doc__)
    arguments(parser)
    parser.add_argument("--batch", type=int, help="default: 16 on CUDA, 1 on the CPU")
    parser.add_argument("--modes", default="inference,training")
    parser.add_argument(
        "--compile", default="all", choices=("none", "original", "all"), help="by torch.compile"
    )
    parser.add_argument("--dtypes", default="", help="bf16, fp16: autocast's in training; fp32")
    parser.add_argument("--memory", help="GiB, comma-separated: largest batches")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, per mode")
    args = parser.parse_args(argv)
    record, device, deadline = open_record(args)
    cuda = device.type == "cuda"
    clip = Clip(args.batch or (16 if cuda else 1))
    memory = args.memory if args.memory is not None else "16,40" if cuda else ""
    limits = [float(m) for m in memory.split(",") if m]
    seconds, rounds, most = args.seconds, 30, 512
    if args.dry:
        clip, seconds, rounds, most = Clip(2, 8, 32, 8, dry=True), 0.0, 2, 1
        limits = [0.5] if limits or args.memory is None else []
    dtypes = (args.dtypes or ("bf16" if cuda else "fp32")).split(",")
    wrong = run(
        record, clip, device, dtypes, args.modes.split(","), args.compile, seconds, rounds, deadline
    )  # fmt: skip
    if limits and (deadline is None or time.monotonic() < deadline):
        batches = training_batches(clip, device, dtypes[0], limits, most, deadline)
        record.extend("training_batches", batches)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
