"""Slots of a backup rank's region: what is there is never written, and whole chains are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_worker.kv_replication.replica_ledger import ReplicaLedger

A, B, C, D, E = b"a", b"b", b"c", b"d", b"e"


def holding(*names: bytes, num_slots: int = 4) -> ReplicaLedger:
    """One session has had these sent, and they are known."""
    ledger = ReplicaLedger(num_slots)
    for name in names:
        ledger.take(name)
    ledger.note_known(names)
    return ledger


def test_a_block_on_its_way_is_not_sent_again_and_not_yet_known() -> None:
    ledger = ReplicaLedger(4)
    ledger.take(A)
    assert (ledger.has(A), ledger.may_take(A), ledger.is_known(A)) == (True, False, False)
    ledger.note_known([A])
    assert (ledger.has(A), ledger.may_take(A), ledger.is_known(A)) == (True, False, True)
    assert not ledger.has(B)


def test_slots_that_sessions_use_are_not_given_away() -> None:
    ledger = holding(A, B, C, D)
    assert not ledger.may_take(E)
    assert ledger.pick_drops() == []
    assert ledger.is_full
    ledger.use(A)
    ledger.release([A, B])
    assert len(ledger.pick_drops()) == 1
    assert (ledger.has(A), ledger.has(B)) == (True, False)


def test_a_dropped_slot_is_free_only_when_the_target_has_said_so() -> None:
    ledger = holding(A, B, C, D)
    ledger.release([A, B, C, D])
    (slot,) = ledger.pick_drops()
    assert not ledger.may_take(E)
    assert not ledger.is_settled
    ledger.note_dropped([slot])
    assert ledger.is_settled
    assert ledger.take(E) == slot


def test_leaves_go_before_their_parents_and_what_was_let_go_first_goes_first() -> None:
    ledger = holding(A, B, C, D)
    ledger.release([C, D])
    ledger.release([A, B])
    gone = []
    for new in (b"1", b"2", b"3", b"4"):
        before = {name for name in (A, B, C, D) if ledger.has(name)}
        ledger.note_dropped(ledger.pick_drops())
        gone += [name for name in before if not ledger.has(name)]
        ledger.take(new)
    assert gone == [D, C, B, A]


def test_nothing_is_dropped_while_slots_are_free() -> None:
    ledger = holding(A, B, C)
    ledger.release([A, B, C])
    assert ledger.pick_drops() == []
    assert all(ledger.is_known(name) for name in (A, B, C))


def test_drops_are_asked_for_many_at_once() -> None:
    names = [b"%d" % number for number in range(64)]
    ledger = holding(*names, num_slots=72)
    ledger.release(names)
    asked = []
    for number in range(20):
        ledger.take(b"new %d" % number)
        if drops := ledger.pick_drops():
            asked.append(len(drops))
            ledger.note_dropped(drops)
    assert asked == [5, 5, 5, 5]


def test_an_idle_block_that_is_used_again_stays() -> None:
    ledger = holding(A, B, C, D)
    ledger.release([A, B, C, D])
    ledger.use(D)
    ledger.note_dropped(ledger.pick_drops())
    assert ledger.is_known(D)
    assert not ledger.has(C)


def test_who_ends_while_its_last_block_is_written_loses_no_parent_first() -> None:
    ledger = ReplicaLedger(2)
    for name in (A, B):
        ledger.take(name)
    ledger.note_known([A])
    ledger.release([A, B])
    assert ledger.pick_drops() == []
    ledger.note_known([B])
    ledger.pick_drops()
    assert (ledger.has(A), ledger.has(B)) == (True, False)


def test_a_name_has_no_second_slot_while_the_first_may_be_known_by_it() -> None:
    ledger = holding(A, B, C, D, num_slots=16)
    for number in range(11):
        ledger.take(b"%d" % number)
    ledger.release([A])
    assert len(ledger.pick_drops()) == 1
    assert not ledger.has(A)
    assert not ledger.may_take(A)
    assert ledger.may_take(E)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_a_small_region_can_be_used_again(num_slots: int) -> None:
    names = [A, B, C][:num_slots]
    ledger = holding(*names, num_slots=num_slots)
    ledger.release(names)
    ledger.note_dropped(ledger.pick_drops())
    assert ledger.may_take(E)


@dataclass
class Target:
    """The other side, whose news reach the ledger late and in any order."""

    known: dict[int, bytes] = field(default_factory=dict)
    written: dict[int, bytes] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)
    news_known: list[bytes] = field(default_factory=list)
    news_dropped: list[int] = field(default_factory=list)


CHAINS = [[A], [A, B], [A, B, C], [A, D], [E], [E, b"f", b"g"], [b"h", b"i"]]
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["begin", "send", "send", "end", "write", "tell", "drop", "forget", "free"]
        ),
        st.integers(0, 20),
    ),
    max_size=150,
)


@settings(max_examples=300, deadline=None)
@given(num_slots=st.integers(1, 7), events=EVENTS)
def test_no_slot_is_written_while_it_may_be_known_and_chains_stay_whole(
    num_slots: int, events: list[tuple[str, int]]
) -> None:
    ledger, target = ReplicaLedger(num_slots), Target()
    sessions: list[tuple[list[bytes], int]] = []
    for event, number in events:
        at = number % len(sessions) if sessions else 0
        if event == "begin":
            sessions.append((CHAINS[number % len(CHAINS)], 0))
        elif event == "send" and sessions:
            chain, num_sent = sessions[at]
            if num_sent == len(chain):
                continue
            name = chain[num_sent]
            if ledger.has(name):
                ledger.use(name)
            elif ledger.may_take(name):
                slot = ledger.take(name)
                assert slot not in target.known
                assert slot not in target.written
                assert slot not in target.asked
                target.written[slot] = name
            else:
                continue
            sessions[at] = (chain, num_sent + 1)
        elif event == "end" and sessions:
            chain, num_sent = sessions.pop(at)
            ledger.release(chain[:num_sent])
        elif event == "write" and target.written:
            slot = sorted(target.written)[number % len(target.written)]
            target.known[slot] = target.written.pop(slot)
            target.news_known.append(target.known[slot])
        elif event == "tell":
            ledger.note_known(target.news_known)
            target.news_known.clear()
        elif event == "drop":
            target.asked += ledger.pick_drops()
        elif event == "forget" and target.asked:
            slot = target.asked.pop(number % len(target.asked))
            del target.known[slot]
            target.news_dropped.append(slot)
        elif event == "free":
            ledger.note_dropped(target.news_dropped)
            target.news_dropped.clear()
        names = [*target.known.values(), *target.written.values()]
        assert len(names) == len(set(names))
        assert all(name in names for chain, num_sent in sessions for name in chain[:num_sent])
        for chain in CHAINS:
            held = [ledger.has(name) for name in chain]
            assert held == sorted(held, reverse=True)
