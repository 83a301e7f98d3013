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
from fastst.models import r2plus1d_18
from fastst.rewrite.convert import convert

from . import layers, measure, peers
from .shapes import DEPTHWISE, PARALLEL, R2PLUS1D_18, TOKENIZER, Case


def cases() -> list[Case]:
    """One of each kind, sizes that are no multiple of any tile."""
    return [c.tiny() for c in (R2PLUS1D_18[2], DEPTHWISE[0], TOKENIZER[0], *PARALLEL[:2])]


def probe(device: torch.device) -> int:
    """Run every backend with kernels; how many calls broke or disagreed with float64.

    The reference runs on the CPU: on the device nothing runs but what is to be watched.
    """
    backends = [b for b in dispatch.BACKENDS if b not in ("aten", "reference")]
    dtypes = ["bf16", "fp32"] if device.type == "cuda" else ["fp32"]
    generator = torch.Generator().manual_seed(0)
    wrong = 0
    for case in cases():
        for mode in case.modes:
            model = layers.model_of(case, mode, generator)
            clips, seeds = layers.draw(case, generator, 1)
            if mode.startswith("training"):
                layers.move_off_kinks(model, clips[0], torch.device("cpu"))
            truth = layers.reference(model, mode, clips[0], seeds[0], torch.device("cpu"))
            for dtype in dtypes:
                kind, needs = measure.DTYPES[dtype], mode.startswith("training") and case.x_grad
                inputs = layers.Inputs(clips, seeds, kind, device, needs)
                for c in peers.ours(model, backends, mode):
                    try:
                        step = layers.Step(c, mode, inputs, kind, device, case.channels[1])
                        found = {k: v.cpu() for k, v in step.outputs().items()}
                        why = measure.untrusted(measure.errors(found, truth), dtype)
                    except dispatch.BackendError as e:
                        print(case.label, mode, dtype, c.name, f"cannot: {str(e)[:120]}")
                        continue
                    wrong += why is not None
                    print(case.label, mode, dtype, c.name, why or "agrees")
    return wrong


def tune(device: torch.device) -> None:
    """Tune the converted network for its own clips, inference and training."""
    cuda = device.type == "cuda"
    size = (16, 3, 16, 112, 112) if cuda else (2, 3, 4, 32, 32)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = r2plus1d_18().to(device, dtype)
    convert(model)
    clip = torch.randn(size, device=device, dtype=dtype)
    for training in (False, True):
        for measured in fastst.tune(model.train(training), clip, seconds=0.5 if cuda else 0.01):
            print("training" if training else "inference", measured)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.probe", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if args.tune:
        tune(device)
        return 0
    return 1 if probe(device) else 0


if __name__ == "__main__":
    sys.exit(main())
