"""What the machine code of the Hopper kernels says of a tile: products that wait, and what is
issued besides products.

ptxas ends a group of HGMMAs by a tag on the last (gsb0). Where a branch cuts a group it puts a
product without sums behind it, and a wait for the group before then waits for all real ones.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tests.static.sass import PRODUCT, WAIT, Program, accumulators, operation

LABEL = re.compile(r"^(\.L_x_\d+):", re.MULTILINE)
ADDRESS = re.compile(r"/\*([0-9a-f]{4,})\*/")
FENCE = "WARPGROUP.ARRIVE"
# What only these ways through an epilogue issue: statistics ask whether a warp has all rows, and
# relu passes NaN on.
COUNTS, RELU = "VOTE", "FMNMX.NAN"


@dataclass(frozen=True)
class Tile:
    """Of a tile of 3 × 3 or 3 taps: 64 channels of a spatial pass, 144 of a temporal one."""

    extra_products: int  # that only end a group, or end one where the next product needs no end
    drains: int  # waits for all products while a tile is multiplied
    epilogue_slots: int | None  # issue slots of a scheduler besides products, at inference
    counting_slots: int | None  # the same with statistics
    product_clocks: int | None  # of the tensor cores


def program(disassembly: str) -> Program:
    """Of one kernel as nvdisasm prints it, whose jumps name labels."""
    addresses = {}
    for label in LABEL.finditer(disassembly):
        found = ADDRESS.search(disassembly, label.end())
        addresses[label[1]] = found[1] if found else "ffffffff"
    return Program(
        re.sub(r"`\((\.L_x_\d+)\)", lambda m: "0x" + addresses.get(m[1], "ffffffff"), disassembly)
    )


def extra_products(found: Program) -> int:
    """Products without sums, and products that end a group although no fence follows."""
    extra, tagged = 0, False
    for i, text in enumerate(found.texts):
        if text.startswith(FENCE) or len(found.before[i]) > 1:
            tagged = False
        elif operation(text).startswith("HGMMA"):
            extra += tagged or not accumulators(text).startswith("R") or "RZ" in text.split(",")[0]
            tagged = "gsb0" in text
    return extra


def _tile_and_products(found: Program) -> tuple[set[int], set[int]]:
    """The loop over tiles, and the loops of products in it."""
    multiply = [a for a in found.loops if any(PRODUCT.search(found.texts[i]) for i in a)]
    tile = max(multiply, key=len, default=set())
    return tile, set().union(*(a for a in multiply if a < tile))


def drains(found: Program) -> int:
    """Waits for all products while a tile is multiplied."""
    waits = (WAIT.search(found.texts[i]) for i in _tile_and_products(found)[1])
    return sum(wait is not None and int(wait[1], 16) == 0 for wait in waits)


def besides_products(found: Program, marker: str) -> int | None:
    """Instructions of a warp on the shortest way through a tile that meets the marker.

    Without those of the loops of products; None where no such way is.
    """
    tile, inside = _tile_and_products(found)
    if not tile:
        return None
    head = min(tile)
    into = _distances(found, [head], tile - inside)
    entry = min((into[i] for i in into if any(j in inside for j in found.after[i])), default=None)
    starts = {j for i in inside for j in found.after[i] if j in tile and j not in inside}
    there = _distances(found, starts, tile - inside - {head})
    marks = [i for i in there if marker in found.texts[i]]
    ends = []
    for mark in marks:
        rest = _distances(found, [mark], tile - inside - {head})
        back = [n for i, n in rest.items() if head in found.after[i]]
        if back:
            ends.append(there[mark] + min(back) - 1)
    return None if entry is None or not ends else entry + min(ends)


def _distances(found: Program, starts: Iterable[int], within: set[int]) -> dict[int, int]:
    """Instructions from a start to each that it reaches, both counted."""
    best: dict[int, int] = {}
    left = [(1, i) for i in starts if i in within]
    heapq.heapify(left)
    while left:
        n, i = heapq.heappop(left)
        if i in best:
            continue
        best[i] = n
        for j in found.after[i]:
            if j in within and j not in best:
                heapq.heappush(left, (n + 1, j))
    return best


def tile(name: str, found: Program) -> Tile:
    """
    Args:
        name: of the kernel, with its template arguments.
    """
    groups = clocks = None
    if m := re.match(r"hopper_spatial_kernel<\w+, (\d+), (\d+), (\d+)>", name):
        columns, groups, blocks = map(int, m.groups())
        clocks = 9 * 4 * groups * blocks * columns // 2
    elif m := re.match(r"hopper_temporal_kernel<\w+, (\d+), (\d+), .* Epilogue>", name):
        columns, frames = map(int, m.groups())
        groups, clocks = 2, 9 * 3 * 2 * frames * columns // 2

    def slots(marker: str) -> int | None:  # each scheduler has one warp of a warpgroup
        besides = None if groups is None else besides_products(found, marker)
        return None if besides is None or groups is None else groups * besides

    return Tile(extra_products(found), drains(found), slots(RELU), slots(COUNTS), clocks)
