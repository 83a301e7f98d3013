"""Long clips over several ranks, and batch norms over all of them."""

from .rewrite.shard_time import (
    SyncBatchNorm,
    gather_time,
    shard_time,
    split_time,
    sync_batch_norm,
    unshard_time,
)

__all__ = [
    "SyncBatchNorm",
    "gather_time",
    "shard_time",
    "split_time",
    "sync_batch_norm",
    "unshard_time",
]
