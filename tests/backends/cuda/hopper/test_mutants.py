"""Bugs planted in the Hopper kernels: a wrong result or the emulator's checks must tell each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastst import dispatch
from fastst.backends import cuda
from fastst.backends.cuda import hopper as cuda_hopper
from fastst.backends.cuda.hopper import tiles
from fastst.backends.cuda.hopper.examples import examples
from fastst.dispatch import quarantine, selfcheck
from fastst.problem.spec import Problem
from tests.support import fuzz, hopper, planted
from tests.support.fuzz import Config
from tests.support.planted import Plant, more


@pytest.fixture(autouse=True)
def _tiles_are_chosen_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("spatial", "temporal"):  # without what they remember
        monkeypatch.setattr(tiles, name, getattr(tiles, name).__wrapped__)


SPATIAL = Config(
    seed=1, channels=72, mid=40, out=8, batch=1, size=(5, 9, 10), norm="batch",
    dtype=torch.float16, x_layout="channels_last",
)  # fmt: skip
TEMPORAL = Config(
    seed=1, channels=8, mid=72, out=136, batch=2, size=(5, 3, 3), norm="batch", activation="silu",
    dtype=torch.float16, x_layout="channels_last",
)  # fmt: skip
STEM = Config(
    seed=1, channels=3, mid=45, out=64, batch=1, size=(4, 20, 21), kernel=(3, 7, 7),
    stride=(1, 2, 2), padding=(1, 3, 3), norm="frozen", dtype=torch.float16,
    x_layout="channels_last",
)  # fmt: skip


@pytest.mark.parametrize(
    ("file", "config"),
    [("hopper/spatial.cu", SPATIAL), ("hopper/temporal.cu", TEMPORAL),
     more("hopper/stem.cu", STEM)],
)  # fmt: skip
def test_nothing_is_caught_without_a_bug(
    file: str, config: Config, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of the kernels is right: so it is the bugs that are caught below."""
    plant(file, **planted.HOPPER)
    hopper.in_clusters(monkeypatch)
    fuzz.hold(config, "cuda", backward=False)


@pytest.mark.parametrize(
    ("file", "right", "wrong", "config"),
    [
        # a tap off by one
        ("hopper/spatial.cu", "(block * p.h.kernel + kh + i) * N",
         "(block * p.h.kernel + (kh + i + 1) % p.h.kernel) * N", SPATIAL),
        more("hopper/temporal.cu", "- before) / Up + i;", "- before) / Up + i + 1;", TEMPORAL),
        more("hopper/stem.cu", "(i + kTaps - tap) % kTaps", "(i + tap) % kTaps", STEM),
        # a wrong swizzle
        more("hopper/spatial.cu", ".swizzle = swizzle});", ".swizzle = Swizzle::none});", SPATIAL),
        more("hopper/temporal.cu", "^ (row % 8)", "^ (row % 4)", TEMPORAL),
        # a wrong phase
        more("hopper/spatial.cu", "mbarrier_wait(empty_ + stage_, phase_ ^ 1)",
         "mbarrier_wait(empty_ + stage_, phase_)", SPATIAL),
        # a missing fence
        more("hopper/spatial.cu", "wgmma_fence();", "", SPATIAL),
        more("hopper/spatial.cu", "fence_proxy_async();", "", SPATIAL),
        ("hopper/temporal.cu", "mbarrier_fence_init();", "", TEMPORAL),
        more("hopper/stem.cu", "wgmma_fence(sums, z);", "", STEM),
        # a stage given back too early
        more("hopper/spatial.cu", "wgmma_wait<1>();", "", SPATIAL),
        more("hopper/temporal.cu", "operator()<2>(2, ahead);\n          wgmma_wait<0>();",
         "operator()<2>(2, ahead);", TEMPORAL),
        # operands normalised in the place of those that are multiplied
        more("hopper/temporal.cu", "uint32_t a[2][4] = {}, ahead[2][4];",
         "uint32_t a[2][4]; auto& ahead = a;", TEMPORAL),
        more("hopper/stem.cu",
         "sync_warp();\n    if (threadIdx.x % 32 == 0) mbarrier_arrive(full());",
         "if (threadIdx.x % 32 == 0) mbarrier_arrive(full());", STEM),
        # blocks of a cluster: a stage that is not given back to both, or not waited for by both; a
        # copy to one of them; barriers used before they exist, or after their block has ended
        ("hopper/spatial.cu", ", mbarrier_arrive_at(empty_ + stage, 1);", ";", SPATIAL),
        more("hopper/temporal.cu", "warps * cluster_", "warps", TEMPORAL),
        more("hopper/temporal.cu", "(1 << cluster_) - 1", "1", TEMPORAL),
        more("hopper/spatial.cu", "cluster_sync();", "sync_block();", SPATIAL),
        more("hopper/spatial.cu", "ring.end();", "", SPATIAL),
        more("hopper/temporal.cu", "weights.end();", "", TEMPORAL),
        # weights of other columns
        ("hopper/temporal.cu", "stay && column == held", "stay && held >= 0", TEMPORAL),
        # statistics of rows that do not exist, and normalised padding
        ("hopper/spatial.cu", "total += float(pair.out[half] >= 0)", "total += 1.0f", SPATIAL),
        # a statistic counted twice, and one of some rows taken for one of all
        more("hopper/spatial.cu", "count_ += total;", "count_ += 2 * total;", SPATIAL),
        more("hopper/spatial.cu", "warp_all(total == 2 * Blocks)", "true", SPATIAL),
        ("hopper/temporal.cu", "return !replicate ? -1 :", "return", TEMPORAL),
    ],
)  # fmt: skip
def test_planted_bug_is_caught(
    file: str, right: str, wrong: str, config: Config, plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By blocks in clusters of two."""
    plant(file, right, wrong, **planted.HOPPER)
    hopper.in_clusters(monkeypatch)
    with planted.caught():
        fuzz.hold(config, "cuda", backward=False)


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        # the other's turn is not waited for, or ends as it begins
        ("mbarrier_wait(begins_ + own_, phase_);", "", "emulator: .*that nobody has written"),
        more("if (L::kTurns) turns.begin(ring);",
         "if (L::kTurns) turns.begin(ring), turns.end(ring);",
         "emulator: .*more arrivals at an mbarrier"),
        # the ring does not go on where the other left it
        more("ring.go_on(place_[own_]);", "ring.go_on(ring.place());", "emulator: "),
        # the last stage of a tile is given back while products read it
        ("wgmma_wait<0>();\n    if (previous >= 0) ring.release(previous);",
         "if (previous >= 0) ring.release(previous);\n    wgmma_wait<0>();",
         "emulator: .*race: write .* and a read by wgmma"),
        # tiles that both count
        ("(L::kTurns ? consumer * walk.step : 0)", "0", r"error \S+ > "),
    ],
)  # fmt: skip
def test_turns_that_go_wrong_are_told(
    right: str, wrong: str, told: str, plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("hopper/spatial.cu", right, wrong, **planted.HOPPER)
    hopper.in_clusters(monkeypatch)
    # 9 stages a tile, in a ring of 9: none that comes round to the same place and parity.
    config = replace(SPATIAL, channels=64)
    with pytest.raises((AssertionError, RuntimeError), match=f"(?s){told}"):
        fuzz.hold(config, "cuda", backward=False)


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("hopper/spatial.cu", "+ k * dilation - before;", "+ k * dilation - before + 1;"),
        more("hopper/temporal.cu", "- before) / Up + i;", "- before) / Up + i + 1;"),
        more("hopper/stem.cu", "(i + kTaps - tap) % kTaps", "(i + tap) % kTaps"),
    ],
)
def test_auto_passes_over_a_wrong_kernel(
    file: str, right: str, wrong: str, plant: Plant, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its self-check finds it, on what stands for a GPU, and says so once."""
    plant(file, right, wrong, **planted.HOPPER)
    monkeypatch.setenv("FASTST_CACHE", str(tmp_path))
    monkeypatch.setattr(selfcheck, "_verdicts", {})

    def here(request: quarantine.Request) -> str:  # where the planted library is
        assert request.like is not None
        few = cuda.BACKEND.rehearse(request.like, request.phase, None)
        return selfcheck.check(cuda.BACKEND, few, request.device, request.dtype) or ""

    monkeypatch.setattr(quarantine, "ask", here)
    for module in (cuda, cuda_hopper):
        monkeypatch.setattr(module, "is_emulated", lambda: False)
    monkeypatch.setattr(cuda.BACKEND, "why_not", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    spec, tensors, *_ = examples("hopper", torch.float16)[-1 if "stem" in file else 0]
    problem = Problem.of(tensors, spec)
    with pytest.warns(selfcheck.SelfCheckWarning, match="no longer chooses backend 'cuda'"):
        why = dispatch.reasons(problem)["cuda"]
    assert why is not None and "in its self-check" in why
    assert dispatch.reasons(problem)["cuda"] == why
