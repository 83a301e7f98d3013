"""Host cost of a call on tiny inputs, and of a cold start: import, first call, first backward."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastst.rewrite.convert import convert

from . import peers
from .layers import Inputs, Step, arguments, draw, model_of, open_record
from .measure import Spread
from .record import ROOT, Record
from .shapes import R2PLUS1D_18

CALLS = 20  # per sample at most: a clock's tick is far below their sum
SAMPLE = 1e-3  # s that these may take: less than a turn of a neighbour on the core
TAKES = 5  # at most, until eager agrees with itself
MOST_APART = 1.05  # that eager may be from itself
AGAIN = "eager again"
CONVERTED = "fastst.convert"
EVICTION = 64 << 20  # bytes written before a cold call: instructions and tables leave the caches

COLD_START = """
import json, sys, time
took = {}
def lap(name, start=[time.perf_counter()]):
    took[name] = (time.perf_counter() - start[0]) * 1e3
    start[0] = time.perf_counter()
import torch
from torch import nn
device = sys.argv[2]
x = torch.randn(1, 4, 4, 8, 8).to(device)
lap("import torch")
if sys.argv[1] == "fastst":
    import fastst
lap("import")
if sys.argv[1] == "fastst":
    layer = fastst.Conv2Plus1d(4, 8, 3, padding=1, mid_channels=8, norm="batch")
else:
    layer = nn.Sequential(
        nn.Conv3d(4, 8, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(8), nn.ReLU(),
        nn.Conv3d(8, 8, (3, 1, 1), padding=(1, 0, 0)),
    )
layer = layer.to(device)
def wait():
    if device == "cuda":
        torch.cuda.synchronize()
wait()
lap("build")
y = layer(x)
wait()
lap("first call")
y.sum().backward()
wait()
lap("first backward")
print(json.dumps(took))
"""


def host_us(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    synchronize: Callable[[], None],
    cold: bool = False,
) -> dict[str, float]:
    """The least µs of host time per call, interleaved as in ``measure.interleave``.

    Of many samples the least: what else runs on the core only adds.

    Args:
        cold: time single calls after memory was written, as between the layers of a large network,
            instead of calls in a loop.
    """
    written = torch.empty(EVICTION, dtype=torch.uint8) if cold else None
    times = dict.fromkeys(calls, 1)
    least = dict.fromkeys(calls, math.inf)
    order = list(calls)
    shuffle = random.Random(0)
    for r in range(rounds + 2):
        shuffle.shuffle(order)
        for name in order:
            call = calls[name]
            synchronize()
            if written is not None:
                written.fill_(r % 256)
            start = time.perf_counter()
            for _ in range(times[name]):
                call()
            took = (time.perf_counter() - start) / times[name]
            if r >= 2:  # the first two are warm-up
                least[name] = min(least[name], took * 1e6)
            elif not cold:
                times[name] = max(1, min(CALLS, int(SAMPLE / took)))
    synchronize()
    return least


@contextmanager
def one_core(device: torch.device) -> Iterator[None]:
    """On the CPU one thread of PyTorch's, which stays where it is: tiny inputs gain by no other."""
    if device.type != "cpu":
        yield
        return
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def measure_quietly(measure: Callable[[], dict[str, float]]) -> tuple[dict[str, float], str | None]:
    """The least of as many takes as it needs for eager to agree with itself; or why none did."""
    least: dict[str, float] = {}
    for _ in range(TAKES):
        found = measure()
        least = {name: min(us, least.get(name, math.inf)) for name, us in found.items()}
        eager, again = least[peers.BASELINE], least[AGAIN]
        apart = max(eager, again) / min(eager, again)
        if apart <= MOST_APART:
            return least, None
    return least, f"eager and eager again are a factor of {apart:.2f} apart"


def _convert(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of eager modules of which every call defers."""
    model = copy.deepcopy(model)
    convert(model)
    return model


def per_call(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """The layer against the eager composition, where nothing but the host's work takes time.

    Where eager differs from itself, a row says so and has no number.
    """
    case = R2PLUS1D_18[1].tiny()
    generator = torch.Generator().manual_seed(0)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rows = []
    for mode, what in (("eval", "forward"), ("training-bn", "forward and backward")):
        model = model_of(case, mode, generator)
        clips, seeds = draw(case, generator, 1)
        inputs = Inputs(clips, seeds, torch.float32, device, mode == "training-bn")
        makes: dict[str, Callable[[], Any]] = {
            peers.BASELINE: lambda m=model: m,  # type: ignore[misc]
            "fastst": lambda m=model: peers.layer(m),  # type: ignore[misc]
            CONVERTED: lambda m=model: _convert(m),  # type: ignore[misc]
            AGAIN: lambda m=model: m,  # type: ignore[misc]
        }
        steps = {}
        for name, make in makes.items():
            ours = name in ("fastst", CONVERTED)
            c = peers.Contender(name, "fastst" if ours else "peer", make)
            steps[name] = Step(c, mode, inputs, torch.float32, device, case.channels[1])
        if device.type == "cuda" and mode == "eval":
            # A promise that is read after the capture would not be in the graph.
            made = {name: step for name, step in steps.items() if name != CONVERTED}
            rows += measure_graphs(device, made, rounds)
        for cold, caches in ((False, ""), (True, ", cold caches")):
            with one_core(device):
                least, refused = measure_quietly(
                    lambda s=steps, c=cold: host_us(s, rounds, synchronize, c)  # type: ignore[misc]
                )
            for name, us in least.items():
                of_eager = us / least[peers.BASELINE]
                rows.append(
                    {
                        "call": what + caches,
                        "contender": name,
                        "us": None if refused else us,
                        "of_eager": None if refused else of_eager,
                        "refused": refused,
                    }
                )
    return rows


def measure_graphs(
    device: torch.device, steps: Mapping[str, Callable[[], Any]], rounds: int
) -> list[dict[str, Any]]:
    """µs of the device per replay of a captured forward pass, which must give what the call gives.

    Raises:
        RuntimeError: it gives something else.
    """
    rows = []
    for name, step in steps.items():
        side = torch.cuda.Stream(device)
        with torch.cuda.stream(side):  # as PyTorch asks for: warm, on a stream of its own
            expected = step().clone()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize(device)
        if not torch.equal(y, expected):
            raise RuntimeError(f"{name}: a captured graph gives other results than the call")
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(rounds):
            begin.record()
            for _ in range(CALLS):
                graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / CALLS * 1e3)
        median, quartiles = Spread.of(times).median, Spread.of(times)[::2]
        told = {"call": "forward, CUDA graph", "contender": name}
        rows.append(told | {"us": median, "us_quartiles": quartiles})
    return rows


def cold_start(device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Medians over fresh processes, in ms, of what a first use waits for; none of none."""
    if repeats == 0:
        return []
    found: dict[str, list[dict[str, float]]] = {"eager": [], "fastst": []}
    for _ in range(repeats):
        for name in found:
            done = subprocess.run(
                [sys.executable, "-c", COLD_START, name, device.type],
                capture_output=True, text=True, cwd=ROOT, check=True, timeout=300,
            )  # fmt: skip
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return [
        {"contender": name} | {k: statistics.median(t[k] for t in takes) for k in takes[0]}
        for name, takes in found.items()
    ]


def run(record: Record, device: torch.device, rounds: int, repeats: int) -> None:
    record.extend("overhead", per_call(device, rounds))
    record.extend("cold_start", cold_start(device, repeats))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description=__doc__)
    arguments(parser)
    parser.add_argument("--starts", type=int, default=3, help="of each, cold")
    args = parser.parse_args(argv)
    record, device, _ = open_record(args)
    run(record, device, 3 if args.dry else 30, args.starts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
