"""The rank and incarnation of this process: given by the node agent, or allocated in etcd if it was
started by hand."""

from __future__ import annotations

from gpu_worker.config import RankConfig
from shared.errors import ConfigError
from shared.incarnations import allocate_incarnation
from shared.keys import Keys
from shared.store import Store
from shared.types import Incarnation, Member, RankId


async def acquire_identity(config: RankConfig, store: Store, keys: Keys) -> tuple[Member, int]:
    """The member and its lease. Raises ConfigError if only one of incarnation and lease was given,
    StoreError."""
    rank = RankId(config.rank)
    if bool(config.incarnation) != bool(config.lease_id):
        raise ConfigError("--incarnation and --lease-id go together: give both or neither")
    if not config.incarnation:
        return await allocate_incarnation(store, keys, rank, config.timings.lease_ttl_s)
    return Member(rank=rank, incarnation=Incarnation(config.incarnation)), config.lease_id
