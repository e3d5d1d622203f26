"""What is news of etcd is decided by revision, whatever the order in which it arrives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shared.revisions import TOMBSTONE_REVISIONS, Revisions
from shared.store import KeyValue, Snapshot, WatchEvent


def put(key: str, revision: int) -> WatchEvent:
    return WatchEvent(key=key, value=b"%d" % revision, mod_revision=revision)


def delete(key: str, revision: int) -> WatchEvent:
    return WatchEvent(key=key, value=None, mod_revision=revision)


def snapshot(revision: int, *values: tuple[str, int], restored: bool = False) -> Snapshot:
    found = (
        KeyValue(key=key, value=b"%d" % mod, create_revision=mod, mod_revision=mod)
        for key, mod in values
    )
    return Snapshot(revision=revision, values=tuple(found), restored=restored)


def test_a_stale_read_does_not_bring_a_deleted_key_back() -> None:
    revisions = Revisions()
    revisions.admit(put("leader", 4))
    assert revisions.admit(delete("leader", 6)) == [delete("leader", 6)]
    assert revisions.admit(snapshot(5, ("leader", 4))) == []
    assert revisions.of("leader") == 0


def test_a_stale_read_does_not_undo_a_newer_value() -> None:
    revisions = Revisions()
    revisions.admit(put("map", 8))
    assert revisions.admit(snapshot(7, ("map", 3))) == []
    assert revisions.of("map") == 8


def test_a_stale_read_does_not_delete_a_key_that_came_after_it() -> None:
    revisions = Revisions()
    revisions.admit(put("map", 8))
    assert revisions.admit(snapshot(7)) == []


def test_a_read_says_what_is_new_and_what_is_gone() -> None:
    revisions = Revisions()
    revisions.admit(snapshot(5, ("a", 2), ("b", 3)))
    assert revisions.admit(snapshot(9, ("b", 7), ("c", 6))) == [
        put("c", 6),
        put("b", 7),
        delete("a", 9),
    ]


def test_the_end_of_a_key_that_was_never_seen_is_no_news() -> None:
    revisions = Revisions()
    assert revisions.admit(delete("a", 5)) == []
    assert revisions.admit(snapshot(4, ("a", 3))) == []


def test_an_etcd_that_lost_its_data_is_believed_though_it_counts_anew() -> None:
    revisions = Revisions()
    revisions.admit(snapshot(50, ("a", 40), ("b", 41)))
    assert revisions.admit(snapshot(3, ("a", 2), restored=True)) == [delete("b", 3), put("a", 2)]
    assert revisions.admit(put("b", 4)) == [put("b", 4)]


def test_deletions_are_forgotten_long_after() -> None:
    revisions = Revisions()
    for revision in range(1, 2 * TOMBSTONE_REVISIONS, 2):
        revisions.admit(put(f"k{revision}", revision))
        revisions.admit(delete(f"k{revision}", revision + 1))
    assert len(revisions._deleted) <= TOMBSTONE_REVISIONS // 2 + 1


@given(st.data())
def test_stale_reads_anywhere_in_a_watch_change_nothing(data: st.DataObject) -> None:
    """At any point a read that etcd answered at any earlier revision may be applied."""
    history: list[dict[str, int]] = [{}]
    changes: list[WatchEvent] = []
    for revision in range(1, data.draw(st.integers(1, 12)) + 1):
        state = dict(history[-1])
        key = data.draw(st.sampled_from("abc"))
        if key in state and data.draw(st.booleans()):
            del state[key]
            changes.append(delete(key, revision))
        else:
            state[key] = revision
            changes.append(put(key, revision))
        history.append(state)
    revisions, seen = Revisions(), dict[str, int]()
    for revision, change in enumerate(changes, 1):
        items: list[Snapshot | WatchEvent] = [change]
        for _ in range(data.draw(st.integers(0, 2))):
            at = data.draw(st.integers(0, revision))
            items.append(snapshot(at, *history[at].items()))
        for item in data.draw(st.permutations(items)):
            for event in revisions.admit(item):
                if event.value is None:
                    del seen[event.key]
                else:
                    seen[event.key] = event.mod_revision
        assert seen == history[revision]


def test_a_read_that_lacks_a_known_change_at_its_own_revision_proves_it_lost() -> None:
    """The change was told, and etcd had it not on its disk when it ended. Its revision went to
    another one, so the count is beyond it again."""
    revisions = Revisions()
    revisions.admit(snapshot(10, ("a", 7), ("b", 8)))
    revisions.admit(put("a", 11))
    revisions.admit(delete("b", 12))
    assert revisions.admit(snapshot(10, ("a", 7), ("b", 8))) == [], "it was answered before"
    assert revisions.admit(snapshot(15, ("a", 7), ("b", 8), ("c", 15))) == [
        put("a", 7),
        put("b", 8),
        put("c", 15),
    ]
    assert (revisions.of("a"), revisions.of("b")) == (7, 8)
