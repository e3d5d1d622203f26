"""What a rank needs from etcd before it may start: its next incarnation number and a lease."""

from __future__ import annotations

import contextlib

import structlog

from shared.errors import TxnConflict
from shared.keys import Keys
from shared.store import Compare, Put, Store
from shared.types import Incarnation, Member, RankId

log = structlog.get_logger()

_CONFLICTS_MAX = 10
_NONE = Incarnation(0)


async def next_incarnation(
    store: Store, keys: Keys, rank: RankId, above: Incarnation = _NONE
) -> Incarnation:
    """Increments the rank's counter in etcd, so that no number is given twice, not even after etcd
    has lost its data: then the number is higher than `above`, the highest that the caller knows.
    Raises StoreUnavailable, and TxnConflict if others incremented it at every attempt."""
    key = keys.incarnation_counter(rank)
    for attempt in range(_CONFLICTS_MAX):
        known = await store.get(key)
        number = 1 + max(above, 0 if known is None else int(known.value))
        revision = 0 if known is None else known.mod_revision
        with contextlib.suppress(TxnConflict):
            await store.txn(
                [Compare(key=key, mod_revision=revision)],
                [Put(key=key, value=str(number).encode())],
            )
            return Incarnation(number)
        log.info("incarnation_conflict", rank=rank, attempt=attempt)
    raise TxnConflict(f"{key} kept changing")


async def allocate_incarnation(
    store: Store,
    keys: Keys,
    rank: RankId,
    lease_ttl_s: float,
    above: Incarnation = _NONE,
) -> tuple[Member, int]:
    """The member to start, and the id of its lease, which the caller keeps alive. Raises
    StoreError."""
    incarnation = await next_incarnation(store, keys, rank, above)
    return Member(rank=rank, incarnation=incarnation), await store.grant_lease(lease_ttl_s)
