"""What ``make static`` measures of a kernel: one row, of Triton's kernels and of CUDA's alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("table.json")
KEY = ("kernel", "case", "config", "arch", "compiler")


@dataclass(frozen=True)
class Row:
    """Numbers are None where they do not apply; those of a loop are of the innermost products."""

    kernel: str
    case: str
    config: str  # tiles, in words
    arch: str  # "9.0", "gfx942"
    compiler: str  # "triton 3.7.1", "nvcc 13.0"
    registers: int
    spilled_in_loop: int  # instructions that move registers to local memory and back
    kept: int | None  # bytes of local memory
    shared: int  # bytes, static and, where the compiler knows it, dynamic
    overwritten: int | None  # products whose operands are written while they may still be read
    serialised: int | None  # products that wait for the one before
    slots: float | None  # instructions issued per cycle that the tensor cores need
    load_bytes: float | None  # of a thread, per global load of a loop
    copies: int | None  # loads that go to shared memory without registers
    outside: int | None  # instructions outside of the loops of products
    wrong: str = ""

    def key(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in KEY)

    def __str__(self) -> str:
        def told(n: Any) -> str:
            return "-" if n is None else str(n)

        numbers = (
            f"{told(self.registers):>4} {told(self.spilled_in_loop):>5} {told(self.kept):>4} "
            f"{told(self.shared):>7} {told(self.overwritten):>6} {told(self.serialised):>6} "
            f"{told(self.slots):>6} {told(self.load_bytes):>5} {told(self.copies):>6} "
            f"{told(self.outside):>7}"
        )
        told_wrong = f"  <- {self.wrong}" if self.wrong else ""
        return f"{self.kernel:24} {self.case:22} {self.arch:7} {numbers} {self.config}{told_wrong}"


HEADER = (
    f"{'kernel':24} {'case':22} arch    regs spill kept  shared hazard serial  slots  load "
    "copies outside configuration"
)


def save(rows: Iterable[dict[str, Any]], path: Path, *, add: bool = False) -> None:
    """One list of rows; with ``add`` after those that the file has."""
    found = json.loads(path.read_text()) if add and path.exists() else []
    lines = [json.dumps(row) for row in [*found, *rows]]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def unique(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as they are written: each once, the worst of those that differ in arguments only."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        old = best.get(row.key())
        if old is None or _cost(row) > _cost(old):
            best[row.key()] = row
    return [
        {k: v for k, v in asdict(best[key]).items() if k != "wrong"}
        for key in sorted(best, key=str)
    ]


def merged(rows: Sequence[dict[str, Any]], table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A table with these rows instead of those of their cases, architectures and compilers."""

    def part(row: dict[str, Any]) -> tuple[str, ...]:
        return row["case"], row["arch"], row["compiler"]

    anew = {part(row) for row in rows}
    kept = [row for row in table if part(row) not in anew]
    return sorted([*kept, *rows], key=lambda row: str([row[k] for k in KEY]))


def _cost(row: Row) -> tuple[float, int, int]:
    return (row.slots or 0.0, row.registers, row.outside or 0)


def changes(rows: Sequence[dict[str, Any]], table: Sequence[dict[str, Any]]) -> list[str]:
    """How measured rows differ from those of a table by the same compilers.

    Of cases, architectures and compilers that both have.
    """
    compilers = {row["compiler"] for row in rows}
    known = {(row["case"], row["arch"], row["compiler"]) for row in table}
    old = {tuple(row[k] for k in KEY): row for row in table if row["compiler"] in compilers}
    measured = {(row["case"], row["arch"]) for row in rows}
    found = []
    for row in rows:
        if (row["case"], row["arch"], row["compiler"]) not in known:
            continue
        before = old.pop(key := tuple(row[k] for k in KEY), None)
        name = " ".join(key)
        if before is None:
            found.append(f"{name}: new")
        elif told := [f"{k} {before[k]} → {row[k]}" for k in row if row[k] != before.get(k)]:
            found.append(f"{name}: {', '.join(told)}")
    gone = (key for key, row in old.items() if (row["case"], row["arch"]) in measured)
    return found + [f"{' '.join(key)}: gone" for key in gone]


def worse(rows: Sequence[dict[str, Any]], table: Sequence[dict[str, Any]]) -> list[str]:
    """Kernels whose loops issue over a tenth more than in the table."""
    old = {tuple(row[k] for k in KEY): row["slots"] for row in table}
    found = []
    for row in rows:
        before = old.get(key := tuple(row[k] for k in KEY))
        if before and row["slots"] and row["slots"] > 1.1 * before:
            found.append(f"{' '.join(key)}: slots {before} → {row['slots']}")
    return found
