"""The demo's results as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

_COLOURS = ("#9aa5b1", "#2a78b5", "#7fb2d9")
_INK, _FAINT = "#1f2933", "#616e7c"


class Panel(NamedTuple):
    """One group of bars, each labelled with its ratio to the first; less is better."""

    title: str
    unit: str
    values: Mapping[str, float]  # by model, the original first


def draw(path: Path, clip: Tensor, title: str, notes: Sequence[str], panels: list[Panel]) -> None:
    """Write a PNG: a strip of frames above one panel of bars for each measurement.

    Args:
        clip: (3, T, H, W) in [0, 1].
        notes: lines under the title.
    """
    figure = Figure(figsize=(10, 5.8), layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 2))
    strip, charts = parts
    figure.suptitle(title, x=0.006, ha="left", fontsize=14, fontweight="bold", color=_INK)
    strip.suptitle("\n".join(notes), x=0.006, ha="left", fontsize=9.5, color=_FAINT)
    shown = clip[:, :: max(1, clip.shape[1] // 8)][:, :8]
    frames: Any = strip.subplots(1, shown.shape[1], squeeze=False)
    for axes, frame in zip(frames[0], shown.permute(1, 2, 3, 0), strict=True):
        axes.imshow(frame.numpy())
        axes.set_axis_off()
    widths = [len(panel.values) + 0.4 for panel in panels]
    columns: Any = charts.subplots(1, len(panels), squeeze=False, width_ratios=widths)
    for axes, panel in zip(columns[0], panels, strict=True):
        _bars(axes, panel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")


def _bars(axes: Any, panel: Panel) -> None:
    names, values = list(panel.values), list(panel.values.values())
    axes.set_title(panel.title, loc="left", fontsize=11, color=_INK)
    bars = axes.bar(names, values, width=0.62, color=_COLOURS[: len(names)])
    for i, (bar, value) in enumerate(zip(bars, values, strict=True)):
        label = f"{value:,.0f} {panel.unit}"
        if i:
            label += f"\n{value / values[0]:.2f} ×"
        axes.annotate(
            label, (bar.get_x() + bar.get_width() / 2, value), (0, 3), textcoords="offset points",
            ha="center", va="bottom", fontsize=10, color=_INK, fontweight="bold" if i else None,
        )  # fmt: skip
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_ylim(0, 1.22 * max(values))
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, labelsize=10, labelcolor=_INK)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
