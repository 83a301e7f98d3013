"""A clip from a video file: decoded, sampled, scaled, cropped."""

from __future__ import annotations

import itertools
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from torch import Tensor

SHIPPED = Path(__file__).parent / "data" / "bigbuckbunny_256x144.mp4"
_STEP = 4  # of the file's frames at most one in four is used, as when training on Kinetics
_MEAN, _STD = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)  # of Kinetics-400


class ClipError(ValueError):
    """A video that cannot be read, or that is too short."""


def read(path: Path, frames: int, size: int) -> Tensor:
    """Evenly spaced frames of the beginning of a video, centre-cropped.

    Returns:
        (3, frames, size, size) in float32, RGB in [0, 1].

    Raises:
        ClipError: the file cannot be decoded, has no video, or has too few frames.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ClipError(f"{path}: requires a video stream, found none")
            decoded = container.decode(video=0)
            images = [
                torch.from_numpy(frame.to_ndarray(format="rgb24"))
                for frame in itertools.islice(decoded, _STEP * frames)
            ]
    except (av.FFmpegError, OSError) as error:
        raise ClipError(f"{path}: cannot be read as a video: {error.strerror or error}") from error
    if len(images) < frames:
        raise ClipError(f"{path}: requires at least {frames} frames, found {len(images)}")
    images = [images[i * len(images) // frames] for i in range(frames)]
    clip = torch.stack(images).permute(0, 3, 1, 2).float() / 255  # (T, 3, H, W)
    return _centre(clip, size).transpose(0, 1)


def normalise(clip: Tensor) -> Tensor:
    """(3, T, H, W) in [0, 1] with the mean and deviation that Kinetics networks are trained on."""
    return (clip - torch.tensor(_MEAN).view(3, 1, 1, 1)) / torch.tensor(_STD).view(3, 1, 1, 1)


def _centre(clip: Tensor, size: int) -> Tensor:
    """(T, 3, H, W) scaled so that its short side is 8/7 of ``size``, and cropped to ``size``²."""
    h, w = clip.shape[-2:]
    scale = size * 8 / 7 / min(h, w)
    scaled = (max(size, round(h * scale)), max(size, round(w * scale)))
    clip = F.interpolate(clip, scaled, mode="bilinear", antialias=True).clamp(0, 1)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return clip[..., top : top + size, left : left + size]
