"""What an architecture of GPUs allows, without asking one."""

from __future__ import annotations

Capability = tuple[int, int]


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# AMD's GPUs by the name of their architecture, as capabilities of major 0: none has been run on.
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1101", "gfx1200", "gfx1201")


def amd(name: str) -> Capability:
    """(0, 942) of "gfx942:sramecc+:xnack-"; the number is hexadecimal, as in the name."""
    return 0, int(name.split(":")[0].removeprefix("gfx"), 16)


def shared_memory_limit(capability: Capability) -> int:
    """Bytes of shared memory that one block may use (CUDA programming guide, table of limits)."""
    if capability[0] == 0:
        return (160 if capability[1] == 0x950 else 64) << 10  # LDS
    if capability in ((8, 6), (8, 9)) or capability[0] == 12:
        return 99 << 10
    if capability[0] == 8:
        return 163 << 10
    return 227 << 10


def processors(capability: Capability) -> int:
    """Multiprocessors to keep busy: about what the data-centre part of the architecture has."""
    if capability[0] == 0:
        return 304 if capability[1] < 0x1000 else 96
    return 108 if capability[0] == 8 else 132
