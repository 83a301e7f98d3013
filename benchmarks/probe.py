"""Small calls of every backend's kernels, forward and backward: what compute-sanitizer watches.

``--tune`` instead lets the library measure its own choices for R(2+1)D-18.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

import fastst
from fastst import dispatch
from fastst.machine import devices
from fastst.models import r2plus1d_18
from fastst.rewrite.convert import convert

from . import layers, measure, peers
from .shapes import DEPTHWISE, PARALLEL, R2PLUS1D_18, TOKENIZER, Case


def cases() -> list[Case]:
    """One of each kind, sizes that are no multiple of any tile; pairs for Hopper's kernels."""
    found = [c.tiny() for c in (R2PLUS1D_18[2], DEPTHWISE[0], TOKENIZER[0], *PARALLEL[:2])]
    return found + [
        Case(f"hopper-{c}-{m}-{k}-s{s}", "hopper", 1, (c, m, k), (3, 6, 9), stride=(s,) * 3)
        for c, m, k in ((64, 144, 64), (72, 45, 64), (64, 72, 136))
        for s in (1, 2)
    ]  # fmt: skip


def stress(device: torch.device, repeats: int) -> int:
    """Training steps again and again beside a stream that keeps the device busy.

    How many of them gave other bits than the first, of those layers whose kernels leave products in
    flight or are read before they are copied over.
    """
    cuda, wrong = device.type == "cuda", 0
    sizes = ((64, 144, 64), (256, 576, 256)) if cuda else ((4, 9, 4),)
    side = torch.cuda.Stream(device) if cuda else None
    noise = torch.randn(2048 if cuda else 8, 2048 if cuda else 8, device=device).half()
    for c, m, k in sizes:
        size = (16, 28, 28) if cuda else (3, 4, 5)
        case = Case(f"{c}-{m}-{k}", "stress", 8 if cuda else 1, (c, m, k), size)
        generator = torch.Generator().manual_seed(0)
        model = layers.model_of(case, "training-bn", generator)
        clips, seeds = layers.draw(case, generator, 1)
        inputs = layers.Inputs(clips, seeds, torch.bfloat16, device, True)
        for contender in peers.own_contenders(model, ["auto"], "training-bn"):
            step = layers.Step(contender, "training-bn", inputs, torch.bfloat16, device, m)
            with dispatch.recording() as calls:
                outputs = step.outputs().items()  # running statistics are meant to go on
            if cuda and (others := {c.chosen for c in calls} - {*with_kernels(device)}):
                print(case.name, contender.name, f"ran on {', '.join(sorted(others))}: no kernels")
                wrong += 1
                continue
            first = {n: t.clone() for n, t in outputs if not n.startswith("norm.running")}
            unlike = torch.zeros((), dtype=torch.int64, device=device)
            for _ in range(repeats):
                if side is not None:
                    with torch.cuda.stream(side):
                        noise @ noise
                found = step.outputs()
                unlike += torch.stack([(found[n] != t).any() for n, t in first.items()]).any()
            print(case.name, contender.name, f"{int(unlike)} of {repeats} runs gave other bits")
            wrong += int(unlike)
    return wrong


def with_kernels(device: torch.device) -> list[str]:
    """Backends whose kernels a device has, if they are there."""
    return [name for name, b in dispatch.BACKENDS.items() if b.device == devices.kind(device)]


def probe(device: torch.device, cases: Sequence[Case]) -> int:
    """Run every backend with kernels; how many calls broke or disagreed with float64, and how many
    backends refused all of them.

    The reference runs on the CPU: on the device nothing runs but what is to be watched.
    """
    backends = with_kernels(device)
    silent = {*backends}
    dtypes = ["bf16", "fp32"] if device.type == "cuda" else ["fp32"]
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for case in cases:
        for mode in case.modes:
            model = layers.model_of(case, mode, generator)
            clips, seeds = layers.draw(case, generator, 1)
            if mode.startswith("training"):
                layers.move_off_kinks(model, clips[0], torch.device("cpu"))
            truth = layers.reference(model, mode, clips[0], seeds[0], torch.device("cpu"))
            for dtype in dtypes:
                kind, needs = measure.DTYPES[dtype], mode.startswith("training") and case.x_grad
                inputs = layers.Inputs(clips, seeds, kind, device, needs)
                for c in peers.own_contenders(model, backends, mode):
                    try:
                        step = layers.Step(c, mode, inputs, kind, device, case.channels[1])
                        found = {k: v.cpu() for k, v in step.outputs().items()}
                        why = measure.why_untrusted(measure.errors(found, truth), dtype)
                    except dispatch.BackendError as e:
                        print(case.label, mode, dtype, c.name, f"cannot: {str(e)[:120]}")
                        continue
                    wrong += why is not None
                    silent -= {c.backend}
                    print(case.label, mode, dtype, c.name, why or "agrees")
    for name in sorted(silent):
        print(f"{name} ran nothing: there was nothing to watch")
    return wrong + len(silent)


def tune(device: torch.device, width: int) -> None:
    """Tune the converted network for its own clips, inference and training."""
    cuda = device.type == "cuda"
    size = (16, 3, 16, 112, 112) if cuda else (2, 3, 4, 32, 32)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = r2plus1d_18(width=width).to(device, dtype)
    convert(model)
    clip = torch.randn(size, device=device, dtype=dtype)
    for training in (False, True):
        for measured in fastst.tune(model.train(training), clip, seconds=0.5 if cuda else 0.01):
            print("training" if training else "inference", measured)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.probe", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry", action="store_true", help="one case, a narrow network")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--stress", type=int, default=0, metavar="N", help="N equal steps")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if args.stress:
        return 1 if stress(device, args.stress) else 0
    if args.tune:
        tune(device, 4 if args.dry else 64)
        return 0
    return 1 if probe(device, cases()[: 1 if args.dry else None]) else 0


if __name__ == "__main__":
    sys.exit(main())
