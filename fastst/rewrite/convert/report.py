"""What a conversion did and what it left."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Replaced:
    """A pair that now runs as one op; names are those of ``model.named_modules()``."""

    name: str  # of the module whose forward runs it; "" for the model itself
    first: str
    second: str
    norm: str | None
    activation: str  # "relu", "none", ...
    order: str
    residual: bool = False  # whether the op adds the block's shortcut
    outer: str = "none"  # the activation of its output that is part of it
    outer_norm: str | None = None  # the batch norm of its output that takes its statistics
    apart: str | None = None  # why that norm does not, as things stand

    def __str__(self) -> str:
        between = [] if self.norm is None else [self.norm]
        if self.activation != "none":
            between.append(self.activation)
        told = f", with {' and '.join(between)} between" if between else ""
        ending = [] if self.outer_norm is None else [norm_told(self.outer_norm, self.apart)]
        ending += ["the residual"] * self.residual
        if self.outer != "none":
            ending.append(self.outer)
        told += f", then {' and '.join(ending)}" if ending else ""
        return f"{self.first} → {self.second}, {self.order}{told}"


def norm_told(norm: str, apart: str | None) -> str:
    """A norm after a pair, and why it takes no statistics of the pair."""
    return norm if apart is None else f"{norm} by itself ({apart})"


@dataclass(frozen=True)
class Left:
    """A separable convolution, two of them, or a layer of this library, that stays as it was."""

    name: str  # of the first convolution, or of the layer
    second: str | None
    reason: str

    def __str__(self) -> str:
        to = "" if self.second is None else f" → {self.second}"
        return f"{self.name or 'the model'}{to}: {self.reason}"


@dataclass
class Report:
    """What ``fastst.convert`` did. Printing it tells all.

    Attributes:
        replaced: pairs that this call replaced.
        already: pairs that an earlier call had replaced.
        left: separable convolutions without a partner and pairs that cannot run as one op.
    """

    replaced: list[Replaced] = field(default_factory=list)
    already: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __str__(self) -> str:
        if not (self.replaced or self.already or self.left):
            return "no pair of a spatial and a temporal convolution found"
        parts = (
            ("replaced", self.replaced), ("replaced before", self.already), ("left", self.left)
        )  # fmt: skip
        lines = []
        for title, entries in parts:
            if entries or title == "replaced":
                lines.append(f"{title}: {len(entries)}")
                lines.extend(f"  {entry}" for entry in entries)
        return "\n".join(lines)
