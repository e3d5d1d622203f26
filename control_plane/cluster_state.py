"""What etcd says of the instance, kept current by one watch over all of its keys, and what changed.
It judges nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import WireError
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import (
    InstanceSpec,
    LeaderRecord,
    RankRecord,
    SlotContents,
    Suspicion,
    Verdict,
    unpack_map,
    unpack_record,
)
from shared.store import Snapshot, WatchEvent
from shared.types import Member


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordPut:
    record: RankRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordDeleted:
    """Its lease expired or was revoked."""

    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspicionRaised:
    suspicion: Suspicion


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPut:
    expert_map: ExpertMap


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictPut:
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderPut:
    record: LeaderRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderDeleted:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedValue:
    """A value that nobody of ours wrote; it is left out of the view."""

    key: str
    error: str


StateChange = (
    RecordPut
    | RecordDeleted
    | SuspicionRaised
    | MapPut
    | VerdictPut
    | LeaderPut
    | LeaderDeleted
    | MalformedValue
)


@dataclass(frozen=True, slots=True)
class _Entry:
    value: Any
    mod_revision: int


class ClusterState:
    """Values by key, and typed looks at them. `version` grows with every change."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self.version = 0
        self.synced = False
        self._entries: dict[str, _Entry] = {}
        self.records: dict[Member, RankRecord] = {}
        self.residents: dict[Member, SlotContents] = {}
        self.assignments: dict[Member, SlotContents] = {}
        self.verdicts: dict[Member, Verdict] = {}
        self.suspicions: dict[str, Suspicion] = {}
        self._decoders: tuple[tuple[str, Callable[[bytes], Any]], ...] = (
            (keys.spec, lambda b: unpack_record(b, InstanceSpec)),
            (keys.leader, lambda b: unpack_record(b, LeaderRecord)),
            (keys.term, lambda b: unpack_record(b, int)),
            (keys.map, unpack_map),
            (keys.ranks, lambda b: unpack_record(b, RankRecord)),
            (keys.residents, lambda b: unpack_record(b, SlotContents)),
            (keys.assignments, lambda b: unpack_record(b, SlotContents)),
            (keys.suspicions, lambda b: unpack_record(b, Suspicion)),
            (keys.verdicts, lambda b: unpack_record(b, Verdict)),
        )

    @property
    def spec(self) -> InstanceSpec | None:
        return self._value(self.keys.spec)  # type: ignore[no-any-return]

    @property
    def expert_map(self) -> ExpertMap | None:
        return self._value(self.keys.map)  # type: ignore[no-any-return]

    @property
    def leader(self) -> LeaderRecord | None:
        return self._value(self.keys.leader)  # type: ignore[no-any-return]

    @property
    def term(self) -> int:
        return self._value(self.keys.term) or 0

    def revision_of(self, key: str) -> int:
        """The mod revision to compare in a transaction: 0 where the key is not there."""
        entry = self._entries.get(key)
        return entry.mod_revision if entry else 0

    def newest_records(self) -> Mapping[int, RankRecord]:
        """By rank, its highest registered incarnation."""
        newest: dict[int, RankRecord] = {}
        for member in sorted(self.records):
            newest[member.rank] = self.records[member]
        return newest

    def apply(self, item: Snapshot | WatchEvent) -> list[StateChange]:
        """Idempotent: what is known already, or older than what is known, changes nothing."""
        if isinstance(item, WatchEvent):
            return self._apply(item.key, item.value, item.mod_revision)
        self.synced = True
        changes: list[StateChange] = []
        present_keys = {kv.key for kv in item.values}
        for key in [k for k in self._entries if k not in present_keys]:
            changes += self._apply(key, None, item.revision)
        for kv in item.values:
            known = self._entries.get(kv.key)
            if known is not None and known.mod_revision > kv.mod_revision <= item.revision:
                del self._entries[kv.key]  # etcd lost its data and counts anew
            changes += self._apply(kv.key, kv.value, kv.mod_revision)
        return changes

    def _value(self, key: str) -> Any:
        entry = self._entries.get(key)
        return entry.value if entry else None

    def _apply(self, key: str, data: bytes | None, mod_revision: int) -> list[StateChange]:
        known = self._entries.get(key)
        if known is not None and mod_revision <= known.mod_revision:
            return []
        if data is None:
            return self._remove(key)
        decode = next((d for prefix, d in self._decoders if self._matches(key, prefix)), None)
        if decode is None:
            return []
        try:
            value = decode(data)
        except WireError as error:
            return [MalformedValue(key=key, error=str(error))]
        self.version += 1
        self._entries[key] = _Entry(value, mod_revision)
        return self._index(key, value)

    @staticmethod
    def _matches(key: str, prefix: str) -> bool:
        return key.startswith(prefix) if prefix.endswith("/") else key == prefix

    def _index(self, key: str, value: Any) -> list[StateChange]:
        match value:
            case RankRecord():
                self.records[value.member] = value
                return [RecordPut(record=value)]
            case SlotContents():
                self._contents(key)[value.member] = value
            case Suspicion():
                self.suspicions[key] = value
                return [SuspicionRaised(suspicion=value)]
            case Verdict():
                self.verdicts[value.member] = value
                return [VerdictPut(verdict=value)]
            case ExpertMap():
                return [MapPut(expert_map=value)]
            case LeaderRecord():
                return [LeaderPut(record=value)]
        return []

    def _remove(self, key: str) -> list[StateChange]:
        entry = self._entries.pop(key, None)
        if entry is None:
            return []
        self.version += 1
        match entry.value:
            case RankRecord() as record:
                self.records.pop(record.member, None)
                return [RecordDeleted(member=record.member)]
            case SlotContents() as contents:
                self._contents(key).pop(contents.member, None)
            case Suspicion():
                self.suspicions.pop(key, None)
            case Verdict() as verdict:
                self.verdicts.pop(verdict.member, None)
            case LeaderRecord():
                return [LeaderDeleted()]
        return []

    def _contents(self, key: str) -> dict[Member, SlotContents]:
        return self.residents if key.startswith(self.keys.residents) else self.assignments
