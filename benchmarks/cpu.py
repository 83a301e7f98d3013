"""The CPU part: a record, tables and charts in under five minutes on two cores.

``--long`` adds training and torch.compile of every form of the model, and every peer of the layers.
``--engines`` adds OpenVINO and ONNX Runtime where they are installed (``pip install .[engines]``),
``--dtypes fp32,bf16`` bfloat16, which is for processors that multiply it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from . import charts, engines, layers, measure, models, overhead, report
from .shapes import R2PLUS1D_18

MODES = ("inference", "eval", "training-bn")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.cpu", description=__doc__)
    layers.arguments(parser)
    parser.set_defaults(device="cpu", threads=2)
    parser.add_argument("--long", action="store_true", help="with torch.compile and all peers")
    engines.add_argument(parser)
    parser.add_argument("--dtypes", default="fp32", help="comma-separated: fp32, bf16, fp16")
    args = parser.parse_args(argv)
    peers = engines.chosen(parser, args)
    start = time.monotonic()
    record, device, _ = layers.open_record(args)
    cases = [c.at_batch(1) for c in R2PLUS1D_18]
    clip, seconds, rounds = models.Clip(1), 3.0, 20
    if args.dry:
        cases, clip = [c.tiny() for c in cases[:2]], models.Clip(1, 4, 32, 8)
        seconds, rounds = 0.0, 2
    dtypes = args.dtypes.split(",")
    ceilings = measure.ceilings(device, dtypes, args.dry)
    record.set(ceilings=ceilings, threads=torch.get_num_threads())
    level = "all" if args.long else "short"
    options = layers.Options(device, level, ("auto",), seconds, rounds, ceilings)
    wrong = layers.run(record, cases, MODES, dtypes, options)
    what = ("inference", "training") if args.long else ("inference",)
    model_seconds = 0.0 if args.dry else 15.0
    compiled = "all" if args.long else "original"
    wrong += models.run(
        record, clip, device, dtypes, what, compiled, model_seconds, rounds, engines=peers
    )
    overhead.run(record, device, *((3, 1) if args.dry else (30, 3)))
    record.set(seconds=time.monotonic() - start)
    if args.out is None:
        report.update()
    else:
        charts.draw(record.data, args.out.parent)
    print(report.show(record.data))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
