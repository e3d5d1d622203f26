"""One immutable snapshot of what etcd holds about the instance. `StateApplier` makes the next one;
nothing here judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shared.desired_state import DesiredState
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import (
    AgentRecord,
    InstanceSpec,
    LeaderDoubt,
    LeaderRecord,
    ProcessView,
    RankRecord,
    SlotContents,
    Suspicion,
    Verdict,
)
from shared.types import Member, NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """Never edited: every change of etcd leads to a new one with a higher `version`.

    `synced` says whether the first snapshot of the watch is in it. `revisions` holds the mod
    revisions of the keys that transactions compare: leader, term, spec, desired, map, views; and of
    doubts about the leader, which are about the one in office when they were written. If
    etcd lost its data, `expert_map` is still the one that ranks run, and `is_map_stored` is False.
    `refused` are registered ranks with which this process cannot serve: `records` lacks them.
    """

    keys: Keys
    version: int = 0
    synced: bool = False
    spec: InstanceSpec | None = None
    expert_map: ExpertMap | None = None
    is_map_stored: bool = True
    leader: LeaderRecord | None = None
    term: int = 0
    first_epoch: int = 0  # of the present term
    revisions: Mapping[str, int] = field(default_factory=dict)
    records: Mapping[Member, RankRecord] = field(default_factory=dict)
    refused: Mapping[Member, RankRecord] = field(default_factory=dict)
    residents: Mapping[Member, SlotContents] = field(default_factory=dict)
    assignments: Mapping[Member, SlotContents] = field(default_factory=dict)
    verdicts: Mapping[Member, Verdict] = field(default_factory=dict)
    suspicions: Mapping[str, Suspicion] = field(default_factory=dict)  # by etcd key
    leader_doubts: Mapping[Member, LeaderDoubt] = field(default_factory=dict)  # by whose they are
    views: Mapping[Member, ProcessView] = field(default_factory=dict)
    desired: DesiredState = DesiredState()
    agents: Mapping[NodeId, AgentRecord] = field(default_factory=dict)

    def revision_of(self, key: str) -> int:
        """The mod revision that a transaction compares; 0 if the key does not exist."""
        return self.revisions.get(key, 0)

    def newest_records(self) -> Mapping[int, RankRecord]:
        """The highest registered incarnation of each rank, by rank."""
        return {member.rank: self.records[member] for member in sorted(self.records)}
