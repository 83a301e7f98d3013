"""What the temporal convolutions are for: two networks on clips that only the order tells apart.

    python examples/train_demo.py

f-R2D-18 sees each frame by itself, R(2+1)D-18 sees their order. Both are trained by
``examples/train.py`` on digits that are pushed left or right, up or down, towards the viewer or
away, and judged by how often they tell the direction of a movement, given its axis.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import train
from digits import CLASSES, MovingDigits, same_direction
from matplotlib.figure import Figure
from options import Options, whole

NAMES = {"fr2d_18": "f-R2D-18", "r2plus1d_18": "R(2+1)D-18"}
FRAMES, SIZE, WIDTH, BATCH = 8, 32, 16, 16
_COLOURS = {"fr2d_18": "#9aa5b1", "r2plus1d_18": "#2a78b5"}
_INK, _FAINT = "#1f2933", "#616e7c"
_BEGIN, _END = "<!-- train-demo:begin -->", "<!-- train-demo:end -->"
# Of a recorded run: the figures, and the pages and the chart that show them.
ROOT = Path(__file__).parents[1]
RECORD, CHART = ROOT / "docs/train-demo.json", ROOT / "docs/img/train-demo.png"
PAGES = (ROOT / "docs/training.md",)


class Result(NamedTuple):
    """What became of one network."""

    parameters: int
    history: list[dict[str, float]]  # of each epoch: loss, top1, direction


def run(
    epochs: int, clips: int, evaluated: int, seed: int = 0, width: int = WIDTH
) -> dict[str, Result]:
    """Train both networks alike.

    Args:
        epochs: passes.
        clips: of a pass; every pass draws new ones.
        evaluated: clips that both are judged on, the same after every pass.
        width: channels of the networks' first stage; the published ones have 64.
    """
    data = train.Data(
        MovingDigits(clips, FRAMES, SIZE, train=True, seed=seed),
        MovingDigits(evaluated, FRAMES, SIZE, train=False),
        CLASSES,
        {"top1": train.top(1), "direction": same_direction},
    )
    results = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            options = Options(
                model=name, width=width, frames=FRAMES, size=SIZE, clips=1, epochs=epochs,
                batch=BATCH, lr=0.02, warmup=0.5, workers=0, seed=seed, device="cpu",
                out=Path(folder),
            )  # fmt: skip
            trainer = train.train(options, data)
        parameters = sum(p.numel() for p in trainer.model.parameters())
        results[name] = Result(parameters, trainer.history)
    return results


def draw(path: Path, results: dict[str, Result]) -> None:
    """Write a PNG: a clip and its reverse above the curves of training."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(10, 6.4), layout="constrained", facecolor="white")
    figure.suptitle(
        "Only the order of the frames tells left from right", x=0.015, ha="left",
        fontsize=14, fontweight="bold", color=_INK,
    )  # fmt: skip
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2))
    data = MovingDigits(len(CLASSES), FRAMES, SIZE, train=False)
    strips: Any = top.subplots(2, FRAMES)
    for row, label in zip(strips, (0, 1), strict=True):
        for axes, frame in zip(row, data[label]["clips"][0, 0], strict=True):
            axes.imshow(frame.numpy(), cmap="gray", vmin=0, vmax=255)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(CLASSES[label], rotation=0, ha="right", va="center", color=_INK)
    panels: Any = bottom.subplots(1, 2)
    _curves(panels[0], results, "direction", "direction accuracy", 100)
    panels[0].axhline(50, color=_FAINT, linewidth=1, linestyle=":")
    panels[0].set_ylim(0, 105)
    panels[0].yaxis.set_major_formatter("{x:.0f}%")
    panels[0].annotate("chance", (1, 50), (0, -12), textcoords="offset points", color=_FAINT)
    _curves(panels[1], results, "loss", "training loss (6 classes)", 1)
    panels[1].set_ylim(bottom=0)
    figure.savefig(path, dpi=120, format="png")


def _curves(axes: Any, results: dict[str, Result], key: str, title: str, scale: float) -> None:
    for name, result in results.items():
        values = [scale * figures[key] for figures in result.history]
        epochs = range(1, len(values) + 1)
        axes.plot(epochs, values, color=_COLOURS[name], linewidth=2, marker="o", markersize=3)
        axes.annotate(
            NAMES[name], (epochs[-1], values[-1]), (0, 7), textcoords="offset points",
            ha="right", color=_COLOURS[name], fontweight="bold",
        )  # fmt: skip
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel("epoch", color=_FAINT)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(colors=_FAINT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def describe(results: dict[str, Result], epochs: int, clips: int, evaluated: int) -> dict[str, Any]:
    """A run as plain values."""
    networks = [
        {"network": NAMES[name], "parameters": r.parameters, "history": r.history}
        for name, r in results.items()
    ]
    return {
        "networks": networks, "epochs": epochs, "clips": clips, "evaluated": evaluated,
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }  # fmt: skip


def table(run: dict[str, Any]) -> str:
    """The figures of a run as Markdown."""
    lines = [
        "| network | parameters | direction accuracy | 6-class accuracy |",
        "|---|---:|---:|---:|",
    ]
    for network in run["networks"]:
        last = network["history"][-1]
        lines.append(
            f"| {network['network']} | {network['parameters']:,} | {last['direction']:.1%} | "
            f"{last['top1']:.1%} |"
        )
    lines.append("")
    lines.append(
        f"{run['epochs']} epochs of {run['clips']:,} clips of {FRAMES}×{SIZE}×{SIZE}, judged on "
        f"{run['evaluated']:,} others; first stages of {WIDTH} channels instead of 64; PyTorch "
        f"{run['torch']} on a CPU ({run['machine']}, threads: {run['threads']}). Chance is 50.0% "
        "and 16.7%; a network that sees the axis of a movement, but not its direction, reaches "
        "50.0% in both."
    )
    return "\n".join(lines)


def insert(path: Path, text: str) -> None:
    """Put text between the marks of a Markdown page.

    Raises:
        ValueError: the page has no marks.
    """
    page = path.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(_BEGIN)}\n.*?{re.escape(_END)}", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{path}: requires the marks {_BEGIN} and {_END}")
    page = pattern.sub(lambda _: f"{_BEGIN}\n{text}\n{_END}", page)
    path.write_text(page, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=whole(1), default=12)
    parser.add_argument(
        "--clips", type=whole(BATCH), default=480, help="of an epoch (default: 480)"
    )
    parser.add_argument("--evaluated", type=whole(1), default=300, help="clips (default: 300)")
    parser.add_argument("--out", type=Path, default=Path("out/train-demo.png"), help="chart")
    parser.add_argument("--record", action="store_true", help="update the documentation")
    options = parser.parse_args(arguments)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    sizes = options.epochs, options.clips, options.evaluated
    results = run(*sizes)
    draw(options.out, results)
    figures = describe(results, *sizes)
    print(f"{table(figures)}\n\n{options.out}")
    if options.record:
        RECORD.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        draw(CHART, results)
        for page in PAGES:
            insert(page, table(figures))


if __name__ == "__main__":
    main()
