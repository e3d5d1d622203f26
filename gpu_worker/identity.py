"""The rank and incarnation of this process: given by the node agent, or allocated in etcd if it was
started by hand; and whether the instance can have a rank of this release."""

from __future__ import annotations

from gpu_worker.config import RankConfig
from shared.errors import ConfigError
from shared.incarnations import allocate_incarnation
from shared.keys import Keys
from shared.records import unpack_map, unpack_rank
from shared.store import Store
from shared.types import Incarnation, Member, RankId


async def require_same_protocol(store: Store, keys: Keys, rank: int) -> None:
    """Raises OtherRelease if a member of the newest map and this process cannot serve together:
    nothing can come of starting, before they have ended. Raises StoreError."""
    values = (await store.get_prefix(keys.serving)).values
    packed = {kv.key: kv.value for kv in values}
    if keys.map not in packed:
        return
    for member in unpack_map(packed[keys.map]).members:
        record = packed.get(keys.rank(member.rank, member.incarnation))
        if record is not None and member.rank != rank:
            unpack_rank(record, f"this process of rank {rank}")


async def acquire_identity(config: RankConfig, store: Store, keys: Keys) -> tuple[Member, int]:
    """The member and its lease. Raises ConfigError if only one of incarnation and lease was given,
    StoreError."""
    rank = RankId(config.rank)
    if bool(config.incarnation) != bool(config.lease_id):
        raise ConfigError("--incarnation and --lease-id go together: give both or neither")
    if not config.incarnation:
        return await allocate_incarnation(store, keys, rank, config.timings.lease_ttl_s)
    return Member(rank=rank, incarnation=Incarnation(config.incarnation)), config.lease_id
