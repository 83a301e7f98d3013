"""``conv3d`` on the generic CUDA kernels through the emulator: its numbers, what is written, why
"auto" passes it over, and bugs planted in the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastst
from fastst.backends import cuda
from fastst.backends.contract import ConvBackward
from fastst.backends.cuda import convolution, library
from fastst.functional import BatchNorm, Norm, conv3d
from fastst.problem.conv3d import ConvProblem, ConvSpec, ConvTensors
from tests.support import fuzz, planted
from tests.support.fuzz import ConvConfig, ConvLimits
from tests.support.made import Made, watched
from tests.support.planted import Plant

pytestmark = pytest.mark.usefixtures("emulated")

SMALL = ConvLimits(batch=2, channels=17, frames=5, space=6, work=60_000)


@pytest.mark.parametrize("chunk", range(4))
def test_random_calls_are_right(chunk: int) -> None:
    fuzz.fuzz("cuda", 12, SMALL, first=fuzz.SEED + 1000 * chunk, least=1.0)


PLAIN: dict[str, Any] = {
    "batch": 2, "channels": 6, "out": 4, "size": (3, 4, 5), "dtype": torch.float32,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "group by frames, past": dict(
        norm="group", norm_groups=2, per_frame=True, past=2, causal=True, padding=(0, 1, 1),
        input_activation="silu", padding_mode=("circular", "zeros"),
    ),
    "instance": dict(norm="instance", input_activation="gelu", x_layout="channels_last"),
    "batch, strided, residual": dict(
        norm="batch", stride=(2, 1, 2), dilation=(1, 2, 1), residual=True, activation="silu",
    ),
    "layer in float64": dict(
        norm="layer", dtype=torch.float64, padding=((2, 0), (0, 1), 1),
        input_activation="gelu_tanh",
    ),
    "rms, first frame": dict(
        norm="rms", causal=True, padding=(0, 1, 1), padding_mode=("zeros", "replicate"),
    ),
    "l2 in bfloat16": dict(norm="l2", past=1, dtype=torch.bfloat16),
    "depthwise, past": dict(
        groups=6, out=12, norm="frozen", past=1, input_activation="silu",
        padding_mode=("reflect", "zeros"),
    ),
    "past alone": dict(past=1, residual=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind: str) -> None:
    fuzz.hold(ConvConfig(**(PLAIN | KINDS[kind])), "cuda")


def test_statistics_of_y() -> None:
    x, w = torch.randn(2, 3, 4, 5, 6), torch.randn(5, 3, 3, 3, 3)
    with fastst.use_backend("cuda"):
        y, found = conv3d(x, w, padding=1, output_statistics=True)
    var, mean = torch.var_mean(y.double(), (0, 2, 3, 4), correction=0)
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.var.double(), var, rtol=1e-5, atol=1e-6)


# ---- what is written


@pytest.mark.parametrize(
    "settings",
    [
        dict(input_norm=Norm("group", groups=2), input_activation="silu", padding=1),
        dict(
            input_norm=BatchNorm(torch.zeros(8), torch.ones(8)), padding=1, padding_mode="reflect"
        ),
        dict(input_norm=Norm("rms"), past=torch.randn(1, 8, 2, 6, 6), causal=True),
        dict(residual=torch.randn(1, 4, 4, 6, 6), padding=1, activation="relu"),
    ],
)
def test_nothing_is_written_but_y_and_statistics(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made()
    monkeypatch.setattr(cuda.BACKEND, "conv3d", watched(convolution.conv3d, made))
    x, w = torch.randn(1, 8, 4, 6, 6), torch.randn(4, 8, 3, 3, 3)
    with fastst.use_backend("cuda"), torch.no_grad():
        y = conv3d(x, w, **settings)
    own = y.untyped_storage().nbytes()
    by_position = getattr(settings.get("input_norm"), "kind", None) == "rms"
    positions = 6 if by_position else 0  # floats of each, C = 8
    assert made.total - own <= 4 * (positions * x[0, 0].numel() + 100 * 8)


@pytest.mark.parametrize("past", [0, 2])
def test_backward_writes_dx_alone(past: int) -> None:
    x, w = torch.randn(2, 8, 4, 6, 6), torch.randn(4, 8, 1, 1, 1)
    before = torch.randn(2, 8, past, 6, 6) if past else None
    tensors = ConvTensors(x, w, past=before)
    problem = ConvProblem.of(
        tensors, ConvSpec(norm="group", norm_groups=2, input_activation="silu")
    )
    _, mean, var, *_ = convolution.conv3d(problem, tensors)
    dy = torch.randn(problem.out_shape)
    needs = [t is not None for t in tensors]
    made = Made()
    dx, *_, dpast = watched(convolution.conv3d_backward, made)(
        ConvBackward(problem, tensors, dy, mean, var, needs)
    )
    own = dx.nbytes + (dpast.nbytes if past else 0)
    assert own <= made.total <= own + 8000, made.sizes


# ---- who runs it


def test_auto_says_why_it_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = ConvTensors(torch.empty(1, 64, 4, 8, 8), torch.empty(64, 64, 3, 3, 3))
    problem = ConvProblem.of(tensors, ConvSpec(padding=(1,) * 6))
    assert cuda.BACKEND.why_unhonoured(problem.spec) is None
    assert cuda.BACKEND.why_not(problem, "backward") is None
    monkeypatch.setattr(cuda, "is_emulated", lambda: False)
    why = str(cuda.BACKEND.why_not_auto(problem, "forward"))
    assert "only its generic kernels" in why and "Hopper" in why and "3×3×3" in why


def test_a_source_needs_a_table_for_all_for_clips_or_for_frames() -> None:
    x = torch.zeros(2, 4, 3, 2, 2)
    tensors = ConvTensors(x, torch.zeros(4, 4, 1, 1, 1))
    k = library.Launcher(ConvProblem.of(tensors, ConvSpec()))
    source = k.norm_act(x, torch.zeros(4, 5, 4), "none")
    with pytest.raises(ValueError, match="for all clips, for each or for each frame"):
        k.write_source(source, x)


# ---- planted bugs

TAP, SUMS = "generic/tap_conv.cu", "reductions.cu"
SEEN_BY = {
    "table": "group by frames, past", "past": "past alone", "sums": "instance",
    "layer": "layer in float32", "frame mode": "rms, first frame",
    "squares": "layer in float32",
}  # fmt: skip
EXTRA = {"layer in float32": KINDS["layer in float64"] | {"dtype": torch.float32}}
MUTANTS = {
    "table": (TAP, "n * clip_ + t * frame_", "n * clip_"),
    "past": (TAP, "at.t += p.before;", ""),
    "sums": (SUMS, "begin += set * length, end += set * length;", ""),
    "layer": (TAP, "g - row(2, at) - ", "g - "),
    "frame mode": (TAP, "i == 0 ? conv.frame_mode : conv.mode", "conv.mode"),
    "squares": (SUMS, "(value(c) - centre) * (value(c) - centre)", "value(c) * value(c)"),
}  # fmt: skip


@pytest.mark.parametrize("file", [TAP, SUMS])
def test_nothing_is_caught_without_a_bug(file: str, plant: Plant) -> None:
    plant(file, **planted.GENERIC)
    for kind in sorted(set(SEEN_BY.values())):
        fuzz.hold(ConvConfig(**(PLAIN | (KINDS | EXTRA)[kind])), "cuda")


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name: str, plant: Plant) -> None:
    plant(*MUTANTS[name], **planted.GENERIC)
    with planted.caught():
        fuzz.hold(ConvConfig(**(PLAIN | (KINDS | EXTRA)[SEEN_BY[name]])), "cuda")
