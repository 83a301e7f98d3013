"""What README and docs say of the benchmarks, and their pictures, from the newest records.

``python -m benchmarks.report`` rewrites them, ``--check`` says whether they agree, and
``--record FILE`` prints the tables of one record and draws its charts beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import charts, coverage, diagrams, headline, tables
from .record import RESULTS, ROOT, cpu, newest
from .svg import Card

PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "backends.md")
IMAGES = ROOT / "docs" / "img"
# What ``python -m fastst`` says of kernels for GPUs.
STATUS = ROOT / "fastst" / "machine" / "status.json"
_BLOCK = re.compile(
    r"(<!-- benchmarks:begin (?P<name>[\w-]+) -->\n).*?(<!-- benchmarks:end (?P=name) -->)", re.S
)


def of_gpus(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {place: r for place, r in records.items() if place != "cpu"}


def status(records: dict[str, dict[str, Any]]) -> str:
    """The text of STATUS, a line for each kernel family."""
    rows = tables.status_rows(of_gpus(records))
    return "[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n"


def of_cpus(results: Path) -> dict[str, dict[str, Any]]:
    """The newest record of each processor, by its name and what it computes with."""
    found = newest(results, lambda r: cpu(r["machine"]) if r["place"] == "cpu" else "")
    return {name: record for name, record in sorted(found.items()) if name}


def blocks(results: Path) -> dict[str, str]:
    """Every block that a page can hold, by name."""
    records = newest(results)
    gpus = of_gpus(records)
    return {
        "headline": headline.block(of_cpus(results), gpus),
        "cpu": tables.cpu_block(records.get("cpu")),
        "gpu": tables.gpu_block(gpus),
        "status": tables.status_block(gpus),
    }


def pictures(results: Path = RESULTS) -> dict[str, Card]:
    """Every picture of the pages, by the name of its file."""
    records = newest(results)
    found = {
        "call.svg": diagrams.call(),
        "coverage.svg": coverage.picture(newest(results, coverage.hardware)),
        "streaming.svg": diagrams.streaming(),
    }
    if "cpu" in records:
        found["kept-tensors.svg"] = charts.kept_tensors(records["cpu"])
    for record in records.values():
        found |= charts.cards(record)
    return found


def fill(text: str, found: dict[str, str], page: str = "README.md") -> str:
    """``text`` with every marked block replaced.

    Raises:
        ValueError: a marker names no block, or has no end.
    """
    begun = re.findall(r"<!-- benchmarks:begin ([\w-]+) -->", text)
    whole = [m["name"] for m in _BLOCK.finditer(text)]
    if begun != whole:
        raise ValueError(f"{page}: every benchmarks:begin needs its end, got {begun} and {whole}")
    unknown = sorted(set(begun) - set(found))
    if unknown:
        raise ValueError(f"{page}: no benchmark block {unknown}; there are {sorted(found)}")
    return _BLOCK.sub(lambda m: f"{m[1]}{found[m['name']]}\n{m[3]}", text)


def differs(
    pages: Sequence[Path] = PAGES, results: Path = RESULTS, images: Path = IMAGES
) -> list[Path]:
    """The pages, pictures and data that say something else than the newest records."""
    records = newest(results)
    found = blocks(results)
    old = [p for p in pages if fill(text := p.read_text(), found, p.name) != text]
    for name, card in pictures(results).items():
        path = images / name
        if not path.exists() or path.read_text() != card.svg():
            old.append(path)
    if STATUS.read_text() != status(records):
        old.append(STATUS)
    return old


def update(pages: Sequence[Path] = PAGES, results: Path = RESULTS, images: Path = IMAGES) -> None:
    """Rewrite the blocks of the pages, the pictures and STATUS from the newest records."""
    records = newest(results)
    found = blocks(results)
    for page in pages:
        page.write_text(fill(page.read_text(), found, page.name))
    for name, card in pictures(results).items():
        card.write(images / name)
    STATUS.write_text(status(records))


def show(record: dict[str, Any]) -> str:
    """The tables of one record."""
    if record["machine"]["device"] == "cuda":
        return tables.gpu_block({record["place"]: record})
    return tables.cpu_block(record)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", type=Path)
    args = parser.parse_args(argv)
    if args.record:
        record = json.loads(args.record.read_text())
        print(show(record))
        charts.draw(record, args.record.parent)
        return 0
    if args.check:
        old = [str(p.relative_to(ROOT)) for p in differs()]
        print(f"{', '.join(old)}: run python -m benchmarks.report" if old else "all pages agree")
        return 1 if old else 0
    update()
    return 0


if __name__ == "__main__":
    sys.exit(main())
