"""Markdown tables made from records, and nothing else. Every figure comes from a measured row."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastst.dispatch import selfcheck

from .measure import Spread
from .record import cpu

Row = dict[str, Any]
Record = dict[str, Any]

NEVER = "never run on a GPU"
# What was executed as compilers made it, on a CPU (docs/design/executed.md); its runs write it.
EXECUTED = Path(__file__).parents[1] / "tests/emulator/ptx/executed.json"
HALVES = {"bfloat16", "float16"}
COMPILERS = {"cuda": "nvcc", "triton": "triton"}
MODES = {
    "inference": "inference, norm folded for all",
    "eval": "inference, batch norm as in the model",
    "training-bn": "training step, batch norm",
    "training": "training step, no norm",
}
OURS = {"fastst auto": "contiguous", "fastst auto channels-last": "channels-last"}
EAGER = ("eager", "eager channels-last")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(r) + " |" for r in rows)])


def geomean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


def times(spread: Sequence[float] | None) -> str:
    """A ratio with its quartiles."""
    if spread is None:
        return "–"
    q25, median, q75 = spread
    return f"{median:.2f} ({q25:.2f}–{q75:.2f})"


def find(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Measured rows with these values."""
    return [r for r in rows if r["ms"] is not None and all(r[k] == v for k, v in wanted.items())]


def pool(spreads: Sequence[Sequence[float]]) -> Spread:
    """Geometric means of quartiles over cases."""
    return Spread(*(geomean(q) for q in zip(*spreads, strict=True)))


def machine_line(record: Record) -> str:
    m = record["machine"]
    what = f"{cpu(m)}, {m['threads']} threads"
    if m["device"] == "cuda":
        what = f"{m['gpu']}, driver {m['driver']}, CUDA {m['cuda']}, cuDNN {m['cudnn']}"
    triton = f", Triton {m['triton']}" if m["device"] == "cuda" else ""
    ceilings = record.get("ceilings") or {}
    reached = ", ".join(f"{v:.3g} TFLOP/s {k}" for k, v in ceilings.get("gemm_tflops", {}).items())
    text = (
        f"{what}; torch {m['torch']}{triton}, Python {m['python']}; "
        f"{record['date'][:10]} at `{record['commit']}`."
    )
    if ceilings:
        text += f" Ceilings in the same run: copy {ceilings['copy_gbs']:.3g} GB/s, matrix product or inner loop {reached}."  # noqa: E501
    return text


def _against_better_eager(rows: list[Row], ours: Row) -> float | None:
    """× the faster of the two eager layouts, from medians."""
    same = {k: ours[k] for k in ("case", "family", "mode", "dtype")}
    eager = [r["ms"] for name in EAGER for r in find(rows, contender=name, **same)]
    return min(eager) / ours["ms"] if eager else None


def summary(rows: list[Row], family: str, dtype: str) -> str:
    """Geometric means over a family's shapes, and the worst shape."""
    body = []
    for mode, title in MODES.items():
        for name, layout in OURS.items():
            mine = find(rows, family=family, dtype=dtype, mode=mode, contender=name)
            mine = [r for r in mine if r.get("vs_users") and r.get("vs_best")]
            better = [b for r in mine if (b := _against_better_eager(rows, r)) is not None]
            if not mine or not better:
                continue
            users = [r["vs_users"] for r in mine]
            body.append([
                title, layout, str(len(mine)), times(pool(users)),
                f"{min(u[1] for u in users):.2f}", f"{geomean(better):.2f}",
                f"{min(better):.2f}", times(pool([r["vs_best"] for r in mine])),
            ])  # fmt: skip
    head = [
        "mode", "input", "shapes", "× eager contiguous", "least", "× better eager layout", "least",
        "× best peer",
    ]  # fmt: skip
    return table(head, body)


def shapes(rows: list[Row], family: str, dtype: str, modes: Sequence[str]) -> str:
    """Each shape: eager's time and everybody's ratio to it."""
    contenders = ["eager channels-last", "4D", *OURS]
    titles = ["eager channels-last", "4D reshape", *(f"fastst, {v}" for v in OURS.values())]
    body = []
    for mode in modes:
        for base in find(rows, family=family, dtype=dtype, mode=mode, contender="eager"):
            cells = []
            for name in contenders:
                found = find(rows, family=family, dtype=dtype, mode=mode, contender=name, case=base["case"])  # fmt: skip  # noqa: E501
                cells.append(times(found[0]["vs_users"]) if found else "refused")
            body.append([base["label"], MODES[mode], f"{base['ms']:.3g} ms", *cells])
    return table(["layer, N×T×H×W", "mode", "eager contiguous", *titles], body)


def memory(rows: list[Row], family: str, case: str, dtype: str) -> str:
    """What a training step holds for backward and at its peak, against eager."""
    wanted = dict(family=family, case=case, mode="training-bn", dtype=dtype)
    base = find(rows, contender="eager", **wanted)
    if not base:
        return ""
    names = {
        "eager": "eager contiguous",
        "fastst auto": "fastst",
        "fastst auto recompute": "fastst, `recompute=True`",
    }
    body = []
    for name, title in names.items():
        for r in find(rows, contender=name, **wanted):
            saved, peak = r["saved_bytes"], r["peak_bytes"]
            body.append([
                title, f"{saved / 2**20:.1f} MiB", f"{saved / base[0]['saved_bytes']:.2f}",
                f"{peak / 2**20:.1f} MiB", f"{peak / base[0]['peak_bytes']:.2f}",
            ])  # fmt: skip
    head = [
        "training " + base[0]["label"],
        "held for backward",
        "of eager",
        "peak above inputs",
        "of eager",
    ]
    return table(head, body)


def models(record: Record) -> str:
    body = [
        [
            f"{r['model']} {r['mode']}, {r['clip']} {r['dtype']}",
            " ".join(filter(None, (r["contender"], r.get("version")))),
            f"{r['clips_per_s']:.3g}", times(r["vs_users"]), _error(r),
            f"{r['peak_bytes'] / 2**20:.0f} MiB" if r["peak_bytes"] else "not seen",
        ]
        for r in record["models"] if r["ms"] is not None
    ]  # fmt: skip
    head = [
        "model", "variant", "clips/s", "× original", "error against float64",
        "peak above model and input",
    ]  # fmt: skip
    return table(head, body) if body else ""


def _error(row: Row) -> str:
    """Of the logits or, in training, of the gradient, which is further off."""
    found = row.get("error")
    return f"{max(found.values()):.1e}" if found else ""


def training_batches(record: Record) -> str:
    body = [
        [
            r["model"] + " " + r["clip"],
            r["dtype"],
            f"{r['memory_gib']:g} GiB",
            r["contender"],
            str(r["batch"]),
        ]
        for r in record["training_batches"]
    ]
    head = ["model", "dtype", "memory", "variant", "largest training batch"]
    return table(head, body) if body else ""


def overhead(record: Record) -> str:
    calls = [
        [
            r["call"],
            r["contender"],
            f"refused: {r['refused']}" if r.get("refused") else f"{r['us']:.0f} µs",
        ]
        for r in record["overhead"]
    ]
    parts = []
    if calls:
        parts.append(table(["host cost, tiny input", "", "per call"], calls))
    if record["cold_start"]:
        head = [k for k in record["cold_start"][0] if k not in ("contender", "build")]
        body = [[r["contender"], *(f"{r[k]:.0f} ms" for k in head)] for r in record["cold_start"]]
        parts.append(table(["cold start", *head], body))
    return "\n\n".join(parts)


def control(rows: list[Row]) -> str:
    """How far two measurements of the same thing lie apart: smaller differences are noise."""
    again = find(rows, kind="control")
    if not again:
        return ""
    worst = max(abs(math.log(r["vs_users"][1])) for r in again)
    spread = pool([r["vs_users"] for r in again])
    pooled_again = times(spread)
    quiet = spread.q75 / spread.q25 < 1.1 and worst < 0.1
    return (
        f"Eager contiguous measured a second time as if it were a contender: × {pooled_again}; "
        f"on its worst shape it was off by {math.expm1(worst):.0%}."
        + ("" if quiet else " **The machine was not quiet: differences of that size are noise.**")
    )


def refusals(rows: list[Row]) -> str:
    bad = [r for r in rows if r["refused"]]
    if not bad:
        return "Every result agreed with float64; none was refused."
    ours = sum(r["kind"] == "fastst" for r in bad)
    return f"{len(bad)} of {len(rows)} rows have no number because they disagreed with float64 ({ours} of this library): the record says why."  # noqa: E501


def slow_paths(rows: list[Row]) -> str:
    slow = sorted({(r["contender"], r["slow_path"]) for r in rows if r.get("slow_path")})
    if not slow:
        return ""
    return "Fell into a slow path on some shape: " + ", ".join(f"{n} ({s})" for n, s in slow) + "."


HOW = (
    "Medians of interleaved rounds, quartiles in brackets; × is the other's time over ours of the "
    "same round, so above 1 is faster. Best peer: the fastest of the eager layouts, the 4D reshape "
    "and whatever else the run had."
)


def _clip(record: Record) -> str:
    return "".join(f"{r['clip']} clip, " for r in record["models"][:1])


def cpu_block(record: Record | None) -> str:
    if record is None:
        return "No record yet: `make bench`."
    rows, family = record["layers"], "r2plus1d-18"
    parts = [
        machine_line(record), HOW,
        f"**Pairs of R(2+1)D-18, {_clip(record)}float32** (geometric means over the shapes)",
        summary(rows, family, "fp32"),
        " ".join(filter(None, (control(rows), refusals(rows), slow_paths(rows)))),
        shapes(rows, family, "fp32", ("eval", "training-bn")),
        by_family([r for r in rows if r["dtype"] != "fp32"]),
        memory(rows, family, "64-144-64", "fp32"),
        models(record), overhead(record),
    ]  # fmt: skip
    return "\n\n".join(p for p in parts if p)


def gpu_block(records: dict[str, Record]) -> str:
    if not records:
        return (
            f"No GPU record exists: every kernel here was {NEVER}. `make gpu` makes one wherever "
            "there is a GPU."
        )
    return "\n\n".join(_one_gpu(r) for r in records.values())


def _one_gpu(record: Record) -> str:
    rows = record["layers"]
    parts = [f"**{record['machine']['gpu']}**: " + machine_line(record), HOW, by_family(rows)]
    parts.append(" ".join(filter(None, (control(rows), refusals(rows), slow_paths(rows)))))
    parts += [memory(rows, "r2plus1d-18", "64-144-64", "bf16"), models(record)]
    parts += [training_batches(record), overhead(record)]
    return "\n\n".join(p for p in parts if p)


def by_family(rows: list[Row]) -> str:
    """Each family, dtype and mode: this library's faster layout of ``auto`` on each shape."""
    keys = dict.fromkeys((r["family"], r["mode"], r["dtype"]) for r in rows)
    body = []
    for family, mode, dtype in keys:
        best: dict[str, Row] = {}
        for name in OURS:
            for r in find(rows, family=family, mode=mode, dtype=dtype, contender=name):
                if r["case"] not in best or r["ms"] < best[r["case"]]["ms"]:
                    best[r["case"]] = r
        mine = [r for r in best.values() if r.get("vs_users") and r.get("vs_best")]
        if not mine:
            continue
        users = pool([r["vs_users"] for r in mine])
        roofline = [r["roofline"] for r in mine if r.get("roofline")]
        body.append([
            family, MODES[mode], dtype, str(len(mine)), times(users),
            times(pool([r["vs_best"] for r in mine])),
            f"{min(r['vs_best'][1] for r in mine):.2f}",
            f"{geomean(roofline):.0%}" if roofline else "–",
        ])  # fmt: skip
    head = [
        "shapes",
        "mode",
        "dtype",
        "n",
        "× eager contiguous",
        "× best peer",
        "least",
        "of roofline",
    ]
    return table(head, body) if body else ""


def status_rows(records: dict[str, Record]) -> list[dict[str, Any]]:
    """What is known of each kernel family; ``fastst.info`` has it from machine/status.json."""
    return [
        {
            "backend": family.backend, "kernels": family.what,
            "executed": executed_capabilities(family),
            "gpus": {r["machine"]["gpu"]: status(r, family) for r in records.values()},
        }
        for family in FAMILIES
    ]  # fmt: skip


def status_block(records: dict[str, Record]) -> str:
    """Kernel family × GPU: verified at, measured at, or never run; and where no GPU is needed."""
    names = [r["machine"]["gpu"] for r in records.values()] or ["any GPU"]
    body = [
        [
            f"`{row['backend']}`", row["kernels"], ", ".join(row["executed"]) or "–",
            *(row["gpus"].get(name, NEVER) for name in names),
        ]
        for row in status_rows(records)
    ]  # fmt: skip
    return table(["backend", "kernel family", "compiled code executed on a CPU", *names], body)


class Family(NamedTuple):
    """Kernels that are verified and measured together."""

    backend: str
    what: str
    holds: Callable[[Row], bool]  # whether a row is of this family, given that the backend ran it
    kinds: Sequence[str] = ()  # of the self-checks of its kernels


def _hopper(row: Row) -> bool:
    return any("hopper_" in kernel for kernel in row.get("kernels", ()))


def _pair(row: Row) -> bool:
    return not row["family"].startswith(("parallel", "depthwise", "conv3d"))


def _single(row: Row) -> bool:
    return row["family"] == "conv3d"


def _trains(row: Row) -> bool:
    return row["mode"].startswith("training")


FAMILIES = [
    Family("cuda", "Hopper: (2+1)D pair, inference",
           lambda r: _pair(r) and _hopper(r) and not _trains(r), ("hopper",)),
    Family("cuda", "Hopper: (2+1)D pair, training",
           lambda r: _pair(r) and _hopper(r) and _trains(r), ("hopper backward",)),
    Family("cuda", "generic: (2+1)D pair", lambda r: _pair(r) and not _hopper(r)),
    Family("cuda", "depthwise pair", lambda r: r["family"] == "depthwise",
           ("depthwise", "depthwise backward")),
    Family("cuda", "parallel 4D", lambda r: r["family"].startswith("parallel")),
    Family("cuda", "generic: conv3d", _single),
    Family("triton", "(2+1)D pair, inference", lambda r: _pair(r) and not _trains(r),
           ("dense forward", "grouped forward")),
    Family("triton", "(2+1)D pair, training", lambda r: _pair(r) and _trains(r),
           ("dense backward", "grouped backward")),
    Family("triton", "depthwise pair", lambda r: r["family"] == "depthwise",
           ("depthwise forward", "depthwise backward")),
    Family("triton", "parallel 4D", lambda r: r["family"].startswith("parallel"),
           ("parallel forward", "parallel backward")),
    Family("triton", "conv3d", _single, ("conv3d forward", "conv3d backward")),
]  # fmt: skip


@functools.cache
def _executed_table() -> dict[str, Any]:
    return json.loads(EXECUTED.read_text()) if EXECUTED.exists() else {}


def executed_capabilities(family: Family) -> list[str]:
    """Compute capabilities for which compiled kernels of a family were executed in both dtypes of
    16 bits, and were right."""
    dtypes: dict[str, set[str]] = {}
    for compiler, rows in _executed_table().items():
        if compiler.startswith(COMPILERS[family.backend]):
            for case, row in rows.items():
                if family.holds(row):
                    dtypes.setdefault(case.split()[0], set()).add(row["dtype"])
    return sorted(capability for capability, seen in dtypes.items() if seen >= HALVES)


def status(record: Record, family: Family) -> str:
    """Of one kernel family in one record: verdicts on its kernels, and whether it was measured.

    Rows exist only where the result agreed with float64.
    """
    units: list[Row] = [u for s in record["stages"] for u in s.get("instances", [])]
    checked = [
        (u["backend"], u["state"]) for u in units
        if u["backend"] == family.backend and u["kind"] in family.kinds
    ]  # fmt: skip
    counts = selfcheck.tally(checked).get(family.backend, {})
    if set(counts) - {"passed", "not run", "unknown"}:
        return f"**{selfcheck.format_counts(counts)}** at `{record['commit']}`"
    ours = [r for r in record["layers"] if r["kind"] == "fastst"]
    ran = [r for r in ours if r.get("ran_on") == [family.backend] and family.holds(r)]
    if not ran:
        passed_checks = counts.get("passed", 0)
        return f"{passed_checks} checks passed at `{record['commit']}`" if passed_checks else NEVER
    wrong = [r for r in ran if r["refused"]]
    if wrong:
        return f"**{len(wrong)} of {len(ran)} results refused** at `{record['commit']}`"
    tests = next((s for s in record["stages"] if s["stage"] == "tests"), None)
    passed = tests is not None and tests["ok"] and tests.get("passed", 0) > 0
    verified = "verified and measured" if passed else "measured"
    return f"{verified} at `{record['commit']}`"
