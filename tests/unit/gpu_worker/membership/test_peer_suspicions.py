"""When a rank withdraws what it said of a peer."""

from __future__ import annotations

import pytest

from gpu_worker.membership.peer_suspicions import KEPT_S, REPEAT_S, PeerSuspicions
from shared.types import Epoch, Incarnation, Member, RankId, Step, SuspicionReason

PEER = Member(rank=RankId(2), incarnation=Incarnation(1))
EPOCH = Epoch(1)


def look(
    suspicions: PeerSuspicions, now: float, step: int, *, waits: bool, linked: bool = True
) -> list[Member]:
    peers = [PEER] if waits else []
    return suspicions.on_look(
        now,
        at_step=(EPOCH, Step(step)),
        waiting_for=peers,
        linked=[PEER] if linked else [],
    )


@pytest.fixture
def suspected() -> PeerSuspicions:
    """The peer was late in step 7, at 0 s."""
    suspicions = PeerSuspicions()
    assert suspicions.on_suspected(PEER, SuspicionReason.EXCHANGE, 0.0)
    look(suspicions, 0.5, 7, waits=True)
    return suspicions


def test_the_same_is_not_said_twice_in_a_moment(suspected: PeerSuspicions) -> None:
    assert not suspected.on_suspected(PEER, SuspicionReason.EXCHANGE, 0.9 * REPEAT_S)
    assert suspected.on_suspected(PEER, SuspicionReason.LINK, 0.9 * REPEAT_S)
    assert suspected.on_suspected(PEER, SuspicionReason.EXCHANGE, REPEAT_S)


def test_it_is_held_while_the_same_step_waits(suspected: PeerSuspicions) -> None:
    for tenths in range(10, 100, 5):
        assert look(suspected, tenths / 10, 7, waits=True) == []
    assert PEER in suspected.peers


def test_it_is_withdrawn_when_the_step_has_gone_on_though_the_next_one_waits_as_well(
    suspected: PeerSuspicions,
) -> None:
    assert look(suspected, KEPT_S, 9, waits=True) == [PEER]
    assert not suspected.peers
    assert look(suspected, KEPT_S + 0.5, 9, waits=True) == []


def test_it_is_withdrawn_when_nobody_waits_any_more(suspected: PeerSuspicions) -> None:
    assert look(suspected, KEPT_S, 7, waits=False) == [PEER]


def test_it_is_held_until_the_link_is_open_again(suspected: PeerSuspicions) -> None:
    assert look(suspected, 5.0, 7, waits=False, linked=False) == []
    assert look(suspected, 5.5, 7, waits=False) == [PEER]


def test_a_fresh_one_stays_for_a_while(suspected: PeerSuspicions) -> None:
    assert suspected.on_suspected(PEER, SuspicionReason.LINK, 1.0)
    assert look(suspected, 1.5, 8, waits=False) == []
    assert look(suspected, 1.0 + KEPT_S, 8, waits=False) == [PEER]


def test_after_it_was_withdrawn_it_can_be_raised_at_once(suspected: PeerSuspicions) -> None:
    now = KEPT_S
    assert look(suspected, now, 9, waits=False) == [PEER]
    assert suspected.on_suspected(PEER, SuspicionReason.EXCHANGE, now)


def test_nothing_remains_of_a_peer_that_is_gone(suspected: PeerSuspicions) -> None:
    suspected.forget(PEER)
    assert not suspected.peers
