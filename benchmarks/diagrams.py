"""Pictures that explain rather than measure: how a call finds its kernels, what a stream keeps."""

from __future__ import annotations

from .svg import Card

WIDTH = 760

CHOICES = (  # in the order in which "auto" asks them
    ("cuda", "NVIDIA GPUs: dense pairs on Hopper, depthwise ones"),
    ("triton", "GPUs: kernels that the first call compiles"),
    ("cpu", "x86-64 CPUs: all but float64, with AVX2 or AVX-512"),
    ("aten", "everything else: PyTorch's own convolutions"),
)


def call() -> Card:
    """From a module to the backend that runs it."""
    card = Card(WIDTH, "A call takes the first backend that can run it")
    card.description = (
        "A layer, or a pair of convolutions that fastst.convert found, calls one PyTorch operator. "
        "It asks " + ", ".join(f"{name} ({what})" for name, what in CHOICES) + " in this order."
    )
    top = card.heading() + 18
    high, left, right = 46, 196, 360
    middle = top + (len(CHOICES) * high - 6) / 2
    steps = [
        (24, 150, ["Conv2Plus1d, or a", "pair in your model"]),
        (left, 144, ["torch.ops.fastst", ".conv2plus1d"]),
    ]
    for x, width, lines in steps:
        card.box(x, middle - 30, width, 60, "none")
        for i, line in enumerate(lines):
            card.text(x + width / 2, middle - 5 + 20 * i, line, 14, "ink", "middle")
    card.arrow(174, middle, left)
    card.text(left, middle + 54, "one operator", 13, "faint")
    card.line(left + 144, middle, right - 10, middle)
    card.line(right - 10, top + 20, right - 10, top + 20 + high * (len(CHOICES) - 1))
    for i, (name, what) in enumerate(CHOICES):
        y = top + high * i
        colour = "ours" if name != "aten" else "plain"
        card.arrow(right - 10, y + 20, right + 14)
        card.box(right + 14, y, 62, high - 6, colour)
        card.text(right + 45, y + 25, name, 14, "onink", "middle", bold=True)
        first, _, second = what.partition(": ")
        card.text(right + 84, y + 16, first, 13, bold=True)
        card.text(right + 84, y + 34, second, 12, "faint")
    card.height = top + high * len(CHOICES) + 12
    return card


def streaming() -> Card:
    """Chunks of a clip go through a causal layer; the state holds the last frames of each."""
    card = Card(WIDTH, "A stream keeps the last frames of each chunk, and nothing else")
    card.description = (
        "A causal layer with three temporal taps takes a clip in chunks of 3, 1 and 4 frames. Each "
        "call returns the frames that it completes and a state of two frames, which the next call "
        "takes. The outputs together are those of the whole clip."
    )
    top = card.heading(["layer.stream(chunk, state) with three temporal taps"]) + 16
    size, gap, space = 30, 6, 62
    x, number = 92.0, 0
    rows = {"chunk": top, "call": top + 56, "y": top + 122}
    for name, y in rows.items():
        card.text(24, y + 21, "" if name == "call" else name, 15, bold=True)
    for i, frames in enumerate((3, 1, 4)):
        width = frames * (size + gap) - gap
        box = max(width, 62)
        start = x + (box - width) / 2
        for j in range(frames):
            at = start + j * (size + gap)
            held = j >= frames - 2 or frames == 1
            for row in ("chunk", "y"):
                colour = "kept" if row == "chunk" and held else "pale"
                card.box(at, rows[row], size, size, colour)
                ink = "onink" if colour == "kept" else "ink"
                card.text(at + size / 2, rows[row] + 20, str(number + j), 13, ink, "middle")
        card.box(x, rows["call"], box, 40, "none")
        card.text(x + box / 2, rows["call"] + 25, "layer", 14, "ink", "middle")
        if i < 2:
            card.arrow(x + box + 4, rows["call"] + 20, x + box + space - 4)
            last = number + frames - 1
            for at, text in ((14, "state"), (36, f"of {last - 1}, {last}")):
                card.text(x + box + space / 2, rows["call"] + at, text, 12, "faint", "middle")
        x, number = x + box + space, number + frames
    y = rows["y"] + 62
    card.box(24, y - 12, 14, 14, "kept")
    card.text(46, y, "frames that states are made of: the last two before the next chunk", 14)
    card.height = y + 22
    return card
