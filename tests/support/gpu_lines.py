"""Which lines only a GPU reaches, and whether they ran: for ``tests/test_gpu_lines.py``.

Such a line asks something of ``torch.cuda`` or of ``machine.devices.runtime``, or lies in a branch
whose condition says that a device is a GPU, or behind one that leaves where it is none.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.support import ROOT

_WORDS = ("cuda", "on_gpu", "hip")  # names and texts by which conditions tell a GPU
_QUESTIONS = ("is_gpu", "is_rocm", "capturing")  # functions of ``machine.devices``
_RUNTIMES = ("torch.cuda.", "gpu_runtime.", "runtime(", "devices.runtime(")


def lines() -> dict[tuple[str, int], str]:
    """By file and number: the text of each line."""
    found: dict[tuple[str, int], str] = {}
    for path in sorted([*ROOT.glob("fastst/**/*.py"), *ROOT.glob("benchmarks/*.py")]):
        text = path.read_text(encoding="utf-8")
        written = text.splitlines()
        for number in sorted(set(_of(ast.parse(text)))):
            found[str(path), number] = written[number - 1].strip()
    return found


def _of(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If):
            if _tells(node.test, ast.Eq):
                yield from _statements(node.body)
            elif _tells(node.test, ast.NotEq):
                yield from _statements(node.orelse)
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            yield from _behind_exits(block if isinstance(block, list) else [])
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(_RUNTIMES):
            yield node.lineno


def _behind_exits(block: list[ast.stmt]) -> Iterator[int]:
    """What follows "if it is no GPU: return"."""
    leave = (ast.Return, ast.Raise, ast.Continue)
    for i, statement in enumerate(block):
        exits = isinstance(statement, ast.If) and isinstance(statement.body[-1], leave)
        if exits and _tells(statement.test, ast.NotEq):
            yield from _statements(block[i + 1 :])


def _statements(body: list[ast.stmt]) -> Iterator[int]:
    for statement in body:
        yield from (s.lineno for s in ast.walk(statement) if isinstance(s, ast.stmt))


def _tells(test: ast.expr, how: type[ast.cmpop]) -> bool:
    """Whether a condition that is true (of equality) or false says that something is on a GPU."""
    if isinstance(test, ast.BoolOp):
        return isinstance(test.op, ast.And) and any(_tells(v, how) for v in test.values)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return how is ast.NotEq and _tells(test.operand, ast.Eq)
    if isinstance(test, ast.Call):
        return how is ast.Eq and ast.unparse(test.func).split(".")[-1] in _QUESTIONS
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], how):
        return any(isinstance(c, ast.Constant) and c.value == "cuda" for c in test.comparators)
    if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot) and how is ast.Eq:
        return ast.unparse(test.left).endswith(_WORDS)
    return (
        how is ast.Eq
        and isinstance(test, ast.Name | ast.Attribute)
        and (ast.unparse(test).split(".")[-1] in _WORDS)
    )


@contextmanager
def traced(files: set[str]) -> Iterator[set[tuple[str, int]]]:
    """(file, number) of the lines of these files that this thread runs within it."""
    ran: set[tuple[str, int]] = set()
    known: dict[CodeType, bool] = {}

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            ran.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def called(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code not in known:
            known[code] = str(Path(code.co_filename)) in files
        return local if known[code] else None

    before = sys.gettrace()
    sys.settrace(called)
    try:
        yield ran
    finally:
        sys.settrace(before)
