"""What a conversion did and what it left."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Replaced:
    """A pair that runs as one operation; names are those of ``model.named_modules()``.

    Without a sample these are neighbours that fit, and only a call shows what lies between them.
    """

    first: str
    second: str
    order: str  # "spatial-first" | "temporal-first"
    norm: str | None = None
    activation: str | None = None  # "relu", "none", ...; None without a sample
    residual: bool = False  # whether the op adds the block's shortcut
    outer: str = "none"  # the activation of its output that is part of it
    outer_norm: str | None = None  # the batch norm of its output that is part of it

    def __str__(self) -> str:
        if self.activation is None:
            return f"{self.first} → {self.second}, {self.order}, where one follows the other"
        between = [] if self.norm is None else [self.norm]
        if self.activation != "none":
            between.append(self.activation)
        text = f", with {' and '.join(between)} between" if between else ""
        ending = [] if self.outer_norm is None else [self.outer_norm]
        ending += ["the residual"] * self.residual
        if self.outer != "none":
            ending.append(self.outer)
        text += f", then {' and '.join(ending)}" if ending else ""
        return f"{self.first} → {self.second}, {self.order}{text}"


@dataclass(frozen=True)
class Alone:
    """A convolution without a partner that ran as one operation with what stands around it."""

    name: str
    norm: str | None = None  # of what it reads: "batch", "group", "instance" or "l2"
    activation: str = "none"  # behind that norm
    past: bool = False  # whether it reads frames of a cache before those of its input
    padded: bool = False  # whether calls before it pad
    residual: bool = False
    outer: str = "none"
    outer_norm: bool = False  # whether a batch norm behind it takes its statistics, or is in it

    def __str__(self) -> str:
        reads = [] if self.norm is None else [f"{self.norm} norm"]
        reads += [self.activation] if self.activation != "none" else []
        reads += ["cached frames"] * self.past + ["padding"] * self.padded
        ends = ["batch norm"] * self.outer_norm + ["the residual"] * self.residual
        ends += [self.outer] if self.outer != "none" else []
        parts = [
            f"{what} {', '.join(some)}" for what, some in (("with", reads), ("then", ends)) if some
        ]
        return f"{self.name or 'the model'}: " + ("; ".join(parts) or "alone")


@dataclass(frozen=True)
class Left:
    """A separable convolution, or a layer of this library, that runs as it did."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'}: {self.reason}"


@dataclass
class Report:
    """What ``fastst.convert`` did. Printing it tells all.

    Attributes:
        replaced: pairs whose convolutions this call has prepared.
        already: pairs that an earlier call had.
        alone: with a sample, convolutions without a partner that ran as one operation.
        left: convolutions without a partner and layers, with the reason.
        whole: names of convolutions over space and time at once: ``factorize`` makes pairs of them.
    """

    replaced: list[Replaced] = field(default_factory=list)
    already: list[Replaced] = field(default_factory=list)
    alone: list[Alone] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not (self.replaced or self.already or self.alone or self.left):
            found = "no pair of a spatial and a temporal convolution found"
            several = f"; fastst.factorize makes pairs of {len(self.whole)} k×k×k convolutions"
            return found + several * bool(self.whole)
        parts = (
            ("replaced", self.replaced), ("replaced before", self.already),
            ("one operation each", self.alone), ("left", self.left),
        )  # fmt: skip
        lines = []
        for title, entries in parts:
            if entries or title == "replaced":
                lines.append(f"{title}: {len(entries)}")
                lines.extend(f"  {entry}" for entry in entries)
        return "\n".join(lines)
