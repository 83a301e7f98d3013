"""Charts of a record as PNG: speed-ups, memory, roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .tables import MODES, OURS, Record, Row, find

MAIN_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
FASTST, PEER, EAGER, GREY = "#0b6e99", "#e08e36", "#8a8f98", "#c9ccd1"


def draw(record: Record, folder: Path) -> list[Path]:
    """Write what the record has rows for; nothing where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    dtype = MAIN_DTYPE[record["machine"]["device"]]
    rows = find(record["layers"], dtype=dtype)
    written = []
    for name, chart in (("speedup", speedup), ("memory", memory), ("roofline", roofline)):
        figure = chart(pyplot, record, rows)
        if figure is None:
            continue
        caption = f"{_machine(record)}, {dtype}, {record['date'][:10]} at {record['commit']}"
        figure.supxlabel(caption, x=0.99, ha="right", fontsize=7, color="#555")
        path = folder / f"benchmarks-{record['place']}-{name}.png"
        figure.savefig(path, dpi=120, metadata={"Software": None})
        pyplot.close(figure)
        written.append(path)
    return written


def _machine(record: Record) -> str:
    return str(record["machine"].get("gpu") or record["machine"]["cpu"])


def _faster(rows: list[Row]) -> list[Row]:
    """Of each case and mode, this library's faster layout."""
    best: dict[tuple[str, str, str], Row] = {}
    for name in OURS:
        for r in find(rows, contender=name):
            key = (r["family"], r["case"], r["mode"])
            if r.get("vs_users") and (key not in best or r["ms"] < best[key]["ms"]):
                best[key] = r
    return list(best.values())


def speedup(pyplot: Any, record: Record, rows: list[Row]) -> Any:
    """Against what users have and against the best peer, by shape, one panel for each mode."""
    ours = _faster(rows)
    modes = [m for m in MODES if any(r["mode"] == m for r in ours)]
    if not modes:
        return None
    most = max(sum(r["mode"] == m for r in ours) for m in modes)
    figure, axes = pyplot.subplots(
        1, len(modes), figsize=(4.2 * len(modes) + 1, 0.42 * most + 1.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, mode in zip(axes[0], modes, strict=True):
        part = [r for r in ours if r["mode"] == mode][::-1]
        for i, r in enumerate(part):
            for offset, key, colour in ((0.2, "vs_users", FASTST), (-0.2, "vs_best", PEER)):
                q25, median, q75 = r[key]
                error = [[max(median - q25, 0)], [max(q75 - median, 0)]]
                axis.barh(i + offset, median, 0.38, color=colour, xerr=error, ecolor="#333")
        axis.axvline(1, color="#333", linewidth=0.8)
        axis.set_yticks(range(len(part)), [r["label"].rsplit(", ", 1)[0] for r in part], fontsize=8)
        axis.set_title(MODES[mode], fontsize=9)
        axis.set_xlabel("× faster (median, quartiles)", fontsize=8)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=c) for c in (FASTST, PEER)]
    labels = ["against eager contiguous", "against the best peer"]
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return figure


def memory(pyplot: Any, record: Record, rows: list[Row]) -> Any:
    """Held for backward, of eager: plain and with recompute."""
    base = [r for r in find(rows, mode="training-bn", contender="eager") if r.get("saved_bytes")]
    if not base:
        return None
    figure, axis = pyplot.subplots(figsize=(7.5, 0.5 * len(base) + 1.6), layout="constrained")
    entries = (("eager", EAGER), ("fastst auto", FASTST), ("fastst auto recompute", PEER))
    for i, b in enumerate(base[::-1]):
        for k, (name, colour) in enumerate(entries):
            same = {key: b[key] for key in ("family", "case", "mode")}
            for r in find(rows, contender=name, **same):
                mib = r["saved_bytes"] / 2**20
                axis.barh(i + 0.27 * (1 - k), mib, 0.25, color=colour)
    axis.set_yticks(range(len(base)), [b["label"] for b in base[::-1]], fontsize=8)
    axis.set_xlabel("MiB held for backward, training with batch norm", fontsize=8)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=c) for _, c in entries]
    labels = ["eager", "fastst", "fastst, recompute=True"]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def roofline(pyplot: Any, record: Record, rows: list[Row]) -> Any:
    """Achieved arithmetic over the least intensity, under the ceilings of the same run."""
    ceilings = record.get("ceilings")
    rows = [r for r in rows if r.get("tflops") and r.get("gbs")]
    if not rows or not ceilings:
        return None
    peak = ceilings["gemm_tflops"][rows[0]["dtype"]]
    copy = ceilings["copy_gbs"]
    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    groups = (
        ("other peers", GREY, lambda r: r["kind"] == "peer" and r["contender"] != "eager"),
        ("eager contiguous", EAGER, lambda r: r["contender"] == "eager"),
        ("fastst", FASTST, lambda r: r["kind"] == "fastst"),
    )
    intensities = [1e3 * r["tflops"] / r["gbs"] for r in rows]
    for label, colour, belongs in groups:
        points = [(1e3 * r["tflops"] / r["gbs"], r["tflops"]) for r in rows if belongs(r)]
        if points:
            axis.scatter(*zip(*points, strict=True), s=16, color=colour, label=label, alpha=0.85)
    ridge = 1e3 * peak / copy
    low, high = min(*intensities, ridge) / 2, 2 * max(*intensities, ridge)
    axis.plot(
        [low, ridge, high], [low * copy / 1e3, peak, peak], color="#333", linewidth=1,
        label="measured ceilings",
    )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per byte that must move", fontsize=8)
    axis.set_ylabel("TFLOP/s", fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    return figure
