"""The report: README and records agree, and every figure comes from a row."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import fastst
from benchmarks import charts, coverage, gpu_run, headline, report, tables
from benchmarks.shapes import R2PLUS1D_18
from benchmarks.svg import Bar, Card, bars
from fastst.machine.gpu import amd
from fastst.problem.spec import PairSpec, PairTensors, Problem
from tests.support import ROOT

MEASURED = {"refused": None, "cannot": None, "slow_path": None, "kernels": []}


TWO = ("64-144-64", "128-288-128")
EVERY = tuple(c.name for c in R2PLUS1D_18)


def row(case: str, mode: str, contender: str, ms: float, **changes: Any) -> dict[str, Any]:
    kind = "fastst" if "fastst" in contender else "control" if "again" in contender else "peer"
    ratio = 12.0 / ms
    mib = int(ms * 2**20)
    found = {
        "case": case, "family": "r2plus1d-18", "label": f"{case}, 1×2×3²", "dtype": "fp32",
        "mode": mode, "contender": contender, "kind": kind, "ms": ms, "saved_bytes": mib,
        "peak_bytes": 2 * mib, "vs_users": [ratio * 0.9, ratio, ratio * 1.1],
        "vs_best": [ratio * 0.8, ratio * 0.8, ratio * 0.8], "best_peer": "4D", "tflops": 0.1 / ms,
        "gbs": 1 / ms, "roofline": 0.5, "ran_on": ["aten"],
    }  # fmt: skip
    return found | MEASURED | changes


def record(place: str = "cpu", cases: tuple[str, ...] = TWO) -> dict[str, Any]:
    times = {
        "eager": 12.0, "eager again": 12.0, "eager channels-last": 10.0, "4D": 9.6,
        "fastst auto": 6.0, "fastst auto channels-last": 4.0, "fastst auto recompute": 8.0,
    }  # fmt: skip
    rows = [
        row(case, mode, contender, ms)
        for case in cases
        for mode in ("inference", "eval", "training-bn")
        for contender, ms in times.items()
    ]
    machine = {
        "device": "cpu", "cpu": "Some CPU", "threads": 2, "torch": "2.13.0", "python": "3.11.7",
        "triton": "3.7",
    }  # fmt: skip
    if place != "cpu":
        machine |= {
            "device": "cuda",
            "gpu": "Some GPU",
            "driver": "1",
            "cuda": "13",
            "cudnn": 91500,
        }
        rows = [r | {"dtype": "bf16", "ran_on": ["triton"]} for r in rows]
    models = [
        {
            "model": "R(2+1)D-18", "clip": "1×16×112²", "mode": "inference", "contender": name,
            "kind": kind, "ms": ms, "clips_per_s": 1000 / ms, "vs_users": [1000 / ms] * 3,
            "refused": None, "peak_bytes": 2**20, "dtype": "fp32",
        }
        for name, kind, ms in (
            ("original", "peer", 1000.0), ("original channels-last", "peer", 800.0),
            ("converted", "fastst", 500.0), ("optimised", "fastst", 390.0),
        )
    ]  # fmt: skip
    return {
        "date": "2026-01-02T03:04:05+00:00", "commit": "abc123def", "place": place,
        "machine": machine,
        "ceilings": {"copy_gbs": 20.0, "gemm_tflops": {"fp32": 0.2, "bf16": 0.2}},
        "layers": rows, "models": models, "training_batches": [], "overhead": [], "cold_start": [],
        "stages": [],
    }  # fmt: skip


def test_pages_and_pictures_agree_with_the_newest_records() -> None:
    assert not report.differs(), "run python -m benchmarks.report"


def test_every_block_and_picture_is_shown_once() -> None:
    text = "\n".join(page.read_text() for page in report.PAGES)
    for name in report.blocks(report.RESULTS):
        assert text.count(f"<!-- benchmarks:begin {name} -->") == 1, name
    text = "\n".join(page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for name in report.pictures():
        assert f"img/{name}" in text, f"{name} is drawn and shown nowhere"
    shown = {p.name for p in report.IMAGES.glob("*.svg")}
    assert shown == set(report.pictures()), "pictures that nothing draws"


def pages(tmp_path: Path) -> tuple[Path, Path, Path]:
    path, results = tmp_path / "README.md", tmp_path / "results"
    (results / "cpu").mkdir(parents=True)
    (results / "cpu" / "2026-01-02-abc.json").write_text(json.dumps(record(cases=EVERY)))
    blocks = "\n".join(
        f"<!-- benchmarks:begin {n} -->\nold\n<!-- benchmarks:end {n} -->"
        for n in report.blocks(report.RESULTS)
    )
    path.write_text(f"before\n{blocks}\nafter\n")
    return path, results, tmp_path / "img"


def test_check_notices_a_changed_figure_picture_and_a_newer_record(tmp_path: Path) -> None:
    path, results, images = pages(tmp_path)
    assert path in report.differs([path], results, images)
    report.update([path], results, images)
    assert not report.differs([path], results, images)
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "\nold\n" not in text
    path.write_text(text.replace("2.00", "2.01", 1))
    assert report.differs([path], results, images) == [path]
    path.write_text(text)
    picture = images / "benchmarks-cpu-speedup.svg"
    picture.write_text(picture.read_text().replace("2.50", "9.50"))
    assert report.differs([path], results, images) == [picture]
    report.update([path], results, images)
    newer = record(cases=EVERY) | {"date": "2026-02-02T00:00:00+00:00", "commit": "fffffffff"}
    (results / "cpu" / "2026-02-02-fff.json").write_text(json.dumps(newer))
    assert path in report.differs([path], results, images)


@pytest.mark.parametrize(
    "text",
    ["<!-- benchmarks:begin cpu -->", "<!-- benchmarks:begin x -->\n<!-- benchmarks:end x -->"],
)
def test_markers_that_mean_nothing_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="README"):
        report.fill(text, report.blocks(report.RESULTS))


def test_summary_is_computed_from_the_rows() -> None:
    rows = record()["layers"]
    rows[4]["vs_users"] = [4.0, 8.0, 16.0]  # inference of the first case, fastst auto
    line = next(
        x
        for x in tables.summary(rows, "r2plus1d-18", "fp32").splitlines()
        if "contiguous |" in x and "folded" in x
    )
    cells = [c.strip() for c in line.strip("|").split("|")]
    low, median, high = (math.sqrt(a * b) for a, b in ((4.0, 1.8), (8.0, 2.0), (16.0, 2.2)))
    assert cells[2:] == [
        "2", f"{median:.2f} ({low:.2f}–{high:.2f})", "2.00", f"{10 / 6:.2f}", f"{10 / 6:.2f}",
        "1.60 (1.60–1.60)",
    ]  # fmt: skip


def test_refused_rows_are_in_no_mean_and_are_counted() -> None:
    found = record()
    whole = tables.cpu_block(found)
    bad = copy.deepcopy(found)
    for r in bad["layers"]:
        if r["case"] == "128-288-128" and r["contender"] == "fastst auto":
            r |= {"ms": None, "refused": "y: relative error 1"}
    text = tables.cpu_block(bad)
    assert "Every result agreed with float64" in whole
    assert f"3 of {len(bad['layers'])} rows have no number" in text
    assert "refused |" in text
    assert "| contiguous | 1 |" in text


def test_memory_table_is_relative_to_eager() -> None:
    text = tables.memory(record()["layers"], "r2plus1d-18", "64-144-64", "fp32")
    assert "| fastst | 6.0 MiB | 0.50 | 12.0 MiB | 0.50 |" in text


def test_no_gpu_record_says_never_run(tmp_path: Path) -> None:
    blocks = report.blocks(pages(tmp_path)[1])
    assert tables.NEVER in blocks["gpu"]
    lines = blocks["status"].splitlines()[2:]
    assert lines
    assert all(tables.NEVER in line for line in lines)
    assert {"cuda", "triton"} == {re.findall("`(.*?)`", line)[0] for line in lines}


def family(backend: str, what: str) -> tables.Family:
    return next(f for f in tables.FAMILIES if (f.backend, f.what) == (backend, what))


def test_status_of_a_kernel_family() -> None:
    gpu = record("some-gpu")
    pair, parallel = family("triton", "(2+1)D pair, inference"), family("triton", "parallel 4D")
    assert tables.status(gpu, pair) == "measured at `abc123def`"
    assert tables.status(gpu, parallel) == tables.NEVER
    assert tables.status(gpu, family("cuda", "generic: (2+1)D pair")) == tables.NEVER
    gpu["stages"] = [{"stage": "tests", "ok": True, "passed": 3}]
    assert tables.status(gpu, pair) == "verified and measured at `abc123def`"
    gpu["stages"] = [{"stage": "tests", "ok": False, "passed": 3}]
    assert tables.status(gpu, pair) == "measured at `abc123def`"
    unit = {"backend": "triton", "kind": "dense forward", "state": "passed"}
    gpu["stages"] = [{"stage": "instances", "ok": True, "instances": [unit, unit]}]
    assert tables.status(gpu, pair) == "measured at `abc123def`"
    other = unit | {"kind": "parallel forward"}
    gpu["stages"][0]["instances"] = [unit, unit | {"state": "hang"}, other]
    assert tables.status(gpu, pair) == "**1 passed, 1 hang** at `abc123def`"
    assert tables.status(gpu, parallel) == "1 checks passed at `abc123def`"
    gpu["stages"] = []
    gpu["layers"][4]["refused"] = "y: relative error 1"
    assert "refused" in tables.status(gpu, pair)
    assert "refused" not in tables.status(gpu, family("triton", "(2+1)D pair, training"))


def test_status_tells_hopper_kernels_by_their_names() -> None:
    gpu = record("some-gpu")
    for r in gpu["layers"]:
        hopper = r["mode"] == "inference"
        r |= {"ran_on": ["cuda"], "kernels": ["hopper_spatial_kernel<…>" if hopper else "tap_conv"]}
    said = {f.what: tables.status(gpu, f) for f in tables.FAMILIES if f.backend == "cuda"}
    measured = {what for what, status in said.items() if status != tables.NEVER}
    assert measured == {"Hopper: (2+1)D pair, inference", "generic: (2+1)D pair"}


def test_gpu_block_and_summary_of_a_gpu_record() -> None:
    gpu = record("some-gpu")
    text = tables.gpu_block({"some-gpu": gpu})
    assert "Some GPU" in text
    assert "cuDNN 91500" in text
    assert "| r2plus1d-18 | training step, batch norm | bf16 | 2 | 3.00 (2.70–3.30) |" in text
    gpu["layers"] += [r | {"refused": "y: wrong"} for r in gpu["layers"] * 5]
    gpu["stages"] = [
        {"stage": f"s{i}", "ok": False, "seconds": 1.0, "failures": ["t"] * 50} for i in range(30)
    ]
    assert len(gpu_run.summary(gpu).splitlines()) <= gpu_run.SUMMARY_LINES


def texts(card: Card) -> list[str]:
    """What a picture says; an error if it is no XML."""
    root = ElementTree.fromstring(card.svg())
    return [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text")]


def test_charts_say_what_was_found(tmp_path: Path) -> None:
    written = charts.draw(record(cases=EVERY), tmp_path)
    names = ["memory", "network", "speedup"]
    assert sorted(p.name for p in written) == [f"benchmarks-cpu-{n}.svg" for n in names]
    drawn = charts.cards(record(cases=EVERY))
    speedup = texts(drawn["benchmarks-cpu-speedup.svg"])
    # The faster eager layout takes 10 ms, our faster one 4 ms.
    assert speedup[0] == "Pairs run 2.5 to 2.5 and train 2.5 to 2.5 times as fast"
    assert "Longer is better" in speedup[1]
    assert speedup.count("2.50") == 16
    memory = texts(drawn["benchmarks-cpu-memory.svg"])
    assert memory[0] == "Training keeps 50% of the memory that PyTorch keeps"
    assert "Shorter is better" in memory[1]
    assert texts(drawn["benchmarks-cpu-network.svg"])[0].endswith("1.0 clips per second become 2.6")
    assert charts.draw(record() | {"layers": [], "models": []}, tmp_path / "none") == []


def test_charts_leave_out_what_was_refused() -> None:
    found = record(cases=EVERY)
    for r in found["layers"]:
        if r["case"] == "stem" and r["contender"].startswith("fastst"):
            r |= {"ms": None, "refused": "y: relative error 1"}
    assert texts(charts.cards(found)["benchmarks-cpu-speedup.svg"]).count("2.50") == 14
    assert "benchmarks-cpu-memory.svg" not in charts.cards(found)


def test_no_text_leaves_a_picture() -> None:
    """At 0.62 em a character, wider than the usual fonts."""
    for name, card in report.pictures().items():
        root = ElementTree.fromstring(card.svg())
        for e in root.iter("{http://www.w3.org/2000/svg}text"):
            width = 0.6 * float(e.get("font-size", 0)) * len(e.text or "")
            x = float(e.get("x", 0)) - {"start": 0, "middle": 0.5, "end": 1}[
                e.get("text-anchor", "start")
            ] * width  # fmt: skip
            assert x >= 0, (name, e.text)
            assert x + width <= card.width + 4, (name, e.text)


def test_headline_says_what_no_gpu_has_run() -> None:
    cpus = {"Some": record(cases=EVERY)}
    text = headline.block(cpus, {})
    assert "| **2.6 ×** (2.1 ×) |" in text
    assert "| **0.50 ×**; 0.67 × |" in text
    assert "**No GPU has run any of this yet.**" in text
    gpu = headline.block(cpus, {"some-gpu": record("some-gpu", EVERY)})
    assert "`triton` (2+1)D pair, inference" in gpu
    assert re.search(r"\*\*No GPU has run\*\* .*`cuda` depthwise pair", gpu)


def test_headline_has_a_column_for_each_processor(tmp_path: Path) -> None:
    """The newest of each, by its name alone; a figure that one of them lacks says so."""
    results = tmp_path / "cpu"
    results.mkdir()
    for day, name, models in ((1, "AMD EPYC", True), (2, "Some(R) Xeon(R) CPU @ 3GHz", False)):
        for older in (0, 10):
            found = record(cases=EVERY) | ({} if models else {"models": []})
            found["date"] = f"20{20 - older}-01-0{day}T00:00:00+00:00"
            found["machine"]["cpu"] = name
            found["machine"]["cpu_instructions"] = ["avx2"] if models else ["amx_bf16"]
            (results / f"{older}-{day}.json").write_text(json.dumps(found))
    text = report.blocks(tmp_path)["headline"]
    assert "| AMD EPYC | Some Xeon with AMX |" in text
    assert "whole network, float32 | **2.6 ×** (2.1 ×) | not measured |" in text
    assert "AMD EPYC, 2 threads, PyTorch 2.13.0, 2020-01-01; Some Xeon with AMX, 2 threads" in text


def test_coverage_follows_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    def state(records: dict[str, Any], backend: str, hardware: str) -> set[str]:
        return {s[hardware] for line, s in coverage.states(records) if line.backend == backend}

    cpu = record()
    assert state({}, "cpu", "avx512") == {"tested"}
    assert state({"cpu": cpu}, "cpu", "avx512") == {"tested"}  # its rows ran on aten
    assert state({"cpu": cpu}, "aten", "avx512") == {"measured"}
    for r in cpu["layers"]:
        r["ran_on"] = ["cpu"]
    assert state({"cpu": cpu}, "cpu", "avx512") == {"measured"}
    assert state({"cpu": cpu}, "cpu", "avx2") == {"tested"}
    cpu["layers"][4]["refused"] = "y: relative error 1"
    assert state({"cpu": cpu}, "cpu", "avx512") == {"tested"}
    gpu = record("some-gpu")
    assert state({"gpu": gpu}, "triton", "9") == {"measured"}
    assert state({"gpu": gpu}, "triton", "8") == {"executed"}
    assert state({"gpu": gpu}, "triton", "10") == {"emulated"}
    assert state({"gpu": gpu}, "cuda", "9") == {"executed"}
    every = tables._executed_table()
    half = {
        compiler: {case: row for case, row in rows.items() if row["dtype"] != "float16"}
        for compiler, rows in every.items()
    }
    for found in ({}, half):  # both dtypes of 16 bits, or it was not
        monkeypatch.setattr(tables, "_executed_table", lambda found=found: found)
        assert state({"gpu": gpu}, "cuda", "9") == {"emulated"}
    assert "measured" in " ".join(texts(coverage.picture({"gpu": gpu})))


def test_coverage_is_what_the_backends_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "no" where ``why_not`` says so, as if the hardware were there; nothing else is "no"."""
    library = SimpleNamespace(device_count=lambda: 1, device_error=lambda: "")
    monkeypatch.setattr(fastst.backends.cuda, "load", lambda: library)
    monkeypatch.setattr(fastst.backends.cpu, "load", lambda: library)
    monkeypatch.setattr(fastst.backends.triton.launch, "is_interpreted", lambda: False)
    for line, known in coverage.states({}):
        backend = fastst.dispatch.BACKENDS[line.backend]
        for hardware in ("avx512", *coverage.NVIDIA, "amd"):
            known_of = {"8": (8, 0), "9": (9, 0), "10": (10, 0), "amd": amd("gfx942")}
            capability = known_of.get(hardware)
            monkeypatch.setattr(
                fastst.backends.triton.launch, "capability", lambda device, c=capability: c
            )
            device = torch.device("cpu" if capability is None else "cuda")
            x, ws, wt = (
                torch.empty(size, dtype=torch.float32, device="meta")
                for size in ((2, 16, 5, 9, 9), (16, 16, 1, 3, 3), (16, 16, 3, 1, 1))
            )
            problem = Problem.of(PairTensors(x, ws, wt), PairSpec(padding=(1, 1, 1, 1, 1, 1)))
            why = backend.why_not(dataclasses.replace(problem, device=device), "forward")
            if line.what == "dense pairs, Hopper" and hardware != "9":
                continue  # these kernels are not all of the backend
            if line.backend == "cuda" and hardware == "amd":
                continue  # where its library cannot be loaded
            assert (known[hardware] == "no") == (why is not None), (line, hardware, why)


def test_no_line_goes_through_a_label() -> None:
    card = Card(760, "Near one")
    bars(
        card,
        60,
        [("near", [Bar(v, "ours", f"{v:.2f}") for v in (0.5, 0.9, 0.95, 1.0, 1.6)])],
        200,
        1,
    )
    card.height = 200
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring(card.svg())
    (line,) = [float(e.get("x1", "")) for e in root.iter(f"{svg}line")]
    labels = [e for e in root.iter(f"{svg}text") if re.fullmatch(r"\d\.\d\d", e.text or "")]
    assert len(labels) == 5
    for label in labels:
        begin = float(label.get("x", ""))
        assert not begin < line < begin + 9 * len(label.text or ""), label.text
