"""Engines beside PyTorch: their numbers are held to the same rule, and their exports work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import cpu, engines, models, tables


def rows(names: tuple[str, ...], dtype: str = "fp32") -> dict[str, dict[str, Any]]:
    clip = models.Clip(1, 4, 32, 8, dry=True)
    found = models.compare(clip, torch.device("cpu"), dtype, False, "none", 0.0, 2, engines=names)
    return {r["contender"]: r for r in found}


def test_an_engine_gets_a_number_only_if_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def right(model: nn.Module, clip: Tensor, dtype: torch.dtype) -> engines.Call:
        return lambda x: model(x).detach()

    def wrong(model: nn.Module, clip: Tensor, dtype: torch.dtype) -> engines.Call:
        return lambda x: model(x).detach() * 1.001

    def missing(model: nn.Module, clip: Tensor, dtype: torch.dtype) -> engines.Call:
        raise ImportError("No module named 'third'")

    for name, engine in (("openvino", right), ("onnxruntime", wrong), ("third", missing)):
        monkeypatch.setitem(engines.ENGINES, name, engine)
    found = rows(("openvino", "onnxruntime", "third"))
    assert found["openvino"]["ms"] > 0
    assert found["openvino"]["kind"] == "peer"
    assert found["onnxruntime"]["ms"] is None
    assert "relative error" in found["onnxruntime"]["refused"]
    assert "No module named 'third'" in found["third"]["refused"]
    assert found["converted"]["refused"] is None
    assert "not seen" in tables.models({"models": list(found.values())})  # an engine's memory


def test_bfloat16_is_the_dtype_of_models_and_an_engine_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = []

    def engine(model: nn.Module, clip: Tensor, dtype: torch.dtype) -> engines.Call:
        told.append((dtype, clip.dtype, next(model.parameters()).dtype))
        return lambda x: model(x).detach()

    monkeypatch.setitem(engines.ENGINES, "openvino", engine)
    found = rows(("openvino",), "bf16")
    assert told == [(torch.bfloat16, torch.float32, torch.float32)]
    assert all(r["refused"] is None and r["ms"] > 0 for r in found.values())
    exact = found["openvino"]["error"]["logits"]
    assert all(r["error"]["logits"] > 100 * exact for n, r in found.items() if n != "openvino")


def test_asking_for_engines_that_are_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "version", lambda name: None)
    with pytest.raises(SystemExit):
        cpu.main(["--engines", "--dry"])
    assert "--engines requires one of openvino, onnxruntime" in capsys.readouterr().err


@pytest.mark.parametrize("name", engines.ENGINES)
def test_the_export_runs(name: str) -> None:
    pytest.importorskip(name)
    if name == "onnxruntime":
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 4, (1, 3, 3)), nn.ReLU(), nn.Conv3d(4, 2, (3, 1, 1))).eval()
    x = torch.randn(1, 3, 4, 6, 6)
    call = engines.ENGINES[name](model, x, torch.float32)
    other = torch.randn_like(x)
    with torch.no_grad():
        torch.testing.assert_close(call(other), model(other), rtol=1e-4, atol=1e-5)
