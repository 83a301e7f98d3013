"""What an installation does with compilers that are missing, too old or broken: stand-ins here."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends.cuda.test_library import script
from tests.support import ROOT

OLD = """case "$*" in *-std=c++20*)
    echo "$0: error: unrecognized command-line option '-std=c++20'" >&2; exit 1;; esac
"""
NO_HOST_COMPILER = """echo 'nvcc fatal   : Failed to preprocess host compiler properties.' >&2
exit 1
"""
SILENT = "exit 3\n"
# Makes what it is told to: an object, a library and a file of what they depend on.
WORKING = """while [ $# -gt 0 ]; do
    case $1 in -o|-MF) [ $1 = -o ] && echo made > "$2" || : > "$2"; shift;; esac; shift
done
"""
LIBRARIES = ("_C", "_cpu_avx2", "_cpu_avx512")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "fastst").mkdir()
    for name in ("__init__.py", "py.typed"):
        shutil.copy(ROOT / "fastst" / name, folder / "fastst")
    tiles = Path("fastst/backends/cuda/hopper/instances.py")  # of which the build makes a header
    (folder / tiles).parent.mkdir(parents=True)
    shutil.copy(ROOT / tiles, folder / tiles)
    return folder


def build(
    source: Path, compilers: dict[str, str], **settings: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """``setup.py build`` with these compilers alone on PATH, and what it wrote down."""
    path = source.parent / "bin"
    shutil.rmtree(path, ignore_errors=True)
    (path / "cuda" / "bin").mkdir(parents=True)
    for name, text in compilers.items():
        file = path / "cuda" / "bin" / name if name == "nvcc" else path / name
        file.write_text(f"#!/bin/sh\n{text}")
        file.chmod(0o755)
    dropped = ("CXX", "CUDA_PATH", "FASTST_BUILD_CPU", "FASTST_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {"PATH": str(path), "CUDA_HOME": str(path / "cuda"), **settings}
    if "nvcc" not in compilers:  # there may be one in /usr/local/cuda
        environment.setdefault("FASTST_BUILD_CUDA", "0")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-lib", "../built"],
        cwd=source, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    written = source.parent / "built" / "fastst" / "_left_out.json"
    return done, json.loads(written.read_text()) if written.exists() else {}


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("fastst")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compilers", "settings", "reason"),
    [
        ({}, {}, "no C++ compiler for x86-64 was found"),
        ({"g++": WORKING}, {"CXX": "g++-99"}, "CXX=g++-99 was not found"),
        ({"g++": OLD}, {}, "error: unrecognized command-line option '-std=c++20'"),
        ({"clang++": OLD}, {}, "error: unrecognized command-line option '-std=c++20'"),
        ({"g++": SILENT}, {}, "the build of fastst._cpu_avx2 failed: "),
    ],
    ids=["none", "misnamed", "old", "old-clang", "broken"],
)
def test_without_a_cxx_that_works(
    source: Path, compilers: dict[str, str], settings: dict[str, str], reason: str
) -> None:
    done, left_out = build(source, compilers, **settings)
    assert done.returncode == 0, done.stderr
    (line,) = lines(done)
    assert line.startswith("fastst is installed without its CPU library: PyTorch's own")
    assert reason in line and "To get it: g++ 12" in line
    assert set(left_out) == set(LIBRARIES) and reason in left_out["_cpu_avx2"]
    assert not [*(source.parent / "built").rglob("*.so")]

    done, _ = build(source, compilers, **settings, FASTST_BUILD_CPU="1")
    assert done.returncode != 0
    (line,) = lines(done)
    assert line.startswith("fastst: FASTST_BUILD_CPU=1, but ") and reason in line


@pytest.mark.slow
def test_nvcc_without_a_host_compiler(source: Path) -> None:
    done, left_out = build(source, {"nvcc": NO_HOST_COMPILER})
    assert done.returncode == 0, done.stderr
    cpu, cuda = sorted(lines(done))
    assert "without its CPU library" in cpu and "without its CUDA library" in cuda
    assert "nvcc fatal   : Failed to preprocess host compiler properties." in left_out["_C"]
    assert left_out["_C"] in cuda

    done, _ = build(source, {"nvcc": NO_HOST_COMPILER}, FASTST_BUILD_CUDA="1")
    assert done.returncode != 0
    assert "fastst: FASTST_BUILD_CUDA=1, but the build of fastst._C failed: nvcc fatal" in (
        done.stderr
    )


@pytest.mark.slow
def test_architectures_that_are_none(source: Path) -> None:
    listed = {"FASTST_BUILD_CPU": "0", "TORCH_CUDA_ARCH_LIST": "8.0;Grace"}
    done, left_out = build(source, {"nvcc": WORKING}, **listed)
    assert done.returncode == 0, done.stderr
    (line,) = lines(done)
    assert "'Grace' is neither a compute capability" in line and left_out["_C"] in line

    done, _ = build(source, {"nvcc": WORKING}, **listed, FASTST_BUILD_CUDA="1")
    assert done.returncode != 0
    assert lines(done)[0].startswith("fastst: FASTST_BUILD_CUDA=1, but TORCH_CUDA_ARCH_LIST: ")


@pytest.mark.slow
def test_what_can_be_built_is_built_beside_what_cannot(source: Path) -> None:
    done, left_out = build(source, {"g++": WORKING, "nvcc": NO_HOST_COMPILER})
    assert done.returncode == 0, done.stderr
    assert set(left_out) == {"_C"} and len(lines(done)) == 1
    made = {f.name.split(".")[0] for f in (source.parent / "built").rglob("*.so")}
    assert made == {"_cpu_avx2", "_cpu_avx512"}


@pytest.mark.slow
def test_paths_of_any_characters(source: Path) -> None:
    """Of the sources, of what is built and of both compilers."""
    odd = source.parent / 'it\'s a $HOME: "C" & #1'
    odd.mkdir()
    source = source.rename(odd / "source")
    named = shlex.quote(str(odd / "bin" / "g++"))
    done, left_out = build(source, {"g++": WORKING, "nvcc": WORKING}, CXX=named)
    assert done.returncode == 0 and not left_out, done.stderr
    assert {f.name.split(".")[0] for f in (odd / "built").rglob("*.so")} == set(LIBRARIES)


def test_a_compiler_may_be_named_with_arguments(source: Path) -> None:
    told = "case $1 in '-B/a b') ;; *) exit 3;; esac\n"
    done, _ = build(
        source, {"g++": told + WORKING}, CXX="g++ '-B/a b'", FASTST_BUILD_CPU="native"
    )  # fmt: skip
    assert [*(source.parent / "built").rglob("*.so")], done.stdout
    _, left_out = build(source, {"g++": WORKING}, CXX="g++ '")
    assert left_out["_cpu_avx2"] == "CXX=g++ ' was not found"


@pytest.mark.slow
def test_a_failed_build_leaves_no_older_library(source: Path) -> None:
    build(source, {"g++": WORKING})
    for file in (source / "csrc").rglob("*.cpp"):
        file.touch()
    _, left_out = build(source, {"g++": OLD})
    assert {"_cpu_avx2", "_cpu_avx512"} <= set(left_out)
    assert not [*(source.parent / "built").rglob("*.so")]


def test_what_was_not_wanted_is_left_out_without_a_word(source: Path) -> None:
    done, left_out = build(source, {"g++": WORKING}, FASTST_BUILD_CPU="0")
    assert done.returncode == 0 and not lines(done)
    assert left_out == {name: f"{v}=0 was set" for name, v in zip(
        LIBRARIES, ("FASTST_BUILD_CUDA", "FASTST_BUILD_CPU", "FASTST_BUILD_CPU"), strict=True
    )}  # fmt: skip


@pytest.mark.parametrize(("machine", "count"), [("x86_64", 2), ("aarch64", 0)])
def test_the_cpu_library_is_for_one_architecture(
    machine: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    settings = {"FASTST_BUILD_CUDA": "0", "FASTST_BUILD_CPU": "auto"}
    called: Any = script(monkeypatch, "/usr/bin/g++", **settings)["called"]
    assert len(called["ext_modules"]) == count


def test_native_builds_for_this_machine_alone(source: Path) -> None:
    done, left_out = build(source, {"g++": WORKING}, FASTST_BUILD_CPU="native")
    assert done.returncode == 0 and not lines(done)
    (built,) = [f.name.split(".")[0] for f in (source.parent / "built").rglob("*.so")]
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert built == ("_cpu_avx512" if wide else "_cpu_avx2")
    assert left_out == {
        "_C": "FASTST_BUILD_CUDA=0 was set",
        "_cpu_avx2" if wide else "_cpu_avx512": "FASTST_BUILD_CPU=native was set",
    }


def test_an_unknown_setting_is_refused(source: Path) -> None:
    done, _ = build(source, {}, FASTST_BUILD_CPU="yes")
    assert done.returncode != 0
    assert "FASTST_BUILD_CPU must be auto, 0, 1 or native, got 'yes'" in done.stderr
    done, _ = build(source, {}, FASTST_BUILD_CUDA="native")
    assert "FASTST_BUILD_CUDA must be auto, 0 or 1, got 'native'" in done.stderr
