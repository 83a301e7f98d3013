"""What ``make static`` makes of machine code."""

from __future__ import annotations

from tests.static.sass import local_accesses

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
