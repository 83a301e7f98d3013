"""One command for a machine with a GPU: build, test, sanitise, tune, measure, record, summarise.

Needs PyTorch, Triton and pytest; nvcc and ninja for the native library; no network. Every stage has
its share of the time and is written when it ends, so that being cut off loses only the rest.
Writes to --out: summary.txt, record.json, log.txt and up to three charts. Exits non-zero when
anything was wrong. ``--dry`` goes through every stage on the CPU in seconds, ``--dry all`` through
all of their kinds of work in minutes; both at tiny sizes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from fastst.dispatch import selfcheck

from . import charts, tables
from .record import FAULTED, ROOT, Record

LOG_BYTES = 400_000  # of each stage's output, the end of it
SUMMARY_LINES = 60
SANITIZED = 99  # exit status by which compute-sanitizer says that it found something


@dataclass(frozen=True)
class Stage:
    """A command and its share of what time is left; ``why_not`` says why it cannot run here."""

    name: str
    share: float
    command: list[str]
    why_not: str | None = None
    environment: tuple[tuple[str, str], ...] = ()
    judge: Callable[[int, str], dict[str, Any]] | None = None
    needed: bool = False  # nothing after it is worth its time where it fails


@dataclass(frozen=True)
class Outcome:
    status: int
    output: str
    seconds: float
    cut_off: bool


def execute(
    command: Sequence[str], limit_s: float, environment: dict[str, str], warm: bool = False
) -> Outcome:
    """Run a command in a process group of its own; end all of it after the limit.

    Args:
        warm: fork this process for a module, which then need not import PyTorch.
    """
    start = time.monotonic()
    # What is measured and verified here are compiled kernels, never interpreted ones.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment = inherited | {"PYTHONPATH": _paths(inherited)} | environment
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = (_fork if warm and command[1] == "-m" else _start)(command, log, environment)
        cut_off = False
        try:
            status = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            cut_off = True
            os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        log.seek(0)
        output = log.read()
    return Outcome(status, output, time.monotonic() - start, cut_off)


def _start(command: Sequence[str], log: IO[str], environment: dict[str, str]) -> Any:
    return subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
        env=environment,
    )  # fmt: skip


class _Fork:
    """What a run needs of ``subprocess.Popen``."""

    def __init__(self, process: Any) -> None:
        self.process, self.pid = process, process.pid

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("", timeout or 0.0)
        return int(self.process.exitcode)


def _fork(command: Sequence[str], log: IO[str], environment: dict[str, str]) -> Any:
    there = multiprocessing.get_context("fork")
    process = there.Process(target=_run_module, args=(command[2:], log.fileno(), environment))
    process.start()
    return _Fork(process)


def _run_module(command: Sequence[str], log: int, environment: dict[str, str]) -> None:
    os.setsid()
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [*command]
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _paths(environment: dict[str, str]) -> str:
    """This checkout before what was on the path: packages may have been brought there."""
    return os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))


def module(name: str, *args: str) -> list[str]:
    return [sys.executable, "-m", name, *args]


# What may go wrong in a dry run, each in the first instance of its kind.
PLANTS = {
    "wrong": "grouped forward", "oom": "parallel forward", "fault": "depthwise forward",
    "hang": "dense forward",
}  # fmt: skip


def stages(dry: str | None, out: Path, scratch: Path, plants: Sequence[str] = ()) -> list[Stage]:
    """Every stage in the order of its value, with its share of the time.

    Args:
        dry: "few" or "all" of its work on the CPU, at tiny sizes.
        plants: of ``PLANTS``, what goes wrong in a dry run.
    """
    record, junit = str(out / "record.json"), scratch / "tests.xml"
    device = "cpu" if dry else "cuda"
    few = ["--dry"] if dry == "few" else []

    def layers(name: str, share: float, dry_case: str, *args: str) -> Stage:
        common = ("--device", device, "--out", record, "--seconds", "1", "--minutes", "{minutes}")
        small = ("--dry", "--peers", "core", "--families", dry_case)
        command = module("benchmarks.layers", *common, *(small if dry else args))
        return Stage(name, share, command)

    tests = module("pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={junit}")
    if dry:
        tests += ["--collect-only", *(["tests/backends/test_gpu.py"] if few else [])]
    else:
        tests.append("--continue-on-collection-errors")
        # Instances and repeats have stages of their own, with limits that suit them.
        tests += ["--deselect", "tests/backends/test_gpu.py"]
        if importlib.util.find_spec("pytest_timeout"):
            tests += ["--timeout=120", "--timeout-method=thread"]
        if importlib.util.find_spec("xdist"):
            tests += ["-n", "4"]
    probe = module("benchmarks.probe", "--device", device, *few)
    tool = found_in_toolkit("compute-sanitizer")
    missing = None if tool or dry else "compute-sanitizer is not in the CUDA toolkit"
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    sanitizers = []
    for check in ("memcheck", "racecheck"):
        watched = [tool or "", "--tool", check, "--error-exitcode", str(SANITIZED), *probe]
        command = probe if dry else watched
        sanitizers.append(Stage(check, 7, command, missing, uncached, judge_sanitizer))
    whole = ["--device", device, "--out", record, *(["--dry"] if dry else [])]
    networks = [*whole, "--compile", "none", *([] if dry else ["--minutes", "{minutes}"])]
    compiled = [*whole, "--minutes", "{minutes}", "--memory", ""]
    compiled += ["--compile", "original", "--modes", "inference"] if few else []
    starts = "0" if few else "1" if dry else "3"
    some = "64-144-64,256-576-256"
    rest = "tokenizer,latents,parallel-4d,odd,r2plus1d-18-torchvision,r2plus1d-34"
    return [
        build(dry is not None, scratch),
        instances(dry is not None, out, device, plants),
        *sanitizers,
        Stage("stress", 5, [*probe, "--stress", "3" if dry else "10000"]),
        Stage("overhead", 4, module("benchmarks.overhead", *whole, "--starts", starts)),
        layers(
            "layers", 24, "128-230-128", "--dtypes", "bf16", "--modes", "inference,training-bn",
            "--families", "r2plus1d-18,depthwise",
        ),
        Stage(
            "tests", 18, tests, None, (("FASTST_FUZZ", "4"),),  # each compiles kernels of its own
            lambda s, text: judge_tests(s, junit, bool(dry), text),
        ),
        Stage("tune", 6, [*probe, "--tune"]),
        layers(
            "layers compiled", 10, "mid-45", "--dtypes", "bf16", "--peers", "compiled",
            "--modes", "inference,training-bn", "--families", some,
        ),
        Stage("models", 10, module("benchmarks.models", *networks)),
        layers(
            "layers dtypes", 10, "parallel-add-64", "--dtypes", "tf32,fp16,fp32",
            "--modes", "inference,training-bn", "--families", "r2plus1d-18",
        ),
        layers("layers rest", 8, "tokenizer-128", "--dtypes", "bf16", "--families", rest),
        Stage("models compiled", 8, module("benchmarks.models", *compiled)),
    ]  # fmt: skip


def build(dry: bool, scratch: Path) -> Stage:
    """The native library for this GPU, in place; a dry run has it left out, and elsewhere."""
    command = [sys.executable, "setup.py", "build_ext"]
    if dry:
        command += ["--build-lib", str(scratch)]
        none = ("FASTST_BUILD_CUDA", "0"), ("FASTST_BUILD_CPU", "0")
        return Stage("build", 14, command, None, none, needed=True)
    environment = ("TORCH_CUDA_ARCH_LIST", architecture()), ("FASTST_BUILD_CUDA", "1")
    return Stage("build", 14, [*command, "--inplace"], why_no_build(), environment, needed=True)


def instances(dry: bool, out: Path, device: str, plants: Sequence[str] = ()) -> Stage:
    """Each instance of each kernel by itself, a hang of a few seconds being one."""
    results = out / "instances.json"
    command = module("benchmarks.instances", "--device", device, "--out", str(results))
    command += ["--minutes", "{minutes}"]
    environment: tuple[tuple[str, str], ...] = ()
    if dry:
        command += ["--dry", "--unit-seconds", "5" if "hang" in plants else "60"]
        environment = (("TRITON_INTERPRET", "1"),)
    if plants:
        paths = os.pathsep.join((str(ROOT / "tests" / "support" / "plants"), str(ROOT)))
        planted = ",".join(f"{plant}:{PLANTS[plant]}" for plant in plants)
        environment += ("FASTST_TEST_PLANT", planted), ("PYTHONPATH", paths)
    return Stage("instances", 14, command, None, environment,
                 lambda status, _: judge_instances(status, results))  # fmt: skip


def judge_instances(status: int, results: Path) -> dict[str, Any]:
    """Counts, and the name of each unit that did not pass; also where the stage did not end."""
    if not results.exists():
        return {"ok": False, "told": f"ended with {status} and left no results"}
    rows = json.loads(results.read_text())
    states = [r["state"] for r in rows]
    bad = [r for r in rows if r["state"] not in ("passed", "not run")]
    told = selfcheck.format_counts({s: states.count(s) for s in dict.fromkeys(states)})
    # The state first: the summary has room for the beginning.
    failures = [f"{r['state']}: {r['backend']} {r['dtype']} {r['name']}: {r['why']}" for r in bad]
    kept = ("backend", "kind", "dtype", "name", "state")
    return {
        "ok": status == 0 and not bad, "told": told, "failures": failures,
        "instances": [{k: r[k] for k in kept} for r in rows],
    }  # fmt: skip


def found_in_toolkit(name: str) -> str | None:
    """A program on the PATH or in the CUDA toolkit, where setup.py looks for nvcc, too."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or ""
    places = [str(Path(home) / "bin")] if home else []
    places += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return next((f for p in places if (f := shutil.which(name, path=p))), None)


def architecture() -> str:
    """Only this GPU's, for a quick build: "9.0a" on Hopper, whose own instructions need the "a"."""
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + "a" * (major >= 9)


def why_no_build() -> str | None:
    """Why the native library is not built in place, or None."""
    if not (ROOT / "setup.py").exists() or not list((ROOT / "csrc").glob("**/*.cu")):
        return "there is no native library in this checkout"
    if found_in_toolkit("nvcc") is None:
        return "nvcc is not in CUDA_HOME, on the PATH or in /usr/local/cuda"
    return None


def judge_tests(status: int, junit: Path, dry: bool, text: str = "") -> dict[str, Any]:
    """Counts and names of failures. No GPU test at all is as wrong as one that fails."""
    if dry:
        return {"ok": status in (0, 5)}  # 5: nothing carries the marker
    if not junit.exists():
        words = text.split()
        counts = ", ".join(f"{words.count(w)} {w.lower()}" for w in ("PASSED", "FAILED", "ERROR"))
        started = [line.split()[0] for line in text.splitlines() if "::" in line]
        last = f"; the last to start: {started[-1]}" if started else ""
        told = f"pytest ended with {status} and left no report: {counts}{last}"
        return {"ok": False, "told": told}
    cases = list(ElementTree.parse(junit).iter("testcase"))
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    passed = len(cases) - len(bad) - len(skipped)
    return {
        "ok": status == 0 and passed > 0,
        "passed": passed, "failed": len(bad), "skipped": len(skipped),
        "failures": [f"{c.get('classname')}::{c.get('name')}" for c in bad][:50],
        "told": f"{passed} passed, {len(bad)} failed, {len(skipped)} skipped",
    }  # fmt: skip


def judge_sanitizer(status: int, text: str) -> dict[str, Any]:
    """Found something, found nothing, or does not work on this machine."""
    if status == 0:
        return {"ok": True}
    if status == SANITIZED:
        found = [line.strip("= \n") for line in text.splitlines() if line.startswith("=====")]
        return {"ok": False, "told": "; ".join(found[:3])[:300]}
    last = (text.strip().splitlines() or ["no output"])[-1][:160]
    if "not supported" in text or "Unable to" in text or "error 999" in text:
        return {"ok": True, "skipped": True, "told": f"does not work here: {last}"}
    return {"ok": False, "told": last}


def skip(stage: Stage, why: str) -> dict[str, Any]:
    return {"stage": stage.name, "ok": True, "skipped": True, "seconds": 0.0, "told": why}


def run_stage(stage: Stage, limit_s: float, log: Path, warm: bool) -> dict[str, Any]:
    """Run one stage within its limit; what happened, for the record."""
    if stage.why_not is not None:
        return skip(stage, stage.why_not)
    # The measuring stages stop by themselves a little before they would be ended.
    minutes = f"{max(limit_s - 25, 0.6 * limit_s) / 60:.3f}"
    command = [a.replace("{minutes}", minutes) for a in stage.command]
    done, faults = execute(command, limit_s, dict(stage.environment), warm), []
    spent, output = done.seconds, done.output
    while done.status == FAULTED and limit_s - spent > 30:  # the next unit, in a new process
        faults += [line for line in done.output.splitlines() if line.startswith("FAULT ")]
        left = f"{max(limit_s - spent - 25, 0.6 * (limit_s - spent)) / 60:.3f}"
        again = [a.replace("{minutes}", left) for a in stage.command] + ["--resume"]
        done = execute(again, limit_s - spent, dict(stage.environment), warm)
        spent, output = spent + done.seconds, output + done.output
    done = Outcome(done.status, output, spent, done.cut_off)
    found: dict[str, Any] = {"ok": done.status == 0 and not faults}
    if stage.judge is not None:
        found = stage.judge(done.status, done.output)
    if done.cut_off:  # stages end by themselves before: something in it waits for ever
        told = f"cut off after {done.seconds:.0f} s"
        found |= {"ok": False, "told": "; ".join(filter(None, (told, found.get("told"))))}
    if faults:
        found |= {"ok": False, "told": f"{len(faults)} units faulted", "failures": faults}
    if not found["ok"] and "told" not in found:
        last = (done.output.strip().splitlines() or ["no output"])[-1]
        found["told"] = f"exit status {done.status}: {last[:200]}"
    with log.open("a") as f:
        f.write(f"\n===== {stage.name}: {'ok' if found['ok'] else 'WRONG'}, {done.seconds:.0f} s\n")
        f.write(done.output[-LOG_BYTES:])
    return {"stage": stage.name, "skipped": False, "seconds": done.seconds} | found


def summary(data: dict[str, Any]) -> str:
    """What a reader must know, in at most 60 lines."""
    lines = [tables.machine_line(data), ""]
    for s in data["stages"]:
        word = "skipped" if s.get("skipped") else "ok" if s["ok"] else "WRONG"
        lines.append(
            f"{s['stage']:16} {word:8} {s['seconds']:6.0f} s  {s.get('told', '')}".rstrip()
        )
    failures = [f for s in data["stages"] for f in s.get("failures", [])]
    refused = [
        f"{r['label']} {r['mode']} {r['dtype']} {r['contender']}: {r['refused']}"
        for r in data["layers"] if r["refused"] and r["kind"] == "fastst"
    ]  # fmt: skip
    for title, found in (("failed tests", failures), ("results of ours refused", refused)):
        if found:
            lines += ["", f"{title}: {len(found)}", *(f"  {f[:150]}" for f in found[:8])]
    if data.get("not_run"):
        lines += ["", f"not run in the given time: {len(data['not_run'])} units"]
    lines += ["", *tables.by_family(data["layers"]).splitlines()]
    text = tables.models(data)
    lines += ["", *text.splitlines()] if text else []
    cut = len(lines) - SUMMARY_LINES
    if cut > 0:
        lines = [*lines[: SUMMARY_LINES - 1], f"… {cut + 1} more lines: see record.json"]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_run", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu_run")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--dry", nargs="?", const="few", choices=("few", "all"), help="every stage on the CPU, tiny"
    )
    parser.add_argument(
        "--plant", nargs="+", default=[], choices=PLANTS, help="in a dry run: goes wrong so"
    )
    parser.add_argument("--commit", help="of this checkout, where git is not there to ask")
    args = parser.parse_args(argv)
    if args.plant and not args.dry:
        parser.error("--plant is for --dry")
    if not args.dry and not torch.cuda.is_available():
        print(
            "gpu_run requires a CUDA device that PyTorch sees; --dry goes without", file=sys.stderr
        )
        return 2
    if args.commit:
        os.environ["FASTST_COMMIT"] = args.commit
    if args.dry == "few":
        importlib.import_module("torch._inductor")  # by profilers: once, not in every fork
    end = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if args.dry else "cuda")
    path, log = args.out / "record.json", args.out / "log.txt"
    Record(path, device, fresh=True, dry=args.dry is not None)
    log.write_text("")
    with tempfile.TemporaryDirectory() as scratch:
        todo = stages(args.dry, args.out, Path(scratch), args.plant)
        while todo:
            stage, left = todo[0], end - time.monotonic() - 10
            shares = sum(s.share for s in todo if s.why_not is None or s is stage)
            limit, todo = left * stage.share / shares, todo[1:]
            if limit < 5:
                found = skip(stage, "no time left")
            else:
                found = run_stage(stage, limit, log, args.dry == "few")
            record = Record(path, device)  # a stage may have written to it
            record.extend("stages", [found])
            (args.out / "summary.txt").write_text(summary(record.data))
            word = "ok" if found["ok"] else "WRONG"
            print(f"{stage.name}: {word}, {found['seconds']:.0f} s", flush=True)
            if stage.needed and not found["ok"]:
                print(f"stopped: {stage.name} failed", flush=True)
                break
    data = json.loads(path.read_text())
    charts.draw(data, args.out)
    print(summary(data))
    return 0 if all(s["ok"] for s in data["stages"]) else 1


if __name__ == "__main__":
    sys.exit(main())
