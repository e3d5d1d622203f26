"""Which of what etcd says is news, by revision. Pure; it holds no values.

A prefix can be heard of in several ways at once: its watch, a read after a write of unknown
outcome, the results of own transactions. They arrive in any order. etcd gives every change a
revision that only grows, so a change is news if and only if its revision is above that of the last
change of the same key. That holds for deletions, too: a key that is gone keeps the revision at
which it went, so that a read that etcd answered earlier does not bring it back.

A read at revision r that shows a key as it was before a change which is known and not above r
proves that etcd has lost that change. An etcd of one node, before 3.5.5, tells of a change before
its disk has it; if it ends in that moment, it counts on from before, and other changes get that
revision. So a read then has the last word on that key.
"""

from __future__ import annotations

from shared.store import Snapshot, WatchEvent

TOMBSTONE_REVISIONS = 10_000
"""A deletion is remembered until the watch is so many revisions beyond it. No read is under way for
that long."""


class Revisions:
    """The revision of the last change of each key that was admitted."""

    def __init__(self) -> None:
        self._live: dict[str, int] = {}
        self._deleted: dict[str, int] = {}

    def of(self, key: str) -> int:
        """The mod revision of a live key, to compare in a transaction; 0 if it is absent."""
        return self._live.get(key, 0)

    def admit(self, item: Snapshot | WatchEvent) -> list[WatchEvent]:
        """What of `item` is news, as events in ascending order of their revisions. Idempotent."""
        if isinstance(item, WatchEvent):
            return [item] if self._admit_event(item) else []
        if item.restored:
            return self._replace_all(item)
        self._forget_lost(item)
        news = [
            WatchEvent(
                key=kv.key, value=kv.value, mod_revision=kv.mod_revision, lease_id=kv.lease_id
            )
            for kv in item.values
        ]
        present = {kv.key for kv in item.values}
        news += [
            WatchEvent(key=key, value=None, mod_revision=item.revision)
            for key, revision in self._live.items()
            if key not in present and revision <= item.revision
        ]
        news.sort(key=lambda event: event.mod_revision)
        return [event for event in news if self._admit_event(event)]

    def _admit_event(self, event: WatchEvent) -> bool:
        key, revision = event.key, event.mod_revision
        if revision <= max(self._live.get(key, 0), self._deleted.get(key, 0)):
            return False
        if event.value is not None:
            self._live[key] = revision
            self._deleted.pop(key, None)
            return True
        was_live = self._live.pop(key, None) is not None
        self._deleted[key] = revision
        self._prune(revision)
        return was_live

    def _forget_lost(self, snapshot: Snapshot) -> None:
        for kv in snapshot.values:
            for known in (self._live, self._deleted):
                if kv.mod_revision < known.get(kv.key, 0) <= snapshot.revision:
                    del known[kv.key]

    def _replace_all(self, snapshot: Snapshot) -> list[WatchEvent]:
        """etcd lost its data and restarted its count: revisions before and after do not compare."""
        present = {kv.key for kv in snapshot.values}
        gone = [key for key in self._live if key not in present]
        self._live = {kv.key: kv.mod_revision for kv in snapshot.values}
        self._deleted = {}
        events = [
            WatchEvent(
                key=kv.key, value=kv.value, mod_revision=kv.mod_revision, lease_id=kv.lease_id
            )
            for kv in sorted(snapshot.values, key=lambda kv: kv.mod_revision)
        ]
        deletions = [
            WatchEvent(key=key, value=None, mod_revision=snapshot.revision) for key in gone
        ]
        return deletions + events

    def _prune(self, revision: int) -> None:
        while self._deleted:
            oldest = next(iter(self._deleted))
            if self._deleted[oldest] > revision - TOMBSTONE_REVISIONS:
                return
            del self._deleted[oldest]
