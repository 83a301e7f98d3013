"""What the drivers of Triton's and of nvcc's kernels share: cases, faults and what they count."""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from emulator.ptx.executed import Executed
from tests.support import fuzz
from tests.support.fuzz import Config, ConvConfig, ConvLimits, Limits

from . import counts

RECORD = Path(__file__).parent / "executed.json"
# Both dtypes of 16 bits run everywhere: the first word in the name of a case that says its own.
HALVES = {torch.bfloat16: "bfloat16", torch.float16: "half"}
Cases = Mapping[str, Config | ConvConfig]
Row = dict[str, Any]


def in_both(cases: Cases) -> Cases:
    """Each case of 16 bits in the other dtype of 16 bits as well, where it has no twin yet."""
    (one, first), (two, second) = HALVES.items()
    found = dict(cases)
    for name, config in cases.items():
        if config.dtype in HALVES and not {first, second} & {*name.split()}:
            other = two if config.dtype is one else one
            found.setdefault(f"{name} {HALVES[other]}", replace(config, dtype=other))
    return found


class Plant(NamedTuple):
    """A fault in compiled code."""

    run: str  # a compute capability and a case
    change: Callable[[str], str]  # of the PTX of a kernel
    telling: str  # what the error must say


def everywhere(pattern: str, replacement: str) -> Callable[[str], str]:
    """Change what a pattern finds in a kernel."""
    return lambda text: re.sub(pattern, replacement, text)


def trains(config: Config | ConvConfig) -> bool:
    """Whether a case compares gradients: some are wanted, and no value lies on a kink."""
    kit = fuzz.KITS[type(config)]
    tensors, _ = kit.make(config, "cpu")
    wanted = {name for name in tensors if not name.startswith("running")} - {*config.constant}
    return bool(wanted) and kit.clear(config, tensors)


def row(config: Config | ConvConfig, executed: Executed) -> Row:
    """What a case is, in the words of ``benchmarks.tables``, and the kernels that it ran."""
    if isinstance(config, ConvConfig):
        family = "conv3d"
    elif config.parallel:
        family = "parallel"
    else:
        family = "depthwise" if config.groups[0] == config.channels > 1 else "dense"
    return {
        "dtype": str(config.dtype).removeprefix("torch."), "family": family,
        "mode": "training" if trains(config) else "inference",
        "kernels": sorted(set(executed.kernels)),
    }  # fmt: skip


def record(compiler: str, run: str, found: Row) -> None:
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
    cases: Cases
    runs: Sequence[str]  # a compute capability and a case, all that there are
    limits: Mapping[str, Sequence[Limits | ConvLimits]]  # of random cases, by compute capability
    plants: dict[str, Plant]
    serving: Callable[[str], AbstractContextManager[Executed]]  # by compute capability
    # Every kernel that ships, of those whose name has a pattern: runs for a compute capability,
    # each with what is wrong, or None, and its row of the record.
    instances: Callable[[str, Executed, str], Iterator[tuple[str, str | None, Row]]] | None = None

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

    def main(self, doc: str | None) -> int:
        """Run what the command line says; 1 if anything was wrong."""
        args = self._parser(doc).parse_args()
        torch.set_num_threads(1)
        wrong = 0
        for name in args.plant:
            said = self.planted(self.plants[name])
            print(f"planted {name}: {said or 'seen'}", flush=True)
            wrong += said is not None
        asked = args.plant or args.fuzz or args.instances is not None
        only = args.only or ("" if asked else ".*")
        wrong += self._run_cases([r for r in self.runs if re.fullmatch(only, r)], args)
        if args.instances is not None:
            wrong += self._run_instances(args)
        if args.fuzz:
            wrong += self._run_random(args)
        return min(wrong, 1)

    def _parser(self, doc: str | None) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add = parser.add_argument
        add("--only", metavar="PATTERN", help='such as "9.0 .*", of: capability case')
        add("--plant", action="append", default=[], help="faults by name")
        add("--seed", type=int, default=0, help="of the order of warps, of copies")
        add("--count", metavar="FILE", type=Path, help="write what was counted")
        add("--sites", action="store_true", help="print where accesses cost the most")
        add("--record", action="store_true", help=f"add what was right to {RECORD.name}")
        add("--fuzz", type=int, default=0, help="random cases of each kind for each capability")
        add("--first", type=int, default=fuzz.SEED, help="seed of the first of them")
        if self.instances is not None:
            what = "calls of the self-check, which run every kernel that ships; those of a name"
            add("--instances", nargs="?", const="", metavar="PATTERN", help=what)
        else:
            parser.set_defaults(instances=None)
        return parser

    def _run_cases(self, runs: Sequence[str], args: argparse.Namespace) -> int:
        wrong, table = 0, {}

        def prepare(executed: Executed) -> None:
            executed.seed, executed.count = args.seed, args.sites or args.count is not None

        for run in runs:
            case, begun = self.cases[run.split(maxsplit=1)[1]], time.process_time()
            try:
                executed = self.hold(run, prepare)
                if args.record:
                    record(self.compiler, run, row(case, executed))
                table[run] = counts.of_case(case, executed)
                said = f"{len(executed.kernels)} kernels"
                for line in counts.worst_sites(executed) if args.sites else ():
                    print(f"  {line}", flush=True)
            except (RuntimeError, AssertionError) as error:
                wrong += 1
                said = str(error)
            print(f"{run}: {said}, {time.process_time() - begun:.1f} s", flush=True)
        if args.count:
            counts.write(args.count, self.compiler, table)
        return wrong

    def _run_instances(self, args: argparse.Namespace) -> int:
        assert self.instances is not None
        wrong = 0
        for arch in self.limits:
            with self.serving(arch) as executed:
                executed.seed = args.seed
                begun = time.process_time()
                for name, why, found in self.instances(arch, executed, args.instances):
                    wrong += why is not None
                    if why is None and args.record:
                        record(self.compiler, name, found)
                    took = time.process_time() - begun
                    print(f"{name}: {why or 'right'}, {took:.1f} s", flush=True)
                    begun = time.process_time()
        return wrong

    def _run_random(self, args: argparse.Namespace) -> int:
        wrong = 0
        for arch, kinds in self.limits.items():
            for limits in kinds:
                what = "convolutions" if isinstance(limits, ConvLimits) else "pairs"
                print(f"{arch}: {args.fuzz} random {what} from seed {args.first}", flush=True)
                try:
                    with self.serving(arch):
                        fuzz.fuzz(self.backend, args.fuzz, limits, first=args.first)
                except AssertionError as error:
                    wrong += 1
                    print(error, flush=True)
        return wrong
