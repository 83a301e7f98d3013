"""Microbenchmarks: every shape × dtype × mode, on every backend that can run, against every peer.

Within one unit (a shape, a dtype, a mode) all contenders hold the same state, run in one process,
interleaved, and are compared with float64 before anything is timed. What disagrees gets no number.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastst import dispatch

from . import measure, peers
from .measure import Error, Spread
from .record import FAULTED, Record, default_path, progress
from .shapes import ALL, MODES, Case


@dataclass(frozen=True)
class Options:
    """How a unit is measured."""

    device: torch.device
    level: str = "core"  # of peers: one of ``peers.LEVELS``
    backends: tuple[str, ...] = ("auto",)
    seconds: float = 2.0  # of timing, per unit
    rounds: int = 50  # at most
    ceilings: dict[str, Any] | None = None
    timed: bool = True  # False: only compared with float64
    resume: bool = False  # leaves out what the record has
    seed: int | None = None  # of all numbers; None: of each unit another one


class Inputs:
    """Clips and gradients of the output in one dtype, in both layouts; shared by all contenders."""

    def __init__(
        self, clips: Sequence[Tensor], seeds: Sequence[Tensor], dtype: torch.dtype,
        device: torch.device, needs_grad: bool,
    ) -> None:  # fmt: skip
        self.sets: dict[bool, tuple[list[Tensor], list[Tensor]]] = {}
        for channels_last in (False, True):
            fmt = torch.channels_last_3d if channels_last else torch.contiguous_format

            def laid_out(t: Tensor, fmt: torch.memory_format = fmt) -> Tensor:
                return t.to(device, dtype).clone(memory_format=fmt)

            self.sets[channels_last] = (
                [laid_out(x).requires_grad_(needs_grad) for x in clips],
                [laid_out(g) for g in seeds],
            )


class Step:
    """One contender's call in one mode: forward, or forward and backward."""

    def __init__(
        self, contender: peers.Contender, mode: str, inputs: Inputs, dtype: torch.dtype,
        device: torch.device, mid: int,
    ) -> None:  # fmt: skip
        self.contender, self.training, self.mid = contender, mode.startswith("training"), mid
        self.module = peers.prepare(contender, dtype, device).train(self.training)
        self.clips, self.seeds = inputs.sets[contender.channels_last]

    def forward(self, i: int = 0) -> Tensor:
        with self.contender.context():
            return self.module(self.clips[i])

    def __call__(self, i: int = 0) -> Tensor:
        if not self.training:
            with torch.no_grad():
                return self.forward(i)
        with self.contender.context():
            y: Tensor = self.module(self.clips[i])
            torch.autograd.backward(y, self.seeds[i])
        return y.detach()

    def step_within(self) -> None:
        """A training step as within a network, where nobody keeps y, and dy only until backward."""
        with self.contender.context():
            (self.module(self.clips[0]) * self.seeds[0]).sum().backward()

    def clear(self) -> None:
        """Forget gradients: every step writes new ones, none accumulates."""
        self.module.zero_grad(set_to_none=True)
        for x in self.clips:
            x.grad = None

    def outputs(self) -> dict[str, Tensor]:
        """y and, in training, every gradient and the running statistics, of the first inputs."""
        self.clear()
        found = collect(self(0), self.clips[0], self.module, self.mid)
        self.clear()
        return found


def collect(y: Tensor, x: Tensor, module: nn.Module, mid: int) -> dict[str, Tensor]:
    """Everything that two runs of one case must agree on; padded mid channels cut off."""
    found = {"y": y}
    if x.requires_grad and x.grad is not None:
        found["dx"] = x.grad
    for name, p in module.named_parameters():
        if p.grad is not None:
            g = p.grad
            if name in ("spatial.weight", "spatial.bias", "norm.weight", "norm.bias"):
                g = g[:mid]
            if name == "temporal.weight":
                g = g[:, :mid]
            found["d " + name] = g
    if module.training:
        for name, b in module.named_buffers():
            if "running" in name:
                found[name] = b[:mid]
    return found


def lost_device(error: BaseException) -> bool:
    """Whether CUDA runs nothing any more in this process."""
    sticky = isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)
    return sticky and "out of memory" not in str(error)


def representable(t: Tensor) -> Tensor:
    """t rounded to what bfloat16 and float16 both hold, so that all dtypes see the same numbers."""
    t = t.bfloat16().float()
    return torch.where(t.abs() < 2**-14, 0, t)


def model_of(case: Case, mode: str, generator: torch.Generator) -> peers.Eager:
    """The eager layer in the mode's state, with random parameters and running statistics."""
    norm = case.norm and mode in ("eval", "training-bn")
    model = peers.Eager(case, norm).train(mode.startswith("training"))
    with torch.no_grad():
        for p in model.parameters():
            fan = max(p[0].numel(), 1) if p.dim() > 1 else 1
            noise = torch.randn(p.shape, generator=generator) * (2 / fan) ** 0.5
            # Biases are multiples of 1/256 below 1/2: sums with shifts stay exact in every dtype.
            p.copy_(
                representable(noise) if p.dim() > 1 else (25 * noise).round().clamp(-96, 96) / 256
            )
        if model.norm is not None:
            bn: Any = model.norm

            def uniform() -> Tensor:
                return representable(torch.rand(bn.weight.shape, generator=generator) + 0.5)

            bn.weight.copy_(uniform())
            bn.running_mean.copy_(uniform() - 1)
            bn.running_var.copy_(uniform())
    return model


KINKS = {"relu": (0.0,), "hardswish": (-3.0, 3.0)}  # where an activation's derivative jumps


def move_off_kinks(model: peers.Eager, clip: Tensor, device: torch.device) -> None:
    """Shift the bias before the activation so that no value of the clip lies on a kink.

    Rounding would turn the sign of such a value, and the gradients of two right implementations
    then differ by far more than rounding: comparing them would say nothing. Of shifts that every
    dtype holds exactly, each channel takes the one that leaves the widest gap.
    """
    kinks = KINKS.get(model.case.activation, ())
    if not kinks:
        return
    seen: list[Tensor] = []
    double = copy.deepcopy(model).double().to(device)
    double.activation.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        double(clip.double().to(device))
        v = seen[0].transpose(0, 1).flatten(1)  # (channels, positions)
        shifts = torch.arange(-6, 6, device=device, dtype=v.dtype) / 256
        gaps = torch.stack([
            torch.stack([(v + (s - k)).abs().amin(1) for k in kinks]).amin(0) for s in shifts
        ])  # fmt: skip
        best = shifts[gaps.argmax(0)].float().cpu()
        for bias in _biases_before_activation(model):
            bias += best[: len(bias)]
            best = best[len(bias) :]


def _biases_before_activation(model: peers.Eager) -> list[Tensor]:
    """Parameters that shift what the activation reads, together one entry for each channel."""
    combine = model.case.combine
    if model.norm is not None:
        biases: list[Tensor | None] = [model.norm.bias]
    elif combine is None:
        first = model.spatial if model.case.order == "spatial-first" else model.temporal
        biases = [first.bias]
    else:
        biases = [model.spatial.bias, model.temporal.bias][: 1 if combine == "add" else 2]
    return [b for b in biases if b is not None]


def reference(
    model: peers.Eager, mode: str, clip: Tensor, seed: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """The outputs that ``Step.outputs`` is compared with: ``nn.Conv3d`` composed, in float64."""
    needs = mode.startswith("training") and model.case.x_grad
    inputs = Inputs([clip], [seed], torch.float64, device, needs)
    plain = peers.Contender("float64", "control", lambda: model)
    step = Step(plain, mode, inputs, torch.float64, device, model.case.channels[1])
    step.module.double()
    return step.outputs()


def draw(case: Case, generator: torch.Generator, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Input clips and gradients of the output."""
    problem = case.problem()
    x = (case.batch, case.channels[0], *case.size)

    def some(shape: Sequence[int]) -> list[Tensor]:
        device = generator.device
        return [
            representable(torch.randn(tuple(shape), generator=generator, device=device))
            for _ in range(count)
        ]

    return some(x), some(problem.out_shape)


def unit(
    case: Case, mode: str, dtypes: Sequence[str], options: Options, seed: int | None = None
) -> list[dict[str, Any]]:
    """Rows of one case in one mode, for each dtype, from one set of numbers and one reference."""
    seed = random.SystemRandom().getrandbits(31) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    model = model_of(case, mode, generator)
    # Billions of numbers: where they are needed.
    clips, seeds = draw(case, torch.Generator(options.device).manual_seed(seed), 3)
    if mode.startswith("training"):
        move_off_kinks(model, clips[0], options.device)
    truth = reference(model, mode, clips[0], seeds[0], options.device)
    rows = []
    for dtype in dtypes:
        with measure.precision(dtype):
            rows += _contest(case, mode, dtype, model, clips, seeds, truth, options, seed)
    return rows


def _contest(
    case: Case, mode: str, dtype: str, model: peers.Eager, clips: Sequence[Tensor],
    seeds: Sequence[Tensor], truth: dict[str, Tensor], options: Options, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    device, torch_dtype = options.device, measure.DTYPES[dtype]
    cuda = device.type == "cuda"
    field = [
        *peers.peer_contenders(model, mode, cuda, options.level),
        *peers.own_contenders(model, list(options.backends), mode),
    ]
    work = case.work(mode, torch_dtype)
    needs = mode.startswith("training") and case.x_grad
    inputs = Inputs(clips, seeds, torch_dtype, device, needs)
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    yardsticks: list[dict[str, Error]] = []
    for c in field:
        row: dict[str, Any] = {
            "case": case.name, "family": case.family, "label": case.label, "dtype": dtype,
            "mode": mode, "contender": c.name, "kind": c.kind, "ms": None, "refused": None,
            "cannot": None,
            "seed": seed,
        }  # fmt: skip
        rows[c.name] = row
        try:
            step = Step(c, mode, inputs, torch_dtype, device, case.channels[1])
            with dispatch.recording() as calls:
                measure.poison(work.bytes, device)
                outputs = step.outputs()
            if c.kind == "fastst":
                row["ran_on"] = sorted({call.chosen for call in calls})
            if c.kind != "other":
                found = measure.errors(outputs, truth)
                row["error"] = {"l2": found["y"].l2, "largest": found["y"].largest}
                if c.name in peers.YARDSTICKS:
                    row["refused"] = measure.why_untrusted(found, dtype)
                    if row["refused"] is None:
                        yardsticks.append(found)
                elif not yardsticks:
                    row["refused"] = "nothing to compare with: PyTorch's own result is wrong"
                else:
                    row["refused"] = measure.disagreement(found, yardsticks, dtype)
            del outputs
            if options.timed:
                row |= _costs(step, device)  # of refused ones too: their kernels tell what is wrong
                if row["refused"] is None:
                    steps[c.name] = step
        except (RuntimeError, ValueError, NotImplementedError, TypeError) as e:
            if lost_device(e):
                raise
            # That a call is not supported is no fault; that ours breaks on one it accepts is.
            broke = c.kind == "fastst" and not isinstance(e, dispatch.BackendError)
            told = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0][:200]}"
            row["refused" if broke else "cannot"] = told
    _time(steps, rows, case, work, options, seed)
    if options.level in ("compiled", "all"):
        torch._dynamo.reset()
    return list(rows.values())


def _costs(step: Step, device: torch.device) -> dict[str, Any]:
    """Memory and kernels of a warm call."""
    step.clear()
    if step.training:  # the gate's run allocated gradients; what follows starts without
        step(0)
        step.clear()
    seen = measure.observe(lambda: step(0), device)
    step.clear()
    found: dict[str, Any] = seen._asdict()
    if step.training:
        found["peak_bytes"] = measure.observe(step.step_within, device).peak_bytes
        step.clear()
        found["saved_bytes"] = measure.saved_bytes(step.forward)
    return found


def _time(
    steps: dict[str, Step], rows: dict[str, dict[str, Any]], case: Case, work: Any,
    options: Options, seed: int,
) -> None:  # fmt: skip
    if not steps:
        return
    clock = measure.Clock(options.device)
    timed = {name: measure.Timed(step, step.clear) for name, step in steps.items()}
    gc.collect()
    samples = measure.interleave(clock, timed, options.seconds, 3, seed, options.rounds)
    medians = {name: Spread.of(s).median for name, s in samples.items()}
    peer = [n for n in steps if rows[n]["kind"] == "peer"]
    best = min(peer, key=medians.__getitem__) if peer else None
    for name, values in samples.items():
        row = rows[name]
        spread = Spread.of(values)
        ms = spread.median
        row |= {
            "ms": ms,
            "ms_quartiles": (spread.q25, spread.q75),
            "samples": len(values),
            "tflops": work.flops / ms / 1e9 if row["kind"] != "other" else None,
            "gbs": work.bytes / ms / 1e6 if row["kind"] != "other" else None,
        }
        if peers.BASELINE in samples:
            row["vs_users"] = measure.ratios(samples[peers.BASELINE], values)
        if best is not None:
            row["best_peer"] = best
            row["vs_best"] = measure.ratios(samples[best], values)
        if options.ceilings is not None and row["kind"] != "other":
            row["roofline"] = _floor_ms(work, row["dtype"], options.ceilings) / ms


def _floor_ms(work: Any, dtype: str, ceilings: dict[str, Any]) -> float:
    """The larger of the times for the arithmetic and for the bytes, at the measured ceilings."""
    peak = ceilings["gemm_tflops"][dtype]
    return max(work.flops / peak / 1e9, work.bytes / ceilings["copy_gbs"] / 1e6)


def run(
    record: Record,
    cases: Sequence[Case],
    modes: Sequence[str],
    dtypes: Sequence[str],
    options: Options,
    deadline: float | None = None,
    label: str = "layers",
) -> int:
    """Measure units until the deadline (of ``time.monotonic``); how many rows were refused.

    Each unit is written when it ends. Counted are this library's rows only: a peer's refused
    number is a finding, ours is a fault.
    """
    units = [(c, m) for c in cases for m in modes if m in c.modes]
    wrong, skipped = 0, []
    bar = progress(units, desc=label, unit="unit")
    for case, mode in bar:
        if options.resume and _is_done(record, case, mode):
            continue
        if deadline is not None and time.monotonic() > deadline:
            skipped.append(f"{case.family}/{case.name}/{mode}")
            continue
        try:
            rows = unit(case, mode, dtypes, options, options.seed)
        except torch.OutOfMemoryError as e:
            skipped.append(f"{case.family}/{case.name}/{mode}: {str(e).splitlines()[0][:120]}")
            continue
        except RuntimeError as e:
            if not lost_device(e):
                raise
            name = f"{case.family}/{case.name}/{mode}"
            record.set(faults=[*record.data.get("faults", []), name])
            print(f"FAULT {name}: {str(e).splitlines()[0][:200]}", flush=True)
            raise SystemExit(FAULTED) from e
        unit_of = ("case", "family", "mode", "dtype")
        done = {tuple(r[k] for k in unit_of) for r in rows}
        # A unit measured again, with more peers say, takes the place of the earlier one.
        kept = [r for r in record.data["layers"] if tuple(r[k] for k in unit_of) not in done]
        record.set(layers=kept + rows)
        wrong += sum(r["refused"] is not None and r["kind"] == "fastst" for r in rows)
        for r in rows:
            if r["refused"] is not None and r["kind"] == "fastst":
                what = " ".join(r[k] for k in ("label", "mode", "dtype", "contender"))
                print(f"REFUSED {what}: {r['refused']}")
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    if skipped:
        record.set(not_run=[*record.data.get("not_run", []), *skipped])
        print(f"{len(skipped)} of {len(units)} units did not run in the given time or memory")
    return wrong


def _is_done(record: Record, case: Case, mode: str) -> bool:
    """Whether an earlier process of the same run measured it, or was ended by it."""
    if f"{case.family}/{case.name}/{mode}" in record.data.get("faults", []):
        return True
    rows = record.data["layers"]
    return any((r["case"], r["family"], r["mode"]) == (case.name, case.family, mode) for r in rows)


def available_backends(device: str = "cpu") -> tuple[str, ...]:
    """Every backend to try; one that cannot run a call says so in its row.

    On a GPU "auto" takes the CUDA kernels that are worth their time; by name the generic ones would
    run, too, for seconds a call.
    """
    out = {"reference"} | ({"cuda"} if device.startswith("cuda") else set())
    return ("auto", *(name for name in dispatch.BACKENDS if name not in out))


def arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that the benchmarks share."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's")
    parser.add_argument("--out", type=Path, help="record to write or add to")
    parser.add_argument("--minutes", type=float, help="stop starting measurements after these")
    parser.add_argument("--dry", action="store_true", help="tiny sizes: exercises everything")


def open_record(args: argparse.Namespace) -> tuple[Record, torch.device, float | None]:
    """Record, device and deadline of shared arguments."""
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    warnings.filterwarnings("ignore", category=dispatch.FallbackWarning)
    record = Record(args.out or default_path(device), device, fresh=args.out is None)
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    return record, device, deadline


def main(argv: Sequence[str] | None = None, before: Callable[[], None] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.layers", description=__doc__)
    arguments(parser)
    parser.add_argument("--dtypes", default="", help="of bf16,fp16,tf32,fp32; default: all on CUDA")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--families", default="", help="families or case names, comma-separated")
    parser.add_argument("--peers", default="core", choices=peers.LEVELS)
    parser.add_argument("--resume", action="store_true", help="leave out what the record has")
    parser.add_argument("--batch", type=int, help="instead of each case's own")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, per unit")
    args = parser.parse_args(argv)
    record, device, deadline = open_record(args)
    cuda = device.type == "cuda"
    dtypes = (args.dtypes or ("bf16,fp16,tf32,fp32" if cuda else "fp32")).split(",")
    wanted = [f for f in args.families.split(",") if f]
    cases = [c for c in ALL if not wanted or c.family in wanted or c.name in wanted]
    batch = args.batch or (None if cuda else 1)
    cases = [c.at_batch(batch) if batch else c for c in cases]
    seconds, rounds = args.seconds, 50
    if args.dry:
        cases, seconds, rounds = [c.tiny() for c in cases], 0.0, 2
    ceilings = measure.ceilings(device, dtypes, args.dry)
    record.set(ceilings=record.data.get("ceilings") or ceilings)
    options = Options(
        device, args.peers, available_backends(args.device), seconds, rounds, ceilings,
        resume=args.resume, seed=0 if args.dry else None,
    )  # fmt: skip
    wrong = run(record, cases, args.modes.split(","), dtypes, options, deadline)
    print(f"{len(record.data['layers'])} rows, {wrong} refused: {record.path.name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
