"""The report: README and records agree, and every figure comes from a row."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import charts, gpu_run, report, tables

MEASURED = {"refused": None, "cannot": None, "slow_path": None, "kernels": []}


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


def record(place: str = "cpu") -> dict[str, Any]:
    times = {
        "eager": 12.0, "eager again": 12.0, "eager channels-last": 10.0, "4D": 9.6,
        "fastst auto": 6.0, "fastst auto channels-last": 4.0, "fastst auto recompute": 8.0,
    }  # fmt: skip
    rows = [
        row(case, mode, contender, ms)
        for case in ("64-144-64", "128-288-128")
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
    return {
        "date": "2026-01-02T03:04:05+00:00", "commit": "abc123def", "place": place,
        "machine": machine,
        "ceilings": {"copy_gbs": 20.0, "gemm_tflops": {"fp32": 0.2, "bf16": 0.2}},
        "layers": rows, "models": [], "training_batches": [], "overhead": [], "cold_start": [],
        "stages": [],
    }  # fmt: skip


def test_readme_agrees_with_the_newest_records() -> None:
    assert report.check(), "run python -m benchmarks.report"


def test_readme_holds_every_block() -> None:
    text = report.README.read_text()
    for name in report.blocks({}):
        assert f"<!-- benchmarks:begin {name} -->" in text, f"README has no block {name!r}"


def readme(tmp_path: Path) -> tuple[Path, Path]:
    path, results = tmp_path / "README.md", tmp_path / "results"
    (results / "cpu").mkdir(parents=True)
    (results / "cpu" / "2026-01-02-abc.json").write_text(json.dumps(record()))
    blocks = "\n".join(
        f"<!-- benchmarks:begin {n} -->\nold\n<!-- benchmarks:end {n} -->"
        for n in report.blocks({})
    )
    path.write_text(f"before\n{blocks}\nafter\n")
    return path, results


def test_check_notices_a_changed_figure_and_a_newer_record(tmp_path: Path) -> None:
    path, results = readme(tmp_path)
    assert not report.check(path, results)
    report.update(path, results, tmp_path / "img")
    assert report.check(path, results)
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "\nold\n" not in text
    path.write_text(text.replace("2.00", "2.01", 1))
    assert not report.check(path, results)
    path.write_text(text)
    newer = record() | {"date": "2026-02-02T00:00:00+00:00", "commit": "fffffffff"}
    (results / "cpu" / "2026-02-02-fff.json").write_text(json.dumps(newer))
    assert not report.check(path, results)


@pytest.mark.parametrize(
    "text",
    ["<!-- benchmarks:begin cpu -->", "<!-- benchmarks:begin x -->\n<!-- benchmarks:end x -->"],
)
def test_markers_that_mean_nothing_are_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="README"):
        report.fill(text, report.blocks({}))


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


def test_no_gpu_record_says_never_run() -> None:
    blocks = report.blocks({"cpu": record()})
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


def test_charts_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = charts.draw(record(), tmp_path)
    assert sorted(p.name for p in written) == [
        "benchmarks-cpu-memory.png", "benchmarks-cpu-roofline.png", "benchmarks-cpu-speedup.png",
    ]  # fmt: skip
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)
    empty = record() | {"layers": []}
    assert charts.draw(empty, tmp_path / "none") == []
