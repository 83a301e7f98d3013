"""R(2+1)D-18 on a clip before and after ``fastst.convert``: agreement, time, memory, a chart."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastst
from fastst.models import r2plus1d_18

try:
    from tqdm import tqdm

    from . import chart, clip
except ImportError as error:
    print(f"fastst.demo: {error}; it needs: pip install 'fastst[demo]'", file=sys.stderr)
    sys.exit(2)
from . import measure

_FEW_ULPS = 4 * torch.finfo(torch.float32).eps
_DOUBLE = 1e-8  # what float64 keeps of a gradient through 37 batch norms, some over few values


class Agreement(NamedTuple):
    """Relative errors of the original and of the converted network."""

    output: float  # of the original in float32 against float64
    converted_output: float  # of the converted one in float32, against the original in float64
    gradient: float  # of the converted one against the original, both in float64
    running_statistics: float  # likewise, after one training step

    def holds(self) -> bool:
        """At most twice the error of PyTorch's own operators, and the same function in float64."""
        double = max(self.gradient, self.running_statistics)
        return self.converted_output <= 2 * self.output + _FEW_ULPS and double <= _DOUBLE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0; 1 if the converted network computes something else; 2 if the clip, the checkpoint or the
        output file is of no use.
    """
    options = _options(argv)
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.open("ab").close()
        frames = clip.read(options.video, options.frames, options.size)
        original = r2plus1d_18(weights=options.weights)
    except (clip.ClipError, OSError, ValueError) as error:
        print(f"fastst.demo: {error}", file=sys.stderr)
        return 2
    x = clip.normalise(frames).expand(options.batch, -1, -1, -1, -1).to(options.device)
    original.to(options.device)
    converted = copy.deepcopy(original)
    report = fastst.convert(converted)
    models = {"original": original, "converted": converted}

    rounds = 2 * len(models) * (options.repeats + 1)
    with tqdm(total=rounds + 2 * len(models), unit="run", disable=options.quiet) as bar:
        agreement = _agreement(models, x, bar)
        seconds = {}
        for what, step in (("inference", measure.infer), ("training step", measure.train)):
            bar.set_description(f"timing, {what}")
            seconds[what] = measure.medians(step, models, x, options.repeats, bar.update)
    saved = {name: measure.saved_bytes(model, x) for name, model in models.items()}

    panels = [
        *(
            chart.Panel(f"{what[0].upper()}{what[1:]}, median", "ms", _scaled(1e3, by_model))
            for what, by_model in seconds.items()
        ),
        chart.Panel("Saved for backward", "MB", _scaled(1e-6, saved)),
    ]
    weights = options.weights.name if options.weights else "random weights"
    setting = (
        f"R(2+1)D-18, {weights}; {options.batch} × {options.frames} frames of {options.size}² from "
        f"{options.video.name}; {_machine(options.device)}, float32"
    )
    replaced = f"{len(report.replaced)} pairs of convolutions replaced"
    keys = "unchanged" if list(original.state_dict()) == list(converted.state_dict()) else "CHANGED"
    print(f"{setting}\n{replaced}, state_dict keys {keys}\n\n{_table(agreement, panels)}")
    notes = [setting, f"{replaced}; {_summary(agreement)}"]
    chart.draw(options.output, frames, "fastst.convert: before and after", notes, panels)
    print(f"\nchart: {options.output}")
    if keys == "unchanged" and agreement.holds():
        return 0
    print("fastst.demo: the converted network does not agree with the original", file=sys.stderr)
    return 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastst.demo", description=__doc__)
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--video", type=Path, default=clip.SHIPPED, help="any file that FFmpeg reads")
    add("--frames", type=_at_least(1), default=16, help="frames of the clip (16)")
    add("--size", type=_at_least(32), default=112, help="height and width in pixels (112)")
    add("--batch", type=_at_least(1), default=1, help="times the clip is repeated (1)")
    add("--repeats", type=_at_least(1), default=5, help="timed runs of each kind (5)")
    add("--threads", type=_at_least(1), help="CPU threads (PyTorch's choice)")
    add("--device", type=_device, default="cuda" if gpu else "cpu", help="cuda if there is one")
    add("--weights", type=Path, help="torchvision's checkpoint of r2plus1d_18 (random weights)")
    add("--seed", type=int, default=0, help="of the random weights (0)")
    add("--output", type=Path, default=Path("out/demo.png"), help="the chart (out/demo.png)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(argv)


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    parse.__name__ = "int"
    return parse


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {error}") from error
    return device


def _agreement(models: Mapping[str, nn.Module], x: Tensor, bar: tqdm) -> Agreement:
    """Errors of one inference and one training step; leaves the models as they were.

    Training is compared in float64: in float32 a ReLU whose input is nearly 0 may open in one run
    and not in the other, which moves the gradient of the early layers by a percent.
    """
    bar.set_description("agreement, float64")
    double, found = x.double(), []
    for model in models.values():
        model = copy.deepcopy(model).double()
        output = measure.infer(model, double)
        measure.train(model, double)
        found.append((output, measure.gradient(model), measure.running_statistics(model)))
        bar.update()
    (truth, gradient, statistics), (_, other_gradient, other_statistics) = found
    bar.set_description("agreement, float32")
    errors = []
    for model in models.values():
        errors.append(measure.relative_error(measure.infer(model, x), truth))
        bar.update()
    return Agreement(
        errors[0],
        errors[1],
        measure.relative_error(other_gradient, gradient),
        measure.relative_error(other_statistics, statistics),
    )


def _scaled(factor: float, values: Mapping[str, float]) -> dict[str, float]:
    return {name: factor * value for name, value in values.items()}


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _summary(a: Agreement) -> str:
    return (
        f"error of the output against float64 {a.output:.1e}, converted {a.converted_output:.1e}; "
        f"gradients differ by {a.gradient:.1e} in float64"
    )


def _table(a: Agreement, panels: list[chart.Panel]) -> str:
    rows = [
        ("", "original", "converted", "ratio"),
        ("Output: error against float64", f"{a.output:.1e}", f"{a.converted_output:.1e}", ""),
        ("Gradient: difference in float64", "", f"{a.gradient:.1e}", ""),
        ("Running statistics: difference in float64", "", f"{a.running_statistics:.1e}", ""),
    ]
    for panel in panels:
        before, after = panel.values["original"], panel.values["converted"]
        label, ratio = f"{panel.title}, {panel.unit}", f"{after / before:.2f}"
        rows.append((label, f"{before:,.0f}", f"{after:,.0f}", ratio))
    return "\n".join(f"{r[0]:<44}{r[1]:>12}{r[2]:>12}{r[3]:>8}".rstrip() for r in rows)


if __name__ == "__main__":
    sys.exit(main())
