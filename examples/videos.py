"""Data sets of videos: their listings as distributed, decoding, sampling of clips.

Files that cannot be used (unreadable, no video, too short) never stop a run: in training another
one takes their place, in evaluation they count for nothing, and either way the sample says why.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

EXTENSIONS = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
NO_LABEL = -100  # what torch.nn.functional.cross_entropy ignores
_UNUSABLE_IN_A_ROW = 20


class DataError(ValueError):
    """A listing that cannot be used."""


class VideoError(ValueError):
    """A video that cannot be used."""


class Video(NamedTuple):
    path: Path
    label: int  # index into the classes


class Listing(NamedTuple):
    videos: list[Video]
    classes: list[str]


# ---- listings


def read_folder(root: Path) -> Listing:
    """Videos in one folder per class: ``root/CLASS/FILE``.

    Raises:
        DataError: no such folder, or no videos in it.
    """
    if not root.is_dir():
        raise DataError(f"{root}: requires a folder with one folder of videos per class")
    found = sorted(p for p in root.glob("*/*") if p.suffix.lower() in EXTENSIONS)
    if not found:
        raise DataError(f"{root}: found no videos in the form CLASS/FILE ({', '.join(EXTENSIONS)})")
    classes = sorted({p.parent.name for p in found})
    return Listing([Video(p, classes.index(p.parent.name)) for p in found], classes)


def read_list(path: Path, root: Path, classes: Sequence[str] | None = None) -> Listing:
    """Videos named by a list file, in the form in which the data sets are distributed.

    - ``*.json``, Something-Something V2: objects with ``id`` and ``template`` (or ``label``); files
      ``root/ID.webm``.
    - ``*.csv`` with a header, Kinetics: ``label, youtube_id, time_start, time_end``; files
      ``root/[LABEL/]ID_START_END.mp4`` or ``root/[LABEL/]ID.mp4``.
    - anything else, UCF-101 and most others: a path per line, below root, and after a space or
      comma a class index, counted from 0 or, as UCF-101's, from 1. The folder of the file is the
      class where it is a known one, or goes one to one with the index.

    Args:
        classes: names in the order of the labels; None to take them from the list, sorted.

    Raises:
        DataError: no such file, an entry that does not parse or names an unknown class, or no
            entries.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if path.suffix.lower() == ".json":
        named = _something(path, text, root)
    elif text.lstrip().lower().startswith("label,"):
        named = _kinetics(path, text, root)
    else:
        named = _lines(path, text, root, classes)
    if not named:
        raise DataError(f"{path}: lists no videos")
    names = list(classes) if classes is not None else sorted({name for _, name in named})
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted({name for _, name in named} - index.keys())
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} classes are not among the {len(names)} known ones, for "
            f"example {unknown[0]!r}"
        )
    return Listing([Video(p, index[name]) for p, name in named], names)


def read_classes(path: Path) -> list[str]:
    """Names of classes, in the order of their labels.

    Something-Something V2's ``labels.json`` (name to index), UCF-101's ``classInd.txt`` (index and
    name per line), or a name per line.
    """
    try:
        text = path.read_text()
        if path.suffix.lower() == ".json":
            table = json.loads(text)
            return sorted(table, key=lambda name: int(table[name]))
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as a list of classes: {error}") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = [name.split(maxsplit=1) for name in names]
    if names and all(len(n) == 2 and n[0].isdigit() for n in numbered):
        names = [name for _, name in sorted(numbered, key=lambda n: int(n[0]))]
    if not names:
        raise DataError(f"{path}: names no classes")
    return names


def _something(path: Path, text: str, root: Path) -> list[tuple[Path, str]]:
    try:
        entries = json.loads(text)
        return [
            (root / f"{e['id']}.webm", str(e.get("template", e.get("label"))).translate(_BRACKETS))
            for e in entries
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: requires a list of objects with 'id' and 'template': {error!r}"
        ) from error


_BRACKETS = str.maketrans("", "", "[]")  # "Holding [something]" is "Holding something" as a class


def _kinetics(path: Path, text: str, root: Path) -> list[tuple[Path, str]]:
    named = []
    for row in csv.DictReader(text.splitlines()):
        try:
            label, name = row["label"], row["youtube_id"]
            span = f"_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: requires label, youtube_id, time_start and time_end in a row, got {row}"
            ) from error
        forms = [root / d / f"{name}{s}.mp4" for d in (label, "") for s in (span, "")]
        named.append((next((p for p in forms if p.exists()), forms[0]), label))
    return named


def _lines(
    path: Path, text: str, root: Path, classes: Sequence[str] | None
) -> list[tuple[Path, str]]:
    entries: list[tuple[str, int | None]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, label = line.rpartition("," if "," in line else " ")
        has_label = bool(name) and label.strip().isdigit()
        entries.append((name.strip(), int(label)) if has_label else (line, None))
    folders = [Path(name).parent.name for name, _ in entries]
    labels = [label for _, label in entries]
    # Folders name the classes where they say the same as the indices do.
    pairs = set(zip(folders, labels, strict=True))
    one_to_one = len(pairs) == len(set(folders)) == len(set(labels)) or set(labels) == {None}
    if all(folders) and (one_to_one if classes is None else set(folders) <= set(classes)):
        return [(root / name, folder) for (name, _), folder in zip(entries, folders, strict=True)]
    if None in labels:
        raise DataError(
            f"{path}: requires a class index, or a folder that is a class, in each line"
        )
    numbers = [label for label in labels if label is not None]
    names = {n: f"class {n:06d}" for n in numbers}  # in the order of the indices when sorted
    if classes is not None and not set(names.values()) <= set(classes):
        first = 0 if 0 in names else 1
        if max(names) - first >= len(classes) or (first == 1 and len(classes) not in names):
            raise DataError(
                f"{path}: class indices {min(names)} to {max(names)} do not tell how the "
                f"{len(classes)} classes are counted; start them at 0"
            )
        names = {n: classes[n - first] for n in numbers}
    return [(root / name, names[n]) for (name, _), n in zip(entries, numbers, strict=True)]


# ---- clips


def sample_frames(
    count: int, frames: int, step: int, clips: int, generator: np.random.Generator | None
) -> list[np.ndarray]:
    """Indices of the frames of clips: one at a random place, or several evenly spread.

    Args:
        count: frames of the video; where they do not span a clip, the step shrinks.
        frames: of a clip.
        step: between the frames of a clip.
        clips: how many; only without a generator.
        generator: places one clip; None for evaluation.

    Raises:
        VideoError: fewer frames than a clip has.
    """
    if count < frames:
        raise VideoError(f"has {count} frames, fewer than the clip's {frames}")
    if frames > 1:
        step = min(step, (count - 1) // (frames - 1))
    last_start = count - (frames - 1) * step - 1
    if generator is not None:
        starts = [int(generator.integers(last_start + 1))]
    else:
        starts = [round(last_start * (i + 0.5) / clips) for i in range(clips)]
    return [start + step * np.arange(frames) for start in starts]


def decode(
    path: Path, choose: Callable[[int], list[np.ndarray]], short_side: int
) -> list[np.ndarray]:
    """Clips of a video.

    Args:
        choose: from the number of frames to the frame indices of each clip.
        short_side: to which frames are scaled.

    Returns:
        Clips of (T, H, W, 3) bytes, RGB.

    Raises:
        VideoError: cannot be read, has no video, or what ``choose`` raises.
    """
    try:
        times = _times(path)
        clips = choose(len(times))
        wanted = {times[i] for clip in clips for i in clip}
        images: dict[int, np.ndarray] = {}
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if any(name in container.format.name for name in _SEEKABLE):
                container.seek(min(wanted), stream=stream)  # the key frame at or before
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    images[frame.pts] = _scaled(frame, short_side)
                if frame.pts >= max(wanted):
                    break
        missing = len(wanted) - len(images)
        if missing:
            raise VideoError(f"{missing} of the {len(wanted)} frames wanted do not decode")
        return [np.stack([images[times[i]] for i in clip]) for clip in clips]
    except (av.FFmpegError, OSError, TypeError) as error:
        raise VideoError(f"cannot be read: {error}") from error


_SEEKABLE = ("mp4", "matroska")  # whose marks of key frames can be trusted: AVI's cannot


def _times(path: Path) -> list[int]:
    """When the frames of a video are due: their exact number, without decoding them."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise VideoError("has no video")
        packets = [p for p in container.demux(video=0) if p.size and not p.is_discard]
        return sorted(p.dts if p.pts is None else p.pts for p in packets)


def _scaled(frame: Any, short_side: int) -> np.ndarray:
    scale = short_side / min(frame.width, frame.height)
    size = [max(short_side, round(n * scale)) for n in (frame.width, frame.height)]
    return frame.to_ndarray(width=size[0], height=size[1], format="rgb24", interpolation="BILINEAR")


class Clips(Dataset[dict[str, Any]]):
    """Clips of videos as bytes.

    A sample has ``clips`` (clips, 3, T, H, W) of uint8, ``label``, and in ``unusable`` what files
    were skipped on the way to it, one per line, or nothing. Random choices depend on (seed, epoch,
    index) alone, so that an epoch is the same whenever and wherever it is run.

    Args:
        listing: the videos.
        frames: of a clip.
        step: between the frames of a clip.
        size: H and W of a clip; frames are scaled to 8/7 of it on the short side and cropped.
        train: one clip at a random place, cropped and flipped at random.
        clips: of each video in evaluation, spread evenly, cropped in the centre.
        flip: whether training mirrors; not where left and right are what classes are about.
        seed: of all random choices.
    """

    def __init__(
        self,
        listing: Listing,
        frames: int,
        step: int,
        size: int,
        train: bool,
        *,
        clips: int = 1,
        flip: bool = True,
        seed: int = 0,
    ) -> None:
        self.videos, self.classes = listing
        self.frames, self.step, self.size, self.train = frames, step, size, train
        self.clips, self.flip, self.seed = 1 if train else clips, flip and train, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Index −1 is an empty sample, which fills the last batch of a rank."""
        if index < 0:
            return self._nothing("")
        skipped: list[str] = []
        generator = np.random.default_rng((self.seed, self.epoch, index)) if self.train else None
        while len(skipped) < _UNUSABLE_IN_A_ROW:
            path, label = self.videos[index]
            try:
                clips = self._load(path, generator)
            except VideoError as error:
                skipped.append(f"{path}: {error}")
                if generator is None:
                    return self._nothing(skipped[0])
                index = int(generator.integers(len(self.videos)))
                continue
            return {"clips": clips, "label": label, "unusable": "\n".join(skipped)}
        raise DataError(
            f"{len(skipped)} videos in a row cannot be used, the last one: {skipped[-1]}"
        )

    def _load(self, path: Path, generator: np.random.Generator | None) -> Tensor:
        def choose(count: int) -> list[np.ndarray]:
            return sample_frames(count, self.frames, self.step, self.clips, generator)

        images = np.stack(decode(path, choose, round(self.size * 8 / 7)))  # (clips, T, H, W, 3)
        room = [n - self.size for n in images.shape[2:4]]
        if generator is None:
            top, left = room[0] // 2, room[1] // 2
        else:
            top, left = (int(generator.integers(n + 1)) for n in room)
        images = images[:, :, top : top + self.size, left : left + self.size]
        if generator is not None and self.flip and generator.random() < 0.5:
            images = images[:, :, :, ::-1]
        return torch.from_numpy(images.transpose(0, 4, 1, 2, 3).copy())

    def _nothing(self, why: str) -> dict[str, Any]:
        shape = (self.clips, 3, self.frames, self.size, self.size)
        return {"clips": torch.zeros(shape, dtype=torch.uint8), "label": NO_LABEL, "unusable": why}


class Shares(Sampler[int]):
    """The indices of one rank: equally many on every rank, the same order on every run.

    Args:
        length: of the data set.
        rank, ranks: which share of how many.
        multiple: the share's length is a multiple of it: in training what is left over is dropped,
            in evaluation −1 fills up.
        seed: shuffles together with the epoch; None for evaluation, in order.
        start: indices of the share to leave out at its beginning, when resuming within an epoch.
    """

    def __init__(
        self, length: int, rank: int, ranks: int, multiple: int, seed: int | None = None
    ) -> None:
        self.length, self.rank, self.ranks, self.multiple = length, rank, ranks, multiple
        self.seed, self.epoch, self.start = seed, 0, 0

    def _indices(self) -> Iterable[int]:
        chunk = self.ranks * self.multiple
        if self.seed is None:
            fill = -self.length % chunk
            return [*range(self.length), *[-1] * fill][self.rank :: self.ranks]
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return order[: self.length // chunk * chunk][self.rank :: self.ranks].tolist()[self.start :]

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices())

    def __len__(self) -> int:
        chunk = self.ranks * self.multiple
        whole = -(-self.length // chunk) if self.seed is None else self.length // chunk
        return whole * self.multiple - self.start
