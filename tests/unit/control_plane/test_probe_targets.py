"""Whom the control plane probes, above all after leases were lost."""

from __future__ import annotations

import numpy as np

from control_plane.cluster_state import ClusterState
from control_plane.probe_targets import ProbeTargets
from control_plane.state_applier import MapPut, RecordPut
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import RankRecord
from shared.types import Epoch, Incarnation, Member, NodeId, RankId, RankState

KEYS = Keys("targets")


def record(rank: int) -> RankRecord:
    return RankRecord(
        rank=RankId(rank),
        incarnation=Incarnation(1),
        node=NodeId("n"),
        pid=1,
        lease_id=1,
        state=RankState.READY,
        control_host="h",
        control_port=1,
        transfer_name="t",
        slots=1,
        kv_blocks=1,
        kv_block_tokens=1,
        exchange="transfer",
    )


def map_of(*members: Member) -> ExpertMap:
    placement = np.zeros((1, 4, 1), dtype=np.int16)
    return ExpertMap(epoch=Epoch(1), num_experts=1, members=members, placement=placement)


def state_of(*records: RankRecord, expert_map: ExpertMap | None = None) -> ClusterState:
    return ClusterState(keys=KEYS, records={r.member: r for r in records}, expert_map=expert_map)


def test_registered_ranks_are_probed_and_deregistered_ones_are_not() -> None:
    targets = ProbeTargets()
    for each in (record(0), record(1)):
        targets.on_change(RecordPut(record=each), state_of(record(0), record(1)))
    assert targets.records(state_of(record(1)), ()) == [record(1)]


def test_a_member_without_its_record_is_probed_until_it_is_dead() -> None:
    targets, member = ProbeTargets(), record(0).member
    targets.on_change(RecordPut(record=record(0)), state_of(record(0)))
    without_record = state_of(expert_map=map_of(member))
    assert targets.records(without_record, ()) == [record(0)]
    assert targets.records(without_record, {member}) == []


def test_a_new_map_forgets_who_is_neither_registered_nor_a_member() -> None:
    targets = ProbeTargets()
    both = state_of(record(0), record(1))
    for each in (record(0), record(1)):
        targets.on_change(RecordPut(record=each), both)
    newer = map_of(record(1).member)
    targets.on_change(MapPut(expert_map=newer), state_of(expert_map=newer))
    again = map_of(record(0).member, record(1).member)
    assert targets.records(state_of(expert_map=again), ()) == [record(1)]
