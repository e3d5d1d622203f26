"""The rank and incarnation of this process: given by the node agent, or allocated in etcd if it was
started by hand; and whether the instance can have a rank of this release."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_worker.config import KvCacheDtype, RankConfig
from shared.errors import ConfigError
from shared.incarnations import allocate_incarnation
from shared.keys import Keys
from shared.records import RankRecord, unpack_map, unpack_rank
from shared.store import Store
from shared.types import Incarnation, Member, RankId


async def read_peers(store: Store, keys: Keys, rank: int) -> list[RankRecord]:
    """The other members of the newest map. Raises OtherRelease if one of them and this process
    cannot serve together: nothing can come of starting, before they have ended. Raises
    StoreError."""
    values = (await store.get_prefix(keys.serving)).values
    packed = {kv.key: kv.value for kv in values}
    if keys.map not in packed:
        return []
    records = [
        packed.get(keys.rank(member.rank, member.incarnation))
        for member in unpack_map(packed[keys.map]).members
        if member.rank != rank
    ]
    reader = f"this process of rank {rank}"
    return [unpack_rank(record, reader) for record in records if record is not None]


def step_tokens_of(peers: Sequence[RankRecord]) -> int:
    """How many tokens a step of theirs has at most, if they exchange on cards; otherwise 0. Their
    buffers are laid out for it, and so this rank's must be."""
    handles = (peer.exchange_handles for peer in peers)
    return next((h.step_tokens_max for h in handles if h is not None), 0)


def require_kv_cache_dtype(
    peers: Sequence[RankRecord], wanted: KvCacheDtype, *, on_card: bool
) -> None:
    """Raises ConfigError if this rank could not keep its KV cache so, or its peers do not: a
    session that moved here would go on with other tokens."""
    if wanted is not KvCacheDtype.AUTO and not on_card:
        raise ConfigError(
            f"--kv-cache-dtype {wanted.value} is for cards; ranks on CPUs keep what they compute"
        )
    other = next((peer for peer in peers if peer.kv_cache_dtype != wanted.value), None)
    if other is not None:
        raise ConfigError(
            f"rank {other.rank} serves with --kv-cache-dtype {other.kv_cache_dtype}, and this one "
            f"would with {wanted.value}; all ranks of an instance need the same"
        )


async def acquire_identity(config: RankConfig, store: Store, keys: Keys) -> tuple[Member, int]:
    """The member and its lease. Raises ConfigError if only one of incarnation and lease was given,
    StoreError."""
    rank = RankId(config.rank)
    if bool(config.incarnation) != bool(config.lease_id):
        raise ConfigError("--incarnation and --lease-id go together: give both or neither")
    if not config.incarnation:
        return await allocate_incarnation(store, keys, rank, config.timings.lease_ttl_s)
    return Member(rank=rank, incarnation=Incarnation(config.incarnation)), config.lease_id
