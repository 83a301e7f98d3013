"""The README's tables and the charts, from the newest records.

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

from . import charts, tables
from .record import RESULTS, ROOT, newest

README = ROOT / "README.md"
IMAGES = ROOT / "docs" / "img"
_BLOCK = re.compile(
    r"(<!-- benchmarks:begin (?P<name>[\w-]+) -->\n).*?(<!-- benchmarks:end (?P=name) -->)", re.S
)


def blocks(records: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Every block that the README can hold, by name."""
    gpus = {place: r for place, r in records.items() if place != "cpu"}
    return {
        "cpu": _with_charts(tables.cpu_block(records.get("cpu")), records.get("cpu")),
        "gpu": tables.gpu_block(gpus),
        "status": tables.status_block(gpus),
    }


def _with_charts(text: str, record: dict[str, Any] | None) -> str:
    if record is None:
        return text
    images = [
        f"![{name}](docs/img/benchmarks-{record['place']}-{name}.png)"
        for name in ("speedup", "memory")
    ]
    return text + "\n\n" + "\n".join(images)


def fill(text: str, found: dict[str, str]) -> str:
    """``text`` with every marked block replaced.

    Raises:
        ValueError: a marker names no block, or has no end.
    """
    begun = re.findall(r"<!-- benchmarks:begin ([\w-]+) -->", text)
    whole = [m["name"] for m in _BLOCK.finditer(text)]
    if begun != whole:
        raise ValueError(f"README: every benchmarks:begin needs its end, got {begun} and {whole}")
    unknown = sorted(set(begun) - set(found))
    if unknown:
        raise ValueError(f"README: no benchmark block {unknown}; there are {sorted(found)}")
    return _BLOCK.sub(lambda m: f"{m[1]}{found[m['name']]}\n{m[3]}", text)


def check(readme: Path = README, results: Path = RESULTS) -> bool:
    """Whether the README says what the newest records say."""
    text = readme.read_text()
    return fill(text, blocks(newest(results))) == text


def update(readme: Path = README, results: Path = RESULTS, images: Path = IMAGES) -> None:
    """Rewrite the README's blocks and the charts of the newest records."""
    records = newest(results)
    text = readme.read_text()
    readme.write_text(fill(text, blocks(records)))
    for record in records.values():
        charts.draw(record, images)


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
        agrees = check()
        print("README agrees" if agrees else "README differs: run python -m benchmarks.report")
        return 0 if agrees else 1
    update()
    return 0


if __name__ == "__main__":
    sys.exit(main())
