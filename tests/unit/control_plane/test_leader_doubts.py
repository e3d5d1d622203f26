"""When a standby may take the key of a leader in office."""

from __future__ import annotations

import pytest

from control_plane.leader_doubts import lost_leader
from control_plane.state_applier import MalformedValue, StateApplier
from shared.codec import pack
from shared.keys import Keys
from shared.records import LeaderDoubt, LeaderRecord, Suspicion, pack_map, pack_record
from shared.store import WatchEvent
from shared.types import (
    Accuser,
    Epoch,
    Incarnation,
    Member,
    RankId,
    Step,
    SuspicionReason,
)
from tests.support.gateway_harness import toy_map

KEYS = Keys("test")
LEADER = LeaderRecord(control_plane="a", pid=2, term=1, since=0.0)
NUM_RANKS = 4


def member(rank: int, incarnation: int = 1) -> Member:
    return Member(rank=RankId(rank), incarnation=Incarnation(incarnation))


class Etcd:
    """What a control plane has heard of it."""

    def __init__(self) -> None:
        self.applier = StateApplier(KEYS)
        self.revision = 10
        self.put(KEYS.map, pack_map(toy_map(1, [member(rank) for rank in range(NUM_RANKS)])))
        self.leader = self.put(KEYS.leader, pack_record(LEADER))

    def put(self, key: str, value: bytes | None) -> int:
        self.revision += 1
        event = WatchEvent(key=key, value=value, mod_revision=self.revision)
        self.news = self.applier.apply(event)
        return self.revision

    def doubt(self, *ranks: int, control_plane: str = "a", incarnation: int = 1) -> None:
        for rank in ranks:
            who = RankId(rank), Incarnation(incarnation)
            doubt = LeaderDoubt(rank=who[0], incarnation=who[1], control_plane=control_plane)
            self.put(KEYS.leader_doubt(*who), pack(doubt))

    def suspect(self, rank: int) -> None:
        who = RankId(rank), Incarnation(1)
        suspicion = Suspicion(
            rank=who[0],
            incarnation=who[1],
            by="rank-9.1",
            reason=SuspicionReason.LINK,
            epoch=Epoch(1),
            step=Step(0),
            raised_at=0.0,
        )
        self.put(KEYS.suspicion(*who, Accuser.RANK, "rank-9.1"), pack(suspicion))

    @property
    def lost(self) -> int | None:
        return lost_leader(self.applier.state)


@pytest.fixture
def etcd() -> Etcd:
    return Etcd()


def test_more_than_half_of_the_ranks_must_have_lost_it(etcd: Etcd) -> None:
    etcd.doubt(0, 1)
    assert etcd.lost is None
    etcd.doubt(3)
    assert etcd.lost == etcd.leader
    etcd.put(KEYS.leader_doubt(RankId(3), Incarnation(1)), None)
    assert etcd.lost is None


def test_ranks_that_went_with_its_host_have_no_say(etcd: Etcd) -> None:
    etcd.doubt(0, 1)
    etcd.suspect(2)
    assert etcd.lost == etcd.leader
    etcd.suspect(0)
    assert etcd.lost is None, "one that is suspected itself does not count, nor does its doubt"


def test_doubts_are_about_who_was_in_office(etcd: Etcd) -> None:
    etcd.doubt(0, 1, 2)
    assert etcd.lost == etcd.leader
    etcd.leader = etcd.put(KEYS.leader, pack_record(LEADER))
    assert etcd.lost is None
    etcd.doubt(0, 1, 2, control_plane="b")
    assert etcd.lost is None
    etcd.doubt(0, 1, 2)
    assert etcd.lost == etcd.leader
    etcd.put(KEYS.leader, None)
    assert etcd.lost is None


def test_who_is_not_in_the_map_has_no_say(etcd: Etcd) -> None:
    etcd.doubt(0, 1)
    etcd.doubt(2, incarnation=7)
    etcd.doubt(NUM_RANKS)
    assert etcd.lost is None


def test_a_rank_that_speaks_for_another_is_not_believed(etcd: Etcd) -> None:
    doubt = LeaderDoubt(rank=RankId(1), incarnation=Incarnation(1), control_plane="a")
    etcd.put(KEYS.leader_doubt(RankId(0), Incarnation(1)), pack(doubt))
    (news,) = etcd.news
    assert isinstance(news, MalformedValue)
    assert etcd.applier.state.leader_doubts == {}
