"""Reading machine code: what moves registers to local memory and back, and whether in a loop."""

from __future__ import annotations

import re

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
JUMP = re.compile(r"\b(?:BRA|CALL)\b.*\b0x([0-9a-f]+)$")
END = re.compile(r"(BRA(\.\w+)* 0x|EXIT|RET)")  # without a condition
LOCAL = re.compile(r"\b(STL|LDL)\b")


def local_accesses(code: str) -> tuple[int, int]:
    """Instructions that read or write local memory: all, and those in a loop: that may run again.

    Addresses alone do not tell: what is seldom needed stands behind the end, and jumps back.
    """
    found = [(int(at, 16), text) for at, text in INSTRUCTION.findall(code)]
    place = {at: i for i, (at, _) in enumerate(found)}
    after: list[list[int]] = []
    for i, (_, text) in enumerate(found):
        target = JUMP.search(text)
        after.append([place[int(target[1], 16)]] if target else [])
        if i + 1 < len(found) and not END.match(text):
            after[i].append(i + 1)

    def again(start: int) -> bool:
        seen: set[int] = set()
        ahead = list(after[start])
        while ahead and start not in seen:
            i = ahead.pop()
            if i not in seen:
                seen.add(i)
                ahead += after[i]
        return start in seen

    local = [i for i, (_, text) in enumerate(found) if LOCAL.search(text)]
    return len(local), sum(map(again, local))
