"""Reading machine code of NVIDIA GPUs: control flow, loops, matrix products and their operands.

Works on what ``cuobjdump -sass`` prints. What a loop is comes from the control flow, not from
addresses: what is seldom needed stands behind the end, and jumps back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
JUMP = re.compile(r"\b(?:BRA|CALL)\b.*\b0x([0-9a-f]+)$")
END = re.compile(r"(BRA(\.\w+)* 0x|EXIT|RET)")  # without a condition
LOCAL = re.compile(r"\b(STL|LDL)\b")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
PRODUCT = re.compile(r"HGMMA|HMMA|DMMA|UTC\w*MMA")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
LOAD = re.compile(r"(LDG|LDGSTS)\b")
# Instructions whose first register is no destination.
READS_ONLY = re.compile(
    r"(ST|BAR|BRA|BRX|RED|LDGSTS|LDGDEPBAR|WARPGROUP|WARPSYNC|DEPBAR|MEMBAR|FENCE|ERRBAR|ISETP|"
    r"FSETP|DSETP|HSETP|PLOP|R2P|R2UR|U[A-Z]|B(SSY|SYNC|MOV|REAK)|EXIT|NOP|SYNCS|CCTL|CALL|RET|"
    r"NANOSLEEP|YIELD|HGMMA|CREDUX|REDUX)"
)
# FMAs of all warps in a cycle of a multiprocessor, dense, of 16-bit types with float32 sums; those
# of data-centre parts (GeForce parts have half of it, and so half of the slots per cycle).
RATE = {"8.0": 1024, "8.6": 512, "8.9": 512, "9.0": 2048, "10.0": 4096, "12.0": 512}
SCHEDULERS = 4  # of a multiprocessor: instructions that it issues in a cycle


def operation(text: str) -> str:
    """The instruction without its predicate and operands."""
    return PREDICATE.sub("", text).split()[0]


def written(text: str) -> set[int]:
    """Registers that an instruction writes, but for a matrix product."""
    name = operation(text)
    if READS_ONLY.match(name):
        return set()
    found = re.search(r"\sR(\d+)\b(?!\S*\])", PREDICATE.sub("", text).split("[")[0] + " ")
    if not found:
        return set()
    count = 1
    if name.startswith("LDSM"):
        count = int((re.search(r"\.([124])$", name) or [0, 1])[1])
    elif ".128" in name:
        count = 4
    elif re.search(r"\.64\b|\.WIDE\b|\.F64\b", name) or re.match(r"(D(FMA|ADD|MUL)|CS2R$)", name):
        count = 2
    return set(range(int(found[1]), int(found[1]) + count))


def accumulators(text: str) -> str:
    """The first register of the sums of an HGMMA."""
    return re.search(r"HGMMA\S* (\w+)", text)[1]  # type: ignore[index]


def operand(text: str) -> set[int]:
    """Registers that an HGMMA reads its first factor from; none where that is in shared memory."""
    found = re.search(r"HGMMA\S* R\d+, R(\d+)", text)
    return set(range(int(found[1]), int(found[1]) + 4)) if found else set()


def products(text: str) -> float:
    """FMAs of one warp, as those of 16-bit types: others take their share of a cycle."""
    name = operation(text)
    if m := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        n = int(m[1]) * int(m[2]) * int(m[3]) / 4  # one of four warps
    elif m := re.match(r"HMMA\.(16816|1688|1684)", name):
        n = 16 * 8 * int(m[1][3:])
    else:
        return 0.0
    return n * (2 if "TF32" in name else 1)


@dataclass
class Program:
    """Machine code of a kernel."""

    code: str
    found: list[tuple[int, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.found = [(int(at, 16), text) for at, text in INSTRUCTION.findall(self.code)]

    @cached_property
    def texts(self) -> list[str]:
        return [text for _, text in self.found]

    @cached_property
    def after(self) -> list[list[int]]:
        """Instructions that may come next."""
        place = {at: i for i, (at, _) in enumerate(self.found)}
        after: list[list[int]] = []
        for i, (_, text) in enumerate(self.found):
            target = JUMP.search(text)
            at = place.get(int(target[1], 16)) if target else None
            after.append([] if at is None else [at])
            if i + 1 < len(self.found) and not END.match(text):
                after[i].append(i + 1)
        return after

    @cached_property
    def before(self) -> list[list[int]]:
        before: list[list[int]] = [[] for _ in self.found]
        for i, ahead in enumerate(self.after):
            for j in ahead:
                before[j].append(i)
        return before

    def _dominators(self) -> list[int]:
        """The immediate dominator of each instruction (Cooper, Harvey, Kennedy); −1: dead."""
        order: list[int] = []
        seen = {0}
        stack: list[tuple[int, Iterator[int]]] = [(0, iter(self.after[0]))]
        while stack:
            i, ahead = stack[-1]
            for j in ahead:
                if j not in seen:
                    seen.add(j)
                    stack.append((j, iter(self.after[j])))
                    break
            else:
                order.append(i)
                stack.pop()
        number = {i: n for n, i in enumerate(order)}
        idom = [-1] * len(self.found)
        idom[0] = 0
        changed = True
        while changed:
            changed = False
            for i in reversed(order[:-1]):
                new = -1
                for j in self.before[i]:
                    if j in number and idom[j] >= 0:
                        while new >= 0 and new != j:
                            if number[new] < number[j]:
                                new = idom[new]
                            else:
                                j = idom[j]
                        new = j
                if idom[i] != new:
                    idom[i] = new
                    changed = True
        return idom

    @cached_property
    def loops(self) -> list[set[int]]:
        """Instructions of each natural loop; those of one head together."""
        if not self.found:
            return []
        idom = self._dominators()
        depth: dict[int, int] = {0: 0}

        def depth_of(i: int) -> int:
            path = []
            while i not in depth:
                path.append(i)
                i = idom[i]
            for j in reversed(path):
                depth[j] = depth[idom[j]] + 1
            return depth[path[0]] if path else depth[i]

        loops: dict[int, set[int]] = {}
        for i, ahead in enumerate(self.after):
            for head in ahead:
                if head > i or idom[i] < 0:  # code is laid out in an order of dominance
                    continue
                at = i
                while depth_of(at) > depth_of(head):
                    at = idom[at]
                if at != head:
                    continue
                body = loops.setdefault(head, {head})
                stack = [i]
                while stack:
                    j = stack.pop()
                    if j not in body:
                        body.add(j)
                        stack += self.before[j]
        return list(loops.values())

    @cached_property
    def innermost(self) -> list[list[int]]:
        """Loops with matrix products in which no other such loop lies, in order."""
        multiply = [loop for loop in self.loops if any(PRODUCT.search(self.texts[i]) for i in loop)]
        return [sorted(a) for a in multiply if not any(b < a for b in multiply)]

    def local_accesses(self) -> tuple[int, int]:
        """Instructions that read or write local memory: all, and those in a loop."""
        local = [i for i, text in enumerate(self.texts) if LOCAL.search(text)]
        inside = set().union(*self.loops) if local else set()
        return len(local), sum(i in inside for i in local)

    def overwritten(self) -> list[str]:
        """Products that may still read registers when those are written: undefined behaviour.

        Of each HGMMA with a factor in registers, the paths on which a register of it is written
        before a wait has retired the group of the product.
        """
        return [
            f"{text} -> {fault}"
            for i, text in enumerate(self.texts)
            if operation(text).startswith("HGMMA") and (reads := operand(text))
            for fault in self._first_write(i, reads)
        ]

    def _first_write(self, start: int, reads: set[int]) -> list[str]:
        ends = int("gsb0" in self.texts[start])  # groups that have ended, that of the product first
        ahead = [(j, ends) for j in self.after[start]]
        seen: set[tuple[int, int]] = set()
        while ahead:
            i, groups = ahead.pop()
            if (i, groups) in seen:
                continue
            seen.add((i, groups))
            text = self.texts[i]
            if wait := WAIT.search(text):
                if groups > int(wait[1], 16):
                    continue
            elif operation(text).startswith("HGMMA"):
                groups = min(groups + ("gsb0" in text), 8)
            elif written(text) & reads:
                return [text]
            ahead += [(j, groups) for j in self.after[i]]
        return []

    def serialised(self) -> int:
        """HGMMAs that start only when the one before has ended, in straight code or a loop.

        Outside of loops, and between two products of a loop, only waits inside of one product
        count: between steps of its reduction, on the same sums.
        """
        inside = {i for loop in self.innermost for i in loop}
        found, last, waited = 0, "", False
        for i, text in enumerate(self.texts):
            if operation(text).startswith("HGMMA"):
                if not accumulators(text).startswith("R"):
                    continue  # only ends a group
                found += waited and (accumulators(text) == last or i in inside)
                last, waited = accumulators(text), False
            elif JUMP.search(text) or len(self.before[i]) > 1:
                last, waited = "", False
            elif (wait := WAIT.search(text)) and last:
                waited = int(wait[1], 16) == 0
        return found

    def slots(self, architecture: str) -> float | None:
        """Instructions that are issued per cycle that the tensor cores need, of the worst loop.

        A quarter of the instructions of all warps over the cycles of their products.
        """
        found = []
        for loop in self.innermost:
            n = sum(products(self.texts[i]) for i in loop)
            if n:
                found.append(len(loop) / SCHEDULERS * RATE[architecture] / n)
        return round(max(found), 2) if found else None

    def load_bytes(self) -> float | None:
        """Bytes of a thread per global load, on average: in the loops of products, else in all."""
        inside = [i for loop in self.innermost for i in loop] or range(len(self.found))
        names = [operation(self.texts[i]) for i in inside]
        sizes = [width(n) for n in names if LOAD.match(n)]
        return round(sum(sizes) / len(sizes), 1) if sizes else None

    def copies(self) -> int:
        """Loads that go to shared memory without registers, in the loops of products."""
        return sum(
            operation(self.texts[i]).startswith(("LDGSTS", "UTMALDG"))
            for loop in self.innermost for i in loop
        )  # fmt: skip

    def outside(self) -> int | None:
        """Instructions outside of the loops of products; None where there are none."""
        if not self.innermost:
            return None
        return len(self.found) - sum(map(len, self.innermost))


def width(name: str) -> int:
    """Bytes that a thread loads or stores."""
    for bits in (128, 64):
        if f".{bits}" in name:
            return bits // 8
    return 1 if re.search(r"\.[US]8\b", name) else 2 if re.search(r"\.[US]16\b", name) else 4


def local_accesses(code: str) -> tuple[int, int]:
    """Instructions that read or write local memory: all, and those in a loop."""
    return Program(code).local_accesses()
