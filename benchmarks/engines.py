"""Inference engines that people would take in the place of PyTorch: OpenVINO and ONNX Runtime.

Optional: ``pip install '.[engines]'``. They get the original model, exported, in float32 and on
PyTorch's number of threads, and are compared with float64 as everybody else is.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]


def openvino(model: nn.Module, clip: Tensor) -> Call:
    """OpenVINO's CPU plugin, tuned for the latency of one request."""
    import openvino as ov

    program = torch.export.export(model, (clip,))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(ov.convert_model(program), "CPU", settings)
    request = compiled.create_infer_request()

    def call(x: Tensor) -> Tensor:
        return torch.from_numpy(request.infer({0: x.numpy()})[0])

    return call


def onnxruntime(model: nn.Module, clip: Tensor) -> Call:
    """ONNX Runtime's CPU provider, with all of its graph optimisations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (clip,), path, dynamo=True, verbose=False)
        session = ort.InferenceSession(path, options, providers=providers)
    name = session.get_inputs()[0].name

    def call(x: Tensor) -> Tensor:
        found: Any = session.run(None, {name: x.numpy()})[0]
        return torch.from_numpy(found)

    return call


ENGINES: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}


def version(name: str) -> str | None:
    """The version of an engine that is installed, else None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
