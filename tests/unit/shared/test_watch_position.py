"""A watch goes on where it was, whatever happened to its stream."""

from __future__ import annotations

from shared.store import Snapshot, WatchEvent
from shared.watch_position import WatchPosition

OURS, ANOTHER = 1, 2  # cluster ids


def event(revision: int) -> WatchEvent:
    return WatchEvent(key="a", value=b"", mod_revision=revision)


def watching(revision: int) -> WatchPosition:
    position = WatchPosition()
    position.on_snapshot(Snapshot(revision=revision, values=()))
    return position


def test_first_comes_a_snapshot() -> None:
    assert WatchPosition().revision is None
    assert watching(7).revision == 7


def test_a_stream_starts_at_what_is_known_and_what_is_known_is_dropped() -> None:
    position = watching(7)
    assert position.on_events([event(7), event(8), event(8)]) == [event(8), event(8)]
    assert position.revision == 8
    assert position.on_events([event(8)]) == []


def test_compaction_asks_for_a_snapshot_that_is_an_ordinary_one() -> None:
    position = watching(7)
    position.on_compacted()
    assert position.revision is None
    assert not position.on_snapshot(Snapshot(revision=30, values=())).restored


def test_older_data_ask_for_a_snapshot_that_replaces_everything() -> None:
    position = watching(7)
    assert position.on_created(7, OURS)
    assert not position.on_created(6, OURS)
    assert position.revision is None
    assert position.on_snapshot(Snapshot(revision=3, values=())).restored
    assert position.on_created(3, OURS)
    position.on_compacted()
    assert not position.on_snapshot(Snapshot(revision=4, values=())).restored


def test_an_etcd_that_began_anew_is_noticed_though_it_is_ahead_again() -> None:
    position = watching(7)
    assert position.on_created(7, OURS)
    assert not position.on_created(900, ANOTHER)
    assert position.on_snapshot(Snapshot(revision=901, values=())).restored
    assert position.on_created(901, ANOTHER)
