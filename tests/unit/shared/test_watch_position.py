"""A watch goes on where it was, whatever happened to its stream."""

from __future__ import annotations

import pytest

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


def delivered() -> WatchPosition:
    """Up to revision 9, at which two keys changed and one went."""
    position = watching(7)
    assert position.on_created(7, OURS)
    position.on_events([event(8)])
    position.on_events(at_nine())
    return position


def at_nine() -> list[WatchEvent]:
    gone = WatchEvent(key="c", value=None, mod_revision=9)
    return [event(9), WatchEvent(key="b", value=b"b", mod_revision=9), gone]


def test_a_stream_that_begins_with_what_is_known_goes_on() -> None:
    position = delivered()
    assert position.on_created(20, OURS)
    assert position.on_events(at_nine()) == []
    assert position.on_events([event(12)]) == [event(12)]


def test_deletions_of_the_last_revision_may_be_missing() -> None:
    """An etcd before 3.5.6 drops them when it compacts up to there."""
    position = delivered()
    assert position.on_created(20, OURS)
    assert position.on_events(at_nine()[:2]) == []
    assert position.revision == 9


@pytest.mark.parametrize(
    "first",
    [
        [event(12)],
        [event(9)],
        [WatchEvent(key="a", value=b"other", mod_revision=9), at_nine()[1]],
    ],
    ids=["a later one", "a part", "another change at that revision"],
)
def test_a_stream_that_lacks_what_was_delivered_shows_that_etcd_has_lost_it(
    first: list[WatchEvent],
) -> None:
    position = delivered()
    assert position.on_created(20, OURS)
    assert position.on_events(first) == []
    assert position.revision is None
    assert position.on_snapshot(Snapshot(revision=21, values=())).restored
    assert position.on_created(21, OURS)
    assert position.on_events([event(22)]) == [event(22)]
