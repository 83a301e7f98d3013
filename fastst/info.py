"""What is installed, built and able to run here: ``python -m fastst``.

Imports nothing but the standard library itself, and survives whatever the rest does.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

# What ``fastst/__init__.py`` imports: it keeps silent about their errors when this module runs.
_PARTS = ("functional", "dispatch", "nn.layers", "rewrite", "models")
_PACKAGES = ("torch", "triton", "numpy", "av", "matplotlib")


def report() -> str:
    """The whole report as text. Never raises: what cannot be found out says why."""
    sections: dict[str, Callable[[], Iterator[str]]] = {
        "Versions": _versions,
        "Devices": _devices,
        "Native library": _native,
        "Backends": _backends,
        "Kernels for GPUs": _kernels,
        "Cache": _cache,
        "Environment": _environment,
    }
    lines = []
    for title, section in sections.items():
        lines.append(title)
        lines += [f"  {line}" for line in _survive(section)]
    return "\n".join(lines)


def _survive(section: Callable[[], Iterator[str]]) -> Iterator[str]:
    try:
        yield from section()
    except (Exception, SystemExit) as error:
        yield _failure(error)


def _failure(error: BaseException) -> str:
    first = str(error).strip().splitlines()
    return f"broken: {type(error).__name__}" + (f": {first[0]}" if first else "")


def _versions() -> Iterator[str]:
    yield f"fastst {_version('fastst')} in {os.path.dirname(os.path.abspath(__file__))}"
    for part in _PARTS:
        try:
            importlib.import_module(f"fastst.{part}")
        except (Exception, SystemExit) as error:
            yield f"fastst.{part} is {_failure(error)}"
    yield f"Python {platform.python_version()}, {platform.platform()}"
    for name in _PACKAGES:
        yield from _survive(functools.partial(_package, name))
    yield from _survive(_torch_build)


def _package(name: str) -> Iterator[str]:
    yield f"{name} {_version(name)}"


def _version(name: str) -> str:
    """Version of a package as its metadata has it, and whether it can be imported."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
        if name != "fastst":
            return found
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        return f"{found}, {_failure(error)}"
    return str(getattr(module, "__version__", found))


def _torch_build() -> Iterator[str]:
    import torch

    yield f"CUDA of torch: {torch.version.cuda or 'none, a CPU build'}"
    yield f"cuDNN: {torch.backends.cudnn.version() or 'none'}"


def _devices() -> Iterator[str]:
    import torch

    yield f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    devices = importlib.import_module("fastst.machine.devices")
    found = devices.present()
    if not found:
        yield "no GPU"
    for device in found:
        yield f"{device}: {devices.describe(device)}"


def _native() -> Iterator[str]:
    yield from _survive(_cpu_library)
    yield f"nvcc: {shutil.which('nvcc') or 'not on PATH'}"
    found = importlib.util.find_spec("fastst._C")
    if found is None:
        missing = importlib.import_module("fastst.machine.left_out").why_not_built("_C")
        yield f"fastst._C {missing}: FASTST_BUILD_CUDA=1 pip install . says what it takes"
        return
    yield f"fastst._C is {found.origin}"
    library = importlib.import_module("fastst._C")
    why = library.device_error()
    yield f"it sees {library.device_count()} CUDA devices" + (f": {why}" if why else "")


def _cpu_library() -> Iterator[str]:
    found = importlib.import_module("fastst.backends.cpu.library").load()
    if isinstance(found, str):
        yield f"cpu: {found}"
    else:
        yield f"fastst.{found.__name__.split('.')[-1]} is {found.__file__}"
        how = "by AVX512_BF16" if found.multiplies_pairs() else "in float32"
        if found.refuses_amx():
            how += " (the system refuses AMX)"
        yield f"it multiplies bfloat16 {'by AMX' if found.multiplies_by_amx() else how}"


def _backends() -> Iterator[str]:
    """Which backends run a dense pair, 64 to 144 to 64 channels, and why not the others."""
    import torch

    dispatch = importlib.import_module("fastst.dispatch")
    yield f"auto takes the first that can run of: {', '.join(dispatch.AUTO)}"
    yield from _verdicts(dispatch.BACKENDS, torch.device("cpu"), torch.float32)
    gpus: list[Any] = []
    with contextlib.suppress(Exception):  # of a broken driver, of which the devices tell
        gpus = importlib.import_module("fastst.machine.devices").present()
    for gpu in gpus[:1]:
        yield from _verdicts(dispatch.BACKENDS, gpu, torch.bfloat16)


def _verdicts(backends: dict[str, Any], device: Any, dtype: Any) -> Iterator[str]:
    problem = _dense_pair(device, dtype)
    for name, backend in backends.items():
        label = f"{name}, on {device.type} in {str(dtype).removeprefix('torch.')}: "
        found = [_verdict(backend, problem, phase) for phase in ("forward", "backward")]
        if found[0] == found[1]:
            yield label + found[0]
        else:
            yield f"{label}forward {found[0]}; backward {found[1]}"


def _verdict(backend: Any, problem: Any, phase: str) -> str:
    try:
        why = backend.why_not(problem, phase)
        if why is not None:
            return f"does not run: it {why}"
        avoid = backend.why_not_auto(problem, phase)
    except (Exception, SystemExit) as error:
        return f"is {_failure(error)}"
    return "runs" if avoid is None else f"runs by name, but not by auto: it {avoid}"


def _dense_pair(device: Any, dtype: Any) -> Any:
    import torch

    shapes = importlib.import_module("fastst.problem.spec")
    sizes = ((1, 64, 4, 14, 14), (144, 64, 1, 3, 3), (64, 144, 3, 1, 1))
    tensors = (torch.empty(size, device=device, dtype=dtype) for size in sizes)
    return shapes.Problem.of(
        shapes.PairTensors(*tensors), shapes.PairSpec(padding=(1, 1, 1, 1, 1, 1))
    )


def _kernels() -> Iterator[str]:
    """What was seen of them before they came here, from records: written by benchmarks.report."""
    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "machine", "status.json")
    with open(file, encoding="utf-8") as text:
        rows = json.load(text)
    for row in rows:
        for_ = ", ".join(row["executed"])
        said = [f"compiled code executed on a CPU, for {for_}"] if for_ else []
        said += [f"on {gpu}: {told}" for gpu, told in row["gpus"].items()]
        if not row["gpus"]:
            said.append("never run on a GPU")
        yield f"{row['backend']}, {row['kernels']}: {'; '.join(said)}"


def _cache() -> Iterator[str]:
    yield from _survive(_tuning)
    yield from _survive(_self_checks)


def _tuning() -> Iterator[str]:
    path = importlib.import_module("fastst.machine.choices").cache_file()
    if path.exists():
        yield f"{path}: {len(json.loads(path.read_text()))} measured choices"
    else:
        yield f"{path}: does not exist, nothing was tuned here"


def _self_checks() -> Iterator[str]:
    checks = importlib.import_module("fastst.dispatch.selfcheck")
    verdicts = checks.verdicts()
    failed = {what: why for what, why in verdicts.items() if why}
    yield f"self-checks of kernels: {len(verdicts) - len(failed)} passed, {len(failed)} failed"
    for backend, counts in checks.count_verdicts().items():
        yield f"of {backend}, with these versions: {checks.format_counts(counts)}"
    for what, why in failed.items():
        yield f"not chosen, {what}: it {why}"
    for what, why in checks.postponed_checks().items():
        yield f"left out for now, {what}: it {why}"


def _environment() -> Iterator[str]:
    found = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("FASTST_", "TRITON_"))}
    for name, value in found.items():
        yield f"{name}={value}"
    settings = importlib.import_module("fastst.machine.settings")
    for variable in settings.VARIABLES:
        if variable.name not in found:
            yield f"{variable.name} is not set ({variable.meaning})"


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m fastst", description="What is installed, built and able to run here."
    ).parse_args()
    # A terminal of another encoding must not break the one command that is for broken set-ups.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    print(report())


if __name__ == "__main__":
    main()
