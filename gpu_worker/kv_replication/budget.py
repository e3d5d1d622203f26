"""Whether a rank takes part in copies of KV blocks, and how much memory it gives them."""

from __future__ import annotations

from gpu_worker.config import RankConfig
from shared.records import InstanceSpec

DEFAULT_BYTES_MAX = 4_000_000_000


def uses_kv_replication(config: RankConfig, spec: InstanceSpec) -> bool:
    """Copies are found by the prefix cache's names; a static instance is the one without all that
    deaths need."""
    return config.kv_copies and config.prefix_cache and not config.static and spec.num_ranks > 1


def kv_replica_bytes(config: RankConfig, block_bytes: int) -> int:
    """Of the host's memory, for the blocks of all peers; taken as they come."""
    if config.kv_copies_gb >= 0:
        return int(config.kv_copies_gb * 1e9)
    own_cache_bytes = config.kv_tokens // config.kv_block_tokens * block_bytes
    return min(own_cache_bytes, DEFAULT_BYTES_MAX)
