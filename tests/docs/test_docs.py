"""What the documentation says is executed: snippets, commands, links."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastst
from fastst.backends import cpu, cuda, triton
from fastst.machine import choices
from fastst.problem.conv3d import ConvSpec, ConvTensors, problem_of
from fastst.problem.spec import PairSpec, PairTensors, ParallelSpec, ParallelTensors, Problem
from tests.support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#]+)")

_NAMED = re.compile(  # in backquotes, or in a list of files that is a block
    r"(?:`|^    )"
    r"((?:[\w-]+/)*(?:[\w-]+\.(?:py|cu|cuh|cpp|h|md|toml|txt|yml|ipynb)|[\w-]+/))"
    r"(?:`|\s\s)",
    re.MULTILINE,
)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def snippets(page: Path) -> list[tuple[int, str]]:
    """First line number and source of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text[: m.start(1)].count("\n"), m[1]) for m in _BLOCK.finditer(text)]


class Loops(ast.NodeTransformer):
    """Lets the body of each loop say that it runs."""

    def __init__(self) -> None:
        self.lines: set[int] = set()

    def visit_For(self, loop: ast.For) -> ast.For:
        self.generic_visit(loop)
        self.lines.add(loop.lineno)
        loop.body.insert(0, ast.parse(f"_entered.add({loop.lineno})").body[0])
        return loop


def execute(page: Path, blocks: list[tuple[int, str]]) -> None:
    """All blocks of a page, in order, in one namespace.

    Raises:
        AssertionError: a loop is over nothing: it shows nothing, and nobody tries what is in it.
    """
    loops, entered = Loops(), set[int]()
    namespace: dict[str, object] = {"__name__": "__main__", "_entered": entered}
    for line, source in blocks:
        tree = loops.visit(ast.parse("\n" * line + source, str(page)))
        exec(compile(ast.fix_missing_locations(tree), str(page), "exec"), namespace)
    assert entered == loops.lines, f"{page}: no loop is run in lines {loops.lines - entered}"


def test_a_loop_over_nothing_is_seen() -> None:
    block = (3, "for a in [1]:\n    for b in []:\n        print(b)\n")
    with pytest.raises(AssertionError, match=r"in lines \{5\}"):
        execute(ROOT / "README.md", [block])


@pytest.mark.slow
@each_page
def test_snippets_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slow paths only where they are shown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastst.dispatch.selection, "_warned", set())
    monkeypatch.setenv("FASTST_CACHE", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastst.FallbackWarning)
        execute(page, snippets(page))
    choices.forget()


@pytest.mark.parametrize("notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=str)
def test_notebook_runs(
    notebook: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its code cells, in order, as a kernel would; it is kept without outputs, which go stale."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    notebook = json.loads((ROOT / "examples/convert.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
    assert "pairs replaced" in capsys.readouterr().out


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    missing = [
        link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()
    ]
    assert not missing


@functools.cache
def paths() -> frozenset[str]:
    """Of all files and folders of a checkout, without what is in folders that are made."""
    made = ("build", "dist", "out")
    tops = [p for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in made]
    found = [p for top in tops for p in (top, *top.rglob("*")) if p.suffix != ".pyc"]
    listed = {f"/{p.relative_to(ROOT).as_posix()}{'/' * p.is_dir()}" for p in found}
    return frozenset(listed | {f"/{folder}/" for folder in made})


def missing_paths(text: str) -> set[str]:
    """Files and folders that a text names by the ends of their paths, and that are not there."""
    return {n for n in _NAMED.findall(text) if not any(p.endswith(f"/{n}") for p in paths())}


@each_page
def test_paths_exist(page: Path) -> None:
    assert missing_paths(page.read_text()) == set()


@pytest.mark.parametrize("address", ["https://fastst.example/source", "https://project.org/fastst"])
def test_the_site_sends_nobody_to_a_placeholder(address: str) -> None:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    config = hooks.on_config({"site_url": address, "repo_url": address})
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    text = "See [the licence](LICENSE), [convert](docs/conversion.md#the-report)."
    found = hooks.on_page_markdown(text, page, config, None)
    licence = "the licence (`LICENSE`)"
    if "example" not in address:
        licence = f"[the licence]({address}/blob/main/LICENSE)"
    assert found == f"See {licence}, [convert](conversion.md#the-report)."


def test_a_path_that_is_gone_is_seen() -> None:
    text = "`nn/layers.py`, `nn/gone.py`\n\n    gone/          A floor\n    backends/cpu/  one\n"
    assert missing_paths(text) == {"nn/gone.py", "gone/"}


@each_page
def test_commands_exist(page: Path) -> None:
    """Every ``make x`` is a target, every ``python -m x`` of ours a module."""
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    |^)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for module in set(re.findall(r"python -m ((?:fastst|benchmarks|tests|emulator)[\w.]*)", text)):
        assert importlib.util.find_spec(module) is not None, module


def test_the_first_screen_says_what_decides() -> None:
    """A picture, measured numbers, what no GPU has run, how to install, and a snippet to run."""
    readme = (ROOT / "README.md").read_text()
    screen = "\n".join(readme.splitlines()[:40])
    order = [
        "docs/img/kept-tensors.svg", "<!-- benchmarks:begin headline -->", "GPU",
        "<!-- benchmarks:end headline -->", "pip install", "fastst.convert(", "assert_close",
    ]  # fmt: skip
    places = [screen.find(text) for text in order]
    assert -1 not in places, dict(zip(order, places, strict=True))
    assert places == sorted(places)


def test_every_environment_variable_is_documented() -> None:
    """What the package, its build and its tests read, against the table of variables."""
    sources = [*(ROOT / "fastst").rglob("*.py"), ROOT / "setup.py", ROOT / "tests" / "conftest.py"]
    name = re.compile(r"\bFASTST_[A-Z]+(?:_[A-Z]+)*\b")
    read = set(name.findall("\n".join(p.read_text() for p in sources)))
    text = (ROOT / "docs/environment.md").read_text()
    assert read - {"FASTST_MODULE", "FASTST_EMULATED"} <= set(name.findall(text))


def problem(**changes: Any) -> Problem:
    """A pair on a device, or another op, with one thing made different."""
    device = torch.device(changes.pop("device", "cuda"))
    usual = torch.bfloat16 if device.type == "cuda" else torch.float32
    op, dtype = changes.pop("op", "pair"), changes.pop("dtype", usual)
    groups = changes.get("groups", (1, 1))
    sizes = [(2, 16, 5, 9, 9), (16, 16 // groups[0], 1, 3, 3), (16, 16 // groups[1], 3, 1, 1)]
    tensors = [torch.empty(size, dtype=dtype, device="meta") for size in sizes]
    padding = (1, 1, 1, 1, 1, 1)
    if op == "conv3d":
        tensors[1:] = [torch.empty(16, 16, 3, 3, 3, dtype=dtype, device="meta")]
    made, spec = {
        "pair": (PairTensors, PairSpec), "parallel": (ParallelTensors, ParallelSpec),
        "conv3d": (ConvTensors, ConvSpec),
    }[op]  # fmt: skip
    described = problem_of(made(*tensors), spec(padding=padding, **changes))
    return dataclasses.replace(described, device=device)


FEATURES: dict[str, tuple[str, dict[str, Any]]] = {
    "inference, batch norm folded": ("forward", {"norm": "frozen"}),
    "training forward, batch norm": ("forward", {"norm": "batch"}),
    "backward": ("backward", {"norm": "batch"}),
    "float32": ("forward", {"dtype": torch.float32}),
    "float16, bfloat16": ("forward", {"dtype": (torch.half, torch.bfloat16)}),
    "float64": ("forward", {"dtype": torch.double}),
    "depthwise and grouped": ("forward", {"groups": (16, 16)}),
    "temporal-first": ("forward", {"order": "temporal-first"}),
    "padding modes": ("forward", {"padding_mode": ("reflect", "replicate")}),
    "parallel layer": ("forward", {"op": "parallel"}),
    "parallel layer, backward": ("backward", {"op": "parallel"}),
    "`conv3d`": ("forward", {"op": "conv3d"}),
    "`conv3d`, backward": ("backward", {"op": "conv3d"}),
}


def test_table_of_backends_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell of the table against ``why_not``, as if there were an H200 and AVX-512."""
    library = SimpleNamespace(device_count=lambda: 1, device_error=lambda: "")
    monkeypatch.setattr(cuda, "load", lambda: library)
    monkeypatch.setattr(cpu, "load", lambda: library)
    monkeypatch.setattr(triton.launch, "capability", lambda device: (9, 0))
    monkeypatch.setattr(triton.launch, "is_interpreted", lambda: False)
    rows = re.findall(r"^\| (.+) \|$", (ROOT / "docs/backends.md").read_text(), re.MULTILINE)
    table = {label: cells for label, *cells in (row.split(" | ") for row in rows)}
    names = [cell.strip("`") for cell in table["call"]]
    assert names == list(fastst.dispatch.BACKENDS)
    for feature, (phase, changes) in FEATURES.items():
        for dtype in dtypes(changes):
            given = changes | dtype
            found = [
                fastst.dispatch.selection._why_not(
                    backend, problem(**given, device="cpu" if name == "cpu" else "cuda"), phase
                )
                for name, backend in fastst.dispatch.BACKENDS.items()
            ]
            said = ["yes" if why is None else "no" for why in found]
            assert table[feature] == said, (feature, dtype, found)


def dtypes(changes: dict[str, Any]) -> list[dict[str, Any]]:
    """One change of the dtype for each that a row names."""
    named = changes.get("dtype", ())
    named = named if isinstance(named, tuple) else (named,)
    return [{"dtype": d} for d in named] or [{}]
