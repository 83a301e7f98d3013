"""The script that runs other people's tests with converted networks, on a project made up here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

TESTS = """
import torch
from torch import nn

def network():
    return nn.Sequential(
        nn.Conv3d(3, 8, (1, 3, 3), padding=(0, 1, 1)), nn.ReLU(), nn.Conv3d(8, 4, (3, 1, 1))
    )

def test_shape():
    assert network()(torch.randn(1, 3, 4, 8, 8)).shape == (1, 4, 2, 8, 8)

def test_that_fails_plain():
    assert not network()(torch.randn(1, 3, 4, 8, 8)).any()

def test_of_the_answerer():
    first = network()[0]
    first(torch.randn(1, 3, 4, 8, 8))
    assert "_conv_forward" not in vars(first)
"""


@pytest.mark.slow
def test_counts_what_passes_plain_and_converted(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(TESTS)
    script = ROOT / "tests/support/peers_suites.py"
    done = subprocess.run(
        [sys.executable, str(script), "pytorchvideo", str(tmp_path), "test_theirs.py"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    summary, only_plain = done.stdout.strip().splitlines()
    assert summary == (
        "pytorchvideo: 2 pass plain (1 do not), of these 1 converted; "
        "3 modules converted, 2 pairs ran as one"
    )
    assert only_plain == "  only plain: test_theirs.test_of_the_answerer"
