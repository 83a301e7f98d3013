"""What ``make static`` reads of a tile of the Hopper kernels."""

from __future__ import annotations

from tests.static import hopper
from tests.static.hopper import Tile

# A loop over tiles with one over stages in it, and an epilogue of two ways.
CODE = """
        S2R R0, SR_TID.X
.L_x_1:
        MOV R2, RZ
.L_x_2:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4], R5
        WARPGROUP.ARRIVE
        HGMMA.64x144x16.F32.BF16 R24, gdesc[UR4], R24
        HGMMA.64x144x16.F32.BF16 R96, gdesc[UR8], R96, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x1
        @P0 BRA `(.L_x_2)
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        FFMA R24, R24, R8, R9
        @!P1 BRA `(.L_x_3)
        VOTE.ALL P2, P2
        FADD R10, R10, R24
        BRA `(.L_x_4)
.L_x_3:
        FMNMX.NAN R24, R24, RZ, !PT
.L_x_4:
        STG.E.128 desc[UR4][R6.64], R24
        @P3 BRA `(.L_x_1)
        EXIT
"""
NAME = "hopper_spatial_kernel<__nv_bfloat16, 144, 2, 2>"


def tile(*changes: tuple[str, str]) -> Tile:
    code = CODE
    for right, wrong in changes:
        assert right in code
        code = code.replace(right, wrong)
    lines, at = [], 0
    for line in code.splitlines():
        if line.startswith("        "):
            line, at = f"        /*{at:04x}*/    {line.strip()} ;", at + 16
        lines.append(line)
    return hopper.tile(NAME, hopper.program("\n".join(lines)))


def test_a_tile() -> None:
    """Of two warps on a scheduler. Before the products: MOV; after: the wait, FFMA, a branch, one
    of the two ways, a store and the way back."""
    assert tile() == Tile(
        extra_products=0, drains=0, epilogue_slots=2 * (1 + 3 + 1 + 2),
        counting_slots=2 * (1 + 3 + 3 + 2), product_clocks=9 * 4 * 4 * 72,
    )  # fmt: skip


def test_products_that_only_end_a_group() -> None:
    dummy = (
        "HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0\n        WARPGROUP.DEPBAR.LE gsb0, 0x1"
    )
    assert tile(("WARPGROUP.DEPBAR.LE gsb0, 0x1", dummy)).extra_products > 0
    assert tile(("gdesc[UR4], R24", "gdesc[UR4], R24, gsb0")).extra_products == 1
    fence = "gdesc[UR4], R24, gsb0\n        WARPGROUP.ARRIVE"
    assert tile(("gdesc[UR4], R24", fence)).extra_products == 0  # two groups


def test_waits_for_all_products() -> None:
    assert tile(("gsb0, 0x1", "gsb0, 0x0")).drains == 1


def test_ways_that_are_not_there() -> None:
    assert tile(("VOTE.ALL", "IADD3")).counting_slots is None
    assert tile(("FMNMX.NAN", "FMNMX")).epilogue_slots is None
