"""What ``pip install`` brings: built without torch, without a compiler, complete and importable."""

from __future__ import annotations

import ast
import email
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

import fastst
from tests.support import ROOT

EXTRAS = ("demo", "bench", "engines", "train", "docs", "release", "dev")
_NOT_SOURCES = shutil.ignore_patterns(
    ".*", "build", "dist", "out", "__pycache__", "*.so", "*.egg-info", "_left_out.json"
)


def without(folder: Path, *packages: str) -> dict[str, str]:
    """An environment in which importing these packages fails, and their names say why."""
    for name in packages:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} must not be needed')")
    built = {"FASTST_BUILD_CUDA": "0", "FASTST_BUILD_CPU": "0"}
    return {**os.environ, "PYTHONPATH": str(folder), **built}


def loaded(script: str) -> ModuleType:
    """A script of the checkout, as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, where torch, numpy and triton cannot be imported."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=_NOT_SOURCES)
    (folder / "missing").mkdir()
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "."]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "./source"],
        cwd=folder,
        env=without(folder / "missing", "torch", "numpy", "triton"),
        check=True,
    )
    (found,) = folder.glob("fastst-*.whl")
    return found


@pytest.mark.slow
def test_wheel_is_pure_and_complete(wheel: Path) -> None:
    assert wheel.name == f"fastst-{fastst.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastst").rglob("*.py")}
    assert sources <= set(names)
    data = "fastst/demo/data"
    assert {"fastst/py.typed", f"{data}/README.md", f"{data}/bigbuckbunny_256x144.mp4"} <= set(
        names
    )
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {
        "fastst",
        f"fastst-{fastst.__version__}.dist-info",
    }


@pytest.mark.slow
def test_metadata_asks_for_ranges(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(path))
    required = [Requirement(r) for r in metadata.get_all("Requires-Dist", [])]
    assert [str(r) for r in required if r.marker is None] == ["torch>=2.11"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == set(EXTRAS)
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = {r.name: r.specifier for r in map(Requirement, pins)}
    (torch,) = [r for r in required if r.name == "torch"]
    assert torch.specifier.contains(str(pinned["torch"]).removeprefix("=="))


@pytest.mark.slow
def test_wheel_imports_without_optional_packages(wheel: Path, tmp_path: Path) -> None:
    """Neither Triton nor the native library nor what the demo needs; the demo says so."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    environment = without(tmp_path, "triton", "av", "matplotlib", "tqdm")
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path / "installed")
    program = (
        "import fastst, torch\n"
        "layer = fastst.Conv2Plus1d(2, 3, 3, padding=1, norm='batch')\n"
        "layer(torch.randn(1, 2, 3, 4, 4)).sum().backward()\n"
        "print(fastst.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "installed"))
    demo = subprocess.run(
        [sys.executable, "-m", "fastst.demo"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert demo.returncode == 2
    told = shlex.split(demo.stderr.split("it needs: pip install ")[1])
    text = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^demo = (\[.*\])$", text, re.MULTILINE)
    assert told == ast.literal_eval(extra)
    assert "Traceback" not in demo.stderr


def test_releases_have_a_wheel_for_each_python() -> None:
    """The workflow's matrix, what the package says of itself, and what a wheel is tested with."""
    workflow = (ROOT / ".github/workflows/release.yml").read_text()
    (matrix,) = re.findall(r"^ +python: \[(.*)\]$", workflow, re.MULTILINE)
    listed = re.findall(r"Python :: 3\.(\d+)", text := (ROOT / "pyproject.toml").read_text())
    assert matrix.split(", ") == [f"cp3{minor}" for minor in listed]
    assert f'requires-python = ">=3.{listed[0]}"' in text
    tested = loaded("release/wheel.py").QUICK
    assert f"python -m pytest -q {' '.join(tested)}\n" in workflow


def test_release_check_names_what_does_not_agree(tmp_path: Path) -> None:
    check = loaded("release/check.py")
    for name in ("CHANGELOG.md", "CITATION.cff", "mkdocs.yml", "pyproject.toml"):
        text = (ROOT / name).read_text().replace("fastst.example", "project.org")
        text = re.sub(r"^## Unreleased\n.*?(?=^## )", "", text, flags=re.M | re.S)
        (tmp_path / name).write_text(text)
    (tmp_path / "fastst").mkdir()
    shutil.copy(ROOT / "fastst/__init__.py", tmp_path / "fastst")
    tag = f"v{fastst.__version__}"
    assert check.problems(tag, tmp_path) == []
    found = "\n".join(check.problems("v99.0", tmp_path))
    for part in ("must look like v1.2.3", "__init__.py", "CHANGELOG.md", "CITATION.cff"):
        assert part in found
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    changes = (tmp_path / "CHANGELOG.md").read_text()
    (tmp_path / "CHANGELOG.md").write_text(f"## Unreleased\n\n- news\n\n{changes}")
    found = "\n".join(check.problems(tag, tmp_path))
    assert "placeholder" in found
    assert "Unreleased belongs" in found


def test_source_archive_is_whole(wheel: Path) -> None:
    """It holds every file of a checkout but those whose names begin with a dot."""
    source = wheel.parent / "source"
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "archive"]
    environment = without(wheel.parent / "missing", "torch")
    subprocess.run(command, cwd=source, env=environment, check=True)
    (archive,) = (source / "archive").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    expected = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    made = ("archive/", "build/", "fastst.egg-info/")
    assert {n for n in expected - held if not n.startswith(made) and not n.endswith(".so")} == set()
