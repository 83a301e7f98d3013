"""What ``make static`` makes of machine code."""

from __future__ import annotations

import json
from typing import Any

from tests.static import measured
from tests.static.sass import Program, local_accesses

# Of a loop from 0x10 to 0x40 and a wait at 0x80 that stands behind the end and jumps back.
CODE = [
    "MOV R1, c[0x0][0x28]", "IADD3 R2, R2, 0x1, RZ", "@!P1 BRA 0x80", "FFMA R3, R3, R4, R5",
    "@P0 BRA 0x10", "IADD3 R2, R2, 0x1, RZ", "NOP", "EXIT", "@!P2 BRA 0x80", "BRA 0x60",
    "BRA 0xa0",
]  # fmt: skip


def accesses(at: int, instruction: str) -> tuple[int, int]:
    lines = list(CODE)
    lines[at // 16] = instruction
    return local_accesses(
        "".join(
            f"        /*{16 * i:04x}*/    {text} ;  /* 0x0 */\n" for i, text in enumerate(lines)
        )
    )


def test_local_memory_in_a_loop_and_outside() -> None:
    assert local_accesses("") == accesses(0, "NOP") == (0, 0)
    for at, inside in ((0x0, 0), (0x10, 1), (0x30, 1), (0x50, 0), (0x60, 0)):
        assert accesses(at, "STL [R1+0x4], R7") == (1, inside)
        assert accesses(at, "@!P6 LDL.LU R4, [R1]") == (1, inside)


# Two steps of a loop on Hopper: the factor in R24.. is written anew while the product may read it.
LOOP = [
    "MOV R1, c[0x0][0x28]",
    "LDS.128 R24, [R2]",
    "WARPGROUP.ARRIVE",
    "HGMMA.64x64x16.F32.BF16 R32, R24, gdesc[UR4], R32, !UPT",
    "HGMMA.64x64x16.F32.BF16 R32, R28, gdesc[UR8], R32, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    "LDGSTS.E.BYPASS.128 [R5], desc[UR6][R8.64]",
    "@P0 BRA 0x10",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "EXIT",
    "BRA 0xa0",
]


def program(lines: list[str]) -> Program:
    return Program(
        "".join(f"        /*{16 * i:04x}*/    {t} ;  /* 0x0 */\n" for i, t in enumerate(lines))
    )


def changed(**lines: str) -> Program:
    return program([lines.get(f"at_{i}", line) for i, line in enumerate(LOOP)])


def test_operands_that_are_overwritten_in_flight() -> None:
    (fault,) = program(LOOP).overwritten()  # R28 is not written again
    assert "R24" in fault and "LDS.128" in fault
    assert not changed(at_5="WARPGROUP.DEPBAR.LE gsb0, 0x0").overwritten()  # nothing is in flight
    assert not changed(at_1="LDS.128 R16, [R2]").overwritten()  # other registers
    assert not changed(at_3="HGMMA.64x64x16.F32.BF16 R32, gdesc[UR4], R32, !UPT").overwritten()
    # Retired by the wait for the group after it.
    assert not changed(at_3="HGMMA.64x64x16.F32.BF16 R32, R24, gdesc[UR4], R32, gsb0").overwritten()


def test_products_that_wait_for_each_other() -> None:
    assert program(LOOP).serialised() == 0
    waits = LOOP[:4] + ["WARPGROUP.DEPBAR.LE gsb0, 0x0"] + LOOP[4:]
    waits[8] = "@P0 BRA 0x10"
    assert program(waits).serialised() == 1
    straight = [line for line in waits if "BRA" not in line]
    assert program(straight).serialised() == 1  # of the same sums
    straight[5] = straight[5].replace("R32", "R96")
    assert program(straight).serialised() == 0  # products that follow each other outside of a loop


def test_slots_and_loads_of_a_loop() -> None:
    found = program(LOOP)
    assert [len(loop) for loop in found.innermost] == [7]
    # 7 instructions of each warp, of 2 · 64 · 64 · 16 / 4 products of one, of 2,048 in a cycle.
    assert found.slots("9.0") == round(7 / 4 * 2048 / (2 * 64 * 64 * 16 / 4), 2)
    assert found.load_bytes() == 16 and found.copies() == 1 and found.outside() == 4
    assert changed(at_6="LDG.E.U16 R3, desc[UR6][R8.64]").load_bytes() == 2


def row(**other: Any) -> dict[str, Any]:
    known = dict(kernel="k", case="c", config="", arch="9.0", compiler="triton 3.7.1", slots=1.0)
    return known | other


def test_changes_against_the_table() -> None:
    assert measured.changes([row()], [row()]) == []
    assert measured.changes([row(slots=2.0)], [row()]) == ["k c  9.0 triton 3.7.1: slots 1.0 → 2.0"]
    assert measured.changes([row()], [row(kernel="l")]) == [
        "k c  9.0 triton 3.7.1: new", "l c  9.0 triton 3.7.1: gone",
    ]  # fmt: skip
    assert measured.changes([row(case="d")], [row()]) == []  # not in the table
    assert measured.worse([row(slots=1.05)], [row()]) == []
    assert measured.worse([row(slots=1.2)], [row()]) == ["k c  9.0 triton 3.7.1: slots 1.0 → 1.2"]
    assert measured.changes([row(compiler="triton 3.9")], [row()]) == []
    others = [row(case="d"), row(arch="8.0"), row(compiler="triton 3.9")]
    found = measured.merged([row(slots=2.0)], [row(), *others])
    assert [r for r in found if r["slots"] == 2.0] == [row(slots=2.0)] and len(found) == 4


def test_the_committed_table_is_sound() -> None:
    table = json.loads(measured.TABLE.read_text())
    assert {r["arch"] for r in table} >= {"8.0", "9.0"}
    for r in table:
        assert not r["overwritten"] and not r["serialised"] and not r["spilled_in_loop"], r
