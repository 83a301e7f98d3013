"""A network on a clip before and after ``fastst.convert``: agreement, time, memory, a chart."""

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

from .. import models
from ..machine import devices

try:
    from tqdm import tqdm

    from . import chart, clip
except ImportError as error:
    needed = "pip install 'av>=12' 'matplotlib>=3.8' numpy tqdm"  # the extra "demo"
    print(f"fastst.demo: {error}; it needs: {needed}", file=sys.stderr)
    sys.exit(2)
from . import measure

_NETWORKS = {"r2plus1d_18": "R(2+1)D-18", "r3d_18": "R3D-18"}
ORIGINAL, CONVERTED, OPTIMISED = "original", "converted", "for inference"
_FEW_ULPS = 4 * torch.finfo(torch.float32).eps
_DOUBLE = 1e-8  # what float64 keeps of a gradient through 37 batch norms, some over few values


class Agreement(NamedTuple):
    """Relative errors against the original network in float64."""

    outputs: dict[str, float]  # of each network in float32
    gradient: float  # of the converted one in float64
    running_statistics: float  # likewise, after one training step

    def holds(self) -> bool:
        """At most twice the error of PyTorch's own operators, and the same function in float64."""
        limit = 2 * self.outputs[ORIGINAL] + _FEW_ULPS
        double = max(self.gradient, self.running_statistics)
        return max(self.outputs.values()) <= limit and double <= _DOUBLE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Returns:
        0; 1 if a replaced network computes something else; 2 if the clip, the checkpoint or the
        output file is of no use.
    """
    options = _options(argv)
    torch.manual_seed(options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        frames = clip.read(options.video, options.frames, options.size)
        original = getattr(models, options.model)(weights=options.weights).to(options.device)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.open("ab").close()
    except (clip.ClipError, OSError, ValueError) as error:
        print(f"fastst.demo: {error}", file=sys.stderr)
        return 2
    x = clip.normalise(frames).expand(options.batch, -1, -1, -1, -1).to(options.device)
    converted = copy.deepcopy(original)
    report = fastst.convert(converted)
    same_keys = list(original.state_dict()) == list(converted.state_dict())
    trained = {ORIGINAL: original, CONVERTED: converted}
    run = {**trained, OPTIMISED: fastst.optimize_for_inference(original)}

    rounds = (len(run) + len(trained)) * (options.repeats + 1)
    with tqdm(total=rounds + len(run) + len(trained), unit="run", disable=options.quiet) as bar:
        agreement = _agreement(run, trained, x, bar)
        bar.set_description("timing, inference")
        inference = measure.medians(measure.infer, run, x, options.repeats, bar.update)
        bar.set_description("timing, training step")
        training = measure.medians(measure.train, trained, x, options.repeats, bar.update)
    saved = {name: measure.saved_bytes(model, x) for name, model in trained.items()}

    panels = [
        chart.Panel("Inference, median", "ms", _scale(1e3, inference)),
        chart.Panel("Training step, median", "ms", _scale(1e3, training)),
        chart.Panel("Saved for backward", "MB", _scale(1e-6, saved)),
    ]
    weights = options.weights.name if options.weights else "random weights"
    setting = (
        f"{_NETWORKS[options.model]}, {weights}; {options.batch} × {options.frames} frames of "
        f"{options.size}² from {options.video.name}; {_machine(options.device)}, float32"
    )
    replaced = f"{len(report.replaced)} pairs of convolutions replaced"
    if not report.replaced:
        replaced = f"{len(report.whole)} 3D convolutions prepared"
    keys = "unchanged" if same_keys else "CHANGED"
    print(f"{setting}\n{replaced}, state_dict keys {keys}\n\n{_table(agreement, panels)}")
    notes = [setting, f"{replaced}, state_dict keys {keys}", _summary(agreement)]
    chart.draw(options.output, frames, "One network, before and after conversion", notes, panels)
    print(f"\nchart: {options.output}")
    if same_keys and agreement.holds():
        return 0
    print("fastst.demo: the networks do not agree with the original", file=sys.stderr)
    return 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastst.demo", description=__doc__)
    gpu = next(iter(devices.present()), None)
    add = parser.add_argument
    add("--video", type=Path, default=clip.SHIPPED, help="any file that FFmpeg reads")
    add("--frames", type=_at_least(1), default=16, help="frames of the clip (16)")
    add("--size", type=_at_least(32), default=112, help="height and width in pixels (112)")
    add("--batch", type=_at_least(1), default=1, help="times the clip is repeated (1)")
    add("--repeats", type=_at_least(1), default=5, help="timed runs of each kind (5)")
    add("--threads", type=_at_least(1), help="CPU threads (PyTorch's choice)")
    add("--device", type=_device, default=gpu.type if gpu else "cpu", help="a GPU if there is one")
    add("--model", choices=_NETWORKS, default="r2plus1d_18", help="the network (r2plus1d_18)")
    add("--weights", type=Path, help="torchvision's checkpoint of it (random weights)")
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


def _agreement(
    run: Mapping[str, nn.Module], trained: Mapping[str, nn.Module], x: Tensor, bar: tqdm
) -> Agreement:
    """Errors of one inference and one training step; leaves the models as they were.

    Training is compared in float64: in float32 a ReLU whose input is nearly 0 may open in one run
    and not in the other, which moves the gradient of the early layers by a percent.
    """
    bar.set_description("agreement, float64")
    double, truth, steps = x.double(), {}, {}
    for name, model in trained.items():
        model = copy.deepcopy(model).double()
        with fastst.use_backend("aten"):  # float64 is no case for the fast ones
            truth[name] = measure.infer(model, double)
            measure.train(model, double)
        steps[name] = measure.gradient(model), measure.running_statistics(model)
        bar.update()
    bar.set_description("agreement, float32")
    outputs = {}
    for name, model in run.items():
        outputs[name] = measure.relative_error(measure.infer(model, x), truth[ORIGINAL])
        bar.update()
    gradient, statistics = map(measure.relative_error, steps[CONVERTED], steps[ORIGINAL])
    return Agreement(outputs, gradient, statistics)


def _scale(factor: float, values: Mapping[str, float]) -> dict[str, float]:
    return {name: factor * value for name, value in values.items()}


def _machine(device: torch.device) -> str:
    if devices.is_gpu(device):
        return str(devices.runtime(device).get_device_name(device))
    return f"{device.type}, {torch.get_num_threads()} threads"


def _summary(a: Agreement) -> str:
    errors = ", ".join(f"{name} {error:.1e}" for name, error in a.outputs.items())
    return f"output against float64: {errors}; gradient in float64: {a.gradient:.1e} apart"


def _table(a: Agreement, panels: list[chart.Panel]) -> str:
    rows = {
        "": {name: name for name in a.outputs},
        "Output, error against float64": {n: f"{e:.1e}" for n, e in a.outputs.items()},
        "Gradient, difference in float64": {CONVERTED: f"{a.gradient:.1e}"},
        "Running statistics, likewise": {CONVERTED: f"{a.running_statistics:.1e}"},
    }
    for panel in panels:
        first = panel.values[ORIGINAL]
        rows[f"{panel.title}, {panel.unit}"] = {
            name: f"{value:,.0f}" + (f" ({value / first:.2f})" if name != ORIGINAL else "")
            for name, value in panel.values.items()
        }
    return "\n".join(
        f"{label:<32}{''.join(f'{cells.get(name, str()):>16}' for name in a.outputs)}".rstrip()
        for label, cells in rows.items()
    )


if __name__ == "__main__":
    sys.exit(main())
