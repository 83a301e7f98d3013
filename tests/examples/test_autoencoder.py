"""The example of a Wan-type decoder: the same numbers, whole and frame by frame."""

from __future__ import annotations

from pathlib import Path

import autoencoder
import pytest
import torch


def test_runs_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "decoder.pt"
    torch.save(autoencoder.Decoder(8).state_dict(), path)
    autoencoder.main(["--frames", "4", "--size", "10", "--width", "8", "--checkpoint", str(path)])
    lines = capsys.readouterr().out.splitlines()
    differences = [float(line.split()[-5]) for line in lines if "largest difference" in line]
    assert len(differences) == 2 and max(differences) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--frames", "0"], "requires a whole number from 1 on, got '0'"),
        (["--width", "x"], "requires a whole number from 1 on, got 'x'"),
        (["--checkpoint", "missing.pt"], "missing.pt: no such checkpoint"),
        (["--checkpoint", "other.pt"], "Missing key(s)"),
    ],
)
def test_options_that_do_not_fit(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.zeros(1)}, "other.pt")
    with pytest.raises(SystemExit):
        autoencoder.main(arguments)
    assert told in capsys.readouterr().err.splitlines()[-1]
