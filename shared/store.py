"""The interface to etcd. `shared.etcd_store` talks to a real one; the tests have an in-memory store
with the same semantics."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValue:
    """A key and its value at `mod_revision`. `lease_id` is 0 if it has no lease."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchEvent:
    """A change under a watched prefix. `value` is None if the key was deleted or its lease
    ended."""

    key: str
    value: bytes | None
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All keys under the prefix as they stood at `revision`. A watch begins with one, and sends
    another if events may have been missed (compaction). It may be older than what the receiver
    knows: `shared.revisions` says which of its values are new. If `restored`, etcd came back with
    other data and counts its revisions from the start, and the snapshot replaces everything."""

    revision: int
    values: tuple[KeyValue, ...]
    restored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """A condition of a transaction: the key's mod revision, 0 for "does not exist"."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    key: str


class Store(Protocol):
    """Every method raises StoreUnavailable when etcd does not answer within the store's timeout;
    the operation may then have happened or not."""

    async def get(self, key: str) -> KeyValue | None: ...

    async def get_prefix(self, prefix: str) -> Snapshot: ...

    async def put(self, key: str, value: bytes, *, lease_id: int = 0) -> int:
        """Returns the new mod revision. Raises LeaseLost if the lease is gone."""
        ...

    async def delete(self, key: str) -> bool:
        """Whether the key existed."""
        ...

    async def txn(self, compare: Sequence[Compare], then: Sequence[Put | Delete]) -> int:
        """Does all of `then` if all of `compare` hold, and returns the revision. Raises
        TxnConflict if one does not hold, LeaseLost if a lease is gone; then nothing was done."""
        ...

    async def grant_lease(self, ttl_s: float) -> int: ...

    async def keep_alive(self, lease_id: int) -> float:
        """Returns the remaining TTL in seconds. Raises LeaseLost if the lease is gone."""
        ...

    async def revoke_lease(self, lease_id: int) -> None:
        """Deletes the lease's keys at once. It is no error if the lease is gone already."""
        ...

    def watch(self, prefix: str) -> AsyncGenerator[Snapshot | WatchEvent, None]:
        """Yields a Snapshot first, then every event in order, none lost, across restarts of etcd.
        While etcd is away it yields nothing, raises nothing, and keeps trying. Ends only by
        `aclose()` or by closing the store."""
        ...

    async def close(self) -> None: ...
