"""What the drivers of Triton's and of nvcc's kernels share: cases, faults and what they count."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from emulator.ptx.executed import Executed
from tests.support import fuzz
from tests.support.fuzz import Config, ConvConfig, Limits

from . import counts

RECORD = Path(__file__).parent / "executed.json"


class Plant(NamedTuple):
    """A fault in compiled code."""

    run: str  # a compute capability and a case
    change: Callable[[str], str]  # of the PTX of a kernel
    telling: str  # what the error must say


def everywhere(pattern: str, replacement: str) -> Callable[[str], str]:
    """Change what a pattern finds in a kernel."""
    return lambda text: re.sub(pattern, replacement, text)


def row(config: Config | ConvConfig, executed: Executed) -> dict[str, Any]:
    """What a case is, in the words of ``benchmarks.tables``, and the kernels that it ran."""
    if isinstance(config, ConvConfig):
        family = "conv3d"
    elif config.parallel:
        family = "parallel"
    else:
        family = "depthwise" if config.groups[0] == config.channels > 1 else "dense"
    return {
        "dtype": str(config.dtype).removeprefix("torch."), "family": family,
        "mode": "inference" if config.constant == fuzz.NAMES else "training",
        "kernels": sorted(set(executed.kernels)),
    }  # fmt: skip


def record(compiler: str, run: str, found: dict[str, Any]) -> None:
    """Add what ran, and was right, to the file of all that ever did."""
    table = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    table.setdefault(compiler, {})[run] = found
    lines = [
        f' "{name}": {{\n'
        + ",\n".join(f'  "{run}": {json.dumps(row)}' for run, row in sorted(rows.items()))
        + "\n }"
        for name, rows in sorted(table.items())
    ]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@dataclass
class Driver:
    """Executes the kernels of a backend and holds what they compute to the rule."""

    backend: str
    compiler: str  # its name and version
    cases: Mapping[str, Config | ConvConfig]
    runs: Sequence[str]  # a compute capability and a case, all that there are
    limits: dict[str, Limits]  # of random cases, by compute capability
    plants: dict[str, Plant]
    serving: Callable[[str], AbstractContextManager[Executed]]  # by compute capability

    def hold(self, run: str, prepare: Callable[[Executed], None]) -> Executed:
        """
        Raises:
            AssertionError: the results are wrong.
            RuntimeError: what the machine found.
        """
        arch, case = run.split(maxsplit=1)
        with self.serving(arch) as executed:
            prepare(executed)
            fuzz.hold(self.cases[case], self.backend, device="cpu")
        return executed

    def planted(self, plant: Plant) -> str | None:
        """Returns what is wrong with how a fault was seen, or None."""
        changed = []

        def change(text: str) -> str:
            made = plant.change(text)
            changed.append(made != text)
            return made

        try:
            self.hold(plant.run, lambda executed: setattr(executed, "plant", change))
        except (RuntimeError, AssertionError) as error:
            seen = any(changed) and re.search(plant.telling, str(error))
            return None if seen else f"told otherwise: {error}"
        return "not seen" if any(changed) else "not planted"

    def parser(self, doc: str | None) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument(
            "--only", metavar="PATTERN", help='such as "9.0 .*", of: capability case'
        )
        parser.add_argument("--plant", action="append", default=[], help="faults by name")
        parser.add_argument("--seed", type=int, default=0, help="of the order of warps, of copies")
        parser.add_argument("--count", metavar="FILE", type=Path, help="write what was counted")
        parser.add_argument("--record", action="store_true", help=f"add to {RECORD.name}")
        parser.add_argument("--fuzz", type=int, default=0, help="random cases for each capability")
        parser.add_argument(
            "--first", type=int, default=fuzz.SEED, help="seed of the first of them"
        )
        return parser

    def main(self, args: argparse.Namespace) -> int:
        """Run what the arguments say; 1 if anything was wrong."""
        torch.set_num_threads(1)
        wrong, table = 0, {}
        for name in args.plant:
            said = self.planted(self.plants[name])
            print(f"planted {name}: {said or 'seen'}", flush=True)
            wrong += said is not None

        def prepare(executed: Executed) -> None:
            executed.seed, executed.count = args.seed, args.count is not None

        only = args.only or ("" if args.plant or args.fuzz else ".*")
        for run in (r for r in self.runs if re.fullmatch(only, r)):
            case, begun = self.cases[run.split(maxsplit=1)[1]], time.process_time()
            try:
                executed = self.hold(run, prepare)
                if args.record:
                    record(self.compiler, run, row(case, executed))
                table[run] = counts.of_case(case, executed)
                said = f"{len(executed.kernels)} kernels"
            except (RuntimeError, AssertionError) as error:
                wrong += 1
                said = str(error)
            print(f"{run}: {said}, {time.process_time() - begun:.1f} s", flush=True)
        for arch, limits in self.limits.items() if args.fuzz else ():
            print(f"{arch}: {args.fuzz} random cases from seed {args.first}", flush=True)
            try:
                with self.serving(arch):
                    fuzz.fuzz(self.backend, args.fuzz, limits, first=args.first)
            except AssertionError as error:
                wrong += 1
                print(error, flush=True)
        if args.count:
            counts.write(args.count, self.compiler, table)
        return min(wrong, 1)
