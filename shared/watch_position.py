"""Where a watch stands between two streams: what it has delivered, and from where it goes on. Pure:
`etcd_watch` has the thread and the stream."""

from __future__ import annotations

from collections.abc import Iterable
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
    """

    def __init__(self) -> None:
        self._revision: int | None = None
        self._cluster_id: int | None = None
        self._has_forgotten = False

    @property
    def revision(self) -> int | None:
        """Where the next stream starts; None: the prefix must be read first."""
        return self._revision

    def on_snapshot(self, snapshot: Snapshot) -> Snapshot:
        """What to deliver of a read of the whole prefix."""
        restored, self._has_forgotten = self._has_forgotten, False
        self._revision = snapshot.revision
        return replace(snapshot, restored=True) if restored else snapshot

    def on_created(self, etcd_revision: int, cluster_id: int) -> bool:
        """A stream was accepted by an etcd at this revision. False if etcd came back with older
        data than it had told: it lost its data, or they were replaced. An etcd that began without
        data is another cluster, and may be far beyond our revision again."""
        is_another = self._cluster_id not in (None, cluster_id)
        self._cluster_id = cluster_id
        if self._revision is not None and (is_another or etcd_revision < self._revision):
            self._revision, self._has_forgotten = None, True
        return self._revision is not None

    def on_compacted(self) -> None:
        """The events after the last delivered one are gone."""
        self._revision = None

    def on_events(self, events: Iterable[WatchEvent]) -> list[WatchEvent]:
        """What to deliver of the events of a stream. All events of one revision come together."""
        assert self._revision is not None, "a stream begins with a revision"
        news = [event for event in events if event.mod_revision > self._revision]
        if news:
            self._revision = news[-1].mod_revision
        return news
