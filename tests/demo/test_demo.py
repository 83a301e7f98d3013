"""The demo: what it reads, measures and refuses, and that it notices a wrong network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastst

pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from fastst.demo import __main__ as demo
from fastst.demo import clip, measure

SMALL = ["--frames", "4", "--size", "32", "--repeats", "1", "--quiet"]


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_runs_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And warns of nothing, which is a stranger's first command."""
    monkeypatch.setattr(fastst.dispatch.selection, "_warned", set())
    output = tmp_path / "new" / "chart.png"
    assert demo.main([*SMALL, "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert "17 pairs of convolutions replaced, state_dict keys unchanged" in text
    (saved,) = [line for line in text.splitlines() if line.startswith("Saved for backward")]
    assert float(saved.split("(")[1].rstrip(")")) < 0.75
    import matplotlib.image

    height, width, _ = matplotlib.image.imread(output).shape
    assert min(height, width) > 500


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
def test_runs_another_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "chart.png"
    assert demo.main([*SMALL, "--model", "r3d_18", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("R3D-18, random weights") and "17 3D convolutions prepared" in text


@pytest.mark.slow
def test_notices_a_network_that_computes_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion that changes one weight by a thousandth."""

    def tampering(model: Any) -> Any:
        with torch.no_grad():
            model.layer2[0].conv1[0][3].weight[0, 0] *= 1.001
        return real(model)

    real = fastst.convert
    monkeypatch.setattr(fastst, "convert", tampering)
    assert demo.main([*SMALL, "--output", str(tmp_path / "chart.png")]) == 1
    assert "do not agree" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--video", "{tmp}/none.mp4"], "cannot be read as a video: No such file"),
        (["--video", "{tmp}/text.mp4"], "cannot be read as a video: Invalid data"),
        (["--video", "{tmp}"], "cannot be read as a video: Is a directory"),
        (["--frames", "65"], "requires at least 65 frames, found 64"),
        (["--weights", "{tmp}/none.pth"], "No such file"),
        (["--output", "{tmp}/text.mp4/chart.png"], "text.mp4"),
        (["--output", "{tmp}"], "Is a directory"),
    ],
)
def test_refuses_with_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    argv = ["--output", str(tmp_path / "chart.png")]
    assert demo.main(argv + [o.format(tmp=tmp_path) for o in options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


@pytest.mark.parametrize(
    "options", [["--frames", "0"], ["--size", "16"], ["--device", "toaster"], ["--repeats", "x"]]
)
def test_refuses_bad_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(options)
    assert stopped.value.code == 2
    assert f"argument {options[0]}" in capsys.readouterr().err


def test_clip_is_sampled_evenly_and_cropped() -> None:
    frames = clip.read(clip.SHIPPED, 16, 112)
    assert frames.shape == (3, 16, 112, 112)
    assert 0 <= frames.min() < frames.max() <= 1
    assert (frames[:, 1:] != frames[:, :-1]).flatten(2).any(2).all()  # no frame twice
    every = clip.read(clip.SHIPPED, 64, 112)
    torch.testing.assert_close(frames, every[:, ::4])


def test_clip_without_video_is_refused(tmp_path: Path) -> None:
    import av
    import numpy as np

    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with pytest.raises(clip.ClipError, match="requires a video stream, found none"):
        clip.read(path, 4, 32)


def test_saved_bytes_counts_storages_once() -> None:
    """Both convolutions keep their input, ReLU its output: x, and z once."""
    model = nn.Sequential(nn.Conv3d(2, 4, 1), nn.ReLU(), nn.Conv3d(4, 2, 1))
    x = torch.randn(1, 2, 3, 4, 5)
    positions = 3 * 4 * 5
    assert measure.saved_bytes(model, x) == 4 * positions * (2 + 4)


def test_medians_interleave_and_leave_out_the_first_round() -> None:
    order: list[str] = []
    models = {"a": nn.Identity(), "b": nn.Identity()}
    names = {id(m): n for n, m in models.items()}
    found = measure.medians(
        lambda model, _: order.append(names[id(model)]), models, torch.zeros(1), 3, lambda: None
    )
    assert order == ["a", "b"] * 4
    assert set(found) == {"a", "b"}
    assert all(t >= 0 for t in found.values())
