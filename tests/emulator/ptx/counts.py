"""What a profiler would count of the kernels that the machine ran, as rows of a committed table."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from emulator.ptx.executed import Executed
from tests.support import fuzz

TABLE = Path(__file__).parent / "table.json"
# Classes of instructions, by their opcodes: the first that fits.
CLASSES = {
    "products": r"(wg)?mma\.(mma_|sync)",
    "memory": r"(ld|st|cp|atom|red|ldmatrix|stmatrix|prefetch)\b",
    "waits": r"(bar|barrier|mbarrier|fence|membar|wgmma|griddepcontrol|setmaxnreg)\b",
    "moves": r"(mov|cvt|prmt|shfl|selp|mapa|cvta)\b",
    "branches": r"(bra|ret|exit|setp|vote|elect|match)\b",
    "float": r".*\.(f64|f32|f16|bf16|f16x2|bf16x2)$",
    "integer": r"",
}


def of_kernel(name: str, counted: dict[str, Any]) -> dict[str, Any]:
    """Instructions of warps by class, bytes asked of global memory, and what accesses cost.

    sectors: of 32 bytes, for each request of a warp to global memory, by opcode; passes: over the
    banks, for each 128 bytes of shared memory: 1 where there are no conflicts.
    """
    classes: Counter[str] = Counter()
    for opcode, count in counted["instructions"].items():
        classes[next(c for c, p in CLASSES.items() if re.match(p, opcode))] += count
    row: dict[str, Any] = {"kernel": name, "instructions": {c: classes[c] for c in CLASSES}}
    row |= {key: counted[key] for key in ("bytes_read", "bytes_written")}
    for key, space in (("sectors", "global"), ("passes", "shared")):
        row[key] = {op: round(parts / asked, 2) for op, (asked, parts) in counted[space].items()}
    return row


def worst_sites(executed: Executed, most: int = 12) -> list[str]:
    """Where accesses cost the most, in words: 32 bytes of global memory and passes over the banks
    that went beyond what a warp with its words side by side would take."""
    found: Counter[str] = Counter()
    told: dict[str, str] = {}
    for kernel, counted in executed.counted:
        for space, unit, least in (("global", "sectors", 4), ("shared", "passes", 1)):
            for site, (asked, parts) in counted[f"{space}_sites"].items():
                name = f"{kernel}: {site}"
                found[name] += parts - least * asked
                told[name] = f"{parts / asked:.1f} {unit} for each of {asked}"
    return [f"{name}: {told[name]}" for name, beyond in found.most_common(most) if beyond > 0]


def of_case(config: fuzz.Config | fuzz.ConvConfig, executed: Executed) -> dict[str, Any]:
    """``floor``: bytes of x, weights and the rest read once and y written once; of backward, all of
    them and dy read once more, and gradients written once."""
    make = fuzz.make_conv if isinstance(config, fuzz.ConvConfig) else fuzz.make
    tensors, dy = make(config)  # type: ignore[arg-type]
    given = sum(t.nbytes for t in tensors.values())
    gradients = sum(t.nbytes for n, t in tensors.items() if n not in config.constant)
    floor = given + dy.nbytes + (given + dy.nbytes + gradients if gradients else 0)
    return {"floor": floor, "kernels": [of_kernel(*found) for found in executed.counted]}


def write(path: Path, compiler: str, cases: dict[str, Any]) -> None:
    """Put the rows of a compiler into a table, a line for each kernel."""
    table = json.loads(path.read_text()) if path.exists() else {}
    others = {k: v for k, v in table.items() if k.split()[0] != compiler.split()[0]}
    table = others | {compiler: table.get(compiler, {}) | cases}
    text = []
    for name, rows in sorted(table.items()):
        told = []
        for case, found in rows.items():
            kernels = ",\n    ".join(json.dumps(row) for row in found["kernels"])
            told.append(f'  "{case}": {{"floor": {found["floor"]}, "kernels": [\n    {kernels}]}}')
        text.append(f' "{name}": {{\n' + ",\n".join(told) + "\n }")
    path.write_text("{\n" + ",\n".join(text) + "\n}\n")
