"""Inspect the machine code of the native library, without a GPU.

One row for each kernel and architecture: registers, bytes of stack frame and of spills (local loads
and stores), static shared memory, 16-byte loads; TMA loads, matrix products and their columns.
Fails on a stack frame, on a spill, on a depthwise kernel that moves its frames by less than 16
bytes, and on a Hopper kernel without TMA, with products of other columns than it is named after,
with products that wait for each other, that only end a group or whose operands are overwritten,
with more waits or issue slots of a tile than in table.json, or than the issue slots that are
allowed. The wrappers of Hopper's instructions are compiled by themselves (wrappers.cu), for every
number of columns. Dynamic shared memory is the host's choice; its limits are in
``fastst.backends.cuda.depthwise``. So is the size of clusters, of which machine code only has loads
for several blocks.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])  # this file's neighbour hides the package triton

from tests.static import hopper, measured
from tests.static.sass import Program

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
NVIDIA_TOOLS = "backends/nvidia/bin"  # inside the package triton, where there is no toolkit
WIDE = re.compile(r"\b(LDG|LDGSTS)\.E\.(\w+\.)*128\b")
LOCAL = re.compile(r"\b(LDL|STL)\b")
PRODUCT = re.compile(r"\bHGMMA\.64x(\d+)x16\.F32\S* R\d")  # with no register it only ends a group
TMA = re.compile(r"\bUTMALDG\.(\dD)(\.MULTICAST)?")
# Kernels, and the most issue slots besides products of a tile, of its clocks: alone, and counting.
ALLOWED_SLOTS = (
    ("hopper_spatial_kernel<__nv_bfloat16, 144, 2, 2>", 0.25, 0.35),
    ("hopper_spatial_kernel<__nv_bfloat16, 144, 1, 2>", 0.25, 0.35),
)
# Kernels whose blocks copy weights to each other.
SHARING = ("hopper_spatial_kernel", "hopper_spatial_gradient_kernel", "hopper_temporal_kernel")


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


@functools.cache
def disassembled(cubin: Path) -> dict[str, str]:
    """The code of each kernel; nvdisasm starts it with its section, and cuobjdump --dump-sass would
    need a toolkit."""
    text = output(tool("nvdisasm"), "-c", str(cubin))
    _, *parts = re.split(r"^\s*\.section\s+\.text\.([^\s,]+)", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def inspect(cubin: Path) -> list[tuple[str, Counter[str]]]:
    """Each kernel of a cubin with its resources and counts of instructions."""
    usage = output(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
    resources = {
        m[1]: {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", m[2])}
        for m in re.finditer(r"Function (\S+):\s*\n\s*(.*)", usage)
    }
    counts: dict[str, Counter[str]] = {}
    for current, code in disassembled(cubin).items():
        count = counts.setdefault(current, Counter())
        for line in code.splitlines():
            count["wide"] += bool(WIDE.search(line))
            count["local"] += bool(LOCAL.search(line))
            count["waits"] += "WARPGROUP.DEPBAR" in line
            count["setmaxnreg"] += "USETMAXREG" in line
            if product := PRODUCT.search(line):
                count[f"columns {product[1]}"] += 1
                count["products"] += 1
            if load := TMA.search(line):
                count["tma"] += 1
                count[f"tma {load[1]}"] += 1
                count["multicast"] += load[2] is not None
    return [(name, Counter(r) + counts.get(name, Counter())) for name, r in resources.items()]


def columns(resources: Counter[str]) -> list[int]:
    """The N of its matrix products."""
    return sorted(int(k.split()[1]) for k in resources if k.startswith("columns"))


def meant_columns(name: str) -> list[int]:
    """The N that a kernel is named after, its first number; the stem's two."""
    from fastst.backends.cuda.hopper.launches import STEM

    if name.startswith("hopper_stem"):
        return list(STEM[1:]) if "true" in name else [STEM[1]]
    number = re.search(r"<\w+, (\d+)", name)
    return [int(number[1])] if number else []


def shipped() -> set[str]:
    """Names of the Hopper kernels that configurations name."""
    from fastst.backends.cuda.hopper import instances

    found = set()
    for dtype in ("__half", "__nv_bfloat16"):
        for columns, groups, blocks in instances.SPATIAL:
            tile = f"{columns}, {groups}, {blocks}"
            found.add(f"hopper_spatial_kernel<{dtype}, {tile}>")
        for columns, frames, stride in instances.TEMPORAL:
            for norm in ("false", "true"):
                tile = f"{columns}, {frames}, {stride}, 1, {norm}, Epilogue"
                found.add(f"hopper_temporal_kernel<{dtype}, {tile}>")
        for columns, units in instances.WEIGHT_GRADIENT:
            found.add(f"hopper_weight_gradient_kernel<{dtype}, {columns}, {units}>")
        for columns, blocks in instances.SPATIAL_GRADIENT:
            found.add(f"hopper_spatial_gradient_kernel<{dtype}, {columns}, {blocks}>")
        for columns, frames, stride in instances.TEMPORAL_GRADIENT:
            tile = f"{columns}, {frames}, 1, {stride}, false, GradientEpilogue"
            found.add(f"hopper_temporal_kernel<{dtype}, {tile}>")
        found |= {f"hopper_stem_kernel<{dtype}, {pair}>" for pair in ("false", "true")}
    return found


def product_faults(name: str, resources: Counter[str]) -> list[str]:
    """What is wrong with the matrix products of a kernel that is named after its N."""
    wrong = []
    if columns(resources) != meant_columns(name):
        wrong.append(f"products of {columns(resources) or 'no'} columns")
    # ptxas says so as well (C7510, C7511), but only to who compiles.
    elif resources["waits"] >= resources["products"]:
        wrong.append("every product waits for the one before")
    return wrong


def hopper_faults(name: str, resources: Counter[str]) -> list[str]:
    wrong = product_faults(name, resources)
    if not resources["tma"]:
        wrong.append("no TMA loads")
    if name.startswith(SHARING) and not resources["multicast"]:
        wrong.append("no TMA loads for several blocks")
    if not resources["setmaxnreg"]:
        wrong.append("setmaxnreg was ignored")  # C7508
    return wrong


def tile_faults(name: str, found: Program, tile: hopper.Tile) -> list[str]:
    """What is wrong with the code of a Hopper kernel's tile."""
    wrong = [f"overwrites the operand of a product: {fault}" for fault in found.overwritten()]
    if tile.extra_products:
        wrong.append(f"{tile.extra_products} products that only end a group")
    if name.startswith("hopper_spatial_kernel") and tile.drains:
        wrong.append(f"{tile.drains} waits for all products between stages")
    for kernel, *most in ALLOWED_SLOTS:
        for slots, share in zip((tile.epilogue_slots, tile.counting_slots), most, strict=True):
            if kernel in name and tile.product_clocks is not None and (
                slots is None or slots > share * tile.product_clocks
            ):  # fmt: skip
                wrong.append(f"{slots} issue slots besides {tile.product_clocks} clocks")
    return wrong


Inspected = tuple[list[tuple[str, Counter[str]]], dict[str, tuple[hopper.Tile, list[str]]]]


def inspect_with_tiles(cubin: Path) -> Inspected:
    """``inspect``, and the tiles of its Hopper kernels with what is wrong with them."""
    tiles: dict[str, tuple[hopper.Tile, list[str]]] = {}
    code = disassembled(cubin)
    for mangled, name in names(list(code)).items() if code else ():
        if name.startswith("hopper") and "__nv_bfloat16" in name:  # float16 has the same code
            found = hopper.program(code[mangled])
            tile = hopper.tile(name, found)
            tiles[mangled] = tile, tile_faults(name, found, tile)
    return inspect(cubin), tiles


def wrapper_faults() -> list[str]:
    """Compiles wrappers.cu; empty where there is no nvcc."""
    with tempfile.TemporaryDirectory() as folder:
        return _wrapper_faults(Path(folder))


def _wrapper_faults(folder: Path) -> list[str]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    cubin = folder / "wrappers.cubin"
    compiled = subprocess.run(
        [
            nvcc, "-std=c++20", "-O3", f"-I{CSRC}", f"-I{CSRC / 'cuda'}", "-arch=sm_90a",
            "-Xptxas", "-v", "-cubin", "-o", str(cubin),
            str(Path(__file__).with_name("wrappers.cu")),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if compiled.returncode:
        return [f"wrappers.cu: {compiled.stderr}"]
    wrong = [line for line in compiled.stderr.splitlines() if "(C75" in line]
    kernels = dict(inspect(cubin))
    readable = names(list(kernels))
    for mangled, r in kernels.items():
        name = readable[mangled]
        if name.startswith("from_"):
            wrong += [f"{name}: {fault}" for fault in product_faults(name, r)]
        elif missing := [f"{n}D" for n in range(1, 6) if not r[f"tma {n}D"]]:
            wrong.append(f"{name}: no TMA loads of {missing}")
        elif not r["multicast"]:
            wrong.append(f"{name}: no TMA loads for several blocks")
    found = {n for r in kernels.values() for n in columns(r)}
    if found != set(range(8, 257, 8)):
        wrong.append(f"wrappers.cu: products of {sorted(found)} columns only")
    print(f"{len(kernels)} kernels of wrappers.cu, {len(wrong)} wrong")
    return wrong


def json_row(
    name: str, arch: str, r: Counter[str], tile: hopper.Tile | None = None
) -> dict[str, Any]:
    """As ``measured.Row``: sm_90a is "9.0"; a spill of these kernels is a fault anywhere. Rows of
    Hopper kernels have what their tile says as well."""
    digits = re.sub(r"\D", "", arch)
    version = output(shutil.which("nvcc") or "true", "--version")
    release = re.search(r"release (\S+),", version)
    unknown = dict.fromkeys(("overwritten", "slots", "load_bytes", "copies", "outside"))
    return {
        "kernel": name, "case": "", "config": "", "arch": f"{digits[:-1]}.{digits[-1:]}",
        "compiler": f"nvcc {release[1] if release else '?'}", "registers": r["REG"],
        "spilled_in_loop": r["local"], "kept": r["STACK"] + r["LOCAL"], "shared": r["SHARED"],
        "serialised": int(bool(r["products"]) and r["waits"] >= r["products"]), **unknown,
        **({} if tile is None else asdict(tile)),
    }  # fmt: skip


def worse(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Hopper tiles with more waits, or a tenth more issue slots, than in the table."""
    table = {
        (r["kernel"], r["arch"], r["compiler"]): r
        for r in json.loads(measured.TABLE.read_text())
    }  # fmt: skip
    found = []
    for row in rows:
        before = table.get((row["kernel"], row["arch"], row["compiler"]), {})
        for field, times in (("drains", 1.0), ("epilogue_slots", 1.1), ("counting_slots", 1.1)):
            if before.get(field) is not None and row[field] > times * before[field]:
                found.append(f"{row['kernel']}: {field} {before[field]} → {row[field]}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="add all rows to those of Triton's kernels")
    args, _ = parser.parse_known_args()  # others are for triton.py
    found = library()
    if found is None:
        print("fastst._C is not built (no nvcc): nothing to inspect")
        return 1 if shutil.which("nvcc") else 0
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2) as pool:
        of_wrappers = pool.submit(wrapper_faults)
        subprocess.run(
            [tool("cuobjdump"), "--extract-elf", "all", str(found)],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        rows, cubins = [], sorted(Path(folder).glob("*.cubin"))
        tiles: dict[str, tuple[hopper.Tile, list[str]]] = {}
        for cubin, (kernels, found_tiles) in zip(
            cubins, pool.map(inspect_with_tiles, cubins), strict=True
        ):
            arch = re.search(r"sm_\w+?(?=\.)", cubin.name)
            rows += [(n, arch[0] if arch else "?", r) for n, r in kernels]
            tiles |= found_tiles
        wrong = of_wrappers.result()
    print(f"{'kernel':64} arch   regs stack local shared wide  tma products")
    readable = names(sorted({n for n, _, _ in rows}))
    measured_rows: list[dict[str, Any]] = []
    for mangled, arch, r in sorted(rows, key=lambda row: (readable[row[0]], row[1])):
        name, local, wide = readable[mangled], r["local"], r["wide"]
        products = f"{r['products']} × {columns(r)}" if r["products"] else ""
        print(
            f"{name:64} {arch:6} {r['REG']:4} {r['STACK']:5} {local:5} {r['SHARED']:6} {wide:4} "
            f"{r['tma'] or '':4} {products}"
        )
        tile, faults = tiles.get(mangled, (None, []))
        wrong += [f"{name} on {arch}: {fault}" for fault in faults]
        measured_rows.append(json_row(name, arch, r, tile))
        if r["STACK"] or r["LOCAL"] or local:
            wrong.append(f"{name} on {arch}: stack frame or spill")
        if name.startswith("depthwise") and not wide:
            wrong.append(f"{name} on {arch}: no 16-byte loads")
        if name.startswith("hopper"):
            wrong += [f"{name} on {arch}: {fault}" for fault in hopper_faults(name, r)]
    if not rows:
        wrong.append("no kernels found")
    there = {readable[n] for n, arch, _ in rows if arch == "sm_90a"}
    wrong += [f"{name} is not in the library" for name in sorted(shipped() - there)]
    wrong += worse(measured_rows)
    if args.json:
        measured.save(measured_rows, args.json, add=True)
    print(f"{len(rows)} kernels, {len(wrong)} wrong")
    for line in wrong:
        print(f"  {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
