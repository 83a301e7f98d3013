"""The README's first numbers: three of a CPU, and what no GPU has run."""

from __future__ import annotations

from . import charts, tables
from .tables import FAMILIES, NEVER, Record, find, geomean, table


def block(cpu: Record | None, gpus: dict[str, Record]) -> str:
    parts = [] if cpu is None else [_numbers(cpu)]
    return "\n\n".join([*parts, _gpus(gpus)])


def _numbers(record: Record) -> str:
    """Against PyTorch as it is and, beside it, in its faster memory format, where measured."""
    rows = []
    models = {r["contender"]: r for r in find(record["models"], mode="inference", dtype="fp32")}
    last = models.get("original channels-last")
    if (ours := models.get("optimised")) and last:
        rows.append((
            "inference, whole network", f"**{ours['vs_users'][1]:.1f} ×** as fast",
            f"{last['ms'] / ours['ms']:.1f} × against channels-last",
        ))  # fmt: skip
    better = list(charts.ratios(record, "training-bn").values())
    steps = charts.pairs(record, mode="training-bn", contender="fastst auto")
    if steps and better:
        eager = geomean([r["vs_users"][1] for r in steps])
        rows.append((
            "training step of a pair, mean", f"**{eager:.1f} ×** as fast",
            f"{geomean(better):.1f} × with both in their faster format",
        ))  # fmt: skip
    held = charts.held(record)
    if set(held) == set(charts.HELD):
        base, kept, lean = held.values()
        rows.append((
            "memory that training keeps for backward", f"**{kept / base:.2f} ×** as much",
            f"{lean / base:.2f} × with `recompute=True`",
        ))  # fmt: skip
    return table(["R(2+1)D-18, against PyTorch as it is", "", ""], rows) + (
        f"\n\n{charts.machine(record)}. [All benchmarks](docs/benchmarks.md)."
    )


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
