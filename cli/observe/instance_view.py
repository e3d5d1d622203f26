"""Everything in etcd about an instance at one revision, by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from shared.change_progress import Seen
from shared.desired_state import DesiredState
from shared.errors import StarfishError
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import (
    AgentRecord,
    GatewayRecord,
    InstanceSpec,
    LeaderRecord,
    RankRecord,
    SlotContents,
    Suspicion,
    Verdict,
    unpack_map,
    unpack_record,
)
from shared.store import KeyValue
from shared.types import Member

Record = (
    ExpertMap
    | InstanceSpec
    | DesiredState
    | LeaderRecord
    | RankRecord
    | SlotContents
    | Suspicion
    | Verdict
    | AgentRecord
    | GatewayRecord
)


@dataclass(slots=True, kw_only=True)
class InstanceView:
    """Built once from a snapshot. A field is empty or None if etcd has no such record."""

    spec: InstanceSpec | None = None
    leader: LeaderRecord | None = None
    desired: DesiredState = DesiredState()
    expert_map: ExpertMap | None = None
    ranks: list[RankRecord] = field(default_factory=list)
    agents: list[AgentRecord] = field(default_factory=list)
    gateways: list[GatewayRecord] = field(default_factory=list)
    suspicions: list[Suspicion] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    @classmethod
    def of(cls, keys: Keys, values: Iterable[KeyValue]) -> InstanceView:
        view = cls()
        for kv in values:
            view._add(decode_value(keys, kv.key, kv.value))
        return view

    def record_of(self, rank: int) -> RankRecord | None:
        """The incarnation that the map names, else the newest one; None if the rank is not
        registered."""
        incarnations = [record for record in self.ranks if record.rank == rank]
        mapped = [
            r for r in incarnations if self.expert_map is not None and self.expert_map.has(r.member)
        ]
        return max(mapped or incarnations, key=lambda record: record.incarnation, default=None)

    def seen(self, sessions_of: Callable[[Member], int | None]) -> Seen:
        """`sessions_of` as in `Seen`."""
        return Seen(
            num_ranks=self.spec.num_ranks if self.spec is not None else 0,
            desired=self.desired,
            expert_map=self.expert_map,
            records={record.member: record for record in self.ranks},
            verdicts=self.verdicts,
            sessions_of=sessions_of,
            agents=self.agents,
        )

    def _add(self, record: Record | None) -> None:
        match record:
            case InstanceSpec():
                self.spec = record
            case DesiredState():
                self.desired = record
            case LeaderRecord():
                self.leader = record
            case ExpertMap():
                self.expert_map = record
            case RankRecord():
                self.ranks.append(record)
            case AgentRecord():
                self.agents.append(record)
            case GatewayRecord():
                self.gateways.append(record)
            case Suspicion():
                self.suspicions.append(record)
            case Verdict():
                self.verdicts.append(record)


def decode_value(keys: Keys, key: str, value: bytes) -> Record | None:
    """The record of a key; None for a key without a record, or a record of another version."""
    prefixes: dict[str, type[Record]] = {
        keys.ranks: RankRecord,
        keys.residents: SlotContents,
        keys.assignments: SlotContents,
        keys.suspicions: Suspicion,
        keys.verdicts: Verdict,
        keys.agents: AgentRecord,
        keys.gateways: GatewayRecord,
    }
    single: dict[str, type[Record]] = {
        keys.spec: InstanceSpec,
        keys.desired: DesiredState,
        keys.leader: LeaderRecord,
    }
    try:
        if key == keys.map:
            return unpack_map(value)
        kind = single.get(key) or next((k for p, k in prefixes.items() if key.startswith(p)), None)
        return None if kind is None else unpack_record(value, kind)
    except StarfishError:
        return None
