"""Which backend has run on which hardware, as a picture: from the records and from one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import tables
from .svg import Card
from .tables import FAMILIES, Record

HARDWARE = {
    "avx512": ("x86-64", "AVX-512"),
    "avx2": ("x86-64", "AVX2"),
    "cpu": ("other", "CPUs"),
    "8": ("NVIDIA", "8.x"),
    "9": ("NVIDIA", "9.0"),
    "10": ("NVIDIA", "10 on"),
    "amd": ("AMD", "gfx9, 11, 12"),
    "gpu": ("other", "GPUs"),
}
NVIDIA = ("8", "9", "10")
STATES = {  # from the best to none: colour, and what it means
    "measured": ("good", "measured: agreed with float64 in a recorded run, with its times"),
    "tested": ("some", "tested: the tests run there"),
    "executed": ("-plain", "executed: the compiled code, on a CPU; never on the GPU"),
    "emulated": ("-plain", "emulated: compiled, and run in an emulator on a CPU; never on the GPU"),
    "compiled": ("-plain", "compiled: for gfx942 and gfx1100; run nowhere"),
    "untried": ("-plain", "untried: PyTorch's own operators, which should run there"),
    "no": ("none", "not possible"),
}


class Line(NamedTuple):
    """Kernels of one backend, and what is known of them where there is no record."""

    backend: str
    what: str
    states: dict[str, str]  # by hardware; "no" where nothing stands


def _on(state: str, *hardware: str) -> dict[str, str]:
    return dict.fromkeys(hardware, state)


LINES = [
    Line("cuda", "dense pairs, Hopper", _on("emulated", "9")),
    Line("cuda", "depthwise pairs", _on("emulated", *NVIDIA)),
    Line("cuda", "everything else", _on("emulated", *NVIDIA)),
    Line("triton", "everything", _on("emulated", *NVIDIA) | _on("compiled", "amd")),
    Line("cpu", "all but float64", _on("tested", "avx512", "avx2")),
    Line("aten", "everything", {
        **_on("tested", "avx512", "avx2"), **_on("untried", "cpu", *NVIDIA, "amd", "gpu"),
    }),
]  # fmt: skip
_FAMILIES: dict[str, Callable[[str], bool]] = {
    "dense pairs, Hopper": lambda what: what.startswith("Hopper"),
    "depthwise pairs": lambda what: "depthwise" in what,
    "everything else": lambda what: what.startswith(("generic", "parallel")),
}


def hardware(record: Record) -> str:
    """Which column a record's machine belongs to."""
    machine = record["machine"]
    if machine["device"] == "cuda":
        major = int(machine.get("capability", "9.0").split(".")[0])
        return "10" if major >= 10 else str(major)
    return str(machine.get("cpu_capability", "AVX512")).lower()


def families(line: Line) -> list[tables.Family]:
    belongs = _FAMILIES.get(line.what, lambda what: True)
    return [f for f in FAMILIES if f.backend == line.backend and belongs(f.what)]


def is_executed(line: Line, hardware: str) -> bool:
    """Whether compiled code of all these kernels was executed for this hardware."""
    return all(f"{hardware}.0" in tables.executed_capabilities(f) for f in families(line))


def is_measured(record: Record, line: Line) -> bool:
    """Whether the record has rows of these kernels, and none of them was refused."""
    if record["machine"]["device"] == "cpu":
        rows = [r for r in record["layers"] if line.backend in r.get("ran_on", ())]
        return bool(rows) and not any(r["refused"] for r in rows)
    found = [tables.status(record, f) for f in families(line)]
    return any("measured" in s for s in found) and not any("refused" in s for s in found)


def states(records: dict[str, Record]) -> list[tuple[Line, dict[str, str]]]:
    """The whole table: the state of every backend on every hardware."""
    found = []
    for line in LINES:
        known = {h: line.states.get(h, "no") for h in HARDWARE}
        known |= {
            h: "executed" for h, s in known.items() if s == "emulated" and is_executed(line, h)
        }
        for record in records.values():
            if known.get(hardware(record), "no") != "no" and is_measured(record, line):
                known[hardware(record)] = "measured"
        found.append((line, known))
    return found


def picture(records: dict[str, Record]) -> Card:
    """Rows are backends, columns hardware."""
    table = states(records)
    gpus = any(known[h] == "measured" for _, known in table for h in NVIDIA)
    title = "What has run where" if gpus else "What has run where: so far, only CPUs"
    card = Card(800, title)
    card.description = "; ".join(
        f"{line.backend}, {line.what}: "
        + ", ".join(f"{' '.join(HARDWARE[h])} {state}" for h, state in known.items())
        for line, known in table
    )
    left, wide, high = 172, 76, 46
    top = card.heading() + 12
    for i, (first, second) in enumerate(HARDWARE.values()):
        middle = left + wide * i + wide / 2
        card.text(middle, top, first, 13, "faint", "middle")
        card.text(middle, top + 17, second, 12, "ink", "middle", bold=True)
    y = top + 30
    for line, known in table:
        card.text(24, y + 18, line.backend, 15, bold=True)
        card.text(24, y + 36, line.what, 13, "faint")
        for i, state in enumerate(known.values()):
            colour = STATES[state][0]
            x, outline = left + wide * i + 3, colour.startswith("-")
            card.box(x, y, wide - 6, high - 6, colour.removeprefix("-"), outline=outline)
            if state != "no":
                ink = "onink" if state == "measured" else "ink"
                card.text(x + wide / 2 - 3, y + 25, state, 13, ink, "middle")
        y += high
    y += 14
    for colour, meaning in STATES.values():
        card.box(24, y - 11, 14, 14, colour.removeprefix("-"), outline=colour.startswith("-"))
        card.text(46, y + 1, meaning, 14)
        y += 22
    card.height = y + 2
    return card
