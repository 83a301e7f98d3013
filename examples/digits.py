"""Generated clips whose classes differ in nothing but the order of their frames.

Handwritten digits (scikit-learn's) pushed left or right, up or down, towards the viewer or away. A
clip of one direction is a clip of the other with its frames reversed, so that what sees each frame
by itself can tell the axis, never the direction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset
from videos import NO_LABEL

CLASSES = ["left", "right", "up", "down", "towards", "away"]  # each axis: one way, and back
_TRAINING_IMAGES = 1500  # of 1797; the rest, by other writers, is for evaluation


class MovingDigits(Dataset[dict[str, Any]]):
    """Clips as ``videos.Clips`` gives them, made on the fly from (seed, epoch, index) alone.

    Args:
        length: number of clips; consecutive ones belong to the same axis and are each other's
            reverse.
        frames: T.
        size: H and W.
        train: draws other clips in every epoch; else the clips stay the same.
        seed: of all random choices.
    """

    def __init__(self, length: int, frames: int, size: int, train: bool, seed: int = 0) -> None:
        images = load_digits().images.astype(np.float32) / 16
        images = images[:_TRAINING_IMAGES] if train else images[_TRAINING_IMAGES:]
        self.images = torch.from_numpy(images)
        self.length, self.frames, self.size = length, frames, size
        self.train, self.seed, self.epoch = train, seed, 0
        self.classes = CLASSES

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Index −1 is an empty sample, which fills the last batch of a rank."""
        if index < 0:
            empty = torch.zeros(1, 3, self.frames, self.size, self.size, dtype=torch.uint8)
            return {"clips": empty, "label": NO_LABEL, "unusable": ""}
        label = index % len(CLASSES)
        epoch = self.epoch if self.train else -1
        generator = np.random.default_rng((self.seed, epoch + 1, index // 2))
        clip = self._forwards(label // 2, generator)
        if label % 2:
            clip = clip.flip(0)
        pixels = (clip * 255).round().to(torch.uint8)
        return {"clips": pixels.expand(1, 3, -1, -1, -1), "label": label, "unusable": ""}

    def _forwards(self, axis: int, generator: np.random.Generator) -> Tensor:
        """(T, H, W) of a digit moving left, up or towards the viewer, in [0, 1]."""
        image = self.images[int(generator.integers(len(self.images)))]
        # Half the side of the digit, and where its centre is; the canvas reaches from −1 to 1.
        half = np.full(self.frames, generator.uniform(0.35, 0.5))
        centre = np.tile(generator.uniform(-0.3, 0.3, (2, 1)), self.frames)  # x, y
        path = np.linspace(1, -1, self.frames) * generator.uniform(0.25, 0.45)
        if axis < 2:
            centre[axis] += path
        else:
            half = half * 2.0**-path
        zeros = np.zeros_like(half)
        theta = np.stack(  # canvas to image
            [np.stack([1 / half, zeros, -centre[0] / half], -1),
             np.stack([zeros, 1 / half, -centre[1] / half], -1)], 1,
        )  # fmt: skip
        shape = [self.frames, 1, self.size, self.size]
        grid = F.affine_grid(torch.from_numpy(theta).float(), shape, align_corners=False)
        frames = F.grid_sample(image.expand(self.frames, 1, 8, 8), grid, align_corners=False)
        noise = torch.from_numpy(generator.normal(0, 0.08, shape).astype(np.float32))
        return (0.15 + 0.7 * frames + noise).clamp(0, 1).squeeze(1)


def same_direction(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Whether the likelier of the true axis' two directions is the true one; (N,) bool.

    A tie counts as a miss for one of the two: at chance it is half of the clips.
    """
    axis = labels // 2 * 2
    back = probabilities.gather(1, axis[:, None] + 1) > probabilities.gather(1, axis[:, None])
    return back.squeeze(1).long() == labels % 2
