"""The seam to etcd: what Starfish asks of it. `shared.etcd_store` is the real one; the simulator
has an in-memory twin with the same semantics."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyValue:
    """A key as it stood at `mod_revision`. `lease_id` is 0 where it has none."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchEvent:
    """A change under a watched prefix. `value` is None for a deletion (or a lease's end)."""

    key: str
    value: bytes | None
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All keys under the prefix as they stood at `revision`: at the start of a watch, and again if
    events may have been missed (compaction). It may be older than what is known already:
    `shared.revisions` says what of it is news. `restored`: etcd came back with other data and
    counts its revisions anew, so that the snapshot replaces everything."""

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
        """Returns the new mod revision. Raises LeaseLost where the lease is gone."""
        ...

    async def delete(self, key: str) -> bool:
        """Whether the key existed."""
        ...

    async def txn(self, compare: Sequence[Compare], then: Sequence[Put | Delete]) -> int:
        """All of `then`, if all of `compare` hold; returns the revision. Raises TxnConflict."""
        ...

    async def grant_lease(self, ttl_s: float) -> int: ...

    async def keep_alive(self, lease_id: int) -> float:
        """The remaining TTL in seconds. Raises LeaseLost where the lease is gone."""
        ...

    async def revoke_lease(self, lease_id: int) -> None:
        """Deletes the lease's keys at once. A lease that is gone already is no error."""
        ...

    def watch(self, prefix: str) -> AsyncGenerator[Snapshot | WatchEvent, None]:
        """First a Snapshot, then every event in order, none lost, across restarts of etcd. It keeps
        trying while etcd is away (silence, no exception) and ends only by `aclose()`."""
        ...

    async def close(self) -> None: ...
