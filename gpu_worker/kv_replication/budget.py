"""Whether a rank takes part in KV replication, and how much host memory it gives to replicas."""

from __future__ import annotations

from gpu_worker.config import RankConfig
from shared.records import InstanceSpec

DEFAULT_BYTES_MAX = 4_000_000_000


def uses_kv_replication(config: RankConfig, spec: InstanceSpec) -> bool:
    """Replicas are found by the names of the prefix cache, so they need it. A static instance has
    nothing that handles deaths, so it has no replicas either."""
    return config.kv_copies and config.prefix_cache and not config.static and spec.capacity > 1


def kv_replica_bytes(config: RankConfig, block_bytes: int) -> int:
    """Bytes of host memory for the blocks of all peers. Pages are allocated as they are written."""
    if config.kv_copies_gb >= 0:
        return int(config.kv_copies_gb * 1e9)
    own_cache_bytes = config.kv_tokens // config.kv_block_tokens * block_bytes
    return min(own_cache_bytes, DEFAULT_BYTES_MAX)
