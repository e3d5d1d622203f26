"""Each change gives one line, and nothing else gives any."""

from __future__ import annotations

import dataclasses

import numpy as np

from cli.observe.event_formatter import EventFormatter, EventLine
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import (
    RankRecord,
    SlotContents,
    Suspicion,
    Verdict,
    pack_map,
    pack_record,
)
from shared.store import WatchEvent
from shared.types import (
    Accuser,
    Epoch,
    Incarnation,
    Member,
    NodeId,
    RankId,
    RankState,
    Step,
    SuspicionReason,
)

KEYS = Keys("t")


def rank_record(rank: int, incarnation: int = 1) -> RankRecord:
    return RankRecord(
        rank=RankId(rank),
        incarnation=Incarnation(incarnation),
        node=NodeId("n"),
        pid=100 + rank,
        lease_id=1,
        state=RankState.STARTING,
        control_host="127.0.0.1",
        control_port=1,
        transfer_name="",
        slots=2,
        kv_blocks=8,
        kv_block_tokens=16,
        exchange="transfer",
    )


def expert_map(epoch: int, members: list[tuple[int, int]], slots: list[list[int]]) -> ExpertMap:
    return ExpertMap(
        epoch=Epoch(epoch),
        num_experts=2,
        members=tuple(Member(rank=RankId(r), incarnation=Incarnation(i)) for r, i in members),
        placement=np.array([slots], dtype=np.int16),
        cause="because",
    )


def event(key: str, value: bytes | None) -> WatchEvent:
    return WatchEvent(key=key, value=value, mod_revision=1)


def narrate(formatter: EventFormatter, *events: WatchEvent) -> list[EventLine]:
    return list(formatter.lines(events))


def test_a_lease_comes_and_goes() -> None:
    record = rank_record(3)
    key = KEYS.rank(record.rank, record.incarnation)
    came, gone = narrate(EventFormatter(KEYS), event(key, pack_record(record)), event(key, None))
    assert (came.kind, came.fields["rank"], came.fields["pid"]) == ("lease_came", 3, 103)
    assert (gone.kind, gone.fields["incarnation"]) == ("lease_gone", 1)
    assert "3.1" in gone.text


def test_a_rank_that_becomes_ready_says_so() -> None:
    record = rank_record(0)
    ready = dataclasses.replace(record, state=RankState.READY)
    key = KEYS.rank(record.rank, record.incarnation)
    lines = narrate(
        EventFormatter(KEYS), event(key, pack_record(record)), event(key, pack_record(ready))
    )
    assert [line.kind for line in lines] == ["lease_came", "rank_state"]
    assert lines[1].fields["state"] == "ready"


def test_a_map_says_who_left_who_joined_and_what_moved() -> None:
    before = expert_map(4, [(0, 1), (1, 1)], [[0, 1], [0, 1]])
    after = expert_map(5, [(0, 1), (1, 2)], [[0, -1], [1, 0]])
    _, line = narrate(
        EventFormatter(KEYS), event(KEYS.map, pack_map(before)), event(KEYS.map, pack_map(after))
    )
    assert line.fields == {
        "epoch": 5,
        "cause": "because",
        "members": ["0.1", "1.2"],
        "joined": ["1.2"],
        "left": ["1.1"],
        "slots_changed": 1,
    }
    assert "because" in line.text


def test_suspicions_and_verdicts_name_their_reasons() -> None:
    suspicion = Suspicion(
        rank=RankId(2),
        incarnation=Incarnation(1),
        by="agent:n",
        reason=SuspicionReason.EXIT,
        epoch=Epoch(1),
        step=Step(9),
        raised_at=10.0,
        detail="killed by SIGKILL",
    )
    verdict = Verdict(
        rank=RankId(2),
        incarnation=Incarnation(1),
        cause=SuspicionReason.EXIT,
        signals=(suspicion,),
        epoch=Epoch(2),
        first_signal_at=10.0,
        decided_at=10.025,
    )
    raised, judged, dropped = narrate(
        EventFormatter(KEYS),
        event(
            KEYS.suspicion(RankId(2), Incarnation(1), Accuser.AGENT, "agent:n"),
            pack_record(suspicion),
        ),
        event(KEYS.verdict(RankId(2), Incarnation(1)), pack_record(verdict)),
        event(KEYS.suspicion(RankId(2), Incarnation(1), Accuser.AGENT, "agent:n"), None),
    )
    assert raised.fields["reason"] == "exit"
    assert "killed by SIGKILL" in raised.text
    assert judged.fields["took_ms"] == 25.0
    assert "is dead (exit)" in judged.text
    assert dropped.kind == "suspicion_gone"


def test_who_was_drained_has_left_and_is_not_dead() -> None:
    verdict = Verdict(
        rank=RankId(2),
        incarnation=Incarnation(1),
        cause=SuspicionReason.DRAINED,
        signals=(),
        epoch=Epoch(2),
        first_signal_at=10.0,
        decided_at=10.0,
    )
    [left] = narrate(
        EventFormatter(KEYS), event(KEYS.verdict(RankId(2), Incarnation(1)), pack_record(verdict))
    )
    assert left.text == "rank 2.1 left, as was asked"


def test_assignments_and_residents_are_told_apart() -> None:
    member = Member(rank=RankId(0), incarnation=Incarnation(1))
    value = pack_record(SlotContents.of(member, np.array([[0, -1], [1, 0]], dtype=np.int16)))
    assigned, holds = narrate(
        EventFormatter(KEYS),
        event(KEYS.assignment(RankId(0), Incarnation(1)), value),
        event(KEYS.resident(RankId(0), Incarnation(1)), value),
    )
    assert (assigned.kind, assigned.fields["experts"]) == ("assignment", 3)
    assert holds.kind == "residents"


def test_a_garbled_or_foreign_value_is_passed_over() -> None:
    assert (
        narrate(EventFormatter(KEYS), event(KEYS.map, b"\xff"), event(KEYS.root + "new/1", b"x"))
        == []
    )
