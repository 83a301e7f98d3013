"""How much faster a pair gets with threads: eager's and fastst's, side by side in one process.

``python -m benchmarks.scaling [--threads 1 2] [--families r2plus1d-18 depthwise] [--dtype fp32]``
prints for each pair of a clip and each mode the time with the fewest threads over that with more,
and eager's over fastst's. Both get x in channels-last.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from .conv3d import MODES
from .measure import DTYPES, Clock, Timed, interleave, ratios
from .peers import Eager, layer
from .record import place
from .shapes import ALL, Case


def compare_threads(
    case: Case, mode: str, dtype: torch.dtype, threads: list[int], seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of eager and fastst with each number of threads, in alternating order."""
    torch.manual_seed(0)
    eager = Eager(case, case.norm).to(dtype).train(mode == "training")
    x = torch.randn(case.batch, case.channels[0], *case.size).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    calls = {
        f"{name} {n}": Timed(MODES[mode](model, x), partial(torch.set_num_threads, n))
        for name, model in (("eager", eager), ("fastst", layer(eager)))
        for n in threads
    }
    return interleave(Clock(x.device), calls, seconds, 1, 0, 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", nargs="*", type=int, default=[1, torch.get_num_threads()])
    parser.add_argument("--families", nargs="*", default=["r2plus1d-18", "depthwise", "parallel"])
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each pair and mode")
    options = parser.parse_args()
    print(place(torch.device("cpu")), f"{options.threads} threads")
    few = options.threads[0]
    for case in (c.at_batch(1) for c in ALL if c.family in options.families):
        for mode in ("inference", "training"):
            found = compare_threads(
                case, mode, DTYPES[options.dtype], options.threads, options.seconds
            )
            for n in options.threads:
                gains = (
                    f"{name} {ratios(found[f'{name} {few}'], found[f'{name} {n}']).median:.2f}×"
                    for name in ("eager", "fastst")
                )
                ahead = ratios(found[f"eager {n}"], found[f"fastst {n}"]).median
                print(
                    f"{case.name:18} {mode:10} {n} threads",
                    *gains,
                    f"ahead {ahead:.2f}×",
                    flush=True,
                )


if __name__ == "__main__":
    main()
