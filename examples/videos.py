"""Data sets of videos: their listings as distributed, sampling of clips.

Files that cannot be used (unreadable, no video, too short, one that crashes its decoder) never stop
a run: in training another one takes their place, in evaluation they count for nothing, and either
way the sample says why.
"""

from __future__ import annotations

import codecs
import csv
import gc
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from decoding import VideoError, decode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

EXTENSIONS = (".mp4", ".avi", ".webm", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")
NO_LABEL = -100  # what torch.nn.functional.cross_entropy ignores
_UNUSABLE_IN_A_ROW = 20


class DataError(ValueError):
    """A listing that cannot be used."""


class Video(NamedTuple):
    path: Path
    label: int  # index into the classes


Classes = Sequence[str] | Mapping[int, str]  # names in the order of the labels; by their numbers


class Listing(NamedTuple):
    videos: list[Video]
    classes: list[str]


# ---- listings


def read_folder(root: Path) -> Listing:
    """Videos in one folder per class: ``root/CLASS/FILE``; DataError if there are none.

    Folders and files whose names begin with a dot are systems' own, and no classes.
    """
    if not os.path.isdir(root):
        raise DataError(f"{root}: requires a folder with one folder of videos per class")
    try:
        found = sorted(
            p for p in root.glob("*/*")
            if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")
            and not p.parent.name.startswith(".")
        )  # fmt: skip
    except OSError as error:
        raise DataError(f"{root}: cannot be read: {error}") from error
    if not found:
        raise DataError(f"{root}: found no videos in the form CLASS/FILE ({', '.join(EXTENSIONS)})")
    classes = sorted({p.parent.name for p in found})
    return Listing([Video(p, classes.index(p.parent.name)) for p in found], classes)


def read_list(path: Path, root: Path, classes: Classes | None = None) -> Listing:
    """Videos named by a list file, in the form in which the data sets are distributed.

    - ``*.json``, Something-Something V2: objects with ``id`` and ``template`` (or ``label``); files
      ``root/ID.webm``.
    - a table with a column ``youtube_id``, Kinetics: ``label, youtube_id, time_start, time_end``;
      files ``root/[LABEL/]ID_START_END.mp4`` or ``root/[LABEL/]ID.mp4``.
    - anything else, UCF-101 and most others: a path per line, below root, and after a space, tab,
      comma or semicolon a class index: the number of a class where classes have numbers, else
      counted from 0 or from 1. The folder of the file is the class where it is a known one, or goes
      one to one with the index.

    Bytes that are not UTF-8 are kept, as in the names of files.

    Args:
        classes: as ``read_classes`` gives them; None to take them from the list, sorted.

    Raises:
        DataError: no such file, an entry that does not parse, names an unknown class, or says two
            of them, or no entries.
    """
    text = _text(path)
    first = text.lstrip().partition("\n")[0]
    if path.suffix.lower() == ".json":
        named = _something(path, text, root)
    elif "youtube_id" in first.lower():
        named = _kinetics(path, text.lstrip(), root)
    else:
        named = _lines(path, text, root, classes)
    if not named:
        raise DataError(f"{path}: lists no videos")
    names = sorted({name for _, name in named}) if classes is None else _names(classes)
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted({name for _, name in named} - index.keys())
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} classes are not among the {len(names)} known ones, for "
            f"example {unknown[0]!r}"
        )
    return Listing([Video(p, index[name]) for p, name in named], names)


def read_classes(path: Path) -> Classes:
    """Classes by their numbers where the file numbers them, else in its order; sorted by label.

    Something-Something V2's ``labels.json`` (name to number), UCF-101's ``classInd.txt`` (number
    and name per line, or the other way round), or a name per line.

    Raises:
        DataError: no such file, one that does not parse, no classes, or one name or number twice.
    """
    text = _text(path)
    names: list[str] = []
    if path.suffix.lower() == ".json":
        try:
            numbered = [(int(str(n)), name) for name, n in json.loads(text).items()]
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read as a list of classes: {error}") from error
    else:
        names = list(_filled_lines(text))
        numbered = _numbered(names)
    if numbered:
        names = [name for _, name in sorted(numbered)]
    if not names:
        raise DataError(f"{path}: names no classes")
    for what, values in (("number", [n for n, _ in numbered]), ("class", names)):
        twice = next((v for v in values if values.count(v) > 1), None)
        if twice is not None:
            raise DataError(f"{path}: names the {what} {twice!r} more than once")
    return dict(sorted(numbered)) if numbered else names


def _numbered(lines: list[str]) -> list[tuple[int, str]]:
    """Number and name of each line, or nothing: names may begin or end with digits themselves."""

    def matches(pattern: str) -> list[tuple[str, str]]:
        found = (re.fullmatch(pattern, line) for line in lines)
        return [(m[1], m[2]) for m in found if m is not None]

    first = matches(rf"({_INDEX}){_SEPARATOR}+(.+)")
    if len(first) == len(lines):
        return [(int(n), name) for n, name in first]
    last = matches(rf"(.+?){_SEPARATOR}+({_INDEX})")
    if len({name for name, _ in last}) == len(lines):  # "Level 1" and "Level 2" are names
        return [(int(n), name) for name, n in last]
    return []


def _names(classes: Classes) -> list[str]:
    return list(classes.values() if isinstance(classes, Mapping) else classes)


_INDEX = "[0-9]{1,18}"
_SEPARATOR = r"[ \t,;]"


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # Names of files are bytes: those that are no UTF-8 come out as they are on the disk.
    return data.decode("utf-16" if wide else "utf-8-sig", "replace" if wide else "surrogateescape")


def _filled_lines(text: str) -> Iterator[str]:
    # Not splitlines(), which takes characters for ends of lines that names may have.
    return filter(None, (line.strip(" \t\r") for line in text.split("\n")))


def _something(path: Path, text: str, root: Path) -> list[tuple[Path, str]]:
    named = []
    try:
        for entry in json.loads(text):
            label = entry.get("template", entry.get("label"))
            if not isinstance(label, str) or not isinstance(entry["id"], (str, int)):
                raise ValueError(f"got {entry}")
            named.append((root / f"{entry['id']}.webm", label.translate(_BRACKETS)))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: requires a list of objects with 'id' and 'template': {error!r}"
        ) from error
    return named


_BRACKETS = str.maketrans("", "", "[]")  # "Holding [something]" is "Holding something" as a class


def _kinetics(path: Path, text: str, root: Path) -> list[tuple[Path, str]]:
    named = []
    header, *rows = text.split("\n")
    delimiter = next((d for d in "\t;" if d in header), ",")
    lines = [header.lower(), *rows]
    try:
        for row in csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True):
            cells = {k.strip(): v.strip() for k, v in row.items() if k and isinstance(v, str)}
            if not any(cells.values()):
                continue
            if not all(cells.get(k) for k in ("label", "youtube_id")):
                raise ValueError(f"got {row}")
            label, name = cells["label"], cells["youtube_id"]
            span = f"_{int(cells['time_start']):06d}_{int(cells['time_end']):06d}"
            forms = [root / d / f"{name}{s}.mp4" for d in (label, "") for s in (span, "")]
            named.append((next((p for p in forms if os.path.exists(p)), forms[0]), label))
    except (KeyError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path}: requires label, youtube_id, time_start and time_end in each row: {error!r}"
        ) from error
    return named


def _entry(path: Path, line: str, root: Path) -> tuple[str, int | None]:
    """The name of the file and, where there is one, the index of its class."""
    found = re.fullmatch(rf"(.*?){_SEPARATOR}+({_INDEX})", line)
    name, label = (line, None) if found is None else (found[1], int(found[2]))
    if len(name) > 1 and name[0] == name[-1] == '"':
        name = name[1:-1].replace('""', '"')
    after = re.search(rf"({_DOT_EXTENSIONS}){_SEPARATOR}", name, re.IGNORECASE)
    if after is not None and not name.lower().endswith(EXTENSIONS):
        raise DataError(f"{path}: requires a path and a class index in a line, got {line!r}")
    if "\\" in name and not os.path.exists(root / name):  # written on Windows
        name = name.replace("\\", "/")
    return name, label


_DOT_EXTENSIONS = "|".join(map(re.escape, EXTENSIONS))


def _lines(path: Path, text: str, root: Path, classes: Classes | None) -> list[tuple[Path, str]]:
    entries = [_entry(path, line, root) for line in _filled_lines(text)]
    folders = [Path(name).parent.name for name, _ in entries]
    labels = [label for _, label in entries]
    # Folders name the classes where they say the same as the indices do.
    pairs = set(zip(folders, labels, strict=True))
    one_to_one = len(pairs) == len(set(folders)) == len(set(labels)) or set(labels) == {None}
    named = one_to_one if classes is None else set(folders) <= set(_names(classes))
    if isinstance(classes, Mapping):
        for folder, n in pairs:
            if n is not None and (n not in classes or (named and folder != classes[n])):
                meant = repr(classes[n]) if n in classes else "the number of no class"
                raise DataError(f"{path}: gives {folder!r} the class index {n}, which is {meant}")
    if all(folders) and named:
        return [(root / name, folder) for (name, _), folder in zip(entries, folders, strict=True)]
    if None in labels:
        raise DataError(
            f"{path}: requires a class index, or a folder that is a class, in each line"
        )
    numbers = [label for label in labels if label is not None]
    if isinstance(classes, Mapping):
        return [(root / name, classes[n]) for (name, _), n in zip(entries, numbers, strict=True)]
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


def printable(text: str) -> str:
    """One line that any terminal and file of UTF-8 takes: names of files may be any bytes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


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
                skipped.append(printable(f"{path}: {error}"))
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


def iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader, whose workers free nothing of what this process had made.

    A fork has no threads but its own, and FFmpeg's objects wait for theirs when they are freed: a
    worker whose garbage collector came upon one would wait for ever.
    """
    gc.freeze()
    try:
        return iter(loader)  # starts all workers
    finally:
        gc.unfreeze()
