"""Process groups."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def ranks_of(group: Any) -> range:
    """The ranks of a process group, counted within it."""
    return range(dist.get_world_size(group))


def resolve(name: Any) -> Any:
    """The process group of a name."""
    return dist.distributed_c10d._resolve_process_group(name)
