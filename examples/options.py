"""What a training run is made of."""

# ruff: noqa: RUF009 -- option() is dataclasses.field()

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from fastst import models

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class OptionError(ValueError):
    """A run that cannot be."""


def whole(least: int) -> Callable[[str], int]:
    """A type of argparse: whole numbers from ``least`` on."""

    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"requires a whole number from {least} on, got {text!r}"
            )
        return int(text)

    return parse


def option(default: Any, text: str, **kwargs: Any) -> Any:
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass(frozen=True)
class Options:
    """Everything a run is made of; also the command line."""

    data: Path | None = option(
        None, "folder of the videos: DATA/{train,val}/CLASS/FILE, or root of the lists",
        nargs="?", type=Path,
    )  # fmt: skip
    train_list: Path | None = option(None, "videos to train on (txt, csv, json)", type=Path)
    val_list: Path | None = option(None, "videos to evaluate on", type=Path)
    classes: Path | None = option(None, "names (classInd.txt, labels.json)", type=Path)
    model: str = option("r2plus1d_18", "network of fastst.models", choices=sorted(models.NETWORKS))
    width: int | None = option(
        None, "channels of the first stage, for networks that take it", least=1
    )
    weights: Path | None = option(None, "checkpoint or state_dict to start from", type=Path)
    new_classifier: bool = option(False, "leave the last linear layer out of --weights")
    convert: bool = option(True, "run the conv pairs as single operations (fastst.convert)")
    frames: int = option(16, "frames of a clip", least=1)
    step: int = option(2, "every how many-th frame of the video is taken", least=1)
    size: int = option(112, "height and width of a clip", least=1)
    clips: int = option(
        10, "clips of each video in evaluation, whose probabilities are averaged", least=1
    )
    flip: bool = option(True, "mirror at random (not for classes about left and right)")
    epochs: int = option(30, "passes over the training videos", least=1)
    batch: int = option(8, "clips at a time and device", least=1)
    accumulate: int = option(1, "batches whose gradients make one step", least=1)
    lr: float = option(0.01, "learning rate after the warm-up; decays to 0 along a cosine", least=0)
    warmup: float = option(1.0, "epochs of rising learning rate", least=0)
    momentum: float = option(0.9, "of SGD", least=0)
    weight_decay: float = option(1e-4, "of SGD", least=0)
    amp: str = option("none", "automatic mixed precision", choices=tuple(AMP))
    parallel: str = option("ddp", "under torchrun", choices=("ddp", "fsdp"))
    sync_bn: bool = option(False, "batch norm statistics over all processes")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu or cuda")
    workers: int = option(4, "decoding processes per device", least=0)
    seed: int = option(0, "of everything random", least=0, below=1 << 64)
    out: Path = option(Path("out/train"), "folder of checkpoints and TensorBoard logs", type=Path)
    resume: bool = option(False, "go on from OUT/last.pt")
    save_every: int = option(
        0, "steps between checkpoints, beside those after every epoch", least=0
    )
    log_every: int = option(10, "steps between entries in the log", least=1)

    def __post_init__(self) -> None:
        for f in fields(self):
            least, value = f.metadata.get("least"), getattr(self, f.name)
            below = f.metadata.get("below", math.inf)
            if least is not None and value is not None and not least <= value < below:
                name = f.name.replace("_", "-")
                end = "on" if below == math.inf else f"to {below - 1}"
                raise OptionError(f"--{name} requires a number from {least} {end}, got {value}")
        network = models.NETWORKS[self.model]
        if self.width is not None and "width" not in signature(network).parameters:
            raise OptionError(f"--width: {self.model} has one width only")
        if self.new_classifier and self.weights is None:
            raise OptionError("--new-classifier requires --weights")

    @classmethod
    def parse(cls, description: str | None, arguments: list[str] | None = None) -> Options:
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for f in fields(cls):
            kwargs = {k: v for k, v in f.metadata.items() if k not in ("least", "below")}
            if isinstance(f.default, bool):
                kwargs["action"] = argparse.BooleanOptionalAction
            elif "type" not in kwargs:
                kwargs["type"] = int if f.default is None else type(f.default)
            if "nargs" not in kwargs:
                kwargs["help"] += f" (default: {f.default})"
            name = f.name if "nargs" in kwargs else "--" + f.name.replace("_", "-")
            parser.add_argument(name, default=f.default, **kwargs)
        try:
            return cls(**vars(parser.parse_args(arguments)))
        except OptionError as error:
            parser.error(str(error))
