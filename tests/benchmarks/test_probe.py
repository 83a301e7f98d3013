"""What compute-sanitizer watches: calls that must have run."""

from __future__ import annotations

import pytest
import torch

from benchmarks import probe

CPU = torch.device("cpu")


def test_a_backend_that_refuses_everything_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one whose library cannot be loaded: nothing was watched then, and nothing found."""
    monkeypatch.setattr(probe, "with_kernels", lambda device: ["cuda"])
    assert probe.probe(CPU, probe.cases()[:1]) == 1
    assert "cuda ran nothing: there was nothing to watch" in capsys.readouterr().out
    assert probe.probe(CPU, []) == 1


def test_backends_with_kernels_of_a_device() -> None:
    assert probe.with_kernels(torch.device("cuda")) == ["cuda", "triton"]
