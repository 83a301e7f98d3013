"""Every instance of every GPU kernel, one at a time, in a process that may fault or hang.

Each unit is one example of the self-check: its name is printed before anything of it is launched,
its result when it ends. After a fault or a hang the next unit runs in a new process. Results are
written as they come. Ends with 1 where a kernel was wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastst import check, dispatch
from fastst.dispatch import quarantine, selfcheck


class Unit(NamedTuple):
    """One example of one check."""

    backend: str
    kind: str
    dtype: torch.dtype
    number: int
    name: str


def units(device: torch.device, dtypes: Sequence[torch.dtype], dry: bool) -> Iterator[Unit]:
    """All that can be checked on a device; forward passes in a dry run."""
    for backend, kind, dtype in check.checks(device, dtypes):
        if dry and not kind.endswith("forward"):
            continue
        examples = selfcheck.examples_of(backend, kind, dtype, device)
        for index, example in enumerate(examples):
            yield Unit(backend.name, kind, dtype, index, example.name or f"{kind} {index}")


def absent_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each backend without kernels on a GPU; that one was not built is not wrong."""
    for name, backend in dispatch.BACKENDS.items() if device.type == "cuda" else ():
        why = backend.why_not(check.problem_for(device), "forward")
        if backend.device == "gpu" and why is not None:
            built = name != "cuda" or importlib.util.find_spec("fastst._C") is not None
            unit = Unit(name, "none", torch.float16, 0, "no kernel at all")
            row: dict[str, Any] = unit._asdict() | {"dtype": "", "seconds": 0.0, "why": f"it {why}"}
            yield row | {"state": "unknown" if built else "not run"}


def run(
    device: torch.device, todo: Sequence[Unit], deadline: float, write: Any
) -> list[dict[str, Any]]:
    """Results of the units, each with its state; those not reached are "not run"."""
    results: list[dict[str, Any]] = []
    for unit in todo:
        row: dict[str, Any] = unit._asdict() | {"dtype": str(unit.dtype), "seconds": 0.0}
        if time.monotonic() > deadline:
            row |= {"state": "not run", "why": "no time left"}
        else:
            print(f"{unit.backend} {unit.dtype} {unit.name} ...", flush=True)
            start = time.monotonic()
            request = quarantine.Request(
                unit.backend, device, unit.dtype, False, kind=unit.kind, only=unit.number
            )
            try:
                why = quarantine.ask(request)
                row |= {"state": selfcheck.state(why), "why": why}
            except quarantine.Postponed as reason:
                row |= {"state": "unknown", "why": str(reason)}
            row["seconds"] = round(time.monotonic() - start, 2)
            print(f"  {row['state']} {row['why']}".rstrip(), flush=True)
        results.append(row)
        write(results)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.instances", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON of the results")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--unit-seconds", default="30", help="after which a unit hangs")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    os.environ["FASTST_CHECK_SECONDS"] = args.unit_seconds
    device = torch.device(args.device)
    dtypes = [torch.float16] if args.dry else [torch.bfloat16, torch.float16, torch.float32]
    missing = list(absent_rows(device))
    for row in missing:
        print(f"{row['backend']}: {row['name']}, {row['why']}", flush=True)

    def write(rows: list[dict[str, Any]]) -> None:
        args.out.write_text(json.dumps(missing + rows, indent=1))

    write([])
    results = run(device, list(units(device, dtypes, args.dry)), deadline, write)
    states = [row["state"] for row in missing + results]
    print(", ".join(f"{states.count(s)} {s}" for s in sorted(set(states))) or "no units")
    return 0 if states and set(states) <= {"passed", "not run"} and "passed" in states else 1


if __name__ == "__main__":
    sys.exit(main())
