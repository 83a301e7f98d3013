"""Inference engines that people would take in the place of PyTorch: OpenVINO and ONNX Runtime.

Optional: ``pip install '.[engines]'``. They get the original model in float32, exported, compute in
a dtype on PyTorch's number of threads, and are compared with float64 as everybody else is.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]


def openvino(model: nn.Module, clip: Tensor, dtype: torch.dtype) -> Call:
    """OpenVINO's CPU plugin, tuned for the latency of one request."""
    import openvino as ov

    precisions = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    program = torch.export.export(model, (clip,))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precisions[dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(ov.convert_model(program), "CPU", settings)
    request = compiled.create_infer_request()

    def call(x: Tensor) -> Tensor:
        return torch.from_numpy(request.infer({0: x.numpy()})[0])

    return call


def onnxruntime(model: nn.Module, clip: Tensor, dtype: torch.dtype) -> Call:
    """ONNX Runtime's CPU provider, with all of its graph optimisations.

    Raises:
        ValueError: a dtype in which it has no convolutions.
    """
    import onnxruntime as ort

    if dtype != torch.float32:
        raise ValueError(f"ONNX Runtime requires float32 on CPUs, got {dtype}")

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


ENGINES: dict[str, Callable[[nn.Module, Tensor, torch.dtype], Call]] = {
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}


def version(name: str) -> str | None:
    """The version of an engine that is installed, else None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engines", action="store_true", help="with OpenVINO and ONNX Runtime")


def chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Those that are installed, where they were asked for.

    Raises:
        SystemExit: they were asked for, and none is there.
    """
    found = [name for name in ENGINES if version(name)] if options.engines else []
    if options.engines and not found:
        parser.error(f"--engines requires one of {', '.join(ENGINES)}: pip install '.[engines]'")
    return found
