"""Where a watch stands between two streams: what it has delivered, and from where it goes on. Pure:
`etcd_watch` has the thread and the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shared.store import Snapshot, WatchEvent


class WatchPosition:
    """A new stream starts at the last revision that was delivered, not after it, and what is known
    is dropped.

    etcd compacts its history up to a revision c, and refuses a stream that starts below c. Before
    version 3.5.6 a stream that starts at c is accepted, but the deletions of revision c are missing
    from it. If c is the last delivered revision, they are known; if c is any later one, the stream
    is refused. A stream that started after the last delivered revision could lose a deletion
    unnoticed.

    So a stream begins with what was delivered last. If it does not, etcd has lost that: an etcd of
    one node, before 3.5.5, tells of changes before its disk has them, and counts on from before
    when it has ended in that moment. Other changes have their revisions then, and would be dropped.
    """

    def __init__(self) -> None:
        self._revision: int | None = None
        self._cluster_id: int | None = None
        self._has_forgotten = False
        self._last_puts: tuple[WatchEvent, ...] = ()  # of the revision that was delivered last
        self._awaits_last = False  # the stream has brought nothing yet

    @property
    def revision(self) -> int | None:
        """Where the next stream starts; None: the prefix must be read first."""
        return self._revision

    def on_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """What to deliver of a read of the whole prefix."""
        restored, self._has_forgotten = self._has_forgotten, False
        self._revision, self._last_puts = snapshot.revision, ()
        return replace(snapshot, restored=True) if restored else snapshot

    def on_created(self, etcd_revision: int, cluster_id: int) -> bool:
        """A stream was accepted by an etcd at this revision. False if etcd came back with older
        data than it had told: it lost its data, or they were replaced. An etcd that began without
        data is another cluster, and may be far beyond our revision again."""
        is_another = self._cluster_id not in (None, cluster_id)
        self._cluster_id = cluster_id
        if self._revision is not None and (is_another or etcd_revision < self._revision):
            self._forget()
        self._awaits_last = bool(self._last_puts)
        return self._revision is not None

    def on_compacted(self) -> None:
        """The events after the last delivered one are gone."""
        self._revision, self._last_puts = None, ()

    def on_events(self, events: Sequence[WatchEvent]) -> list[WatchEvent]:
        """What to deliver of the events of a stream. All events of one revision come together. If
        they show that etcd has lost what it told, `revision` is None then: the prefix must be read
        again."""
        assert self._revision is not None, "a stream begins with a revision"
        if self._awaits_last and events:
            self._awaits_last = False
            if not set(events) >= set(self._last_puts):
                self._forget()
                return []
        news = [event for event in events if event.mod_revision > self._revision]
        if news:
            self._revision = news[-1].mod_revision
            self._last_puts = tuple(
                event
                for event in news
                if event.mod_revision == self._revision and event.value is not None
            )
        return news

    def _forget(self) -> None:
        self._revision, self._last_puts, self._has_forgotten = None, (), True
