"""Builds the native libraries with ninja, where there are compilers; see docs/install.md.

``fastst._C`` with nvcc; ``fastst._cpu_avx2`` and ``fastst._cpu_avx512``, from the same sources,
with a C++ compiler on x86-64.

FASTST_BUILD_CUDA, FASTST_BUILD_CPU: "auto" (default: build it if the compiler is found), "1" (it
must be), "0" (do not). CXX: the C++ compiler.
TORCH_CUDA_ARCH_LIST: architectures, as PyTorch extensions take them, e.g. "8.0;9.0a+PTX".
The rest of the package is described in pyproject.toml. Nothing here needs torch or a GPU.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;9.0a;9.0+PTX"  # sm_90a code serves no later chip: PTX of 9.0 does
# csrc/cuda/hopper is written for it alone, and is launched on nothing else.
HOPPER = "-gencode arch=compute_90a,code=sm_90a"
INSTRUCTIONS = {
    "_cpu_avx2": "-mavx2 -mfma",
    "_cpu_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
}


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
        return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_cxx() -> str | None:
    """A C++ compiler for this machine's x86-64, else None."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def architecture_flags(listed: str) -> list[str]:
    """nvcc's -gencode options. "+PTX" alone adds no machine code to an entry listed for PTX only.

    Raises:
        SystemExit: an entry that is no compute capability.
    """
    flags: list[str] = []
    entries = re.split(r"[;,\s]+", listed.strip())
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: {entry!r} is no compute capability such as 9.0a+PTX")
        number = match[1] + match[2] + match[3]
        # Code of 9.0a runs wherever that of 9.0 does; then only the PTX is wanted.
        if not (match[4] and f"{match[1]}.{match[2]}a" in entries):
            flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[4]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def includes(*folders: str) -> str:
    import pybind11

    found = [*(ROOT / f for f in folders), pybind11.get_include(), sysconfig.get_path("include")]
    return " ".join(f"-I{i}" for i in found)


def architectures_of(source: Path | None = None) -> str:
    """nvcc's options for one source, or for all of the library."""
    if source is not None and source.parent.name == "hopper":
        return HOPPER
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    return " ".join(architecture_flags(listed))


def cuda_rules() -> tuple[str, str, list[Path]]:
    """How to compile, how to link, and the sources; cudart goes in, libcuda stays out."""
    nvcc = find_nvcc()
    compile = (
        f"{nvcc} -std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -DFASTST_MODULE=_C "
        f"-DFASTST_EMULATED=false {includes('csrc', 'csrc/cuda')} $architectures"
    )
    link = f"{nvcc} -shared -cudart static {architectures_of()}"
    return compile, link, [*ROOT.glob("csrc/cuda/**/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")]


def cpu_rules(name: str) -> tuple[str, str, list[Path]]:
    """The same of the CPU library for one instruction set.

    Two whole libraries: with both in one, the linker could let a machine without AVX-512 run an
    inline function that was compiled for it.
    """
    cxx = find_cxx()
    compile = (
        f"{cxx} -std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra "
        f"-DFASTST_MODULE={name} {INSTRUCTIONS[name]} {includes('csrc', 'csrc/cpu')}"
    )
    return compile, f"{cxx} -shared -pthread", list(ROOT.glob("csrc/cpu/*.cpp"))


def ninja_file(name: str, output: Path) -> str:
    compile, link, sources = cuda_rules() if name == "_C" else cpu_rules(name)
    lines = [
        "rule compile",
        f"  command = {compile} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link} $in -o $out",
    ]
    objects = []
    for source in sorted(sources):
        object = source.relative_to(ROOT / "csrc").with_suffix(".o").as_posix()
        objects.append(object)
        lines.append(f"build {object}: compile {source}")
        if name == "_C":
            lines.append(f"  architectures = {architectures_of(source)}")
    return "\n".join([*lines, f"build {output}: link {' '.join(objects)}", ""])


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        name = ext.name.split(".")[-1]
        # Kept between builds of every kind, so that each compiles only what has changed.
        folder = ROOT / "build" / name
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(name, output))
        ninja = shutil.which("ninja") or [sys.executable, "-m", "ninja"]
        command = [ninja] if isinstance(ninja, str) else ninja
        subprocess.run([*command, "-C", str(folder)], check=True)


def wanted(variable: str, compiler: str | None, without: str, needed: str) -> bool:
    """Whether to build what a compiler is there for; says so where it is left out.

    Raises:
        SystemExit: it must be built and the compiler is missing, or the setting is unknown.
    """
    setting = os.environ.get(variable, "auto")
    if setting not in ("auto", "0", "1"):
        sys.exit(f"{variable} must be auto, 0 or 1, got {setting!r}")
    if setting == "1" and compiler is None:
        sys.exit(f"fastst: {variable}=1 requires {needed}")
    if setting == "auto" and compiler is None:
        print(f"fastst: {without}. To get it: {needed}; install fastst again.", file=sys.stderr)
    return setting != "0" and compiler is not None


def extensions() -> list[Extension]:
    names = []
    if wanted(
        "FASTST_BUILD_CUDA", find_nvcc(),
        "nvcc was not found, so fastst is installed without its CUDA library",
        "nvcc of the CUDA toolkit 12.5 or newer, under CUDA_HOME or on PATH",
    ):  # fmt: skip
        names.append("_C")
    if wanted(
        "FASTST_BUILD_CPU", find_cxx(),
        "no C++ compiler for x86-64 was found, so fastst is installed without its CPU library; "
        "PyTorch's own convolutions run in its place",
        "g++ 12 or clang++ 15 or newer, on an x86-64 machine",
    ):  # fmt: skip
        names += INSTRUCTIONS
    return [Extension(f"fastst.{name}", sources=[]) for name in names]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
