"""Builds the native libraries with ninja, where there are compilers; see docs/install.md.

``fastst._C`` with nvcc; ``fastst._cpu_avx2`` and ``fastst._cpu_avx512``, from the same sources,
with a C++ compiler on x86-64.

FASTST_BUILD_CUDA, FASTST_BUILD_CPU: "auto" (default: try to build it, and install without it where
that fails), "1" (it must be built, or the installation fails), "0" (do not); for the CPU "native",
too: "auto" for the instruction set of this machine alone. CXX: the C++ compiler.
TORCH_CUDA_ARCH_LIST: architectures, as PyTorch extensions take them, e.g. "8.0;9.0a+PTX".
What is left out, and why, is written to fastst/_left_out.json: fastst tells it where it is missed.
The rest of the package is described in pyproject.toml. Nothing here needs torch or a GPU.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
UP = Path("../..")  # ROOT from where ninja runs, so that objects serve wherever build/ is moved
DEFAULT_ARCHITECTURES = "8.0;9.0a;9.0+PTX"  # sm_90a code serves no later chip: PTX of 9.0 does
LEAST = (7, 5)  # of nvcc 13, which fails at any other
# As PyTorch reads them.
NAMED = {
    "Kepler+Tesla": "3.7", "Kepler": "3.5+PTX", "Maxwell+Tegra": "5.3", "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX", "Volta+Tegra": "7.2", "Volta": "7.0+PTX", "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7", "Ampere": "8.0;8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0", "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}  # fmt: skip
# csrc/cuda/hopper is written for it alone, and is launched on nothing else.
HOPPER = "-gencode arch=compute_90a,code=sm_90a"
ONE_SOURCE = "-MD -MF $out.d -c $in -o $out"  # as ninja reads it
VARIABLES = {
    "_C": "FASTST_BUILD_CUDA",
    "_cpu_avx2": "FASTST_BUILD_CPU",
    "_cpu_avx512": "FASTST_BUILD_CPU",
}
NEEDED = {
    "FASTST_BUILD_CUDA": "nvcc of the CUDA toolkit 12.5 or newer, under CUDA_HOME, on PATH or in "
    "/usr/local/cuda, and a C++ compiler that it takes",
    "FASTST_BUILD_CPU": "g++ 12 or clang++ 15 or newer, on an x86-64 machine",
}
WITHOUT = {
    "FASTST_BUILD_CUDA": "without its CUDA library: Triton's kernels run on GPUs in its place",
    "FASTST_BUILD_CPU": "without its CPU library: PyTorch's own convolutions run on CPUs "
    "in its place",
}
# Seconds for which sources compile: the longest are begun first, so that no core waits for them.
LONGEST = {
    "temporal": 80, "bindings": 45, "spatial": 45, "tap_conv": 44, "temporal_gradient": 40,
    "weight_gradient": 28,
}  # fmt: skip
INSTRUCTIONS = {
    "_cpu_avx2": "-mavx2 -mfma -mf16c",
    "_cpu_avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
}


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (found := shutil.which(str(Path(home) / "bin" / "nvcc"))):
        return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def find_cxx() -> list[str]:
    """The command of a C++ compiler for this machine's x86-64, or nothing."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    if named := os.environ.get("CXX"):
        try:
            words = [named] if shutil.which(named) else shlex.split(named)
        except ValueError:  # a quotation mark without another
            return []
        return words if words and shutil.which(words[0]) else []
    found = shutil.which("g++") or shutil.which("clang++")
    return [found] if found else []


def native() -> str:
    """The CPU library that this machine takes."""
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(found[1].split() if found else ())
    return "_cpu_avx512" if wide else "_cpu_avx2"


def missing_cxx() -> str:
    named = os.environ.get("CXX")
    return f"CXX={named} was not found" if named else "no C++ compiler for x86-64 was found"


@functools.cache
def architecture_flags(listed: str) -> list[str]:
    """nvcc's -gencode options. "+PTX" alone adds no machine code to an entry listed for PTX only.

    Raises:
        BuildError: an entry that is no compute capability, or none that is high enough.
    """
    flags: list[str] = []
    names = re.split(r"[;,\s]+", listed.strip())
    entries = [entry for name in names for entry in NAMED.get(name, name).split(";")]
    dropped: list[str] = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is neither a compute capability such as 9.0a+PTX "
                "nor a name such as Hopper"
            )
        if (int(match[1]), int(match[2])) < LEAST:
            dropped.append(entry)
            continue
        number = match[1] + match[2] + match[3]
        # Code of 9.0a runs wherever that of 9.0 does; then only the PTX is wanted.
        if not (match[4] and f"{match[1]}.{match[2]}a" in entries):
            flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[4]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    low = f"TORCH_CUDA_ARCH_LIST: {', '.join(dropped)} is below {LEAST[0]}.{LEAST[1]}, the least"
    if not flags:
        raise BuildError(low)
    if dropped:
        print(f"fastst: {low}, and left out", file=sys.stderr)
    return flags


def quoted(*words: object) -> str:
    """Words of a command as the shell reads them, once ninja has read them."""
    return shlex.join(map(str, words)).replace("$", "$$")


def includes(*folders: str) -> str:
    import pybind11

    found = [*(UP / f for f in folders), pybind11.get_include(), sysconfig.get_path("include")]
    return quoted(*(f"-I{i}" for i in found))


def architectures_of(source: Path | None = None) -> str:
    """nvcc's options for one source, or for all of the library."""
    if source is not None and source.parent.name == "hopper":
        return HOPPER
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    return " ".join(architecture_flags(listed))


def cuda_rules() -> tuple[str, str, list[Path]]:
    """How to compile, how to link, and the sources; cudart goes in, libcuda stays out.

    The PTX that the machine code was made from stays beside each object, for emulator/ptx.
    """
    nvcc = quoted(find_nvcc())
    compile = (
        f"{nvcc} -std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -DFASTST_MODULE=_C "
        f"-DFASTST_EMULATED=false {includes('csrc', 'csrc/cuda')} -I. $architectures "
        f"--keep --keep-dir $out.ptx {ONE_SOURCE}"
    )
    link = f"{nvcc} -shared -cudart static {architectures_of()}"
    return compile, link, [*ROOT.glob("csrc/cuda/**/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")]


def cpu_rules(name: str) -> tuple[str, str, list[Path]]:
    """The same of the CPU library for one instruction set.

    Two whole libraries: with both in one, the linker could let a machine without AVX-512 run an
    inline function that was compiled for it.
    """
    cxx = quoted(*find_cxx())
    compile = (
        f"{cxx} -std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra "
        f"-DFASTST_MODULE={name} {INSTRUCTIONS[name]} {includes('csrc', 'csrc/cpu')} {ONE_SOURCE}"
    )
    return compile, f"{cxx} -shared -pthread", list(ROOT.glob("csrc/cpu/*.cpp"))


def write_instances(header: Path) -> None:
    """The tiles that the Hopper kernels are compiled for; old where they have not changed."""
    listed = runpy.run_path(str(ROOT / "fastst/backends/cuda/hopper/instances.py"))
    text = listed["header"]()
    if not header.exists() or header.read_text() != text:
        header.write_text(text)


def ninja_file(name: str, output: Path) -> str:
    compile, link, sources = cuda_rules() if name == "_C" else cpu_rules(name)
    lines = [
        "rule compile",
        f"  command = {compile}",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link} $in -o $out",
    ]
    objects = []
    for source in sorted(sources, key=lambda s: (-LONGEST.get(s.stem, 0), s)):
        object = source.relative_to(ROOT / "csrc").with_suffix(".o").as_posix()
        objects.append(object)
        lines.append(f"build {object}: compile {UP / source.relative_to(ROOT)}")
        if name == "_C":
            lines.append(f"  architectures = {architectures_of(source)}")
    target = re.sub("[$ :]", r"$\g<0>", str(output))
    return "\n".join([*lines, f"build {target}: link {' '.join(objects)}", ""])


class BuildError(Exception):
    """A library cannot be built here; says why in one line."""


class Build(build_ext):
    """Builds what it can. What cannot be built is left out in "auto", and an error under "1"."""

    def run(self) -> None:
        super().run()
        folder = ROOT if self.inplace else Path(self.build_lib).resolve()
        record(folder / "fastst")

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.split(".")[-1]
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            build(name, output)
        except BuildError as why:
            variable = VARIABLES[name]
            if not ext.optional:
                sys.exit(f"fastst: {variable}=1, but {why}. It takes {NEEDED[variable]}")
            output.unlink(missing_ok=True)  # of an earlier build
            left_out[name] = str(why)


class Copy(build_py):
    """Copies the package; the record with it where there is nothing to build."""

    def run(self) -> None:
        super().run()
        if not self.distribution.ext_modules:
            record((ROOT if self.editable_mode else Path(self.build_lib).resolve()) / "fastst")


def build(name: str, output: Path) -> None:
    """Compile and link one library.

    Raises:
        BuildError: a tool is missing or fails.
    """
    # Kept between builds of every kind, so that each compiles only what has changed.
    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / "build.ninja").write_text(ninja_file(name, output))
        if name == "_C":
            write_instances(folder / "hopper_instances.h")
            for source in cuda_rules()[2]:
                kept = folder / source.relative_to(ROOT / "csrc").with_suffix(".o.ptx")
                kept.mkdir(parents=True, exist_ok=True)
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        process = subprocess.Popen(
            [*command, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
    except (ImportError, OSError) as error:
        raise BuildError(f"the build of fastst.{name} failed: {error}") from error
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        said.append(line.strip())
    failed = process.wait()
    for file in folder.glob("cuda/**/*.ptx/*"):  # what else nvcc keeps
        if file.suffix != ".ptx":
            file.unlink()
    if failed:
        raise BuildError(f"the build of fastst.{name} failed: {first_error(said)}")


def first_error(said: list[str]) -> str:
    """The line of a failed build that tells most."""
    telling = re.compile(r"\b(error|fatal|cannot|not found|no such file|no module)\b", re.I)
    found = [line for line in said if telling.search(line) and not line.startswith("FAILED")]
    return (found or said or ["it said nothing"])[0][:300]


WANTED = " was set"  # ends the reason of what was not to be built
# Why libraries are not there, by name.
left_out: dict[str, str] = {}


def record(package: Path) -> None:
    """Say what is left out, in one line for each kind of library, and write it down."""
    package.mkdir(parents=True, exist_ok=True)
    (package / "_left_out.json").write_text(json.dumps(left_out, indent=2) + "\n")
    for variable, without in WITHOUT.items():
        whys = {
            why
            for name, why in left_out.items()
            if VARIABLES[name] == variable and not why.endswith(WANTED)
        }
        if whys:
            print(
                f"fastst is installed {without}. Reason: {'; '.join(sorted(whys))}. To get it: "
                f"{NEEDED[variable]}; then install fastst again. {variable}=1 makes this an error.",
                file=sys.stderr,
            )


def extensions() -> list[Extension]:
    """The libraries to try; those that are not go to ``left_out``.

    Raises:
        SystemExit: one must be built and has no compiler, or a setting is unknown.
    """
    missing = {
        "FASTST_BUILD_CUDA": None if find_nvcc() else "nvcc was not found",
        "FASTST_BUILD_CPU": None if find_cxx() else missing_cxx(),
    }
    found = []
    for name, variable in VARIABLES.items():
        setting = os.environ.get(variable, "auto")
        known = ("auto", "0", "1", *(["native"] if variable == "FASTST_BUILD_CPU" else []))
        if setting not in known:
            sys.exit(f"{variable} must be {', '.join(known[:-1])} or {known[-1]}, got {setting!r}")
        if setting == "0" or (setting == "native" and name != native()):
            left_out[name] = f"{variable}={setting}{WANTED}"
        elif missing[variable] is None:
            found.append(Extension(f"fastst.{name}", sources=[], optional=setting != "1"))
        elif setting != "1":
            left_out[name] = missing[variable]
        else:
            needed = NEEDED[variable]
            sys.exit(f"fastst: {variable}=1, but {missing[variable]}. It takes {needed}")
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": Build, "build_py": Copy})
