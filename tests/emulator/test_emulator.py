"""The emulator does what CUDA does on cases worked out by hand, and finds what CUDA does not."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import ROOT

HERE = ROOT / "emulator"
PRODUCTS = (8, 144, 256, 232, 144, 48, 96, 40)  # N, with every swizzle and every major


@pytest.fixture(scope="session")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("emulator_build", HERE / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(program: Path, name: str) -> str:
    return subprocess.run(
        [program, name], capture_output=True, text=True, timeout=60, check=True
    ).stdout


@pytest.fixture(scope="session")
def cases(build: ModuleType) -> Path:
    return build.program(HERE / "cases.cpp")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("barrier", ["10 20 30 40 ... 320"]),
        ("missing barrier", ["race: write of 4 bytes", "and a read by thread"]),
        ("overwrite", ["race: write of 4 bytes", "and a read by thread"]),
        ("warp", ["1 0 3 2 ... 30"]),
        ("across warps", ["race: read of 4 bytes", "and a write by thread"]),
        ("shuffle", ["496 496 496 496 ... 496"]),
        ("unwritten", ["thread (5, 0, 0)", "4 bytes at byte 20", "nobody has written"]),
        ("global bounds", ["thread (127, 0, 0)", "1 elements at 128 of a tensor that spans 128"]),
        ("shared bounds", ["thread (63, 0, 0)", "out of bounds: 4 bytes at byte 256"]),
        ("misaligned", ["misaligned: global access of 16 bytes"]),
        ("divergent", ["divergent barrier", "cases.cpp"]),
        ("early exit", ["deadlock; 32 threads have finished", "32 threads (32 to 63) wait for"]),
        ("named", ["32 33 34 35 ... 63"]),
        (
            "named deadlock",
            ["deadlock; 1 threads have finished", "63 threads (0 to 62) wait for named barrier 3"],
        ),
        ("mbarrier", ["0 6 6 6 ... 0"]),
        ("mbarrier deadlock", ["deadlock", "1 threads (0 to 0) wait for parity 0 of the mbarrier"]),
        ("copy", ["0 108 112 100 ... 0"]),
        ("copy without wait", ["with an asynchronous copy under way"]),
        ("copy without barrier", ["4 bytes at byte 16", "nobody has written"]),
        ("copy misaligned", ["misaligned: global access of 16 bytes"]),
        ("two copies", ["103 107 0 0 ... 0"]),
        ("too many threads", ["kernel case for a case could not be launched: invalid config"]),
        ("too much shared memory", ["could not be launched: invalid argument"]),
    ],
)
def test_case(cases: Path, name: str, told: list[str]) -> None:
    printed = run(cases, name)
    for part in told:
        assert part in printed, printed


# ---- Hopper


@pytest.fixture(scope="session")
def hopper(build: ModuleType) -> Path:
    return build.program(HERE / "hopper_cases.cpp")


def swizzled(span: int) -> str:
    """16 rows of pieces 10·row + piece, where PTX's figures put them."""
    changes = {128: "01234567", 64: "00112233", 32: "00001111"}[span]  # by row of 8
    pieces = range(span // 16)
    return " ".join(str(10 * r + (p ^ int(changes[r % 8]))) for r in range(16) for p in pieces)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        # element (w, h, t, n) is 1 + w + 10 h + 100 t + 1000 n; boxes of 3 × 2 in a plane of 5 × 4
        ("box", "1122 1123 1124 1132 1133 1134"),
        ("box before", "0 0 0 0 0 201"),
        ("box beyond", "1034 1035 0 0 0 0"),
        ("box outside", "0 0 0 0 0 0"),
        ("box of steps", "0 0 0 0 112 114"),
        ("swizzle 128", swizzled(128)),
        ("swizzle 64", swizzled(64)),
        ("swizzle 32", swizzled(32)),
        ("map stride", "strides of a multiple of 16 bytes below 2^40, got 136"),
        ("map row", "box rows of a multiple of 16 bytes, got 24"),
        ("map span", "box rows as long as the swizzle's span, got 64"),
        ("map", ""),
        ("store", " ".join(map(str, range(1, 32))) + " 0 0"),
        ("store without fence", "a TMA store reads what thread 0 has written, with no fence_proxy"),
        ("store without wait", "ends with TMA stores that may still read"),
        ("products f16", "\n".join(f"0 wrong of {64 * n}" for n in PRODUCTS)),
        ("products bf16", "\n".join(f"0 wrong of {64 * n}" for n in PRODUCTS)),
        ("pipeline", "0 wrong of 3072"),
        ("pipeline from registers", "0 wrong of 3072"),
        # bugs planted in that pipeline
        ("wrong swizzle", "3072 wrong of 3072"),
        ("wrong parity", "which nobody has written"),
        ("expect less", "deadlock; "),
        ("expect less", "the mbarrier at byte 0 lacks 0 arrivals and -16 bytes"),
        ("expect more", "the mbarrier at byte 0 lacks 0 arrivals and 16 bytes"),
        ("expect one", "8192 bytes of TMA loads under way: it was told to expect too few"),
        ("row off", "starts at byte 1152, not in the first row of a swizzle period of 1024"),
        ("no wait for full", "which nobody has written"),
        ("release early", "race: write of 8192 bytes at byte 1024 of shared memory and a read by"),
        ("release by one warp", "race: write of 8192 bytes at byte 1024 of shared memory"),
        ("no wgmma fence", "with no wgmma_fence in its group"),
        ("no wait", "race: write of 8192 bytes at byte 1024 of shared memory and a read by wgmma"),
        ("wait for one less", "race: write of 8192 bytes at byte 1024 of shared memory"),
        ("write accumulators", "accumulators written before a wait"),
        ("write a", "registers of A written"),
        ("no init fence", "whose initialisation was not fenced"),
        ("other init fence", "whose initialisation was not fenced"),
        ("no init barrier", "mbarrier at byte 0 not initialised"),
        # what threads write, and the engines read or write
        ("written by threads", "16 16 16 16"),
        ("no proxy fence", "reads what thread 64 has written, with no fence_proxy_async"),
        ("no barrier", "which nobody has written"),
        ("overwrite", "0 0 0 0"),
        ("overwrite without fence", "which thread 0 has written, with no fence_proxy_async"),
        ("registers", ""),
        ("too many registers", "deadlock; 355 threads have finished\n  29 threads"),
        ("fewer registers", "registers increased from 168 to 160"),
    ],
)
def test_hopper_case(hopper: Path, name: str, told: str) -> None:
    printed = run(hopper, name)
    assert told in printed if told else printed == "", printed


# ---- clusters


@pytest.fixture(scope="session")
def clusters(build: ModuleType) -> Path:
    return build.program(HERE / "cluster_cases.cpp")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "told"),
    [
        # of block b: Σ 2·(1 + i)·(1 + 5 b + i) over 5 steps
        ("products", ["110 260 410 560"]),
        ("odd grid", ["could not be launched: cluster misconfiguration"]),
        # bugs planted in it
        ("sync block only", ["use of the mbarrier at byte 0 with no barrier since its init"]),
        ("no init fence", ["whose initialisation was not fenced"]),
        (
            "release own only",
            ["deadlock; ", "byte 16 of block 0 of the cluster lacks 1 arrivals",
             "1 threads (0 to 0) of block 1 of the cluster wait for parity 0 of the mbarrier"],
        ),
        ("count own only", ["block (1,", "race: write of 128 bytes", "memory of block 0"]),
        ("release to nobody", ["arrival at block 2 of a cluster of 2"]),
        ("release early", ["race: write of 128 bytes", "and a read by thread 32"]),
        ("wrong parity", ["more arrivals at an mbarrier than it expects in a phase"]),
        ("mask one", ["deadlock; ", "byte 0 of block 1 of the cluster lacks 0 arrivals and 128"]),
        ("mask three blocks", ["TMA to the blocks of mask 7 of a cluster of 2"]),
        ("expect own only", ["128 bytes of TMA loads under way: it was told to expect too few"]),
        ("expect more", ["deadlock; ", "of block 1 of the cluster lacks 0 arrivals and 128 bytes"]),
        ("leave at once", ["without having waited for an arrival", "by thread 33 of block 0"]),
        ("leave during a copy", ["ends with a TMA load under way to byte 1024"]),
        ("step less", ["block (1,", "ends with a TMA load under way"]),
    ],
)  # fmt: skip
def test_cluster_case(clusters: Path, name: str, told: list[str]) -> None:
    printed = run(clusters, name)
    for part in told:
        assert part in printed, printed


def layout(program: Path, name: str, registers: int) -> list[list[tuple[int, ...]]]:
    """By thread and register, its row and column."""
    places = [tuple(map(int, p.split(","))) for p in run(program, name).split()]
    return [places[t * registers : (t + 1) * registers] for t in range(128)]


def owner(row: int, column: int) -> tuple[int, int]:
    """Thread and accumulator that have an element, by PTX's figure of the m64nNk16 fragment of D.

    A row belongs to four threads with two neighbours each, eight rows to a warp, which has the
    eight rows below as well; eight columns on, the same threads have their next registers.
    """
    thread = 32 * (row // 16) + 4 * (row % 8) + column % 8 // 2
    return thread, column // 8 * 4 + row % 16 // 8 * 2 + column % 2


def test_accumulators_lie_as_in_ptx(hopper: Path) -> None:
    columns = 80
    values = list(map(int, run(hopper, "accumulators").split()))
    places = layout(hopper, "accumulator layout", 128)
    for row, column in itertools.product(range(64), range(256)):
        thread, i = owner(row, column)
        assert places[thread][i] == (row, column)
        if column < columns:
            assert values[thread * columns // 2 + i] == 256 * row + column


def a_element(thread: int, i: int) -> tuple[int, int]:
    """Row and column of element i of A in registers, by PTX's figure of the m64k16 fragment.

    Of each warp's 16 rows a group of four threads has one and the one 8 below it; elements 0, 1, 4
    and 5 are of the first, and those from 4 on are 8 columns on.
    """
    group, place = thread % 32 // 4, thread % 4
    row = 16 * (thread // 32) + group + (0 if i in (0, 1, 4, 5) else 8)
    return row, 2 * place + i % 2 + (8 if i >= 4 else 0)


def test_a_fragments_lie_as_in_ptx(hopper: Path) -> None:
    places = layout(hopper, "a layout", 8)
    assert places == [[a_element(t, i) for i in range(8)] for t in range(128)]
    assert {p for of in places for p in of} == set(itertools.product(range(64), range(16)))


def test_ldmatrix_and_stmatrix(hopper: Path) -> None:
    values = list(map(int, run(hopper, "ldmatrix").split()))
    # the second of two neighbours that lane l gets of matrix j: row l / 4, column 2 (l % 4) + 1
    assert values[:128] == [
        100 * j + 10 * (lane // 4) + 2 * (lane % 4) + 1 for lane in range(32) for j in range(4)
    ]
    # of the transposed matrix: row 2 (l % 4) + 1, column l / 4
    assert values[160:] == [
        100 * j + 10 * (2 * (lane % 4) + 1) + lane // 4 for lane in range(32) for j in range(4)
    ]
    assert values[128:160] == [100 * (m // 8) + 10 * (m % 8) for m in (r ^ 1 for r in range(32))]
