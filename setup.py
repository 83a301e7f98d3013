"""Builds the native library ``fastst._C`` with nvcc and ninja where nvcc is; see docs/install.md.

FASTST_BUILD_CUDA: "auto" (default: build if nvcc is found), "1" (it must be), "0" (do not).
TORCH_CUDA_ARCH_LIST: architectures, as PyTorch extensions take them, e.g. "8.0;9.0a+PTX".
The rest of the package is described in pyproject.toml. Nothing here needs torch or a GPU.
"""

from __future__ import annotations

import os
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


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (found := shutil.which("nvcc", path=str(Path(home) / "bin"))):
        return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


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


def ninja_file(nvcc: str, output: Path) -> str:
    """Rules that compile csrc and link the module; cudart goes in, libcuda stays out."""
    import pybind11

    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    lines = [
        f"nvcc = {nvcc}",
        f"flags = -std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -DFASTST_MODULE=_C "
        f"-DFASTST_EMULATED=false {' '.join(f'-I{i}' for i in includes)}",
        f"architectures = {' '.join(architecture_flags(listed))}",
        "rule compile",
        "  command = $nvcc $flags $architectures -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $nvcc -shared -cudart static $architectures $in -o $out",
    ]
    objects = []
    for source in sorted([*ROOT.glob("csrc/*.cu"), *ROOT.glob("csrc/*.cpp")]):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {source.stem}.o: compile {source}")
    return "\n".join([*lines, f"build {output}: link {' '.join(objects)}", ""])


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(nvcc, output))
        ninja = shutil.which("ninja") or [sys.executable, "-m", "ninja"]
        command = [ninja] if isinstance(ninja, str) else ninja
        subprocess.run([*command, "-C", str(folder)], check=True)


def extensions() -> list[Extension]:
    """
    Raises:
        SystemExit: the library must be built and nvcc is missing, or a setting is unknown.
    """
    wanted = os.environ.get("FASTST_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"FASTST_BUILD_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0" or (wanted == "auto" and not find_nvcc()):
        if wanted == "auto":
            print(
                "fastst: nvcc was not found, so fastst is installed without its CUDA library; the "
                "Triton and PyTorch backends work. To get it: install the CUDA toolkit 12.5 or "
                "newer, set CUDA_HOME to it, and install fastst again.",
                file=sys.stderr,
            )
        return []
    if not find_nvcc():
        sys.exit(
            "fastst: FASTST_BUILD_CUDA=1 requires nvcc, which is neither on PATH nor under "
            "CUDA_HOME; install the CUDA toolkit 12.5 or newer"
        )
    return [Extension("fastst._C", sources=[])]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
