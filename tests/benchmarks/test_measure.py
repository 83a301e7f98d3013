"""The harness: what it counts, what it measures, and that it gives wrong results no number."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import layers, measure, models, overhead, peers, tables
from benchmarks.record import Record, newest
from benchmarks.shapes import ALL, DEPTHWISE, PARALLEL, R2PLUS1D_18, TOKENIZER, Case
from fastst.backends import aten

CPU = torch.device("cpu")
LAYER1 = R2PLUS1D_18[1]


def options(**changes: Any) -> layers.Options:
    return layers.Options(CPU, **({"level": "short", "seconds": 0.0, "rounds": 2} | changes))


# ---- operations and bytes, counted by hand


def test_work_of_a_pair_counted_by_hand() -> None:
    # 2→3→5 channels, one clip of 4×6×6, 3×3×3 taps, stride 2 in space and time.
    case = Case("hand", "hand", 1, (2, 3, 5), (4, 6, 6), stride=(2, 2, 2))
    spatial = 2 * (4 * 3 * 3) * 9 * 2 * 3  # positions, taps, C, M
    temporal = 2 * (2 * 3 * 3) * 3 * 3 * 5  # positions, taps, M, K
    x, y, weights = 2 * 4 * 6 * 6, 5 * 2 * 3 * 3, 3 * 2 * 9 + 5 * 3 * 3
    assert case.work("inference") == (spatial + temporal, 4 * (x + weights + y))
    assert case.work("inference", torch.bfloat16).bytes == 2 * (x + weights + y)
    # Backward: the gradients of input and weights of both convolutions; x, dy and weights are read,
    # dx and the gradients of weights written.
    training = case.work("training")
    assert training.flops == 3 * (spatial + temporal)
    assert training.bytes == 4 * (x + weights + y) + 4 * (x + y + weights + x + weights)


def test_work_of_a_first_layer_needs_no_gradient_of_its_clip() -> None:
    case = Case("hand", "hand", 2, (3, 4, 5), (2, 4, 4), (1, 3, 3), x_grad=False)
    spatial, temporal = 2 * (2 * 2 * 16) * 9 * 3 * 4, 2 * (2 * 2 * 16) * 1 * 4 * 5
    x, y, weights = 2 * 3 * 32, 2 * 5 * 32, 4 * 3 * 9 + 5 * 4
    assert case.work("training").flops == 2 * spatial + 3 * temporal
    assert case.work("training").bytes == 4 * (2 * x + 2 * y + 3 * weights)


def test_work_of_a_depthwise_pair_counted_by_hand() -> None:
    case = Case("hand", "hand", 1, (6, 6, 6), (3, 5, 5), depthwise=True)
    assert case.work("inference").flops == 2 * 75 * 6 * 9 + 2 * 75 * 6 * 3
    assert case.work("inference").bytes == 4 * (2 * 6 * 75 + 6 * 9 + 6 * 3)


def test_work_of_the_parallel_layer_counted_by_hand() -> None:
    add = Case("hand", "hand", 1, (4, 4, 6), (2, 3, 3), norm=False, combine="add")
    assert add.work("inference").flops == 2 * 18 * (9 + 3) * 4 * 6
    cat = Case("hand", "hand", 1, (4, 4, 6), (2, 3, 3), norm=False, combine="cat")
    assert cat.work("inference").flops == 2 * 18 * (9 + 3) * 4 * 3
    assert cat.work("inference").bytes == 4 * (4 * 18 + 6 * 18 + 3 * 4 * 9 + 3 * 4 * 3)


def test_shapes_are_those_of_the_networks() -> None:
    mids = [c.channels[1] for c in R2PLUS1D_18]
    assert mids == [45, 144, 230, 288, 460, 576, 921, 1152]
    assert [c.problem().out_size for c in R2PLUS1D_18[-2:]] == [(2, 7, 7), (2, 7, 7)]
    assert len({(c.family, c.name) for c in ALL}) == len(ALL)


def _clip(case: Case) -> Tensor:
    return torch.randn(case.batch, case.channels[0], *case.size)


@pytest.mark.parametrize("case", [c.tiny() for c in ALL[::3]], ids=lambda c: f"{c.family}-{c.name}")
def test_problem_has_the_output_of_the_eager_layer(case: Case) -> None:
    assert case.problem().out_shape == tuple(peers.Eager(case, False)(_clip(case)).shape)


# ---- peers


@pytest.mark.parametrize("mode", ["inference", "training-bn", "training"])
@pytest.mark.parametrize(
    "case", [R2PLUS1D_18[0], R2PLUS1D_18[2], DEPTHWISE[0], TOKENIZER[0], *PARALLEL[:2]],
    ids=lambda c: c.name,
)  # fmt: skip
def test_every_peer_and_this_library_agree_with_float64(case: Case, mode: str) -> None:
    if mode not in case.modes:
        pytest.skip("the network has no norm there")
    rows = layers.unit(case.tiny(), mode, ["fp32"], options(level="core", timed=False))
    assert {r["contender"]: r["refused"] or r["cannot"] for r in rows} == {
        r["contender"]: None for r in rows
    }
    names = {r["contender"] for r in rows}
    assert {"eager", "eager channels-last", "4D", "fastst auto"} <= names
    if case.channels[1] % 8 and not case.depthwise:
        assert {"eager mid/8", "4D mid/64", "eager channels-last mid/64"} <= names


@pytest.mark.slow
def test_a_compiled_peer_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's front, for three contenders; Inductor's C++ takes half a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rows = layers.unit(LAYER1.tiny(), "inference", ["fp32"], options(level="compiled", timed=False))
    compiled = [r for r in rows if "compiled default" in r["contender"]]
    assert len(compiled) == 3
    assert all(r["refused"] is None and r["cannot"] is None for r in compiled)


def test_bfloat16_rows_share_the_reference() -> None:
    rows = layers.unit(LAYER1.tiny(), "inference", ["fp32", "bf16"], options(timed=False))
    error = {(r["dtype"], r["contender"]): r["error"]["l2"] for r in rows}
    assert error["fp32", "fastst auto"] < 1e-5 < error["bf16", "fastst auto"] < 2e-2


# ---- refusal


def _rows(**changes: Any) -> dict[str, dict[str, Any]]:
    rows = layers.unit(LAYER1.tiny(), "training-bn", ["fp32"], options(**changes), seed=3)
    return {r["contender"]: r for r in rows}


def test_right_results_get_numbers() -> None:
    row = _rows()["fastst auto"]
    assert row["refused"] is None
    assert row["ms"] > 0
    assert row["peak_bytes"] > 0
    assert row["vs_users"][0] <= row["vs_users"][1] <= row["vs_users"][2]
    assert row["samples"] == 2


@pytest.mark.parametrize("wrong", ["last frame", "unwritten", "gradient"])
def test_a_wrong_kernel_gets_no_number(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    forward, backward = aten.conv2plus1d, aten.conv2plus1d_backward

    def broken_forward(*args: Any) -> Any:
        found = forward(*args)
        found.y[:, :, -1] = torch.empty_like(found.y[:, :, -1]) if wrong == "unwritten" else 0
        return found

    def broken_backward(*args: Any) -> Any:
        grads = backward(*args)
        grads[1][..., 0] *= 1.001  # of the spatial weight
        return grads

    if wrong == "gradient":
        monkeypatch.setattr(aten.BACKEND, "conv2plus1d_backward", broken_backward)
    else:
        monkeypatch.setattr(aten.BACKEND, "conv2plus1d", broken_forward)
    rows = _rows(backends=("aten",))
    for name, row in rows.items():
        if row["kind"] == "fastst":
            assert row["refused"] is not None, name
            assert row["ms"] is None
            assert "vs_users" not in row
        else:
            assert row["refused"] is None, name
            assert row["ms"] > 0


def test_a_broken_kernel_is_a_fault_and_an_unsupported_call_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("illegal address")

    monkeypatch.setattr(aten.BACKEND, "conv2plus1d", broken)
    row = _rows(backends=("aten",), timed=False)["fastst aten"]
    assert row["refused"] == "RuntimeError: illegal address"
    row = _rows(backends=("cuda",), timed=False)["fastst cuda"]
    assert row["refused"] is None
    assert row["cannot"].startswith("BackendError")


@pytest.mark.slow
def test_refused_rows_make_the_run_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(problem: Any, tensors: Any, save: bool) -> Any:
        from fastst.backends.contract import PairResult

        return PairResult(problem.empty_output(tensors.x).zero_())

    monkeypatch.setattr(layers, "available_backends", lambda *_: ("aten",))
    arguments = ["--dry", "--device", "cpu", "--families", "64-144-64", "--modes", "inference"]
    arguments += ["--peers", "short", "--out"]
    assert layers.main([*arguments, str(tmp_path / "right.json")]) == 0
    monkeypatch.setattr(aten.BACKEND, "conv2plus1d", nothing)
    assert layers.main([*arguments, str(tmp_path / "wrong.json")]) == 1


def test_pytorchs_own_wrong_result_is_no_yardstick() -> None:
    good = {"y": measure.Error(1e-7, 1e-7)}
    bad = {"y": measure.Error(1e-2, 1.0)}
    assert measure.why_untrusted(good, "fp32") is None
    assert "relative error of 0.01" in str(measure.why_untrusted(bad, "fp32"))
    assert measure.why_untrusted({"y": measure.Error(math.nan, 0)}, "fp32") is not None


@pytest.mark.parametrize(
    ("l2", "largest", "agrees"),
    [(2e-7, 2e-7, True), (1e-5, 2e-7, False), (2e-7, 1e-5, False), (math.nan, math.nan, False)],
)
def test_agreement_holds_both_errors_against_pytorchs_own(
    l2: float, largest: float, agrees: bool
) -> None:
    own = [{"y": measure.Error(1e-7, 1e-7)}]
    assert (measure.disagreement({"y": measure.Error(l2, largest)}, own, "fp32") is None) == agrees


def test_errors_of_missing_misshapen_and_unwritten_outputs_are_nan() -> None:
    reference = {
        "y": torch.ones(2, 3, dtype=torch.float64),
        "dx": torch.ones(1, dtype=torch.float64),
    }
    found = measure.errors({"y": torch.ones(3, 2)}, reference)
    assert all(math.isnan(e.l2) and math.isnan(e.largest) for e in found.values())
    y = torch.ones(2, 3)
    y[0, 0] = math.nan
    assert math.isnan(measure.errors({"y": y}, reference)["y"].l2)


def test_no_value_lies_on_a_kink() -> None:
    case = LAYER1.tiny()
    model = layers.model_of(case, "training-bn", torch.Generator().manual_seed(0))
    clip = layers.representable(_clip(case))
    layers.move_off_kinks(model, clip, CPU)
    u = model.double().spatial(clip.double())
    assert model.norm is not None
    assert model.norm(u).abs().min().item() > 1e-5


# ---- time and memory


def test_interleaving_calls_everybody_in_every_round() -> None:
    called: list[tuple[str, int]] = []

    def timed(name: str) -> measure.Timed:
        return measure.Timed(lambda i: called.append((name, i)))

    samples = measure.interleave(
        measure.Clock(CPU), {"a": timed("a"), "b": timed("b")}, 0.0, 3, seed=0, most=6
    )
    assert [len(s) for s in samples.values()] == [5, 5]
    rounds = called[4:]  # after two warm-up calls of each
    assert [i for _, i in rounds] == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1]
    assert all({a[0], b[0]} == {"a", "b"} for a, b in zip(rounds[::2], rounds[1::2], strict=True))


def test_ratios_compare_within_a_round() -> None:
    # Both are ten times slower in the second round: the ratio knows nothing of it.
    assert measure.ratios([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == (2.0, 2.0, 2.0)


def test_peak_memory_counts_what_a_call_allocates() -> None:
    def call() -> Tensor:
        a = torch.empty(1 << 18)
        b = torch.empty(1 << 19)
        del a
        return b[:1]

    seen = measure.observe(call, CPU)
    assert 3 << 20 <= seen.peak_bytes < (3 << 20) + 4096


def test_slow_paths_are_marked() -> None:
    x, w = torch.randn(1, 2, 3, 6, 6), torch.randn(4, 2, 3, 3, 3)
    seen = measure.observe(
        lambda: torch.ops.aten.slow_conv3d(x, w, [3, 3, 3], None, [1, 1, 1], [1, 1, 1]), CPU
    )
    assert seen.slow_path == "slow_conv"
    assert any("slow_conv3d" in k for k in seen.kernels)


def test_saved_bytes_counts_each_storage_once() -> None:
    a = torch.randn(100, requires_grad=True)
    assert measure.saved_bytes(lambda: a * a) == 400


def test_training_holds_what_the_library_promises() -> None:
    case = LAYER1.at_batch(1)
    generator = torch.Generator().manual_seed(1)
    model = layers.model_of(case, "training-bn", generator)
    inputs = layers.Inputs(*layers.draw(case, generator, 1), torch.float32, CPU, True)
    held = {}
    mode = "training-bn"
    eager = peers.peer_contenders(model, mode, False, "short")
    for c in (*eager, *peers.own_contenders(model, ["auto"], mode)):
        step = layers.Step(c, "training-bn", inputs, torch.float32, CPU, 144)
        held[c.name] = measure.saved_bytes(step.forward)
    assert held["fastst auto"] <= 0.6 * held["eager"]
    assert held["fastst auto channels-last"] <= 0.6 * held["eager"]
    assert held["fastst auto recompute"] <= 0.2 * held["eager"]


@pytest.mark.slow
def test_ceilings_are_measured() -> None:
    found = measure.ceilings(CPU, ["fp32"], dry=True)
    assert found["copy_gbs"] > 0
    assert found["gemm_tflops"]["fp32"] > 0


# ---- models, overhead, record


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 7, 8, 100])
def test_largest_finds_the_last_that_fits(limit: int) -> None:
    tried: list[int] = []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= limit

    assert models.largest(fits, most=50) == min(limit, 50)
    assert max(tried) <= 50


@pytest.mark.slow
def test_a_wrong_model_gets_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    convert, optimise = models.convert, models.optimize_for_inference

    def wrong(model: Any) -> Any:
        with torch.no_grad():
            model.fc.bias += 0.1
        return convert(model)

    clip = models.Clip(1, 2, 16, 4, dry=True)
    monkeypatch.setattr(models, "convert", wrong)
    monkeypatch.setattr(
        models, "optimize_for_inference", lambda m, **how: wrong(m) and optimise(m, **how)
    )
    rows = models.compare(clip, CPU, "fp32", False, "none", 0.0, 1)
    for row in rows:
        assert (row["ms"] is None) == (row["kind"] == "fastst")
        assert (row["refused"] is not None) == (row["kind"] == "fastst")


@pytest.mark.slow
def test_overhead_compares_the_layer_with_eager() -> None:
    rows = overhead.per_call(CPU, 1)
    what = ("forward", "forward and backward")
    assert [(r["call"], r["contender"]) for r in rows] == [
        (w + caches, name) for w in what for caches in ("", ", cold caches")
        for name in ("eager", "fastst", "fastst.convert", "eager again")
    ]  # fmt: skip
    assert all((r["us"] is None) == (r["refused"] is not None) for r in rows)
    assert all(r["refused"] or r["of_eager"] > 0 for r in rows)


def test_overhead_takes_the_least_of_takes_until_eager_agrees_with_itself() -> None:
    takes = iter([(50.0, 20.0, 60.0), (48.0, 30.0, 80.0), (60.0, 25.0, 49.0), (1.0, 1.0, 1.0)])
    names = ("eager", "fastst", "eager again")
    least, refused = overhead.measure_quietly(lambda: dict(zip(names, next(takes), strict=True)))
    assert refused is None
    assert least == {"eager": 48.0, "fastst": 20.0, "eager again": 49.0}


def test_overhead_gives_a_busy_machine_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant: a neighbour that takes turns with everything but one of the two eagers."""
    busy = {"eager": 55_870.0, "fastst": 132.0, "eager again": 160.0}
    monkeypatch.setattr(overhead, "host_us", lambda *args: busy)
    rows = overhead.per_call(CPU, 1)
    assert all(r["us"] is None and r["of_eager"] is None for r in rows)
    assert all("a factor of 349.19 apart" in r["refused"] for r in rows)
    assert "refused: eager and eager again" in tables.overhead({"overhead": rows, "cold_start": []})


def test_overhead_runs_on_one_core_and_gives_the_others_back() -> None:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    with overhead.one_core(CPU):
        assert len(os.sched_getaffinity(0)) == torch.get_num_threads() == 1
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, threads)


def test_record_is_written_at_every_change_and_names_no_place(tmp_path: Path) -> None:
    path = tmp_path / "cpu" / "r.json"
    record = Record(path, CPU)
    record.extend("layers", [{"ms": 1.23456789, "spread": (1.0, float("nan"))}])
    data = json.loads(path.read_text())
    assert data["layers"] == [{"ms": 1.2346, "spread": [1.0, None]}]
    assert data["machine"]["cpu"]
    assert data["machine"]["torch"] == torch.__version__
    assert str(Path.home()) not in path.read_text()
    Record(path, CPU).extend("layers", [{"ms": 2.0}])
    assert len(json.loads(path.read_text())["layers"]) == 2
    assert newest(tmp_path)["cpu"]["layers"][1]["ms"] == 2.0
    assert Record(path, CPU, fresh=True).data["layers"] == []


@pytest.mark.slow
def test_a_unit_measured_again_replaces_the_earlier_rows(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.json", CPU)
    for level in ("core", "short"):
        layers.run(record, [LAYER1.tiny()], ["inference"], ["fp32"], options(level=level))
    assert [r["contender"] for r in record.data["layers"]].count("eager") == 1


def test_deadline_leaves_the_rest_and_says_so(tmp_path: Path) -> None:
    record = Record(tmp_path / "r.json", CPU)
    layers.run(record, [LAYER1.tiny()], ["inference"], ["fp32"], options(), deadline=0.0)
    assert record.data["not_run"] == ["r2plus1d-18/64-144-64/inference"]
    assert record.data["layers"] == []
