"""``conv3d`` on the Triton backend: random calls, launches, and what the self-check runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastst
from fastst.backends import reference
from fastst.backends import triton as backend
from fastst.backends.contract import ConvBackward
from fastst.backends.triton import arguments, convolution, rehearsal
from fastst.dispatch import selfcheck
from fastst.functional import Norm, conv3d
from fastst.machine import choices
from fastst.problem.conv3d import ConvProblem, ConvSpec, ConvTensors
from tests.backends.triton.test_rehearsal import launched as instances_of
from tests.support import fuzz
from tests.support.fuzz import ConvConfig, ConvLimits
from tests.support.triton import DEVICE, planted_bugs

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("few_programs")

TINY = ConvLimits(batch=2, channels=17, frames=4, space=5, work=8_000)


def check(config: ConvConfig, backward: bool = True) -> None:
    fuzz.hold(config, "triton", backward=backward, device=DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_random_calls_are_right(backward: bool) -> None:
    first = fuzz.SEED + 500 * backward
    fuzz.fuzz("triton", 4, TINY, first=first, backward=backward, device=DEVICE, least=1.0)


SMALL: dict[str, Any] = {
    "batch": 1, "channels": 17, "out": 4, "size": (2, 3, 4), "dtype": torch.float16,
    "x_layout": "channels_last", "bias": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "group by frames, past": dict(
        norm="instance", per_frame=True, past=2, causal=True, padding=(0, 1, 1),
        input_activation="silu", padding_mode=("circular", "zeros"),
    ),
    "rms, first frame": dict(
        norm="rms", causal=True, padding=(0, 1, 1), padding_mode=("zeros", "replicate")
    ),
    "past alone": dict(past=1, residual=True, activation="relu"),
    "layer in float64": dict(norm="layer", dtype=torch.float64, padding=((2, 0), (0, 1), 1)),
    "depthwise, past": dict(
        channels=3, out=6, groups=3, norm="batch", past=2, input_activation="relu",
        padding_mode=("reflect", "zeros"),
    ),
    "thin, l2": dict(channels=3, norm="l2", past=1, stride=(1, 2, 1), kernel=(2, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind: str) -> None:
    check(ConvConfig(**(SMALL | KINDS[kind])))


def test_positions_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "is_wide", lambda count: True)
    check(ConvConfig(**(SMALL | KINDS["group by frames, past"])))


@pytest.mark.parametrize(
    ("norm", "activation", "groups", "kernels"),
    [
        (None, "none", 1, {"tap_conv": 1}),
        (Norm("rms"), "silu", 1, {"normalise": 1, "tap_conv": 1}),
        (Norm("group", groups=2), "silu", 1, {
            "channel_moments": 1, "finish_norm": 1, "normalise": 1, "tap_conv": 1,
        }),
        (None, "silu", 16, {"direct_conv": 1}),
    ],
)  # fmt: skip
def test_frames_before_x_are_read_where_they_lie(
    norm: Norm | None, activation: str, groups: int, kernels: dict[str, int],
    launched: Counter[str],
) -> None:  # fmt: skip
    """One launch reads both, bias, residual and activation are of it; z is written if at all."""
    x, past, residual = (
        torch.randn(1, 16, t, 3, 4, device=DEVICE).contiguous(memory_format=torch.channels_last_3d)
        for t in (2, 2, 2)
    )
    weight = torch.randn(16, 16 // groups, 3, 3, 3, device=DEVICE)
    with fastst.use_backend("triton"), fuzz.poisoned():
        conv3d(
            x, weight, weight[:, 0, 0, 0, 0], padding=(0, 1, 1), causal=True, past=past,
            groups=groups, input_norm=norm, input_activation=activation, residual=residual,
            activation="relu",
        )  # fmt: skip
    assert launched == {"pack": 1, **kernels}


def problem(norm: str = "group", past: int = 2, **more: Any) -> ConvProblem:
    """A call on meta tensors."""
    x, before = (
        torch.empty(2, 32, t, 9, 7, dtype=torch.float16, device="meta") for t in (4, max(past, 1))
    )
    weight = torch.empty(16, 32, 3, 3, 3, dtype=torch.float16, device="meta")
    vectors = [torch.empty(32, dtype=torch.float32, device="meta")] * 2
    known = dict(zip(("mean", "var"), vectors, strict=True)) if norm == "frozen" else {}
    tensors = ConvTensors(
        x.contiguous(memory_format=torch.channels_last_3d), weight, None, *vectors,
        past=before if past else None, **known,
    )  # fmt: skip
    spec = ConvSpec(
        padding=(0, 0, 1, 1, 1, 1), norm=norm, norm_groups=4 if norm == "group" else 1,
        input_activation="relu", **more,
    )  # fmt: skip
    return replace(ConvProblem.of(tensors, spec), device=torch.device(DEVICE))


@pytest.mark.parametrize("norm", ["group", "frozen", "layer"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_self_check_runs_what_the_call_launches(norm: str, phase: Any) -> None:
    call = problem(norm, past=0 if norm == "layer" else 2)
    needed = set(rehearsal.instances(call, phase))
    assert needed <= {n for e in rehearsal.rehearse(call, phase) for n in instances_of(e)}
    other = problem(norm, past=0 if norm == "layer" else 2, activation="silu")
    if phase == "forward":
        assert not needed >= set(rehearsal.instances(other, phase))


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_tune_may_choose_among_tiles(phase: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way launches other instances, which the check of that way runs."""
    call = problem("rms", past=0)
    ways = backend.BACKEND.candidates(call, phase)
    assert len(ways) > 2
    launched = {way: frozenset(rehearsal.instances(call, phase, way)) for way in ways}
    assert len(set(launched.values())) == len(ways)
    monkeypatch.setattr(choices, "choice", lambda *call: ways[1])
    assert launched[ways[1]] == frozenset(rehearsal.instances(call, phase))
    depthwise = ConvTensors(
        torch.empty(1, 8, 4, 9, 9, device="meta"), torch.empty(8, 1, 3, 3, 3, device="meta")
    )
    alone = replace(ConvProblem.of(depthwise, ConvSpec(groups=(8,))), device=torch.device(DEVICE))
    assert list(backend.BACKEND.candidates(alone, phase)) == ["tiles 0"]


def test_each_way_is_right() -> None:
    tensors = ConvTensors(torch.randn(1, 16, 2, 4, 5), torch.randn(8, 16, 3, 3, 3) / 20)
    call = ConvProblem.of(tensors, ConvSpec(padding=(1,) * 6, input_activation="relu"))
    truth = reference.conv3d(call, tensors)
    dy = torch.randn(call.out_shape)
    exact = reference.conv3d_backward(ConvBackward.of(call, tensors, truth, dy))
    for way in convolution.ways(call, "forward")[:3]:
        y = convolution.run(call, tensors, call, way).y
        torch.testing.assert_close(y, truth.y, rtol=1e-5, atol=1e-5)
    for way in convolution.ways(call, "backward"):
        dx, dw, *_ = convolution.run_backward(ConvBackward.of(call, tensors, truth, dy), way)
        torch.testing.assert_close(dx, exact[0].float(), rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]
        torch.testing.assert_close(dw, exact[1].float(), rtol=1e-5, atol=1e-4)  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "phase"), [("group", "forward"), ("frozen", "backward")])
def test_self_check_passes(norm: str, phase: Any) -> None:
    examples = rehearsal.rehearse(problem(norm), phase)[:1]
    why = selfcheck.check(backend.BACKEND, examples, torch.device(DEVICE), torch.float16)
    assert why is None, why


NORM, TAP, DIRECT = "norm", "tap_conv", "depthwise"
MUTANTS = {
    "all frames are of x": (TAP, "tl.where(t + i_t * TAPS.move[0] < past[2], old, read)", "read"),
    "past is activated": (DIRECT, "tl.where(tapped[1] < past[2], raw, z)", "z"),
    "time is padded as space": (
        "common", "MODE: tl.constexpr = TAPS.modes[AXIS]", "MODE: tl.constexpr = TAPS.modes[2]",
    ),
    "eps is added to the deviation": (NORM, "1 / tl.sqrt(var + EPS)", "1 / (tl.sqrt(var) + EPS)"),
    "statistics of another clip": (NORM, "* frames + each % frames", "* frames"),
    "the part is the whole": (NORM, "m2 + seen * away * away", "m2"),
    "the mean is no function of x": (NORM, "g -= centre[:, None]", "g = g"),
}  # fmt: skip


SEEN_BY = {
    "all frames are of x": "past alone",
    "past is activated": "depthwise, past",
    "time is padded as space": "rms, first frame",
    "the mean is no function of x": "layer in float64",
    "eps is added to the deviation": "layer in float64",
}


def all_checks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``test_each_kind`` passes without the bug."""
    check(ConvConfig(**(SMALL | KINDS[SEEN_BY.get(name, "group by frames, past")])))


test_planted_bugs_are_seen: Callable[..., None] = planted_bugs(MUTANTS, all_checks)
