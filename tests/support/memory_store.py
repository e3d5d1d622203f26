"""An in-memory etcd with the semantics that `shared.store.Store` promises, on an injected clock:
revisions, transactions, leases, ordered watches, and the faults of a real one: restarts,
compaction, lost data, a full disk, slow replies. `StoreContract` tests it and the real one
alike."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from shared.clock import Clock
from shared.errors import LeaseLost, StoreError, StoreUnavailable, TxnConflict
from shared.store import Compare, Delete, KeyValue, Put, Snapshot, WatchEvent
from shared.watch_position import WatchPosition

_UNDO_MAX = 4096


class _CompactedError(Exception):
    """The history that a watch asks for is gone."""


@dataclass(slots=True)
class _Lease:
    ttl_s: float
    expires_at: float


class MemoryEtcd:
    """The state that several `MemoryStore`s share, one per process. `expire` ends the leases whose
    time is over; every operation calls it first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.revision = 1
        self._cluster_id = 1
        self.values: dict[str, KeyValue] = {}
        self._leases: dict[int, _Lease] = {}
        self._next_lease_id = 1
        self._watches: list[_MemoryWatch] = []
        self._history: list[WatchEvent] = []
        self._compacted_revision = 0
        self._undo: deque[tuple[int, str, KeyValue | None]] = deque(maxlen=_UNDO_MAX)
        self.disk_full = False
        """etcd refuses puts and new leases; deletions and renewals go on."""

    def client(self) -> MemoryStore:
        return MemoryStore(self)

    def expire(self) -> None:
        now = self._clock.now()
        for lease_id in [i for i, lease in self._leases.items() if lease.expires_at <= now]:
            self.revoke(lease_id)

    # Faults.

    def restart(self) -> None:
        """Streams break, and what they had not delivered is sent again. Leases last their whole
        TTL from now on, as etcd grants it to them when it starts."""
        for lease in self._leases.values():
            lease.expires_at = self._clock.now() + lease.ttl_s
        for watch in self._watches:
            watch.break_stream()

    def compact(self, revision: int) -> None:
        """Drops the history below `revision`, and of it keeps what still holds. As etcd does before
        3.5.6, a deletion at `revision` is dropped as well."""
        self._compacted_revision = max(self._compacted_revision, min(revision, self.revision))
        self._history = [
            event
            for event in self._history
            if event.mod_revision > self._compacted_revision
            or (event.mod_revision == self._compacted_revision and event.value is not None)
        ]

    def lose_tail(self, revision: int) -> None:
        """etcd ends and starts again without its changes after `revision`, though it had told of
        them: one of one node may, before 3.5.5. They are among the last `_UNDO_MAX`."""
        while self._undo and self._undo[-1][0] > revision:
            _, key, before = self._undo.pop()
            if before is None:
                self.values.pop(key, None)
            else:
                self.values[key] = before
        self._history = [event for event in self._history if event.mod_revision <= revision]
        self.revision = min(self.revision, revision)
        self.restart()

    def lose_data(self) -> None:
        """etcd starts again with an empty disk."""
        self.revision, self._compacted_revision = 1, 0
        self._cluster_id += 1
        self.values, self._leases, self._history = {}, {}, []
        for watch in self._watches:
            watch.break_stream()

    def check_space(self) -> None:
        """Raises StoreUnavailable if the disk is full."""
        if self.disk_full:
            raise StoreUnavailable("etcd's disk is full")

    def snapshot(self, prefix: str) -> Snapshot:
        found = [kv for key, kv in sorted(self.values.items()) if key.startswith(prefix)]
        return Snapshot(revision=self.revision, values=tuple(found))

    def apply(self, operations: Sequence[Put | Delete]) -> int:
        """Applies all at one revision. Raises LeaseLost if a lease is gone; then applies
        nothing."""
        keys = [operation.key for operation in operations]
        if len(set(keys)) != len(keys):
            raise StoreError("a transaction names a key twice")
        for operation in operations:
            if isinstance(operation, Put):
                self.check_space()
                if operation.lease_id:
                    self._lease(operation.lease_id)
        changes = [op for op in operations if isinstance(op, Put) or op.key in self.values]
        self.revision += bool(changes)
        for change in changes:
            self._publish(self._change(change))
        return self.revision

    def check(self, compare: Sequence[Compare]) -> None:
        for item in compare:
            known = self.values.get(item.key)
            if (known.mod_revision if known else 0) != item.mod_revision:
                raise TxnConflict(f"{item.key} has changed")

    def grant(self, ttl_s: float) -> int:
        ttl_s = float(max(1, math.ceil(ttl_s)))
        lease_id, self._next_lease_id = self._next_lease_id, self._next_lease_id + 1
        self._leases[lease_id] = _Lease(ttl_s, self._clock.now() + ttl_s)
        return lease_id

    def keep_alive(self, lease_id: int) -> float:
        lease = self._lease(lease_id)
        lease.expires_at = self._clock.now() + lease.ttl_s
        return lease.ttl_s

    def revoke(self, lease_id: int) -> None:
        if self._leases.pop(lease_id, None) is not None:
            held = sorted(key for key, kv in self.values.items() if kv.lease_id == lease_id)
            self.apply([Delete(key=key) for key in held])

    def open_watch(self, prefix: str) -> _MemoryWatch:
        watch = _MemoryWatch(prefix)
        self.resume(watch)
        self._watches.append(watch)
        return watch

    def resume(self, watch: _MemoryWatch) -> None:
        """Begins a stream where the watch stands."""
        watch.is_broken = False
        start = watch.position.revision
        try:
            if start is not None and watch.position.on_created(self.revision, self._cluster_id):
                for event in self._events_from(start, watch.prefix):
                    watch.offer(event)
                return
        except _CompactedError:
            watch.position.on_compacted()
        watch.offer(self.snapshot(watch.prefix))

    def _events_from(self, revision: int, prefix: str) -> list[WatchEvent]:
        if revision < self._compacted_revision:
            raise _CompactedError
        return [
            event
            for event in self._history
            if event.mod_revision >= revision and event.key.startswith(prefix)
        ]

    def close_watch(self, watch: _MemoryWatch) -> None:
        if watch in self._watches:
            self._watches.remove(watch)
        watch.is_broken = False
        watch.offer(None)

    def _lease(self, lease_id: int) -> _Lease:
        if lease_id not in self._leases:
            raise LeaseLost(f"lease {lease_id} is gone")
        return self._leases[lease_id]

    def _change(self, operation: Put | Delete) -> WatchEvent:
        key = operation.key
        self._undo.append((self.revision, key, self.values.get(key)))
        if isinstance(operation, Delete):
            del self.values[key]
            return WatchEvent(key=key, value=None, mod_revision=self.revision)
        known = self.values.get(key)
        self.values[key] = KeyValue(
            key=key,
            value=operation.value,
            create_revision=known.create_revision if known else self.revision,
            mod_revision=self.revision,
            lease_id=operation.lease_id,
        )
        return WatchEvent(
            key=key,
            value=operation.value,
            mod_revision=self.revision,
            lease_id=operation.lease_id,
        )

    def _publish(self, event: WatchEvent) -> None:
        self._history.append(event)
        for watch in self._watches:
            if event.key.startswith(watch.prefix) and not watch.is_broken:
                watch.offer(event)


@dataclass(slots=True, eq=False)
class _MemoryWatch:
    """`items` are under way to the watcher."""

    prefix: str
    position: WatchPosition = field(default_factory=WatchPosition)
    is_broken: bool = False
    items: deque[Snapshot | WatchEvent | None] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, item: Snapshot | WatchEvent | None) -> None:
        self.items.append(item)
        self.changed.set()

    def break_stream(self) -> None:
        ended = None in self.items
        self.items.clear()
        self.is_broken = not ended
        if ended:
            self.items.append(None)
        self.changed.set()

    def take(self) -> list[Snapshot | WatchEvent] | None:
        """What the next item brings; None once the watch has ended."""
        item = self.items.popleft()
        if item is None:
            return None
        if isinstance(item, Snapshot):
            return [self.position.on_snapshot(item)]
        # All events of one revision are one response.
        events = [item]
        while self.items and _revision_of(self.items[0]) == item.mod_revision:
            events.append(self.items.popleft())  # type: ignore[arg-type]
        news: list[Snapshot | WatchEvent] = list(self.position.on_events(events))
        if self.position.revision is None:
            self.break_stream()
        return news


def _revision_of(item: Snapshot | WatchEvent | None) -> int:
    return item.mod_revision if isinstance(item, WatchEvent) else 0


class MemoryStore:
    """One process's connection. `reachable = False` cuts it off from etcd: calls fail, and watches
    yield nothing until it is reachable again. `replies_lost = True` lets calls happen, then
    fail. A read of a prefix arrives `read_reply_s` seconds after etcd answered it."""

    def __init__(self, etcd: MemoryEtcd) -> None:
        self._etcd = etcd
        self._reachable = True
        self.replies_lost = False
        self.read_reply_s = 0.0
        self.num_reads_under_way = 0  # answered, but not arrived
        self._watches: list[_MemoryWatch] = []

    @property
    def reachable(self) -> bool:
        return self._reachable

    @reachable.setter
    def reachable(self, value: bool) -> None:
        self._reachable = value
        for watch in self._watches:
            watch.changed.set()

    def break_streams(self) -> None:
        """What the watches had not delivered is sent again, if etcd still has it."""
        for watch in self._watches:
            watch.break_stream()

    async def get(self, key: str) -> KeyValue | None:
        await self._arrive()
        self._reply()
        return self._etcd.values.get(key)

    async def get_prefix(self, prefix: str) -> Snapshot:
        await self._arrive()
        snapshot = self._etcd.snapshot(prefix)
        if self.read_reply_s:
            self.num_reads_under_way += 1
            try:
                await asyncio.sleep(self.read_reply_s)
            finally:
                self.num_reads_under_way -= 1
        self._reply()
        return snapshot

    async def put(self, key: str, value: bytes, *, lease_id: int = 0) -> int:
        await self._arrive()
        revision = self._etcd.apply([Put(key=key, value=value, lease_id=lease_id)])
        self._reply()
        return revision

    async def delete(self, key: str) -> bool:
        await self._arrive()
        existed = key in self._etcd.values
        self._etcd.apply([Delete(key=key)])
        self._reply()
        return existed

    async def txn(self, compare: Sequence[Compare], then: Sequence[Put | Delete]) -> int:
        await self._arrive()
        self._etcd.check(compare)
        revision = self._etcd.apply(then)
        self._reply()
        return revision

    async def grant_lease(self, ttl_s: float) -> int:
        await self._arrive()
        self._etcd.check_space()
        lease_id = self._etcd.grant(ttl_s)
        self._reply()
        return lease_id

    async def keep_alive(self, lease_id: int) -> float:
        await self._arrive()
        ttl_s = self._etcd.keep_alive(lease_id)
        self._reply()
        return ttl_s

    async def revoke_lease(self, lease_id: int) -> None:
        await self._arrive()
        self._etcd.revoke(lease_id)
        self._reply()

    async def watch(self, prefix: str) -> AsyncGenerator[Snapshot | WatchEvent, None]:
        watch = self._etcd.open_watch(prefix)
        self._watches.append(watch)
        try:
            while True:
                while not self._reachable or not (watch.items or watch.is_broken):
                    watch.changed.clear()
                    await watch.changed.wait()
                if watch.is_broken:
                    self._etcd.resume(watch)
                    continue
                items = watch.take()
                if items is None:
                    return
                for item in items:
                    yield item
        finally:
            self._etcd.close_watch(watch)
            self._watches.remove(watch)

    async def close(self) -> None:
        self._reachable = True
        for watch in self._watches:
            self._etcd.close_watch(watch)

    async def _arrive(self) -> None:
        await asyncio.sleep(0)
        if not self._reachable:
            raise StoreUnavailable("etcd is out of reach")
        self._etcd.expire()

    def _reply(self) -> None:
        if self.replies_lost:
            raise StoreUnavailable("etcd did not answer")
