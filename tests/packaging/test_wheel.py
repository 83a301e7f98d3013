"""A wheel with compiled libraries, as users get it: built, repaired, installed, used elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import ROOT

for tool in ("auditwheel", "build"):
    pytest.importorskip(tool, reason="a tool that releases are made with")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="builds for Linux with g++"
)
def test_wheel_is_for_many_linuxes_and_works_away_from_the_checkout(tmp_path: Path) -> None:
    """``release/wheel.py`` fails unless the README, the demo and the tests run from the wheel."""
    command = [sys.executable, str(ROOT / "release/wheel.py"), "--reuse", "--out", str(tmp_path)]
    environment = {**os.environ, "FASTST_BUILD_CUDA": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "manylinux" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for library in ("_cpu_avx2", "_cpu_avx512"):
        assert any(name.startswith(f"fastst/{library}.") for name in names)
