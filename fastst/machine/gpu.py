"""What an architecture of GPUs allows, without asking one."""

from __future__ import annotations

Capability = tuple[int, int]


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def shared_memory_limit(capability: Capability) -> int:
    """Bytes of shared memory that one block may use (CUDA programming guide, table of limits)."""
    if capability in ((8, 6), (8, 9)) or capability[0] == 12:
        return 99 << 10
    if capability[0] == 8:
        return 163 << 10
    return 227 << 10


def processors(capability: Capability) -> int:
    """Multiprocessors to keep busy: about what the data-centre part of the architecture has."""
    return 108 if capability[0] == 8 else 132
