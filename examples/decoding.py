"""Frames of video files, decoded in a process of their own, which is all that a file can end.

    clips = decode(path, choose, short_side)

``python decoding.py FD`` is that process, and FD its end of a pipe.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

SECONDS = 300.0  # for one file


class VideoError(ValueError):
    """A video that cannot be used."""


Choose = Callable[[int], list[np.ndarray]]


def decode(path: Path, choose: Choose, short_side: int) -> list[np.ndarray]:
    """As ``decode_here``, in a process that serves this one: it starts with the first file.

    Raises:
        VideoError: also where the file crashes its decoder, or takes longer than ``SECONDS``.
    """
    global _process
    if _process is None or not _process.serves():
        _process = _Process()
    process, _process = _process, None
    try:
        found = process.decode(path, choose, short_side)
    except TimeoutError as error:
        process.end()
        raise VideoError(f"did not decode within {SECONDS:g} s") from error
    except (EOFError, OSError) as error:
        raise VideoError(f"ended the process that decodes it ({process.end()})") from error
    except BaseException:  # of ``choose``, or an interruption: the two are out of step
        process.end()
        raise
    _process = process
    if isinstance(found, str):
        raise VideoError(found)
    return found


class _Process:
    """The process that decodes, seen from the one that it serves."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.pipe, end = Pipe()
        with end:
            command = [sys.executable, __file__, str(end.fileno())]
            self.child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[end.fileno()]
            )

    def serves(self) -> bool:
        """Whether it is there, and this process'; a fork must not use its parent's."""
        return self.owner == os.getpid() and self.child.poll() is None

    def decode(self, path: Path, choose: Choose, short_side: int) -> list[np.ndarray] | str:
        """The clips, or why there are none."""
        self.pipe.send((path.absolute(), short_side))  # it may be elsewhere
        while True:
            if not self.pipe.poll(SECONDS):
                raise TimeoutError
            found: Any = self.pipe.recv()
            if not isinstance(found, int):
                return found  # type: ignore[no-any-return]
            try:
                self.pipe.send(choose(found))
            except VideoError as error:
                self.pipe.send(str(error))

    def end(self) -> str:
        """End it; says what had ended it before."""
        self.pipe.close()
        try:
            status = self.child.wait(1)
        except subprocess.TimeoutExpired:
            self.child.kill()
            status = self.child.wait()
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"


_process: _Process | None = None


def _serve(pipe: Connection) -> None:
    """Answer until the other end is closed: with a number of frames to choose from, then clips."""

    def ask(count: int) -> list[np.ndarray]:
        pipe.send(count)
        chosen = pipe.recv()
        if isinstance(chosen, str):
            raise VideoError(chosen)
        return chosen  # type: ignore[no-any-return]

    while True:
        try:
            path, short_side = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(decode_here(path, ask, short_side))
        except VideoError as error:
            pipe.send(str(error))


def decode_here(path: Path, choose: Choose, short_side: int) -> list[np.ndarray]:
    """Clips of a video.

    Args:
        choose: from the number of frames to the frame indices of each clip.
        short_side: to which frames are scaled, upright. Where the resolution changes within the
            video, all are cut in their centres to what the smallest of them has.

    Returns:
        Clips of (T, H, W, 3) bytes, RGB.

    Raises:
        VideoError: cannot be read, has no video, or what ``choose`` raises.
    """
    with _readable():
        times = _times(path)
    clips = choose(len(times))
    with _readable():
        wanted = {times[i] for clip in clips for i in clip}
        images = _images(path, wanted, short_side, isinstance(times, range))
    least = [min(image.shape[axis] for image in images.values()) for axis in (0, 1)]
    return [np.stack([_centre(images[times[i]], least) for i in clip]) for clip in clips]


_SEEKABLE = ("mp4", "matroska")  # whose marks of key frames can be trusted: AVI's cannot
_UNTIMED = ("avi", "asf")  # which keep when frames are stored, not when they are due
_MOST_PIXELS = 1 << 26  # of a frame: 8192²
_MOST_LONGER = 16  # than the short side


@contextmanager
def _readable() -> Iterator[None]:
    """Whatever is raised within it is about one file, and must not end a run."""
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(f"cannot be read: {error or type(error).__name__}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video."""
    if not path.is_file():  # to open a pipe would wait for ever
        raise VideoError("cannot be read: is no file" if os.path.lexists(path) else "is missing")
    # Not as a protocol, whatever the name, and nothing that a playlist leads to.
    options = {"protocol_whitelist": "file"}
    with av.open(str(path.absolute()), options=options, metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if stream is None:
            raise VideoError("has no video")
        _check_size(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
        yield container, stream


def _times(path: Path) -> Sequence[int]:
    """When the frames of a video are due: their exact number, without decoding them.

    A range, and so their places, where the file does not say it, or not as the frames are shown.
    """
    with _opened(path) as (container, stream):
        packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
        untold = any(name in container.format.name for name in _UNTIMED)
        reordered = stream.codec_context.has_b_frames
    due = [p.pts for p in packets]
    stored = [p.dts for p in packets if p.dts is not None]
    told = not untold and None not in due and len(set(due)) == len(due) and _ascend(stored)
    # Where frames are stored in another order than they are shown in, their times tell.
    return sorted(due) if told and not (reordered and _ascend(due)) else range(len(packets))


def _ascend(times: Sequence[int]) -> bool:
    return all(a < b for a, b in pairwise(times))


def _images(path: Path, wanted: set[int], short_side: int, counted: bool) -> dict[int, np.ndarray]:
    """The frames that are due at, or where they are counted have the places, that are wanted."""
    with _opened(path) as (container, stream):
        images = {}
        if not counted and any(name in container.format.name for name in _SEEKABLE):
            container.seek(min(wanted), stream=stream)  # the key frame at or before
            images = _decoded(container, stream, wanted, short_side, False)
    if len(images) < len(wanted):  # what follows a key frame may need what is before it
        with _opened(path) as (container, stream):
            images = _decoded(container, stream, wanted, short_side, counted)
    missing = len(wanted) - len(images)
    if missing:
        raise VideoError(f"{missing} of the {len(wanted)} frames wanted do not decode")
    return images


def _decoded(
    container: Any, stream: Any, wanted: set[int], short_side: int, counted: bool
) -> dict[int, np.ndarray]:
    images: dict[int, np.ndarray] = {}
    scaler = VideoReformatter()  # one for all frames: each has a thread for every core
    last = -math.inf
    for place, frame in enumerate(container.decode(stream)):
        at = place if counted else frame.pts
        if at is None:
            continue
        if at <= last:
            raise VideoError("has frames that are due before others that are shown before them")
        last = at
        if at in wanted:
            images[at] = _scale(frame, short_side, scaler)
        if at >= max(wanted):
            break
    return images


def _check_size(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if width * height > _MOST_PIXELS or (short and long > _MOST_LONGER * short):
        raise VideoError(f"has frames of {width}×{height} pixels")


def _scale(frame: Any, short_side: int, scaler: VideoReformatter) -> np.ndarray:
    _check_size(frame.width, frame.height)
    scale = short_side / min(frame.width, frame.height)
    size = [max(short_side, round(n * scale)) for n in (frame.width, frame.height)]
    image = scaler.reformat(frame, *size, "rgb24", interpolation="BILINEAR").to_ndarray()
    return _upright(image, frame.side_data.get("DISPLAYMATRIX"))


def _upright(image: np.ndarray, matrix: Any) -> np.ndarray:
    """The image (H, W, 3) as its display matrix shows it, to the next quarter of a turn."""
    if matrix is None:
        return image
    # (x, y) is shown at (a·x + c·y, b·x + d·y).
    a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).astype(float)
    if abs(b) + abs(c) > abs(a) + abs(d):
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _centre(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    top, left = ((n - m) // 2 for n, m in zip(image.shape[:2], size, strict=True))
    return image[top : top + size[0], left : left + size[1]]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for whom it serves
    _serve(Connection(int(sys.argv[1])))
