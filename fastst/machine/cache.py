"""Small files of what was measured or checked here, which outlive the process.

They lie in ``$FASTST_CACHE``, ``$XDG_CACHE_HOME/fastst`` or ``~/.cache/fastst``; their keys name
all that an entry holds for: ``machine`` and ``versions``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import torch

from . import devices, settings


def folder() -> Path:
    """Where the files lie."""
    if named := settings.value("FASTST_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):  # no HOME, and a user that the system does not know
        base = os.devnull  # in which no file can be
    return Path(base) / "fastst"


@lru_cache(maxsize=16)
def machine(device: torch.device) -> str:
    """Model and vector unit of the CPU; name, driver and cuDNN of a GPU."""
    if devices.is_gpu(device):
        return f"{devices.runtime(device).get_device_name(device)} {devices.describe_driver()}"
    if device.type != "cpu":
        return f"{device.type} {platform.machine()}"
    model = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):  # no such file outside Linux, no such line everywhere
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(s.split(":", 1)[1].strip() for s in lines if s.startswith("model name"))
    return f"{model} {torch.backends.cpu.get_cpu_capability()}"


def sources() -> list[Path]:
    """The files that kernels are made of, and what calls them."""
    package = Path(__file__).parents[1]
    patterns = ("backends/**/*.py", "problem/*.py", "_C*")
    return sorted(path for pattern in patterns for path in package.glob(pattern))


@lru_cache(maxsize=1)
def versions() -> str:
    """PyTorch, Triton and its assembler, and the source of the kernels and of what calls them."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.read_bytes())
    return f"torch {torch.__version__} {_triton()} kernels {digest.hexdigest()[:12]}"


def _triton() -> str:
    """Version of the Triton that is imported, whatever its package is called, and its ptxas."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return "triton none"
    source = Path(found.origin)
    version = re.search(r"__version__ = ['\"]([^'\"]+)", source.read_text(encoding="utf-8"))
    parts = [f"triton {version[1] if version else source}"]
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        if named := os.environ.get(name):
            digest = hashlib.sha256(Path(named).read_bytes() if Path(named).exists() else b"")
            parts.append(f"{name} {named} {digest.hexdigest()[:12]}")
    return " ".join(parts)


def read(path: Path) -> dict[str, str]:
    """What a file holds; nothing if there is none, nothing and a warning if it is broken."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or not all(isinstance(v, str) for v in data.values()):
            raise ValueError("expected an object of strings")
        return data
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"fastst ignores the cache {path}: {error}", stacklevel=2)
        return {}


def add(
    path: Path, found: dict[str, str], without: Callable[[str], bool] = lambda key: False
) -> dict[str, str]:
    """Add entries to a file, which others may have written to; returns all of them.

    Those whose keys are to be ``without`` go. Atomic. Where the file cannot be written, a warning
    says that they last for this process.
    """
    with locked(path.with_name(path.name + ".add")):
        merged = {k: v for k, v in read(path).items() if not without(k)} | found
        partial = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=path.parent, suffix=".json", delete=False
            ) as file:
                partial = file.name
                json.dump(merged, file, indent=1)
            os.replace(partial, path)
        except OSError as error:
            with suppress(OSError):
                if partial is not None:
                    os.unlink(partial)
            message = f"fastst keeps what it found for this process only: {error}"
            warnings.warn(message, stacklevel=3)
    return merged


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it no other process of this machine is within it; where files can be locked."""
    file = None
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path.with_name(path.name + ".lock"), "a")  # noqa: SIM115 -- closed below
        fcntl.flock(file, fcntl.LOCK_EX)
    except (OSError, ImportError):
        pass  # then each does what is to be done by itself
    try:
        yield
    finally:
        if file is not None:
            file.close()
