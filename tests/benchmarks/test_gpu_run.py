"""The one GPU run: its stages on the CPU, its limits, and what it calls wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_run
from benchmarks.gpu_run import ROOT, Stage

ORDER = [
    "build", "instances", "memcheck", "racecheck", "stress", "overhead", "layers", "tests", "tune",
    "layers compiled", "models", "layers dtypes", "layers rest", "models compiled",
]  # fmt: skip


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.slow
@pytest.mark.skipif("FASTST_DRY_RUN" not in os.environ, reason="minutes: with FASTST_DRY_RUN=1")
def test_dry_run_goes_through_every_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTST_CACHE", str(tmp_path.parent / "cache"))
    # Time enough on any machine: the limits are tested below.
    status = gpu_run.main(
        ["--dry", "all", "--out", str(tmp_path), "--minutes", "60", "--commit", "abc"]
    )
    data = json.loads((tmp_path / "record.json").read_text())
    told = {s["stage"]: s.get("told") for s in data["stages"] if not s["ok"]}
    assert (status, told) == (0, {}), (tmp_path / "log.txt").read_text()[-3000:]
    assert [s["stage"] for s in data["stages"]] == ORDER
    assert not any(s["skipped"] for s in data["stages"])
    assert data["commit"] == "abc"
    assert {r["case"] for r in data["layers"]} == {
        "128-230-128", "mid-45", "parallel-add-64", "tokenizer-128",
    }  # fmt: skip
    assert {(r["mode"], "compiled" in r["contender"]) for r in data["models"]} == {
        (mode, compiled) for mode in ("inference", "training") for compiled in (False, True)
    }  # fmt: skip
    assert data["training_batches"]
    assert data["overhead"]
    assert data["cold_start"]
    files = list(tmp_path.iterdir())
    assert {"summary.txt", "record.json", "log.txt"} <= {f.name for f in files}
    assert len(files) <= 9
    assert {r["state"] for r in json.loads((tmp_path / "instances.json").read_text())} == {"passed"}
    assert sum(f.stat().st_size for f in files) < 16 << 20
    summary = (tmp_path / "summary.txt").read_text()
    assert len(summary.splitlines()) <= 60
    assert summary in capsys.readouterr().out


# State of the instance in which each is planted, and what is told of it.
PLANTED = {
    "wrong": ("wrong", "is off by"), "oom": ("unknown", "out of memory"),
    "fault": ("fault", "illegal memory access"), "hang": ("hang", "did not end within"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
def test_a_dry_run_names_and_survives_every_plant(tmp_path: Path) -> None:
    """All of them in one run, in a process of its own, which forks for each stage."""
    options = ["--dry", "--plant", *PLANTED, "--out", str(tmp_path), "--minutes", "60"]
    command = [sys.executable, "-m", "benchmarks.gpu_run", *options]
    environment = os.environ | {"FASTST_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    log = done.stdout + done.stderr + (tmp_path / "log.txt").read_text()[-3000:]
    assert done.returncode == 1, log
    stages = json.loads((tmp_path / "record.json").read_text())["stages"]
    assert [s["stage"] for s in stages] == ORDER
    assert {s["stage"] for s in stages if not s["ok"] or s["skipped"]} == {"instances"}, log
    failures = next(s["failures"] for s in stages if s["stage"] == "instances")
    assert len(failures) == len(PLANTED)
    for plant, (state, told) in PLANTED.items():
        (failure,) = (f for f in failures if f.startswith(f"{state}: "))
        assert gpu_run.PLANTS[plant] in failure and told in failure
        assert failure[:80] in done.stdout  # its summary
    rows = json.loads((tmp_path / "instances.json").read_text())
    kinds = [r["kind"] for r in rows if r["state"] == "passed"]
    assert {gpu_run.PLANTS[p] for p in ("wrong", "fault", "hang")} <= set(kinds)  # the next ones


def run(
    monkeypatch: pytest.MonkeyPatch, out: Path, stages: list[Stage], minutes: float = 2.0
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(gpu_run, "stages", lambda *_: stages)
    status = gpu_run.main(["--dry", "--out", str(out), "--minutes", str(minutes)])
    return status, json.loads((out / "record.json").read_text())


@pytest.mark.slow
def test_one_wrong_stage_makes_the_run_wrong_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = Stage("bad", 1, python("print('no such kernel'); raise SystemExit(3)"))
    good = Stage("good", 1, python("print('fine')"))
    status, data = run(monkeypatch, tmp_path, [bad, good])
    assert status == 1
    assert [s["ok"] for s in data["stages"]] == [False, True]
    assert data["stages"][0]["told"] == "exit status 3: no such kernel"
    assert "no such kernel" in (tmp_path / "log.txt").read_text()
    assert "WRONG" in (tmp_path / "summary.txt").read_text()


@pytest.mark.slow
def test_a_stage_that_hangs_is_ended_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(8); pathlib.Path({str(alive)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    hangs = Stage("hangs", 1, python(code))
    after = Stage("after", 1, python(""))
    start = time.monotonic()
    status, data = run(monkeypatch, tmp_path, [hangs, after], minutes=21 / 60)
    assert status == 1
    assert [s["ok"] for s in data["stages"]] == [False, True]
    assert data["stages"][0]["told"].startswith("cut off after")
    time.sleep(max(0.0, 10 - (time.monotonic() - start)))
    assert not alive.exists()


def test_stages_are_written_as_they_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    code = f"import json; assert [s['stage'] for s in json.load(open({str(record)!r}))['stages']] == ['first']"  # noqa: E501
    stages = [Stage("first", 1, python("")), Stage("second", 1, python(code))]
    status, data = run(monkeypatch, tmp_path, stages)
    assert status == 0, data["stages"]


def test_nothing_runs_after_a_build_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = Stage("build", 1, python("raise SystemExit('no g++')"), needed=True)
    status, data = run(monkeypatch, tmp_path, [broken, Stage("layers", 1, python(""))])
    assert (status, [s["stage"] for s in data["stages"]]) == (1, ["build"])


def test_a_stage_goes_on_in_a_new_process_after_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = (
        "import sys\nif '--resume' in sys.argv: print('rest'); sys.exit(0)\n"
        f"print('FAULT layers/64/eval: CUDA error'); sys.exit({gpu_run.FAULTED})"
    )
    status, data = run(monkeypatch, tmp_path, [Stage("layers", 1, python(code))])
    assert status == 1
    (stage,) = data["stages"]
    assert stage["told"] == "1 units faulted"
    assert stage["failures"] == ["FAULT layers/64/eval: CUDA error"]
    assert "rest" in (tmp_path / "log.txt").read_text()


def test_no_stage_repeats_another(tmp_path: Path) -> None:
    """Every instance and 10,000 repeats of a pair have stages, and no time in that of the tests."""
    stages = {s.name: s for s in gpu_run.stages(None, tmp_path, tmp_path)}
    assert list(stages) == ORDER
    command = " ".join(stages["tests"].command)
    assert "-m gpu" in command and "--deselect tests/backends/test_gpu.py" in command
    assert "10000" in stages["stress"].command


def test_plants_are_for_dry_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_run.main(["--plant", "hang"])
    assert "--plant is for --dry" in capsys.readouterr().err


def test_tools_are_found_where_setup_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "nvcc"
    tool.parent.mkdir()
    tool.write_text("")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_run.found_in_toolkit("nvcc") == str(tool)


def test_stages_keep_the_paths_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/carried")
    code = "import sys; raise SystemExit('/carried' not in sys.path)"
    assert gpu_run.execute(python(code), 60, {}).status == 0


def test_stages_never_interpret_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; raise SystemExit('TRITON_INTERPRET' in os.environ)"
    assert gpu_run.execute(python(code), 60, {}).status == 0


def test_no_time_left_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, data = run(monkeypatch, tmp_path, [Stage("late", 1, python("1/0"))], minutes=0.01)
    assert data["stages"][0]["told"] == "no time left"


def test_unused_time_goes_to_the_later_stages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    show = python("import sys; print(sys.argv[1])") + ["{minutes}"]
    limits = []
    original = gpu_run.run_stage

    def spied(stage: Stage, limit_s: float, *rest: Any) -> dict[str, Any]:
        limits.append(limit_s)
        return original(stage, limit_s, *rest)

    monkeypatch.setattr(gpu_run, "run_stage", spied)
    run(monkeypatch, tmp_path, [Stage("a", 1, show), Stage("b", 1, show)], minutes=10)
    assert limits[0] == pytest.approx(295, abs=5)
    assert limits[1] > 1.8 * limits[0]
    assert float((tmp_path / "log.txt").read_text().splitlines()[2]) < limits[0] / 60


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one"/>
<testcase classname="tests.test_a" name="two"><failure/></testcase>
<testcase classname="tests.test_a" name="three"><skipped/></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted_and_failures_named(tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    assert not gpu_run.judge_tests(3, junit, False)["ok"]
    junit.write_text(JUNIT)
    found = gpu_run.judge_tests(1, junit, False)
    assert not found["ok"]
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"] == ["tests.test_a::two"]


def test_tests_that_were_ended_are_told(tmp_path: Path) -> None:
    text = "tests/a.py::one PASSED [ 33%]\ntests/a.py::two FAILED [ 66%]\ntests/a.py::three"
    found = gpu_run.judge_tests(-9, tmp_path / "tests.xml", False, text)
    assert not found["ok"]
    assert "1 passed, 1 failed" in found["told"] and found["told"].endswith("tests/a.py::three")


def test_a_run_in_which_every_gpu_test_was_skipped_is_wrong(tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text('<testsuite><testcase name="a"><skipped/></testcase></testsuite>')
    assert not gpu_run.judge_tests(0, junit, False)["ok"]


@pytest.mark.parametrize(
    ("status", "text", "ok", "skipped"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", True, False),
        (99, "========= Invalid __global__ read of size 4 bytes", False, False),
        (1, "========= Error: Device not supported. Please refer to the documentation", True, True),
        (1, "Traceback", False, False),
    ],
)
def test_the_sanitizer_finds_or_does_not_work(
    status: int, text: str, ok: bool, skipped: bool
) -> None:
    found = gpu_run.judge_sanitizer(status, text)
    assert (found["ok"], found.get("skipped", False)) == (ok, skipped)


def test_without_a_gpu_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_run.main(["--out", str(tmp_path)]) == 2
    assert "requires a CUDA device" in capsys.readouterr().err
