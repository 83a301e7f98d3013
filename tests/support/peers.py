"""Other people's models, where they are installed; tests that need them are skipped elsewhere."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import pytest
import torch


def torchvision_video() -> ModuleType:
    """``torchvision.models.video``, also of a build whose C++ operators do not load."""
    _define_nms()
    return _import("torchvision.models.video")


def pytorchvideo(name: str) -> ModuleType:
    """``pytorchvideo.<name>``."""
    _define_nms()
    return _import(f"pytorchvideo.{name}")


def peft() -> ModuleType:
    """``peft``, whose ``transformers`` imports torchvision where there is one."""
    _define_nms()
    return _import("peft")


def _define_nms() -> None:
    """torchvision registers a fake of ``nms`` on import, which requires the operator."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)  # its definitions live as long as it does


_kept: list[torch.library.Library] = []


def _import(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name.split('.')[0]} cannot be imported: {error}")


def _complain() -> None:
    """Say which of these packages a plain import cannot load, and why the tests still can."""
    for name in ("torchvision", "pytorchvideo"):
        try:
            importlib.import_module(name)
        except Exception as error:
            first = str(error).splitlines()[0]
            print(
                f"{name} is here for the tests; `import {name}` fails ({first}): it was built "
                f"for another torch than {torch.__version__}. The tests define what is missing "
                "(tests/support/peers.py). To use it, install it and torch from one source, in an "
                "environment of your own."
            )


if __name__ == "__main__":
    _complain()
