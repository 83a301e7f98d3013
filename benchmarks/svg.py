"""Pictures as SVG text: a card with a ground of its own, readable on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

LINE = 20  # height of a line of text
_LIGHT = {
    "ground": "#ffffff", "edge": "#d0d7de", "ink": "#1f2328", "faint": "#59636e",
    "ours": "#0969a8", "pale": "#7cb8e0", "peer": "#c2772a", "plain": "#8b949e", "kept": "#0969a8",
    "good": "#1a7f4b", "some": "#8fd0a9", "none": "#eaeef2", "onink": "#ffffff",
}  # fmt: skip
_DARK = {
    "ground": "#161b22", "edge": "#3d444d", "ink": "#f0f6fc", "faint": "#9aa4af",
    "ours": "#4aa3e0", "pale": "#2d6a98", "peer": "#e0954a", "plain": "#6e7781", "kept": "#4aa3e0",
    "good": "#3fb373", "some": "#2a6b48", "none": "#2a313c", "onink": "#0d1117",
}  # fmt: skip


class Bar(NamedTuple):
    """One bar: its value, its colour's name, and what is written at its end."""

    value: float
    colour: str
    label: str


class Card:
    """A drawing of ``width`` × ``height`` pixels; colours are names of the two palettes."""

    def __init__(self, width: int, title: str, description: str = "") -> None:
        self.width, self.height = width, 24.0
        self.title, self.description = title, description
        self.parts: list[str] = []

    def text(
        self, x: float, y: float, text: str, size: float = 15, colour: str = "ink",
        anchor: str = "start", bold: bool = False,
    ) -> None:  # fmt: skip
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" class="{colour}" '
            f'text-anchor="{anchor}"{weight}>{escape(text)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, colour: str, radius: float = 3,
        outline: bool = False,
    ) -> None:  # fmt: skip
        """A filled rectangle, or one that is only outlined, with dashes."""
        look = f'class="line-{colour}" stroke-dasharray="4 3"' if outline else f'class="{colour}"'
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'rx="{radius:g}" {look}/>'
        )

    def line(self, x: float, y: float, to_x: float, to_y: float, colour: str = "faint") -> None:
        self.parts.append(
            f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" '
            f'class="line-{colour}"/>'
        )

    def arrow(self, x: float, y: float, to_x: float) -> None:
        """A line to the right with a head."""
        self.line(x, y, to_x - 4, y)
        points = f"{to_x:g},{y:g} {to_x - 7:g},{y - 4:g} {to_x - 7:g},{y + 4:g}"
        self.parts.append(f'<polygon points="{points}" class="faint"/>')

    def heading(self, lines: Sequence[str] = ()) -> float:
        """The title and, smaller, lines below it; the height at which the picture goes on."""
        self.text(24, 38, self.title, 18, bold=True)
        for i, line in enumerate(lines):
            self.text(24, 62 + LINE * i, line, 14, "faint")
        return 52 + LINE * len(lines)

    def svg(self) -> str:
        style = "\n".join(
            [*_rules(_LIGHT), "@media (prefers-color-scheme: dark) {", *_rules(_DARK), "}"]
        )
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height:g}" '
            f'width="{self.width}" height="{self.height:g}" role="img" font-family="system-ui, '
            "-apple-system, 'Segoe UI', 'Noto Sans', 'DejaVu Sans', sans-serif\">",
            f"<title>{escape(self.title)}</title>", f"<desc>{escape(self.description)}</desc>",
            f"<style>\n{style}\n</style>",
            f'<rect x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1:g}" rx="8" '
            'class="ground"/>',
            *self.parts, "</svg>", "",
        ])  # fmt: skip

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.svg(), encoding="utf-8")
        return path


def _rules(palette: dict[str, str]) -> list[str]:
    rules = [f".ground {{ fill: {palette['ground']}; stroke: {palette['edge']}; }}"]
    for name, value in palette.items():
        if name not in ("ground", "edge"):
            rules.append(f".{name} {{ fill: {value}; }}")
            rules.append(f".line-{name} {{ fill: none; stroke: {value}; stroke-width: 1.5; }}")
    return rules


def bars(
    card: Card, top: float, groups: Sequence[tuple[str, Sequence[Bar]]], left: float,
    mark: float | None = None, thick: float = 20,
) -> float:  # fmt: skip
    """Horizontal bars from ``left`` on, on one axis that begins at 0; where they end.

    Args:
        groups: what stands before the bars, and the bars that lie close together.
        mark: a value at which a line goes through all groups.
    """
    right = card.width - 24 - max(9.0 * len(b.label) for _, g in groups for b in g) - 8
    scale = (right - left) / max(b.value for _, group in groups for b in group)
    at = left + mark * scale if mark is not None else left
    y = top
    for name, group in groups:
        lines = name.split("\n")
        middle = y + thick * len(group) / 2 + 5 - 9 * (len(lines) - 1)
        for i, line in enumerate(lines):
            card.text(left - 12, middle + 18 * i, line, 14, "faint" if i else "ink", "end")
        for b in group:
            card.box(left, y, max(b.value * scale, 1), thick - 3, b.colour)
            end = left + b.value * scale
            if end < at < end + 8 + 9 * len(b.label):  # the line would go through the label
                end = at
            card.text(end + 8, y + thick / 2 + 4, b.label, 14, bold=True)
            y += thick
        y += 12
    if mark is not None:
        card.line(at, top - 6, at, y - 6, "ink")
    return y


def legend(card: Card, y: float, entries: Sequence[tuple[str, str]]) -> float:
    """Squares of colour with what they mean, in one row; where it ends. "-" outlines one."""
    x = 24.0
    for colour, meaning in entries:
        card.box(x, y, 14, 14, colour.removeprefix("-"), outline=colour.startswith("-"))
        card.text(x + 21, y + 12, meaning, 14)
        x += 21 + 7.6 * len(meaning) + 24
    return y + 30
