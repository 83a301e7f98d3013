"""A program: statements and how the module is called; its text, and smaller ones."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from . import helpers
from .statements import Statement, statements

DRIVER: dict[str, tuple[Any, ...]] = {  # the first of each is what shrinking goes to
    "training": (True, True, False),
    "x_needs_grad": (True, False),
    "mode": ("", "", "", "no_grad", "inference", "autocast"),
    "calls": (1, 1, 2),
    "step": (False, True),  # of an optimizer, between two calls
    "batch": (2, 2, 2, 2, 2, 2, 1, 1, 0),
    "layout": ("plain", "plain", "sliced", "offset", "channels-last"),
    "after": (
        "",
        "",
        "",
        "",
        "deepcopy",
        "load",
        "float",
        "freeze",
        "twice",
        "sample",
        "channels-last",
    ),
    "backward": ("sum", "sum", "square", "second", "twice", "none", "mutated"),
    "inputs": ("normal", "normal", "large", "nan", "small"),
}


@dataclass(frozen=True)
class Program:
    seed: int
    body: tuple[Statement, ...]
    driver: tuple[tuple[str, Any], ...]

    @property
    def how(self) -> dict[str, Any]:
        return dict(self.driver)

    def source(self) -> str:
        """The text of a module."""
        init = [_numbered(s.init, i) for i, s in enumerate(self.body) if s.init]
        forward = "\n".join(_lines(list(enumerate(self.body))))
        return (
            "class Program(Base):\n"
            "    def __init__(self):\n        super().__init__()\n"
            + textwrap.indent("\n".join(init) or "pass", " " * 8)
            + "\n\n    def forward(self, x):\n        log, a, k = self.log, x, x\n"
            + textwrap.indent(forward + "\nreturn x", " " * 8)
            + "\n"
        )

    def build(self) -> Any:
        """The class."""
        names = {name: getattr(helpers, name) for name in helpers.__all__}
        names["__name__"] = __name__
        exec(compile(self.source(), f"<program {self.seed}>", "exec"), names)
        return names["Program"]

    def __str__(self) -> str:
        told = ", ".join(f"{k}={v!r}" for k, v in self.driver if v != DRIVER[k][0])
        return f"# seed {self.seed}: {told or 'called as usual'}\n{self.source()}"

    def smaller(self) -> Iterator[Program]:
        """Programs with less of everything."""
        for size in (8, 4, 2, 1):
            for i in range(0, len(self.body), size):
                if size < len(self.body) or size == 1:
                    yield replace(self, body=self.body[:i] + self.body[i + size :])
        for name, value in self.driver:
            if value != DRIVER[name][0]:
                yield replace(self, driver=tuple({**self.how, name: DRIVER[name][0]}.items()))


def random_program(seed: int) -> Program:
    rng = random.Random(seed)
    body = tuple(statements(rng))
    return Program(seed, body, tuple((k, rng.choice(v)) for k, v in DRIVER.items()))


def _numbered(text: str, i: int) -> str:
    return text.replace("@", str(i))


def _lines(body: list[tuple[int, Statement]]) -> list[str]:
    lines: list[str] = []
    while body:
        (i, s), body = body[0], body[1:]
        if not s.head:
            lines += _numbered(s.forward, i).splitlines()
            continue
        inner, body = _lines(body[: s.size]), body[s.size :]
        if s.head.startswith("def"):
            inner.append("return x")
        lines += [_numbered(s.head, i), *("    " + line for line in inner or ["pass"])]
        lines += _numbered(s.tail, i).splitlines()
    return lines
