"""The record of a run: one JSON file that says where, with what, at which commit, and every row."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FAULTED = 70  # exit status after an error of the GPU: a new process can go on
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Those on which the speed of a convolution depends.
INSTRUCTIONS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16",
)  # fmt: skip
SECTIONS = ("layers", "models", "training_batches", "overhead", "cold_start", "stages")


def _command(*args: str) -> str | None:
    try:
        done = subprocess.run(
            args, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """Short hash of the checkout, from git or ``FASTST_COMMIT``; "+" marks uncommitted code."""
    given = os.environ.get("FASTST_COMMIT")
    if given:
        return given
    short = _command("git", "rev-parse", "--short=9", "HEAD")
    if not short:
        return "unknown"
    code = ("fastst", "csrc", "benchmarks/*.py", "setup.py")
    return short + ("+" if _command("git", "status", "--porcelain", "--", *code) else "")


def _cpuinfo(field: str) -> str:
    """What Linux says of the first core, or nothing."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{field}\s*:\s*(.+)$", text, re.M)
    return found[1].strip() if found else ""


def machine(device: torch.device) -> dict[str, Any]:
    """The machine in terms that mean something elsewhere: no host names, no paths."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_family": _cpuinfo("cpu family") + "/" + _cpuinfo("model"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_instructions": [f for f in INSTRUCTIONS if f in _cpuinfo("flags").split()],
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory_gib": round(p.total_memory / 2**30, 1),
            "multiprocessors": p.multi_processor_count,
            "driver": _command(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
            ),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def place(device: torch.device) -> str:
    """Directory of the records of this kind of machine: the GPU's name, or "cpu"."""
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


class Record:
    """A record on disk; every change is written at once, so that a cut-off run keeps its rows."""

    def __init__(self, path: Path, device: torch.device, fresh: bool = False, **about: Any) -> None:
        """Open ``path``, or start it (over, if ``fresh``) with a description of this machine."""
        self.path = path
        if path.exists() and not fresh:
            self.data: dict[str, Any] = json.loads(path.read_text())
        else:
            self.data = {
                "schema": 1,
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                "commit": commit(),
                "place": place(device),
                "machine": machine(device),
            }
        self.data |= about
        for section in SECTIONS:
            self.data.setdefault(section, [])
        self.write()

    def extend(self, section: str, rows: list[dict[str, Any]]) -> None:
        self.data[section].extend(rows)
        self.write()

    def set(self, **values: Any) -> None:
        self.data |= values
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(_round(self.data), indent=1, ensure_ascii=False) + "\n")
        partial.replace(self.path)


def _round(value: Any) -> Any:
    """Five significant digits: more than any clock here has. NaN, which is no JSON, as None."""
    if isinstance(value, float):
        return None if value != value else float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _round(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_round(v) for v in value]
    return value


def default_path(device: torch.device) -> Path:
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return RESULTS / place(device) / f"{day}-{commit().rstrip('+')}.json"


def newest(
    results: Path = RESULTS, kind: Callable[[dict[str, Any]], str] | None = None
) -> dict[str, dict[str, Any]]:
    """The newest record of each place, or of each kind of machine."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(results.glob("*/*.json")):
        data = json.loads(path.read_text())
        key = path.parent.name if kind is None else kind(data)
        if key not in found or data["date"] > found[key]["date"]:
            found[key] = data
    return found


def chip(machine: dict[str, Any]) -> str:
    """A record's processor, without what is no name."""
    return re.sub(r"\((R|TM)\)|\b(Processor|CPU)\b|@.*", "", machine["cpu"]).strip()


def cpu(machine: dict[str, Any]) -> str:
    """A record's processor and the instruction sets that it is used by."""
    sets = [str(machine.get("cpu_capability", "")).replace("AVX512", "AVX-512")]
    if "amx_bf16" in machine.get("cpu_instructions", ()):
        sets.append("AMX")
    used = " and ".join(filter(None, sets))
    return f"{chip(machine)} with {used}" if used else chip(machine)


def progress(items: Any, **kwargs: Any) -> Any:
    """tqdm where it is installed and somebody watches or a log wants lines; else the items."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, file=sys.stderr, **kwargs)
