"""Charts of a record as SVG: titles say what was found, bars carry their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .record import cpu
from .shapes import R2PLUS1D_18, Case
from .svg import LINE, Bar, Card, bars, legend
from .tables import EAGER, OURS, Record, Row, find

MAIN_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
FAMILY = "r2plus1d-18"
PAIRS = (1, 4, 1, 3, 1, 3, 1, 3)  # how often each of the shapes stands in R(2+1)D-18
WIDTH = 760
HELD = {
    "eager": ("PyTorch", "plain"),
    "fastst auto": ("fastst", "ours"),
    "fastst auto recompute": ("fastst, recompute=True", "ours"),
}
MODELS = {
    "original": ("PyTorch, as it is", "plain"),
    "original channels-last": ("PyTorch, channels-last", "plain"),
    "original compiled": ("torch.compile", "plain"),
    "onnxruntime": ("ONNX Runtime", "plain"),
    "openvino": ("OpenVINO", "plain"),
    "converted": ("fastst.convert", "ours"),
    "converted channels-last": ("fastst.convert,\nchannels-last", "ours"),
    "optimised": ("fastst.optimize_\nfor_inference", "ours"),
}


def cards(record: Record) -> dict[str, Card]:
    """A chart for everything that the record has rows for, by the name of its file."""
    drawn = {"speedup": speedup(record), "network": network(record), "memory": memory(record)}
    place = record["place"]
    return {f"benchmarks-{place}-{k}.svg": card for k, card in drawn.items() if card is not None}


def draw(record: Record, folder: Path) -> list[Path]:
    """Write the charts of a record."""
    return [card.write(folder / name) for name, card in cards(record).items()]


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def machine(record: Record) -> str:
    """Machine, threads and dtype in a line."""
    return place(record, DTYPES[MAIN_DTYPE[record["machine"]["device"]]])


def place(record: Record, *dtypes: str) -> str:
    """Machine, threads, dtypes if any, and when it was measured."""
    m = record["machine"]
    where = [m["gpu"]] if "gpu" in m else [cpu(m), f"{m['threads']} threads"]
    return ", ".join([*where, *dtypes, f"PyTorch {m['torch']}", record["date"][:10]])


def pairs(record: Record, **wanted: str) -> list[Row]:
    dtype = MAIN_DTYPE[record["machine"]["device"]]
    return find(record["layers"], family=FAMILY, dtype=dtype, **wanted)


def fastest(rows: list[Row], names: Sequence[str]) -> float | None:
    """Milliseconds of the fastest of these contenders."""
    found = [r["ms"] for r in rows if r["contender"] in names]
    return min(found) if found else None


def ratios(record: Record, mode: str) -> dict[str, float]:
    """By case: time of PyTorch's faster memory format over ours in our faster one."""
    found = {}
    for case in R2PLUS1D_18:
        rows = pairs(record, mode=mode, case=case.name)
        theirs, ours = fastest(rows, EAGER), fastest(rows, tuple(OURS))
        if theirs is not None and ours is not None:
            found[case.name] = theirs / ours
    return found


def in_words(case: Case) -> str:
    """Where a pair stands in the network, and what goes through it."""
    c, _, k = case.channels
    t, h, w = case.size
    size = f"{c} → {k} channels, {t}×{h}×{w}"
    stage = {64: 1, 128: 2, 256: 3, 512: 4}[k]
    if case.name == "stem":
        return f"stem\n{size}"
    return f"{'stage' if c == k else 'into stage'} {stage}\n{size}"


def speedup(record: Record) -> Card | None:
    """Of each pair of the network: × PyTorch's faster layout, in inference and in training."""
    inference, training = ratios(record, "eval"), ratios(record, "training-bn")
    cases = [c for c in R2PLUS1D_18 if c.name in inference and c.name in training]
    if not cases:
        return None
    cases.sort(key=lambda c: -inference[c.name])

    def spread(values: dict[str, float]) -> str:
        return f"{min(values.values()):.1f} to {max(values.values()):.1f}"

    card = Card(
        WIDTH,
        f"Pairs run {spread(inference)} and train {spread(training)} times as fast",
    )
    lines = [
        "R(2+1)D-18 against PyTorch, both in their faster memory format. Longer is better.",
        machine(record),
    ]
    top = card.heading(lines) + 4
    top = legend(card, top, [("ours", "inference"), ("pale", "training step")]) + 10
    groups = [
        (in_words(c), [
            Bar(inference[c.name], "ours", f"{inference[c.name]:.2f}"),
            Bar(training[c.name], "pale", f"{training[c.name]:.2f}"),
        ])
        for c in cases
    ]  # fmt: skip
    end = bars(card, top, groups, 260, mark=1)
    card.text(260, end + 12, "The vertical line is PyTorch: 1.", 14, "faint")
    card.height = end + 32
    return card


def network(record: Record) -> Card | None:
    """Clips per second of the whole network in every form that was measured."""
    dtype = MAIN_DTYPE[record["machine"]["device"]]
    rows = [r for r in find(record["models"], mode="inference", dtype=dtype) if r["ms"]]
    by_name = {r["contender"]: r for r in rows if r["contender"] in MODELS}
    if "original" not in by_name or not any(r["kind"] == "fastst" for r in by_name.values()):
        return None
    base = by_name["original"]
    best = max(by_name.values(), key=lambda r: r["clips_per_s"])
    title = (
        f"{base['model']}: {base['clips_per_s']:.1f} clips per second become "
        f"{best['clips_per_s']:.1f}"
    )
    if best["kind"] != "fastst":
        title = f"{base['model']}: {MODELS[best['contender']][0]} is the fastest"
    card = Card(WIDTH, title)
    lines = [
        f"Inference, clips of {base['clip']}, clips per second. Longer is better.",
        machine(record),
    ]
    top = card.heading(lines) + 14
    groups = []
    for name, (label, colour) in MODELS.items():
        if name in by_name:
            r = by_name[name]
            ratio = "" if name == "original" else f"  ({r['vs_users'][1]:.1f} ×)"
            text = f"{r['clips_per_s']:.2f}{ratio}"
            groups.append((label, [Bar(r["clips_per_s"], colour, text)]))
    card.height = bars(card, top, groups, 210, thick=28) + 12
    return card


def kept_mib(record: Record) -> dict[str, float]:
    """MiB that all pairs of the network together keep for backward, by contender."""
    found = {}
    for name in HELD:
        rows = {r["case"]: r for r in pairs(record, mode="training-bn", contender=name)}
        if all(rows.get(c.name, {}).get("saved_bytes") for c in R2PLUS1D_18):
            kept = [
                n * rows[c.name]["saved_bytes"] for n, c in zip(PAIRS, R2PLUS1D_18, strict=True)
            ]
            found[name] = sum(kept) / 2**20
    return found


def memory(record: Record) -> Card | None:
    """What the pairs keep for backward in a training step."""
    found = kept_mib(record)
    if "eager" not in found or "fastst auto" not in found:
        return None
    base = found["eager"]
    card = Card(
        WIDTH,
        f"Training keeps {found['fastst auto'] / base:.0%} of the memory that PyTorch keeps",
    )
    lines = [
        f"MiB that the {sum(PAIRS)} pairs of R(2+1)D-18 hold for backward. Shorter is better.",
        machine(record),
    ]
    top = card.heading(lines) + 14
    groups = []
    for name, value in found.items():
        label, colour = HELD[name]
        ratio = "" if name == "eager" else f"  ({value / base:.2f} ×)"
        groups.append((label, [Bar(value, colour, f"{value:.0f} MiB{ratio}")]))
    card.height = bars(card, top, groups, 210, thick=28) + 12
    return card


CASE = "64-144-64"  # the pair of the picture: as wide as most of the network's memory


def kept_tensors(record: Record) -> Card:
    """What a training step keeps: three tensors, two, or one. Widths are channels."""
    rows = pairs(record, mode="training-bn", case=CASE)
    mib = {r["contender"]: r["saved_bytes"] / 2**20 for r in rows if r.get("saved_bytes")}
    card = Card(WIDTH, "Three tensors kept for backward become two, or one")
    card.description = (
        "PyTorch keeps x, u and z of a spatial and a temporal convolution with a norm and an "
        "activation between; fastst keeps x and u, or only x with recompute=True."
    )
    y = card.heading() + 4
    for name, kept in (
        ("eager", ("x", "u", "z")),
        ("fastst auto", ("x", "u")),
        ("fastst auto recompute", ("x",)),
    ):
        _row(card, y, HELD[name][0].split(", "), kept, name != "eager")
        width = 74 * mib[name] / mib["eager"]
        card.box(604, y + 12, width, 26, HELD[name][1])
        card.text(612 + width, y + 30, f"{mib[name]:.0f} MiB", 15, bold=True)
        y += 58
    y += 8
    entries = [("kept", "kept until backward"), ("-faint", "let go"), ("none", "one operation")]
    y = legend(card, y, entries)
    case = next(c for c in R2PLUS1D_18 if c.name == CASE)
    size = "×".join(map(str, case.size))
    card.text(24, y + 10, f"64 → 144 → 64 channels on a clip of {size}.", 14, "faint")
    card.text(24, y + 10 + LINE, machine(record), 14, "faint")
    card.height = y + 10 + LINE + 20
    return card


def _row(card: Card, y: float, label: Sequence[str], kept: Sequence[str], fused: bool) -> None:
    """x → conv → u → norm, activation → z → conv → y, as separate boxes or as one."""
    middle = y + 25
    for i, text in enumerate(label):
        card.text(24, middle + 5 + 20 * i - 10 * (len(label) - 1), text, 14, bold=not i)
    if fused:
        card.box(196, y, 350, 50, "none", 6)
    stations = {"x": (156, 36), "u": (278, 56), "z": (424, 56), "y": (552, 36)}
    for before, after, what in (
        ("x", "u", "1×3×3"),
        ("u", "z", "norm, act"),
        ("z", "y", "3×1×1"),
    ):
        start, end = stations[before][0] + stations[before][1] + 4, stations[after][0] - 4
        card.arrow(start, middle, end)
        card.text((start + end) / 2 - 3, middle - 7, what, 13, "faint", "middle")
    for name, (x, width) in stations.items():
        card.box(x, middle - 15, width, 30, "kept" if name in kept else "ground")
        if name not in kept:
            card.box(x, middle - 15, width, 30, "faint", outline=True)
        colour = "onink" if name in kept else "faint"
        card.text(x + width / 2, middle + 5, name, 16, colour, "middle", name in kept)
