"""Inspect the machine code of the native library, without a GPU.

One row for each kernel and architecture: registers, bytes of stack frame and of spills (local loads
and stores), static shared memory, 16-byte loads. Fails on a stack frame, on a spill, or on a
depthwise kernel that moves its frames by less than 16 bytes. Dynamic shared memory is the host's
choice; its limits are in ``fastst.backends.cuda_depthwise``.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

NVIDIA_TOOLS = "backends/nvidia/bin"  # inside the package triton, where there is no toolkit
WIDE = re.compile(r"\b(LDG|LDGSTS)\.E\.(\w+\.)*128\b")
LOCAL = re.compile(r"\b(LDL|STL)\b")


def tool(name: str) -> str:
    """Path of a CUDA binary utility: on PATH, in the toolkit, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    places = ["/usr/local/cuda/bin"]
    if triton is not None and triton.origin is not None:
        places.append(str(Path(triton.origin).parent / NVIDIA_TOOLS))
    found = shutil.which(name)
    for place in places:
        found = found or shutil.which(name, path=place)
    if found is None:
        sys.exit(f"{name} is neither on PATH nor in {' nor in '.join(places)}")
    return found


def library() -> Path | None:
    spec = importlib.util.find_spec("fastst._C")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def names(mangled: list[str]) -> dict[str, str]:
    """Readable names: kernel<types>."""
    demangled = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = [
        re.sub(r"\(anonymous namespace\)::|fastst::|^void |\(int\)|\(bool\)", "", d).split("(")[0]
        for d in demangled
    ]
    return dict(zip(mangled, short, strict=True))


def inspect(cubin: Path) -> list[tuple[str, dict[str, int]]]:
    """Each kernel of a cubin with its resources and counts of instructions."""
    usage = output(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
    resources = {
        m[1]: {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", m[2])}
        for m in re.finditer(r"Function (\S+):\s*\n\s*(.*)", usage)
    }
    counts: dict[str, Counter[str]] = {}
    current = ""
    # nvdisasm starts each kernel with its section; cuobjdump --dump-sass would need a toolkit.
    for line in output(tool("nvdisasm"), "-c", str(cubin)).splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.([^\s,]+)", line):
            current = section[1]
        elif current:
            count = counts.setdefault(current, Counter())
            count["wide"] += bool(WIDE.search(line))
            count["local"] += bool(LOCAL.search(line))
    return [(name, {**r, **counts.get(name, Counter())}) for name, r in resources.items()]


def main() -> int:
    found = library()
    if found is None:
        print("fastst._C is not built (no nvcc): nothing to inspect")
        return 1 if shutil.which("nvcc") else 0
    wrong = []
    print(f"{'kernel':64} arch   regs stack local shared wide")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tool("cuobjdump"), "--extract-elf", "all", str(found)],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        rows = []
        for cubin in sorted(Path(folder).glob("*.cubin")):
            arch = re.search(r"sm_\w+?(?=\.)", cubin.name)
            rows += [(n, arch[0] if arch else "?", r) for n, r in inspect(cubin)]
    readable = names(sorted({n for n, _, _ in rows}))
    for mangled, arch, r in sorted(rows, key=lambda row: (readable[row[0]], row[1])):
        name, local, wide = readable[mangled], r.get("local", 0), r.get("wide", 0)
        print(f"{name:64} {arch:6} {r['REG']:4} {r['STACK']:5} {local:5} {r['SHARED']:6} {wide:4}")
        if r["STACK"] or r["LOCAL"] or local:
            wrong.append(f"{name} on {arch}: stack frame or spill")
        if name.startswith("depthwise") and not wide:
            wrong.append(f"{name} on {arch}: no 16-byte loads")
    if not rows:
        wrong.append("no kernels found")
    print(f"{len(rows)} kernels, {len(wrong)} wrong")
    for line in wrong:
        print(f"  {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # the neighbouring file hides the package triton
    sys.exit(main())
