"""What reads people's files: nothing that one file or list holds ends a run."""

from __future__ import annotations

import errno
import gc
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av")

import av
import decoding
import options
import videos

ROOT = Path(__file__).parents[2]


def encode(path: Path, images: list[np.ndarray], codec: str = "libx264", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        container.metadata.update(options.pop("metadata", {}))
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode(None))
    return path


def grey(count: int = 12, height: int = 32, width: int = 48) -> list[np.ndarray]:
    return [np.full((height, width, 3), 40 + 12 * i, np.uint8) for i in range(count)]


def load(path: Path, train: bool = False) -> dict[str, Any]:
    listing = videos.Listing([videos.Video(path, 0)], ["x"])
    return videos.Clips(listing, 4, 2, 24, train)[0]


def why(path: Path) -> str:
    """Why an evaluation leaves a file out."""
    sample = load(path)
    assert sample["label"] == videos.NO_LABEL
    assert "\n" not in sample["unusable"]
    return str(sample["unusable"]).removeprefix(videos.printable(f"{path}: "))


# ---- what is right


@pytest.mark.parametrize("name", [b"caf\xe9.avi", "café 猫.avi".encode(), b"a:b.avi", b"a\nb.avi"])
def test_names_of_any_bytes(tmp_path: Path, name: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "plain.avi", grey(), "mpeg4").rename(tmp_path / os.fsdecode(name))
    assert load(path)["label"] == 0
    monkeypatch.chdir(tmp_path)
    assert load(Path(path.name))["label"] == 0  # not the protocol "a"
    path.write_bytes(b"no video")
    told = load(path)["unusable"]
    assert len(told.splitlines()) == 1
    told.encode()


def test_metadata_of_any_bytes(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", grey(), "mpeg4", metadata={"title": "QQQQ caf"})
    path.write_bytes(path.read_bytes().replace(b"QQQQ caf", b"QQQQ ca\xe9"))
    assert load(path)["label"] == 0


def switching(path: Path, sizes: list[tuple[int, int]]) -> Path:
    """Frame i of shade 40 + 12·i, so many of each size."""
    at = 0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=15)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
        for number, (width, height) in enumerate(sizes):
            coder = stream.codec_context
            if number:
                coder = av.CodecContext.create("mpeg4", "w")
                coder.width, coder.height, coder.pix_fmt = width, height, "yuv420p"
                coder.time_base, coder.framerate = Fraction(1, 15), Fraction(15)
            for i in (*range(8), None):
                frame = None
                if i is not None:
                    image = np.full((height, width, 3), 40 + 8 * at, np.uint8)
                    frame = av.VideoFrame.from_ndarray(image, "rgb24")
                    frame.pts, frame.time_base, at = at, Fraction(1, 15), at + 1
                for packet in coder.encode(frame):
                    packet.stream, packet.time_base = stream, Fraction(1, 15)
                    container.mux(packet)
    return path


@pytest.mark.parametrize("sizes", [[(64, 48), (48, 64)], [(48, 64), (96, 48), (32, 32)]])
def test_resolution_that_changes(tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    path = switching(tmp_path / "a.avi", sizes)
    wanted = np.arange(0, 8 * len(sizes), 3)
    (clip,) = decoding.decode_here(path, lambda count: [wanted], 32)
    assert clip.shape == (len(wanted), 32, 32, 3)
    assert np.abs(clip.mean((1, 2, 3)) - 40 - 8 * wanted).max() < 8
    for train in (True, False):
        assert load(path, train)["label"] == 0


def shades(clip: np.ndarray) -> list[int]:
    """Which of ``grey`` the frames of a clip are."""
    return [round((image.mean() - 40) / 12) for image in clip]


B_FRAMES = {"bf": "3", "g": "6", "b_strategy": "0", "sc_threshold": "0"}
OPEN = {"x264-params": "open-gop=1:keyint=6:min-keyint=6:bframes=3:scenecut=0"}


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        ("avi", "libx264", B_FRAMES), ("avi", "mpeg4", {"bf": "2"}), ("asf", "libx264", B_FRAMES),
        ("h264", "libx264", B_FRAMES), ("mpg", "mpeg2video", {"bf": "2"}),
        ("ts", "libx264", B_FRAMES), ("flv", "libx264", B_FRAMES), ("mp4", "libx264", OPEN),
        ("mkv", "libx264", OPEN),
    ],
)  # fmt: skip
def test_frames_come_in_the_order_in_which_they_are_shown(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str]
) -> None:
    """Also where the file tells no time, or another than that."""
    path = encode(tmp_path / f"a.{suffix}", grey(16), codec, **options)
    wanted = [np.arange(16), np.arange(3), np.arange(1, 16, 5), np.array([7])]
    clips = decoding.decode_here(path, lambda count: wanted if count == 16 else [], 32)
    assert [shades(clip) for clip in clips] == [w.tolist() for w in wanted]
    for i in range(16):
        (clip,) = decoding.decode_here(path, lambda count, i=i: [np.array([i])], 32)
        assert shades(clip) == [i]


def test_streams_one_behind_the_other(tmp_path: Path) -> None:
    """Times begin anew in the second."""
    path = encode(tmp_path / "a.ts", grey(8), "libx264", **B_FRAMES)
    path.write_bytes(2 * path.read_bytes())
    (clip,) = decoding.decode_here(path, lambda count: [np.arange(count)], 32)
    assert shades(clip) == 2 * [*range(8)]


def test_times_that_contradict_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that is not known to keep other times than those of its frames."""
    path = encode(tmp_path / "a.avi", grey(16), "libx264", **B_FRAMES)
    monkeypatch.setattr(decoding, "_times", lambda path: [*range(1, 17)])
    with pytest.raises(decoding.VideoError, match="due before others that are shown before them"):
        decoding.decode_here(path, lambda count: [np.arange(16)], 32)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda p: p),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
    ],
)
def test_display_matrices(
    tmp_path: Path, matrix: tuple[int, ...], shown: Callable[[np.ndarray], np.ndarray]
) -> None:
    picture = np.zeros((48, 96, 3), np.uint8)
    picture[:, :32], picture[:24, 32:64] = 255, 128  # no two turns look the same
    path = encode(tmp_path / "a.mp4", [picture] * 8)
    data, (a, b, c, d) = bytearray(path.read_bytes()), (n << 16 for n in matrix)
    at = data.find(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    (clip,) = decoding.decode_here(path, lambda count: [np.arange(4)], 48)
    wanted = shown(picture)
    assert clip[0].shape == wanted.shape
    assert np.abs(clip[0].astype(int) - wanted).mean() < 6
    assert load(path)["clips"].shape == (1, 3, 4, 24, 24)


# ---- what cannot be used: one line each


def test_kinds_of_unusable_files(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mp4", grey()).read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(1 << 16))
    (tmp_path / "text.mp4").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n"
    )
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "nowhere.mp4").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.mp4")  # to open it would wait for ever
    for name in ("folder", "loop", "nowhere", "pipe"):
        assert why(tmp_path / f"{name}.mp4") == "cannot be read: is no file"
    for name in ("empty", "half", "noise", "text"):
        assert why(tmp_path / f"{name}.mp4").startswith(("cannot be read: ", "has "))
    assert why(tmp_path / "gone.mp4") == "is missing"
    assert why(Path("a\0b.mp4"))
    assert why(tmp_path / ("x" * 300 + ".mp4"))


def test_no_frames_and_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert why(tmp_path / "sound.mp4") == "has no video"
    assert why(encode(tmp_path / "one.mp4", grey(1))).startswith("has 1 frames, fewer")


@pytest.mark.parametrize("size", [(16, 2048), (2048, 16)])
def test_long_frames_would_fill_the_memory(tmp_path: Path, size: tuple[int, int]) -> None:
    path = encode(tmp_path / "a.avi", grey(8, *size), "mpeg4")
    assert why(path) == f"has frames of {size[1]}×{size[0]} pixels"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding in this process, where tests can change it."""
    monkeypatch.setattr(videos, "decode", decoding.decode_here)


@pytest.mark.usefixtures("here")
def test_huge_frames_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_MOST_PIXELS", 64 * 48 + 1)
    assert why(encode(tmp_path / "a.mp4", grey(8, 64, 64))) == "has frames of 64×64 pixels"
    assert why(switching(tmp_path / "b.avi", [(64, 48), (640, 480)]))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "error", [MemoryError, ValueError, lambda: OSError(errno.EACCES, "x"), lambda: KeyError("x")]
)
def test_whatever_the_decoder_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]
) -> None:
    """In training another video takes the place."""
    good, bad = (encode(tmp_path / n, grey()) for n in ("good.mp4", "bad.mp4"))
    scaled = decoding._scale

    def broken(frame: Any, *arguments: Any) -> np.ndarray:
        if frame.pts and bad.name in opened[-1]:
            raise error()
        return scaled(frame, *arguments)

    opened: list[str] = []
    original = av.open
    monkeypatch.setattr(av, "open", lambda p, **k: opened.append(p) or original(p, **k))
    monkeypatch.setattr(decoding, "_scale", broken)
    listing = videos.Listing([videos.Video(bad, 1), videos.Video(good, 0)], ["x", "y"])
    data = videos.Clips(listing, 4, 2, 24, True)
    samples = [data[0], data[1]]
    assert [sample["label"] for sample in samples] == [0, 0]
    assert "bad.mp4: cannot be read: " in samples[0]["unusable"]


# Stands in for decoding.py: a file whose name says so does what a broken decoder does with it.
BROKEN = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT / "examples")!r})
from multiprocessing.connection import Connection
import decoding
times = decoding._times
def broken(path):
    if "crash" in path.name: os.kill(os.getpid(), signal.SIGSEGV)
    if "exit" in path.name: os._exit(3)
    if "hang" in path.name: time.sleep(100)
    return times(path)
decoding._times = broken
decoding._serve(Connection(int(sys.argv[1])))
"""


@pytest.fixture
def broken_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setattr(decoding, "__file__", str(tmp_path / "broken.py"))
    monkeypatch.setattr(decoding, "_process", None)


@pytest.mark.usefixtures("broken_decoder")
def test_a_file_ends_no_more_than_its_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = "ended the process that decodes it"
    names = ("crash.mp4", "good.mp4", "exit.mp4", "hang.mp4", "short.mp4")
    crash, good, exits, hang, short = (
        encode(tmp_path / n, grey(12 if n != "short.mp4" else 2)) for n in names
    )
    assert why(crash) == f"{ended} (SIGSEGV)"
    assert why(exits) == f"{ended} (exit status 3)"
    assert load(good)["label"] == 0
    process = decoding._process
    assert why(short).startswith("has 2 frames, fewer")
    assert load(good)["label"] == 0 and decoding._process is process  # one for all that is sound
    monkeypatch.setattr(decoding, "SECONDS", 2.0)
    assert why(hang) == "did not decode within 2 s"


@pytest.mark.usefixtures("broken_decoder")
def test_workers_outlive_what_crashes_a_decoder(tmp_path: Path) -> None:
    """Started by a process that has decoded itself."""
    listed = [(encode(tmp_path / f"{n}.mp4", grey()), n) for n in ("good", "crash", "fine")]
    listing = videos.Listing([videos.Video(path, 0) for path, _ in listed], ["x"])
    data = videos.Clips(listing, 4, 2, 24, False)
    assert data[0]["label"] == 0
    loaded = [*videos.iterate(torch.utils.data.DataLoader(data, 1, num_workers=2, timeout=200))]
    assert [int(batch["label"]) for batch in loaded] == [0, videos.NO_LABEL, 0]
    assert "crash.mp4: ended the process that decodes it (SIGSEGV)" in loaded[1]["unusable"][0]


class Collecting(torch.utils.data.Dataset[int]):
    """Collects garbage in the process that asks."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return gc.collect() * 0


def test_workers_do_not_wait_for_threads_of_the_process_that_forked_them(tmp_path: Path) -> None:
    """What an interrupted decoder leaves to the garbage collector waits for its threads."""
    path = encode(tmp_path / "a.mp4", grey())
    gc.disable()
    try:
        with av.open(str(path)) as container:
            frame = next(container.decode(video=0))
            frame.opaque = [container.streams.video[0].codec_context]
            frame.opaque.append(frame.opaque)
            del frame
        loader = torch.utils.data.DataLoader(Collecting(), num_workers=1, timeout=20)
        assert len([*videos.iterate(loader)]) == 1
        assert gc.collect()
    finally:
        gc.enable()


def test_an_interrupted_file_leaves_nothing_behind(tmp_path: Path) -> None:
    """The next one gets its own frames."""
    path = encode(tmp_path / "a.mp4", grey())

    def interrupted(count: int) -> list[np.ndarray]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoding.decode(path, interrupted, 24)
    assert load(path)["label"] == 0


@pytest.mark.slow
def test_every_cut_and_every_flipped_byte(tmp_path: Path) -> None:
    """Damage anywhere is a sample or one line."""
    seed = torch.initial_seed() % 2**32
    r = np.random.default_rng(seed)
    for codec, suffix in (("libx264", ".mp4"), ("mpeg4", ".avi"), ("libvpx-vp9", ".webm")):
        whole = encode(tmp_path / f"a{suffix}", grey(8), codec).read_bytes()
        for trial in range(40):
            data = bytearray(whole)
            if trial % 2:
                data = data[: r.integers(len(data))]
            for _ in range(1 + trial // 4):
                if data:
                    data[r.integers(len(data))] = r.integers(256)
            path = tmp_path / f"damaged{suffix}"
            path.write_bytes(data)
            sample = load(path)
            assert (sample["label"] == 0) != bool(sample["unusable"]), (seed, suffix, trial)
            assert sample["clips"].shape == (1, 3, 4, 24, 24)


def test_folders_with_loops(tmp_path: Path) -> None:
    encode(tmp_path / "x" / "a.mp4", grey())
    (tmp_path / "x" / "b.mp4").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "again").symlink_to(tmp_path)
    listing = videos.read_folder(tmp_path)
    assert listing.classes == ["x"]
    assert [v.path.name for v in listing.videos] == ["a.mp4", "b.mp4"]
    with pytest.raises(videos.DataError, match="one folder of videos per class"):
        videos.read_folder(tmp_path / "loop")


def test_what_is_hidden_is_no_class_and_no_video(tmp_path: Path) -> None:
    for name in ("x/a.mp4", "x/._a.mp4", ".trash/b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert videos.read_folder(tmp_path).classes == ["x"]
    assert [v.path.name for v in videos.read_folder(tmp_path).videos] == ["a.mp4"]


# ---- lists


def read(path: Path, text: str | bytes, classes: list[str] | None = None) -> tuple[str, str]:
    """The first video of a list below its folder, and its class."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    listing = videos.read_list(path, path.parent, classes)
    first = listing.videos[0]
    return str(first.path.relative_to(path.parent)), listing.classes[first.label]


@pytest.mark.parametrize("bom", [True, False])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", [" ", "\t", ",", ", ", ";", "  "])
@pytest.mark.parametrize("name", ["Run/v1.mp4", "Run/v,1.mp4", "Run/v 1;a.mp4", "Run/v\x85.mp4"])
def test_lines(tmp_path: Path, name: str, separator: str, end: str, bom: bool) -> None:
    text = f"{name}{separator}1{end}Jump/v2.mp4{separator}2{end}"
    for classes in (None, ["Run", "Jump"]):
        assert read(tmp_path / "list.txt", "\ufeff" * bom + text, classes) == (name, "Run")
    assert read(tmp_path / "list.txt", text.encode("utf-16"), None) == (name, "Run")


def test_other_lines(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    assert read(path, '"Run/a, b.mp4",0\nJump/c.mp4,1\n') == ("Run/a, b.mp4", "Run")
    assert read(path, "Run\\a.mp4 0\nJump\\b.mp4 1\n") == ("Run/a.mp4", "Run")
    name = os.fsdecode(b"caf\xe9/a.mp4")
    assert read(path, b"caf\xe9/a.mp4 0\nb/c.mp4 1\n") == (name, name[:4])
    for line in ("Run/a.mp4 run", "Run/a.mp4 120 0", "Run/a.mp4 -1", "Run/a.mp4,0.5"):
        with pytest.raises(videos.DataError, match="a path and a class index in a line, got"):
            read(path, f"{line}\n")


def test_kinetics_tables(tmp_path: Path) -> None:
    columns = ["label", "youtube_id", "time_start", "time_end"]
    for delimiter in (",", "\t", ";"):
        for header in (columns, [f'"{c}"' for c in columns], [c.upper() for c in columns]):
            row = ['"air, drumming"', "a-b", "1", "11"]
            text = "\ufeff" + "\r\n".join(map(delimiter.join, (header, row))) + "\r\n\r\n"
            found = read(tmp_path / "k.csv", text)
            assert found == ("air, drumming/a-b_000001_000011.mp4", "air, drumming")
    for text in (
        "youtube_id,time_start,time_end\na,1,2\n", "label,youtube_id\nx\n",
        "label,youtube_id,time_start,time_end\n,a,1,2\n",
        "label,youtube_id,time_start,time_end\nx,a,one,2\n",
        "label,youtube_id,time_start,time_end\nx," + "a" * 200_000 + ",1,2\n",
    ):  # fmt: skip
        with pytest.raises(videos.DataError, match="requires label, youtube_id"):
            read(tmp_path / "k.csv", text)


@pytest.mark.parametrize(
    "text",
    ['[{"id": "1"}]', '[{"id": "1", "template": null}]', "[1]", '{"a": 1}', "[", "null",
     '[{"id": null, "template": "x"}]', "[" * 100_000, '[{"template": "x"}]'],
)  # fmt: skip
def test_something_something_without_templates(tmp_path: Path, text: str) -> None:
    with pytest.raises(videos.DataError, match="'id' and 'template'"):
        read(tmp_path / "s.json", text)


def test_lists_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "classInd.txt"
    for separator in (" ", "\t", ",", ", "):
        path.write_bytes(f"\ufeff2{separator}Run fast\r\n1{separator}Jump\r\n".encode())
        assert videos.read_classes(path) == {1: "Jump", 2: "Run fast"}
        path.write_text(f"Run fast{separator}7\nJump{separator}0\n")
        assert videos.read_classes(path) == {0: "Jump", 7: "Run fast"}
    path.write_text("² a\nb\n", encoding="utf-8")
    assert videos.read_classes(path) == ["² a", "b"]
    for names in (["Level 1", "Level 2"], ["1 a", "b"], ["Run 1", "Jump"]):
        path.write_text("\n".join(names))
        assert videos.read_classes(path) == names
    for text in ("1 a\n1 b\n2 c\n", "Run 1\nJump 1\n"):
        path.write_text(text)
        with pytest.raises(videos.DataError, match="the number 1 more than once"):
            videos.read_classes(path)
    path.write_text("a\nb\na\n")
    with pytest.raises(videos.DataError, match="'a' more than once"):
        videos.read_classes(path)
    for text in ("[", "[1]", '{"a": null}', json.dumps({}), "1", '{"a": Infinity}', '{"a": 1.5}',
                 '{"a": 0, "b": "0"}', '{"a": true}'):  # fmt: skip
        (tmp_path / "labels.json").write_text(text)
        with pytest.raises(videos.DataError, match=r"labels\.json"):
            videos.read_classes(tmp_path / "labels.json")


# ---- options and what is printed


NUMBERS = [f.name for f in options.fields(options.Options) if "least" in f.metadata]


@pytest.mark.parametrize("name", NUMBERS)
def test_options_of_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = "--" + name.replace("_", "-")
    for value in ("0", "-1"):
        if value == "0" and name in ("lr", "warmup", "momentum", "weight_decay", "workers",
                                     "seed", "save_every"):  # fmt: skip
            assert getattr(options.Options.parse(None, [flag, value]), name) == 0
            continue
        with pytest.raises(SystemExit):
            options.Options.parse(None, [f"{flag}={value}"])
        assert f"{flag} requires a number from" in capsys.readouterr().err.splitlines()[-1]
        with pytest.raises(options.OptionError, match=f"{flag} requires"):
            options.Options(**{name: int(value)})


@pytest.mark.slow
def test_a_run_prints_any_name(tmp_path: Path) -> None:
    """To streams that take ASCII alone, which no name here is."""
    for part in ("train", "val"):
        for label in ("é", "猫"):
            for i in range(2):
                encode(tmp_path / part / label / f"{i}.mp4", grey())
    (tmp_path / "val" / "é" / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"no video")
    command = [
        sys.executable, str(ROOT / "examples/train.py"), str(tmp_path), "--width", "4",
        "--frames", "4", "--size", "16", "--epochs", "1", "--batch", "2", "--workers", "1",
        "--clips", "1", "--device", "cpu", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii:strict",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"1 files could not be used" in done.stdout
    for output in (done.stdout, done.stderr):  # at the end, and as it happens
        assert b"caf\\udce9.mp4: cannot be read" in output
