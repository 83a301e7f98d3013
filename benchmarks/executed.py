"""What compiled kernels ask of memory, as counted by executing them: no time, and no GPU.

``python -m benchmarks.executed`` prints the table of docs/design/performance.md from what
``python -m tests.emulator.ptx.triton --count`` and ``...cuda --count`` have written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .tables import table

COUNTS = Path(__file__).parents[1] / "tests/emulator/ptx/table.json"
_LEAST = 1.5  # passes over the banks that are worth a line


def block() -> str:
    """Markdown, a row for each call."""
    head = ["compiler", "for, call", "kernels", "KB, floor", "KB, asked", "banks: passes of"]
    return table(head, _rows())


def _rows() -> Iterator[list[str]]:
    for compiler, cases in json.loads(COUNTS.read_text()).items():
        for case, found in cases.items():
            kernels = found["kernels"]
            asked = sum(k["bytes_read"] + k["bytes_written"] for k in kernels)
            yield [
                compiler, case, str(len(kernels)), f"{found['floor'] / 1e3:.0f}",
                f"{asked / 1e3:.0f}", _conflicts(kernels) or "–",
            ]  # fmt: skip


def _conflicts(kernels: list[dict[str, Any]]) -> str:
    worst: dict[str, float] = {}
    for kernel in kernels:
        name = kernel["kernel"].split("<")[0].removesuffix("_kernel")
        for opcode, passes in kernel["passes"].items():
            if passes >= _LEAST:
                key = f"`{name}`, `{'.'.join(opcode.split('.')[:2])}`"
                worst[key] = max(worst.get(key, 0), passes)
    return "; ".join(f"{key} {passes:.1f}" for key, passes in worst.items())


if __name__ == "__main__":
    print(block())
