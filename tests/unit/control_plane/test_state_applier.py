"""The state of the cluster: what changes it, what does not, and how gaps and malformed values are
handled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from control_plane.state_applier import (
    LeaderDeleted,
    LeaderPut,
    MalformedValue,
    RankRefused,
    RecordDeleted,
    RecordPut,
    StateApplier,
    SuspicionRaised,
    VerdictPut,
)
from shared.desired_state import DesiredState
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import (
    AgentRecord,
    LeaderRecord,
    RankRecord,
    SlotContents,
    Suspicion,
    Verdict,
    pack_map,
    pack_record,
)
from shared.release import Release
from shared.store import KeyValue, Snapshot, WatchEvent
from shared.types import (
    ACCUSERS,
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

KEYS = Keys("cluster")
LEADER = LeaderRecord(control_plane="a", pid=1, term=3, since=0.0)


def record(rank: int, incarnation: int = 1) -> RankRecord:
    return RankRecord(
        rank=RankId(rank),
        incarnation=Incarnation(incarnation),
        node=NodeId("n"),
        pid=1,
        lease_id=1,
        state=RankState.READY,
        control_host="h",
        control_port=1,
        transfer_name="t",
        slots=2,
        kv_blocks=1,
        kv_block_tokens=1,
        exchange="local",
    )


def put(key: str, value: object, revision: int) -> WatchEvent:
    return WatchEvent(key=key, value=pack_record(value), mod_revision=revision)


def gone(key: str, revision: int) -> WatchEvent:
    return WatchEvent(key=key, value=None, mod_revision=revision)


def key_value(key: str, value: object, revision: int) -> KeyValue:
    return KeyValue(
        key=key, value=pack_record(value), create_revision=revision, mod_revision=revision
    )


def expert_map(epoch: int) -> ExpertMap:
    return ExpertMap(
        epoch=Epoch(epoch),
        num_experts=1,
        members=(Member(rank=RankId(0), incarnation=Incarnation(1)),),
        placement=np.zeros((1, 1, 1), dtype=np.int16),
    )


def put_map(value: ExpertMap, mod_revision: int) -> WatchEvent:
    return WatchEvent(key=KEYS.map, value=pack_map(value), mod_revision=mod_revision)


@pytest.fixture
def cluster() -> StateApplier:
    return StateApplier(KEYS)


def key_of(value: RankRecord) -> str:
    return KEYS.rank(value.rank, value.incarnation)


def test_records_come_and_go(cluster: StateApplier) -> None:
    one = record(1)
    assert cluster.apply(put(key_of(one), one, 5)) == [RecordPut(record=one)]
    assert cluster.state.records == {one.member: one}
    assert cluster.apply(gone(key_of(one), 6)) == [RecordDeleted(member=one.member)]
    assert cluster.state.records == {}


def test_a_state_that_somebody_holds_never_changes(cluster: StateApplier) -> None:
    one, two = record(1), record(2)
    cluster.apply(put(key_of(one), one, 5))
    cluster.apply(put(KEYS.term, 4, 6))
    before = cluster.state
    cluster.apply(put(key_of(two), two, 7))
    cluster.apply(put(KEYS.term, 5, 8))
    cluster.apply(gone(key_of(one), 9))
    assert before.records == {one.member: one}
    assert (before.term, before.revision_of(KEYS.term)) == (4, 6)
    assert cluster.state.records == {two.member: two}
    assert (cluster.state.term, cluster.state.revision_of(KEYS.term)) == (5, 8)


def test_a_change_copies_only_its_own_table(cluster: StateApplier) -> None:
    one = record(1)
    cluster.apply(put(key_of(one), one, 5))
    before = cluster.state
    cluster.apply(put(KEYS.leader, LEADER, 6))
    assert cluster.state.records is before.records


def test_the_newest_incarnation_of_a_rank_represents_it(cluster: StateApplier) -> None:
    for value in (record(1, 2), record(1, 1), record(0, 1)):
        cluster.apply(put(key_of(value), value, 5))
    assert {r: v.incarnation for r, v in cluster.state.newest_records().items()} == {0: 1, 1: 2}


def test_what_is_old_or_known_changes_nothing(cluster: StateApplier) -> None:
    one = record(1)
    cluster.apply(put(key_of(one), one, 5))
    version = cluster.state.version
    assert cluster.apply(put(key_of(one), record(1), 5)) == []
    assert cluster.apply(gone(key_of(one), 4)) == []
    assert cluster.state.version == version
    assert cluster.state.records == {one.member: one}


def test_a_snapshot_tells_what_was_missed(cluster: StateApplier) -> None:
    stays, leaves, comes = record(0), record(1), record(2)
    for value in (stays, leaves):
        cluster.apply(put(key_of(value), value, 5))
    values = (key_value(key_of(stays), stays, 5), key_value(key_of(comes), comes, 8))
    changes = cluster.apply(Snapshot(revision=9, values=values))
    assert changes == [RecordPut(record=comes), RecordDeleted(member=leaves.member)]
    assert cluster.state.synced


def test_a_snapshot_of_an_etcd_that_lost_its_data_counts_though_its_revisions_are_lower(
    cluster: StateApplier,
) -> None:
    cluster.apply(put(KEYS.leader, LEADER, 500))
    other = LeaderRecord(control_plane="b", pid=2, term=1, since=0.0)
    values = (key_value(KEYS.leader, other, 2),)
    cluster.apply(Snapshot(revision=3, values=values, restored=True))
    assert cluster.state.leader == other
    assert cluster.state.revision_of(KEYS.leader) == 2


def test_the_map_that_ranks_run_stays_known_when_etcd_has_lost_it(cluster: StateApplier) -> None:
    running, older = expert_map(7), expert_map(5)
    cluster.apply(put_map(running, 500))
    assert cluster.state.is_map_stored
    assert cluster.apply(Snapshot(revision=3, values=(), restored=True)) == []
    assert cluster.state.expert_map is not None
    assert cluster.state.expert_map.epoch == 7
    assert not cluster.state.is_map_stored
    assert cluster.state.revision_of(KEYS.map) == 0
    found = KeyValue(
        key=KEYS.map, value=pack_map(older), create_revision=2, mod_revision=2, lease_id=0
    )
    assert cluster.apply(Snapshot(revision=3, values=(found,), restored=True)) == []
    assert cluster.state.expert_map.epoch == 7
    assert (cluster.state.is_map_stored, cluster.state.revision_of(KEYS.map)) == (False, 2)
    cluster.apply(put_map(expert_map(8), 4))
    assert cluster.state.expert_map.epoch == 8
    assert cluster.state.is_map_stored


def test_a_map_that_etcd_had_told_of_and_never_kept_is_known_as_one_to_publish_again(
    cluster: StateApplier,
) -> None:
    """By the read after a write that fails, since its revision is not etcd's."""
    older, running = expert_map(5), expert_map(7)
    cluster.apply(put_map(older, 10))
    cluster.apply(put_map(running, 12))
    found = KeyValue(
        key=KEYS.map, value=pack_map(older), create_revision=2, mod_revision=10, lease_id=0
    )
    assert cluster.apply(Snapshot(revision=11, values=(found,))) == []
    assert (cluster.state.is_map_stored, cluster.state.revision_of(KEYS.map)) == (True, 12)
    assert cluster.apply(Snapshot(revision=13, values=(found,))) == []
    assert cluster.state.expert_map is not None
    assert cluster.state.expert_map.epoch == 7
    assert (cluster.state.is_map_stored, cluster.state.revision_of(KEYS.map)) == (False, 10)


def test_a_read_that_etcd_answered_before_the_leader_went_does_not_bring_it_back(
    cluster: StateApplier,
) -> None:
    """A read after a failed write may be applied long after etcd answered it. A leader that is
    gone and stays in the state would never be succeeded."""
    read = Snapshot(revision=5, values=(key_value(KEYS.leader, LEADER, 5),))
    cluster.apply(read)
    cluster.apply(gone(KEYS.leader, 6))
    assert cluster.apply(read) == []
    assert cluster.state.leader is None
    assert cluster.state.revision_of(KEYS.leader) == 0


def test_a_read_that_etcd_answered_before_a_write_does_not_undo_it(cluster: StateApplier) -> None:
    read = Snapshot(revision=5, values=(key_value(KEYS.term, 1, 5),))
    one = record(1)
    cluster.apply(read)
    cluster.apply(put(KEYS.term, 2, 7))
    cluster.apply(put(key_of(one), one, 8))
    assert cluster.apply(read) == []
    assert (cluster.state.term, cluster.state.revision_of(KEYS.term)) == (2, 7)
    assert cluster.state.records == {one.member: one}


def test_the_leader_key_and_its_revision(cluster: StateApplier) -> None:
    assert cluster.apply(put(KEYS.leader, LEADER, 5)) == [LeaderPut(record=LEADER)]
    assert cluster.state.revision_of(KEYS.leader) == 5
    assert cluster.apply(gone(KEYS.leader, 6)) == [LeaderDeleted()]
    assert cluster.state.revision_of(KEYS.leader) == 0
    cluster.apply(put(KEYS.term, 4, 7))
    assert cluster.state.term == 4


def test_contents_suspicions_and_verdicts_are_kept_by_incarnation(cluster: StateApplier) -> None:
    member = Member(rank=RankId(1), incarnation=Incarnation(2))
    contents = SlotContents(
        rank=member.rank, incarnation=member.incarnation, num_layers=1, slots=b"\0\0"
    )
    doubt = Suspicion(
        rank=member.rank,
        incarnation=member.incarnation,
        by="x",
        reason=SuspicionReason.LINK,
        epoch=Epoch(1),
        step=Step(0),
        raised_at=0.0,
    )
    verdict = Verdict(
        rank=member.rank,
        incarnation=member.incarnation,
        cause=SuspicionReason.LINK,
        signals=(doubt,),
        epoch=Epoch(2),
        first_signal_at=0.0,
        decided_at=0.0,
    )
    keys = {
        KEYS.resident(*member_ids(member)): contents,
        KEYS.assignment(*member_ids(member)): contents,
        KEYS.suspicion(*member_ids(member), Accuser.RANK, "x"): doubt,
        KEYS.verdict(*member_ids(member)): verdict,
    }
    changes = [c for key, value in keys.items() for c in cluster.apply(put(key, value, 5))]
    assert changes == [SuspicionRaised(suspicion=doubt), VerdictPut(verdict=verdict)]
    assert cluster.state.residents == cluster.state.assignments == {member: contents}
    assert cluster.state.verdicts == {member: verdict}
    assert list(cluster.state.suspicions.values()) == [doubt]
    for key in keys:
        assert cluster.apply(gone(key, 6)) == []
    state = cluster.state
    left = (state.residents, state.assignments, state.verdicts, state.suspicions)
    assert left == ({}, {}, {}, {})


@pytest.mark.parametrize(
    ("accuser", "reason"),
    [
        (accuser, reason)
        for reason in SuspicionReason
        for accuser in Accuser
        if accuser not in ACCUSERS[reason]
    ],
)
def test_nobody_gives_a_reason_that_another_kind_of_process_has(
    cluster: StateApplier, accuser: Accuser, reason: SuspicionReason
) -> None:
    """A rank that was taken over cannot tell of an exit, which only a node agent can see."""
    member = Member(rank=RankId(1), incarnation=Incarnation(2))
    doubt = suspicion_of(member, reason)
    key = KEYS.suspicion(*member_ids(member), accuser, doubt.by)
    (change,) = cluster.apply(put(key, doubt, 5))
    assert isinstance(change, MalformedValue)
    assert cluster.state.suspicions == {}


def test_a_suspicion_under_the_key_of_another_member_counts_for_nothing(
    cluster: StateApplier,
) -> None:
    doubt = suspicion_of(Member(rank=RankId(1), incarnation=Incarnation(2)), SuspicionReason.LINK)
    key = KEYS.suspicion(RankId(3), Incarnation(2), Accuser.RANK, doubt.by)
    (change,) = cluster.apply(put(key, doubt, 5))
    assert isinstance(change, MalformedValue)
    assert cluster.state.suspicions == {}


def suspicion_of(member: Member, reason: SuspicionReason) -> Suspicion:
    return Suspicion(
        rank=member.rank,
        incarnation=member.incarnation,
        by="x",
        reason=reason,
        epoch=Epoch(1),
        step=Step(0),
        raised_at=0.0,
    )


def member_ids(member: Member) -> tuple[RankId, Incarnation]:
    return member.rank, member.incarnation


def test_garbage_is_named_and_left_out(cluster: StateApplier) -> None:
    one = record(1)
    (change,) = cluster.apply(WatchEvent(key=key_of(one), value=b"\xc1", mod_revision=5))
    assert isinstance(change, MalformedValue)
    assert cluster.state.records == {}


def test_keys_of_others_are_none_of_our_business(cluster: StateApplier) -> None:
    for key in (
        KEYS.gateways + "g",
        KEYS.map + "s",
        KEYS.incarnation_counter(RankId(0)),
    ):
        assert cluster.apply(WatchEvent(key=key, value=b"?", mod_revision=5)) == []


def test_the_desired_state_and_agents(cluster: StateApplier) -> None:
    desired = DesiredState(change=3, verdicts_paused=True)
    cluster.apply(WatchEvent(key=KEYS.desired, value=pack_record(desired), mod_revision=5))
    agent = AgentRecord(node=NodeId("n"), pid=1, ranks=(RankId(0),))
    cluster.apply(WatchEvent(key=KEYS.agent(agent.node), value=pack_record(agent), mod_revision=6))
    assert cluster.state.desired == desired
    assert cluster.state.revision_of(KEYS.desired) == 5
    assert cluster.state.agents == {agent.node: agent}
    cluster.apply(WatchEvent(key=KEYS.desired, value=None, mod_revision=7))
    cluster.apply(WatchEvent(key=KEYS.agent(agent.node), value=None, mod_revision=8))
    assert cluster.state.desired == DesiredState()
    assert cluster.state.agents == {}


def test_a_rank_of_another_release_is_known_and_no_rank_of_ours() -> None:
    """Nobody probes it, assigns it anything, or declares it dead."""
    applier = StateApplier(KEYS)
    stranger = replace(record(1), release=Release(version="9.0", protocol=90, protocol_min=80))
    key = KEYS.rank(1, 1)
    put = WatchEvent(key=key, value=pack_record(stranger), mod_revision=2)
    assert applier.apply(put) == [RankRefused(record=stranger)]
    assert not applier.state.records
    assert applier.state.refused == {stranger.member: stranger}
    assert applier.apply(WatchEvent(key=key, value=None, mod_revision=3)) == []
    assert not applier.state.refused
