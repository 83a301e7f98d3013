"""examples/train.py: data sets as distributed, resuming to the same loss, what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import fastst
from fastst.models import r2plus1d_18
from tests.support import ROOT
from tests.support.ranks import Ranks

pytest.importorskip("av")

import av
import checkpoints
import decoding
import digits
import train
import train_demo
import videos
from options import Options

CODECS = {".mp4": "h264", ".avi": "mpeg4", ".webm": "libvpx-vp9"}


def write_video(path: Path, frames: int = 12, shade: int = 0, bframes: int = 2) -> Path:
    """Frame i is grey of value shade + 12·i."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, "yuv420p", 5
        stream.bit_rate = 4_000_000
        stream.codec_context.max_b_frames = bframes if path.suffix != ".webm" else 0
        for i in range(frames):
            image = np.full((32, 48, 3), shade + 12 * i, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA/{train,val}/{dark,light}/*.mp4, and one file of each kind that cannot be used."""
    root = tmp_path_factory.mktemp("videos")
    for part, count in (("train", 4), ("val", 3)):
        for label, shade in (("dark", 0), ("light", 120)):
            for i in range(count):
                write_video(root / part / label / f"{i}.mp4", shade=shade)
        (root / part / "dark" / "no video.mp4").write_bytes(b"not a video")
    write_video(root / "train" / "light" / "short.mp4", frames=2)
    whole = (root / "val" / "light" / "0.mp4").read_bytes()
    (root / "val" / "light" / "cut off.mp4").write_bytes(whole[: len(whole) // 2])
    return root


def options(tmp_path: Path, data: Path | None = None, **changes: Any) -> Options:
    defaults = {
        "data": data, "model": "r2plus1d_18", "width": 4, "frames": 4, "step": 2, "size": 24,
        "clips": 2, "epochs": 2, "batch": 2, "workers": 0, "device": "cpu", "log_every": 1,
        "out": tmp_path / "run", "lr": 0.01,
    }  # fmt: skip
    return Options(**{**defaults, **changes})


# ---- data


@pytest.mark.parametrize("suffix", CODECS)
def test_decodes_the_frames_that_were_asked_for(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"video{suffix}", frames=20)
    wanted = [np.array([0, 4, 8, 12]), np.array([13, 14, 15, 19])]
    clips = decoding.decode_here(path, lambda count: wanted if count == 20 else [], 32)
    assert [c.shape for c in clips] == [(4, 32, 48, 3)] * 2
    for clip, indices in zip(clips, wanted, strict=True):
        assert np.abs(clip.mean((1, 2, 3)) - 12 * indices).max() < 6


def test_sampling() -> None:
    (clip,) = videos.sample_frames(50, 8, 4, 1, np.random.default_rng(0))
    assert np.diff(clip).tolist() == [4] * 7
    assert 0 <= clip[0] <= 50 - 29
    starts = {
        int(videos.sample_frames(50, 8, 4, 1, np.random.default_rng(s))[0][0]) for s in range(200)
    }
    assert starts == set(range(22))  # every place is reached
    spread = videos.sample_frames(50, 8, 4, 3, None)
    assert [int(c[0]) for c in spread] == [4, 10, 18]
    (tight,) = videos.sample_frames(10, 8, 4, 1, None)
    assert tight.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]  # the step shrinks before it fails
    with pytest.raises(videos.VideoError, match="has 7 frames, fewer than the clip's 8"):
        videos.sample_frames(7, 8, 4, 1, None)


def test_clips_are_the_same_on_every_run_and_differ_between_epochs(folder: Path) -> None:
    listing = videos.read_folder(folder / "train")
    data = videos.Clips(listing, 4, 2, 24, train=True)
    a, b = data[1]["clips"], data[1]["clips"]
    assert torch.equal(a, b)
    assert a.shape == (1, 3, 4, 24, 24)
    others = []
    for data.epoch in range(1, 5):
        others.append(data[1]["clips"])
    assert any(not torch.equal(a, c) for c in others)


def test_unusable_files_are_replaced_in_training_and_left_out_in_evaluation(folder: Path) -> None:
    listing = videos.read_folder(folder / "train")
    names = [v.path.name for v in listing.videos]
    data = videos.Clips(listing, 4, 2, 24, train=True)
    for name, why in (("no video.mp4", "cannot be read"), ("short.mp4", "has 2 frames, fewer")):
        sample = data[names.index(name)]
        assert sample["label"] in (0, 1)
        assert sample["clips"].float().std() > 0
        assert f"{name}: {why}" in sample["unusable"]
    listing = videos.read_folder(folder / "val")
    data = videos.Clips(listing, 4, 2, 24, train=False, clips=2)
    for video, sample in zip(listing.videos, (data[i] for i in range(len(data))), strict=True):
        usable = video.path.name[0].isdigit()
        assert (sample["label"] == videos.NO_LABEL) == (not usable)
        assert bool(sample["unusable"]) == (not usable)
        assert sample["clips"].shape == (2, 3, 4, 24, 24)


def test_only_unusable_files_are_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.mp4").write_bytes(b"nothing")
    with pytest.raises(videos.DataError, match="20 videos in a row cannot be used"):
        videos.Clips(videos.read_folder(tmp_path), 4, 2, 24, train=True)[0]


def names_of(listing: videos.Listing) -> list[tuple[str, str]]:
    return [(v.path.name, listing.classes[v.label]) for v in listing.videos]


def test_kinetics_lists(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "air drumming,-0wE,5,15,train\nzumba,x_y,104,114,train\n"
    )
    (tmp_path / "zumba").mkdir()
    (tmp_path / "zumba" / "x_y_000104_000114.mp4").touch()
    listing = videos.read_list(path, tmp_path)
    assert names_of(listing) == [
        ("-0wE_000005_000015.mp4", "air drumming"), ("x_y_000104_000114.mp4", "zumba")
    ]  # fmt: skip
    assert listing.videos[1].path.exists()
    path.write_text("label,youtube_id\nzumba,x\n")
    with pytest.raises(videos.DataError, match="time_start and time_end"):
        videos.read_list(path, tmp_path)


def test_ucf_lists(tmp_path: Path) -> None:
    for name, text in {
        "classInd.txt": "1 Archery\n2 Biking\n10 Diving\n",
        "trainlist01.txt": "Archery/v_Archery_g08_c01.avi 1\nDiving/v_Diving_g01_c01.avi 10\n",
        "testlist01.txt": "Diving/v_Diving_g02_c01.avi\n",
    }.items():
        (tmp_path / name).write_text(text)
    classes = videos.read_classes(tmp_path / "classInd.txt")
    assert classes == {1: "Archery", 2: "Biking", 10: "Diving"}
    for given in (classes, None):
        listing = videos.read_list(tmp_path / "trainlist01.txt", tmp_path, given)
        assert [c for _, c in names_of(listing)] == ["Archery", "Diving"]
        listing = videos.read_list(tmp_path / "testlist01.txt", tmp_path, listing.classes)
        assert names_of(listing) == [("v_Diving_g02_c01.avi", "Diving")]


def test_something_something_lists(tmp_path: Path) -> None:
    entry = {"id": "78687", "label": "holding potato", "template": "Holding [something] up"}
    (tmp_path / "train.json").write_text(json.dumps([entry]))
    (tmp_path / "labels.json").write_text(
        json.dumps({"Holding something up": "1", "Pushing it": "0"})
    )
    classes = videos.read_classes(tmp_path / "labels.json")
    assert classes == {0: "Pushing it", 1: "Holding something up"}
    listing = videos.read_list(tmp_path / "train.json", tmp_path, classes)
    assert names_of(listing) == [("78687.webm", "Holding something up")]
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(videos.DataError, match="lists no videos"):
        videos.read_list(tmp_path / "train.json", tmp_path)
    (tmp_path / "train.json").write_text("[{}]")
    with pytest.raises(videos.DataError, match="'id' and 'template'"):
        videos.read_list(tmp_path / "train.json", tmp_path)


@pytest.mark.parametrize(
    ("lines", "classes", "expected"),
    [
        ("v/a.mp4 0\nv/b.mp4 12\n", None, ["class 000000", "class 000012"]),
        ("v/a.mp4 0\nv/b.mp4 2\n", ["x", "y", "z"], ["x", "z"]),
        ("v/a.mp4,1\nv/b.mp4,3\n", ["x", "y", "z"], ["x", "z"]),
        ("v/a.mp4 4\nv/b.mp4 1\n", {1: "x", 2: "y", 4: "z"}, ["z", "x"]),
        ("v/a.mp4 1\n", {0: "x", 1: "y", 2: "z"}, ["y"]),
        ("y/a.mp4 4\nx/b.mp4 1\n", {1: "x", 4: "y"}, ["y", "x"]),
        ("y/a b.mp4 1\nx/b.mp4 0\n", None, ["y", "x"]),
    ],
)
def test_plain_lists(
    tmp_path: Path, lines: str, classes: videos.Classes | None, expected: list[str]
) -> None:
    (tmp_path / "list.txt").write_text(lines)
    listing = videos.read_list(tmp_path / "list.txt", tmp_path, classes)
    assert [c for _, c in names_of(listing)] == expected


def test_bad_lists(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    for text, classes, message in (
        ("", None, "lists no videos"),
        ("a.mp4\n", None, "a class index, or a folder"),
        ("v/a.mp4 1\n", ["x", "y"], "start them at 0"),  # counted from 0 or from 1?
        ("v/a.mp4 7\n", ["x", "y"], "start them at 0"),
        ("w/a.mp4\n", ["x", "y"], "a class index, or a folder"),
        (
            "v/a.mp4 3\n",
            {1: "x", 2: "y", 4: "z"},
            "'v' the class index 3, which is the number of no",
        ),
        (
            "v/a.mp4 0\nv/b.mp4 1\n",
            {1: "x", 2: "y"},
            "the class index 0, which is the number of no",
        ),
        ("x/a.mp4 2\n", {1: "x", 2: "y"}, "'x' the class index 2, which is 'y'"),
        ("v/a.mp4 " + "9" * 5000 + "\n", ["x", "y"], "requires a path and a class index"),
    ):
        path.write_text(text)
        with pytest.raises(videos.DataError, match=message):
            videos.read_list(path, tmp_path, classes)
    with pytest.raises(videos.DataError, match="cannot be read"):
        videos.read_list(tmp_path / "nowhere.txt", tmp_path)
    with pytest.raises(videos.DataError, match="found no videos"):
        videos.read_folder(tmp_path)
    with pytest.raises(videos.DataError, match="one folder of videos per class"):
        videos.read_folder(tmp_path / "nowhere")
    path.write_text(" \n")
    with pytest.raises(videos.DataError, match="names no classes"):
        videos.read_classes(path)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_cover_everything_once(ranks: int) -> None:
    shares = [videos.Shares(17, r, ranks, 2) for r in range(ranks)]
    indices = [list(s) for s in shares]
    assert len({len(i) for i in indices}) == 1
    assert [len(s) for s in shares] == [len(i) for i in indices]
    assert sorted(i for part in indices for i in part if i >= 0) == list(range(17))
    shares = [videos.Shares(17, r, ranks, 2, seed=3) for r in range(ranks)]
    seen = [i for s in shares for i in s]
    assert len(seen) == len(set(seen)) == 17 // (2 * ranks) * 2 * ranks
    later = videos.Shares(17, 0, ranks, 2, seed=3)
    later.start = 2
    assert list(later) == list(shares[0])[2:]
    assert len(later) == len(shares[0]) - 2


# ---- runs


@pytest.mark.slow
def test_trains_counts_and_writes(folder: Path, tmp_path: Path) -> None:
    run = train.train(options(tmp_path, folder, accumulate=2, amp="bf16"))
    assert len(run.history) == 2
    assert run.steps == 2
    assert all(np.isfinite(list(figures.values())).all() for figures in run.history)
    assert sorted(line.split(": ")[0].rpartition("/")[2] for line in run.unusable) == [
        "cut off.mp4", "no video.mp4", "no video.mp4", "short.mp4"
    ]  # fmt: skip
    found = checkpoints.read_checkpoint(tmp_path / "run" / "last.pt")
    assert found["classes"] == ["dark", "light"]
    assert found["epoch"] == 2
    assert len(found["unusable"]) == 4
    assert list((tmp_path / "run").glob("events.*"))
    assert (tmp_path / "run" / "best.pt").exists()
    assert not list((tmp_path / "run").glob("*.partial"))


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["none", "fp16"])
def test_resuming_gives_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amp: str
) -> None:
    """Stopped within the second epoch; momentum, schedule, order and clips go on."""

    def data() -> train.Data:
        sets = (digits.MovingDigits(16, 4, 16, True), digits.MovingDigits(6, 4, 16, False))
        return train.Data(*sets, digits.CLASSES, {"top1": train.top(1)})

    common = {"batch": 4, "save_every": 2, "epochs": 2, "size": 16, "lr": 0.05, "amp": amp}
    whole = train.train(options(tmp_path / "whole", **common), data())
    stopped = options(tmp_path / "stopped", **common)
    original = train.Trainer.learning_rate

    def stop(self: train.Trainer) -> float:
        if (self.epoch, self.step) == (1, 3):
            raise Stop
        return original(self)

    monkeypatch.setattr(train.Trainer, "learning_rate", stop)
    with pytest.raises(Stop):
        train.train(stopped, data())
    monkeypatch.undo()
    resumed = Options(**{**vars(stopped), "resume": True})
    again = train.train(resumed, data())
    assert again.losses == whole.losses[-len(again.losses) :]
    assert len(again.losses) == 2  # the second of four steps had been saved
    assert again.history[1]["top1"] == whole.history[1]["top1"]
    states = [t.model.state_dict().values() for t in (again, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def losses(seed: int, convert: bool, dtype: torch.dtype, steps: int = 4) -> list[float]:
    """Of R(2+1)D-18 with thin stages on clips of moving digits."""
    torch.manual_seed(seed)
    model = r2plus1d_18(num_classes=len(digits.CLASSES), width=4).to(dtype)
    if convert:
        fastst.convert(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    data = digits.MovingDigits(4 * steps, 4, 16, True)
    found = []
    for step in range(steps):
        batch = [data[i] for i in range(4 * step, 4 * step + 4)]
        x = torch.cat([sample["clips"] for sample in batch]).to(dtype)
        label = torch.tensor([sample["label"] for sample in batch])
        loss = torch.nn.functional.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.slow
def test_the_same_losses_as_separate_modules() -> None:
    """Rounding grows a hundredfold with each step: float64 shows that nothing else does."""
    ours, eager = (losses(0, convert, torch.float64) for convert in (True, False))
    assert ours == pytest.approx(eager, rel=1e-6)
    assert ours != losses(1, True, torch.float64)


@pytest.mark.slow
def test_losses_within_those_of_seeds() -> None:
    seeds = range(3)
    ours, eager = (
        np.array([losses(s, convert, torch.float32) for s in seeds]) for convert in (True, False)
    )
    spread = np.abs(eager[:, None] - eager[None]).max((0, 1))  # of any two seeds, at each step
    assert (np.abs(ours.mean(0) - eager.mean(0)) <= spread).all()
    assert np.abs(ours[:, 0] - eager[:, 0]).max() < 1e-4


def test_runs_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    once = options(tmp_path, folder, epochs=1)
    train.train(once)
    last = once.out / "last.pt"
    with pytest.raises(checkpoints.CheckpointError, match="exists: --resume"):
        train.train(once)
    resumed = Options(**{**vars(once), "resume": True, "epochs": 2})

    other = Options(**{**vars(resumed), "model": "mc3_18"})
    with pytest.raises(checkpoints.CheckpointError, match=r"is of .*r2plus1d_18.*this run is of"):
        train.train(other)
    renamed = train.load_data(resumed)._replace(classes=["dark", "bright"])
    with pytest.raises(checkpoints.CheckpointError, match="'light' there is 'bright' here"):
        train.train(resumed, renamed)
    kept, found = last.read_bytes(), checkpoints.read_checkpoint(last)
    last.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(checkpoints.CheckpointError, match=r"last\.pt is damaged"):
        train.train(resumed)
    for state in (found["model"], {k: v for k, v in found.items() if k != "history"}):
        torch.save(state, last)
        with pytest.raises(checkpoints.CheckpointError, match="no checkpoint of a run; --weights"):
            train.train(resumed)
    last.unlink()
    with pytest.raises(checkpoints.CheckpointError, match="no such checkpoint"):
        train.train(resumed)
    with pytest.raises(videos.DataError, match="too few for one step of 64"):
        train.train(options(tmp_path / "big", folder, batch=64))
    with pytest.raises(videos.DataError, match="or neither of them"):
        train.train(options(tmp_path / "half", folder, train_list=folder))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "c3d", "--width", "4"], "--width: c3d has one width only"),
        (["--device", "nonsense"], "--device nonsense cannot be used here: "),
        (["--device", "meta"], "--device meta cannot be used here: "),
        (["--seed", str(1 << 64)], "--seed requires a number from 0 to 18446744073709551615"),
        (["--new-classifier"], "--new-classifier requires --weights"),
        (["--model", "c3d", "--size", "16"], "c3d does not take clips of (8, 3, 16, 16, 16): "),
        (["--model", "r2d_18"], "r2d_18 does not take clips of (8, 3, 16, 112, 112): "),
        (["--batch", "1", "--frames", "1", "--size", "1"], "more than 1 value per channel"),
        (["--train-list", "x"], "--classes require the folder DATA"),
        (["--classes", "x"], "--classes require the folder DATA"),
        (["data", "--classes", "__init__.py"], "--classes requires --train-list and --val-list"),
        (["--weights", "tensor.pt"], "tensor.pt has no state_dict"),
        (["--weights", "folder"], "folder is damaged or no checkpoint: "),
        (["--weights", "other.pt"], "other.pt does not fit r2plus1d_18: Error(s) in loading"),
        (["--weights", "other.pt", "--new-classifier"], "other.pt does not fit r2plus1d_18: "),
        (["--out", "tensor.pt"], "File exists: 'tensor.pt'"),
        (["--out", "tensor.pt/run"], "Not a directory: 'tensor.pt/run'"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    torch.save({"model": torch.zeros(1)}, "tensor.pt")
    torch.save({"fc.extra": torch.zeros(1)}, "other.pt")
    Path("folder").mkdir()
    with pytest.raises(SystemExit) as ended:
        train.main([*(["--device", "cpu"] if "--device" not in arguments else []), *arguments])
    usage = capsys.readouterr().err  # of the parser, which then ends with 2
    line = usage.splitlines()[-1] if ended.value.code == 2 else str(ended.value.code)
    assert "\n" not in line
    assert told in line and len(line) < 400


@pytest.mark.parametrize(
    "arguments",
    [["--epochs", "0"], ["--clips", "15"], ["--evaluated", "-1"], ["--epochs", "1.5"],
     ["--out", "file/chart.png"]],
)  # fmt: skip
def test_options_of_the_demo(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(train_demo, "run", lambda *sizes: pytest.fail("began"))
    with pytest.raises(SystemExit):
        train_demo.main(arguments)
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_starts_from_weights_of_other_classes(folder: Path, tmp_path: Path) -> None:
    data = train.load_data(options(tmp_path, folder))
    source = train.build_model(options(tmp_path), ["a", "b", "c"])
    path = tmp_path / "weights.pt"
    checkpoints.write_checkpoint(path, {"model": source.state_dict(), "classes": ["a", "b", "c"]})
    with pytest.raises(checkpoints.CheckpointError, match="3 classes, the data has 2"):
        train.build_model(options(tmp_path, weights=path), data.classes)
    model = train.build_model(options(tmp_path, weights=path, new_classifier=True), data.classes)
    assert torch.equal(model.stem[0].weight, source.stem[0].weight)
    assert model.fc.weight.shape[0] == 2
    with pytest.raises(checkpoints.CheckpointError, match="does not fit"):
        train.build_model(options(tmp_path, weights=path, width=8, new_classifier=True), ["a"])


@pytest.mark.slow
def test_an_interrupted_write_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoints.write_checkpoint(path, {"epoch": 1})

    def half(state: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_checkpoint(path, {"epoch": 2})
    assert checkpoints.read_checkpoint(path) == {"epoch": 1}


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Mischief:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"model": Mischief()}, tmp_path / "last.pt")
    with pytest.raises(checkpoints.CheckpointError, match="damaged or no checkpoint"):
        checkpoints.read_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_command_line() -> None:
    parsed = Options.parse(None, ["videos", "--no-flip", "--amp", "bf16", "--lr", "0.5"])
    assert (parsed.data, parsed.flip, parsed.amp, parsed.lr) == (Path("videos"), False, "bf16", 0.5)
    assert Options.parse(None, []) == Options()


def _as_replica(rank: int, folder: Path, out: Path) -> None:
    started = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as by torchrun
    with mock.patch.dict(os.environ, started):
        train.train(options(out, folder, epochs=1, clips=1, parallel="ddp", sync_bn=True))


@pytest.mark.slow
def test_torchrun(folder: Path, tmp_path: Path, ranks: Ranks) -> None:
    """Two processes; replicas first, then resumed as shards."""
    ranks.run(_as_replica, folder, tmp_path)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(ROOT / "examples/train.py"), str(folder), "--width", "4", "--frames", "4",
        "--size", "24", "--clips", "1", "--batch", "2", "--workers", "0", "--device", "cpu",
        "--sync-bn", "--out", str(tmp_path / "run"), "--epochs", "2", "--parallel", "fsdp",
        "--resume",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2" in done.stdout
    assert "4 files could not be used" in done.stdout
    found = checkpoints.read_checkpoint(tmp_path / "run" / "last.pt")
    model = train.build_model(options(tmp_path), found["classes"])
    model.load_state_dict(found["model"])  # whole tensors under the names of the model


# ---- the demo


def test_reversed_clips_differ_in_nothing_else() -> None:
    for train_part in (True, False):
        data = digits.MovingDigits(12, 8, 24, train_part)
        for i in range(0, 12, 2):
            a, b = data[i], data[i + 1]
            assert torch.equal(a["clips"].flip(2), b["clips"])
            assert (a["label"], b["label"]) == (i % 6, i % 6 + 1)
    assert not torch.equal(data[0]["clips"], data[6]["clips"])


@pytest.mark.slow
def test_train_demo_in_short(tmp_path: Path) -> None:
    """f-R2D tells no direction, R(2+1)D does, and what is shown is written."""
    sizes = {"epochs": 2, "clips": 480, "evaluated": 60}
    results = train_demo.run(**sizes, width=8)
    directions = {name: r.history[-1]["direction"] for name, r in results.items()}
    assert directions["fr2d_18"] == pytest.approx(0.5, abs=0.03)
    assert directions["r2plus1d_18"] > 0.75
    train_demo.draw(tmp_path / "chart.png", results)
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    text = train_demo.table(train_demo.describe(results, *sizes.values()))
    assert "| f-R2D-18 |" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{train_demo._BEGIN}\nstale text\n{train_demo._END}\nafter\n")
    train_demo.insert(page, text)
    assert page.read_text().split("\n")[-3:] == [train_demo._END, "after", ""]
    assert text in page.read_text()
    assert "stale text" not in page.read_text()
    page.write_text("no marks")
    with pytest.raises(ValueError, match="requires the marks"):
        train_demo.insert(page, text)


def test_pages_show_the_recorded_run() -> None:
    """Figures are written by ``make train-demo ARGS=--record``, never by hand."""
    run = json.loads(train_demo.RECORD.read_text(encoding="utf-8"))
    for page in train_demo.PAGES:
        assert train_demo.table(run) in page.read_text(encoding="utf-8")
    first, second = (n["history"][-1]["direction"] for n in run["networks"])
    assert first == pytest.approx(0.5, abs=0.02)
    assert second > 0.9
