"""The README's first numbers: of each processor measured, and what no GPU has run."""

from __future__ import annotations

from . import charts, tables
from .tables import FAMILIES, NEVER, Record, find, geomean, table


def block(cpus: dict[str, Record], gpus: dict[str, Record]) -> str:
    """``cpus``: the newest record of each processor."""
    parts = [_numbers(cpus)] if cpus else []
    return "\n\n".join([*parts, _gpus(gpus)])


def _numbers(cpus: dict[str, Record]) -> str:
    """A column for each processor: against PyTorch as it is and, beside it, in its faster memory
    format, where measured."""
    columns = [_column(record) for record in cpus.values()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, "not measured") for column in columns)) for name in names]
    head = ["R(2+1)D-18: × PyTorch as it is (× in its faster format)", *cpus]
    where = "; ".join(charts.place(record) for record in cpus.values())
    return f"{table(head, rows)}\n\n{where}. [All benchmarks](docs/benchmarks.md)."


def _column(record: Record) -> dict[str, str]:
    cells = {}
    for dtype in ("fp32", "bf16"):
        models = {r["contender"]: r for r in find(record["models"], mode="inference", dtype=dtype)}
        last = models.get("original channels-last")
        if (ours := models.get("optimised")) and last:
            name = f"speed of inference, whole network, {charts.DTYPES[dtype]}"
            faster = last["ms"] / ours["ms"]
            cells[name] = f"**{ours['vs_users'][1]:.1f} ×** ({faster:.1f} ×)"
    better = list(charts.ratios(record, "training-bn").values())
    steps = charts.pairs(record, mode="training-bn", contender="fastst auto")
    if steps and better:
        eager = geomean([r["vs_users"][1] for r in steps])
        name = "speed of a training step of a pair, float32"
        cells[name] = f"**{eager:.1f} ×** ({geomean(better):.1f} ×)"
    held = charts.kept_mib(record)
    if set(held) == set(charts.HELD):
        base, kept, lean = held.values()
        name = "memory that training keeps for backward; with `recompute=True`"
        cells[name] = f"**{kept / base:.2f} ×**; {lean / base:.2f} ×"
    return cells


def _gpus(records: dict[str, Record]) -> str:
    """Which kernel families for GPUs a record verified, or that none did."""
    every = [f"`{f.backend}` {f.what}" for f in FAMILIES]
    seen = [
        f"`{f.backend}` {f.what}"
        for f in FAMILIES
        if any(tables.status(r, f) != NEVER for r in records.values())
    ]
    if not seen:
        return (
            "**No GPU has run any of this yet.** The CUDA and Triton kernels are compiled, and "
            "tested on CPUs: in an emulator, in an interpreter, and as compilers made them."
        )
    missing = [name for name in every if name not in seen]
    where = ", ".join(r["machine"]["gpu"] for r in records.values())
    text = f"**On GPUs ({where}):** measured are {', '.join(seen)}."
    return text + (f" **No GPU has run** {', '.join(missing)} yet." if missing else "")
