"""Follows etcd for the control plane: applies a watch to `ClusterState`, and says what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from control_plane.cluster_state import ClusterState
from shared.desired_state import DesiredState
from shared.errors import WireError
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
    unpack_map,
    unpack_record,
)
from shared.release import own_release
from shared.revisions import Revisions
from shared.store import Snapshot, WatchEvent
from shared.types import ACCUSERS, Member, NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordPut:
    record: RankRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRefused:
    """A rank has registered whose release and ours cannot serve together."""

    record: RankRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordDeleted:
    """The record's lease expired or was revoked."""

    member: Member


@dataclass(frozen=True, slots=True, kw_only=True)
class SuspicionRaised:
    suspicion: Suspicion


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewPut:
    """What a node agent says of a rank's process."""

    view: ProcessView


@dataclass(frozen=True, slots=True, kw_only=True)
class MapPut:
    expert_map: ExpertMap


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictPut:
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredPut:
    """Somebody asked for a change, a part of one is done, or the key is gone: nothing is asked."""

    desired: DesiredState


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderPut:
    record: LeaderRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaderDeleted:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedValue:
    """A value that no Starfish service wrote. The state does not contain it."""

    key: str
    error: str


StateChange = (
    RecordPut
    | RankRefused
    | RecordDeleted
    | SuspicionRaised
    | ViewPut
    | MapPut
    | VerdictPut
    | DesiredPut
    | LeaderPut
    | LeaderDeleted
    | MalformedValue
)


class _Kind(NamedTuple):
    """What one key holds, or the keys under one prefix, which ends with a slash."""

    key: str
    field: str  # of ClusterState
    decode: Callable[[bytes], Any]

    @property
    def is_table(self) -> bool:
        return self.key.endswith("/")

    def holds(self, key: str) -> bool:
        return key.startswith(self.key) if self.is_table else key == self.key


class _Entry(NamedTuple):
    kind: _Kind
    value: Any


_ABSENT: Mapping[str, Any] = {"term": 0, "first_epoch": 0, "desired": DesiredState()}
"""What a field of ClusterState has if its key does not exist, where that is not None."""


class _Update:
    """The next state while it is being made. Copies a table when it first changes."""

    def __init__(self, state: ClusterState) -> None:
        self._state = state
        self._changed: dict[str, Any] = {}

    @property
    def expert_map(self) -> ExpertMap | None:
        """That of the next state."""
        expert_map: ExpertMap | None = self._changed.get("expert_map", self._state.expert_map)
        return expert_map

    def synced(self) -> None:
        self._changed["synced"] = True

    def put(self, key: str, entry: _Entry, mod_revision: int) -> None:
        self._changed["version"] = self._changed.get("version", self._state.version) + 1
        if entry.kind.is_table:
            self._table(entry.kind.field)[_index_of(key, entry.value)] = entry.value
            if isinstance(entry.value, ProcessView | LeaderDoubt):
                self._table("revisions")[key] = mod_revision
        else:
            self._changed[entry.kind.field] = entry.value
            self._table("revisions")[key] = mod_revision
            if entry.kind.field == "expert_map":
                self._changed["is_map_stored"] = True

    def remove(self, key: str, entry: _Entry) -> None:
        self._changed["version"] = self._changed.get("version", self._state.version) + 1
        if entry.kind.is_table:
            self._table(entry.kind.field).pop(_index_of(key, entry.value), None)
            if isinstance(entry.value, ProcessView | LeaderDoubt):
                self._table("revisions").pop(key, None)
        else:
            self._changed[entry.kind.field] = _ABSENT.get(entry.kind.field)
            self._table("revisions").pop(key, None)

    def keep_map(self, expert_map: ExpertMap) -> None:
        """Whatever etcd holds now, ranks run this newer one."""
        self._changed["version"] = self._changed.get("version", self._state.version) + 1
        self._changed["expert_map"], self._changed["is_map_stored"] = expert_map, False

    def result(self) -> ClusterState:
        return replace(self._state, **self._changed) if self._changed else self._state

    def _table(self, field: str) -> dict[Any, Any]:
        if field not in self._changed:
            self._changed[field] = dict(getattr(self._state, field))
        table: dict[Any, Any] = self._changed[field]
        return table


class StateApplier:
    """`state` is the newest snapshot; `apply` replaces it.

    One watch event copies only the table that it changes: when a rank dies, every peer writes a
    suspicion, and each of them arrives as an event of its own.

    The watch, reads after writes of unknown outcome and the results of own transactions arrive in
    any order: `Revisions` says which of it is news.
    """

    def __init__(self, keys: Keys) -> None:
        self.state = ClusterState(keys=keys)
        self._revisions = Revisions()
        self._entries: dict[str, _Entry] = {}
        self._kinds = (
            _Kind(keys.spec, "spec", lambda b: unpack_record(b, InstanceSpec)),
            _Kind(keys.leader, "leader", lambda b: unpack_record(b, LeaderRecord)),
            _Kind(keys.term, "term", lambda b: unpack_record(b, int)),
            _Kind(keys.first_epoch, "first_epoch", lambda b: unpack_record(b, int)),
            _Kind(keys.map, "expert_map", unpack_map),
            _Kind(keys.ranks, "records", lambda b: unpack_record(b, RankRecord)),
            _Kind(keys.residents, "residents", lambda b: unpack_record(b, SlotContents)),
            _Kind(keys.assignments, "assignments", lambda b: unpack_record(b, SlotContents)),
            _Kind(keys.leader_doubts, "leader_doubts", lambda b: unpack_record(b, LeaderDoubt)),
            _Kind(keys.suspicions, "suspicions", lambda b: unpack_record(b, Suspicion)),
            _Kind(keys.views, "views", lambda b: unpack_record(b, ProcessView)),
            _Kind(keys.verdicts, "verdicts", lambda b: unpack_record(b, Verdict)),
            _Kind(keys.desired, "desired", lambda b: unpack_record(b, DesiredState)),
            _Kind(keys.agents, "agents", lambda b: unpack_record(b, AgentRecord)),
        )

    def apply(self, item: Snapshot | WatchEvent) -> list[StateChange]:
        """Replaces `state`, and returns what changed. Idempotent: what is known already, or older
        than what is known, changes nothing. A Snapshot must be of all keys of the instance."""
        update = _Update(self.state)
        if isinstance(item, Snapshot):
            update.synced()
        changes: list[StateChange] = []
        for event in self._revisions.admit(item):
            changes += self._apply(update, event)
        running = self.state.expert_map
        is_restored = isinstance(item, Snapshot) and item.restored
        if running is not None:
            stored = update.expert_map
            is_lost = stored is None and (is_restored or not self.state.is_map_stored)
            if is_lost or (stored is not None and stored.epoch < running.epoch):
                update.keep_map(running)
                changes = [change for change in changes if not isinstance(change, MapPut)]
        self.state = update.result()
        return changes

    def keep_map(self, expert_map: ExpertMap) -> list[StateChange]:
        """Ranks were given this map, which etcd does not hold yet."""
        update = _Update(self.state)
        update.keep_map(expert_map)
        self.state = update.result()
        return [MapPut(expert_map=expert_map)]

    def _apply(self, update: _Update, event: WatchEvent) -> list[StateChange]:
        key = event.key
        if event.value is None:
            return self._remove(update, key)
        kind = next((kind for kind in self._kinds if kind.holds(key)), None)
        if kind is None:
            return []
        try:
            value = kind.decode(event.value)
            if isinstance(value, Suspicion):
                _check_accuser(self.state.keys, key, value)
            elif isinstance(value, LeaderDoubt):
                _check_doubt(self.state.keys, key, value)
        except WireError as error:
            return [MalformedValue(key=key, error=str(error))]
        if isinstance(value, RankRecord) and not value.release.speaks_with(own_release()):
            self._entries[key] = entry = _Entry(kind._replace(field="refused"), value)
            update.put(key, entry, event.mod_revision)
            return [RankRefused(record=value)]
        entry = self._entries[key] = _Entry(kind, value)
        update.put(key, entry, event.mod_revision)
        return _changes_of_put(value)

    def _remove(self, update: _Update, key: str) -> list[StateChange]:
        entry = self._entries.pop(key, None)
        if entry is None:
            return []
        update.remove(key, entry)
        match entry.value:
            case RankRecord() as record if entry.kind.field == "records":
                return [RecordDeleted(member=record.member)]
            case LeaderRecord():
                return [LeaderDeleted()]
            case DesiredState():
                return [DesiredPut(desired=DesiredState())]
        return []


def _check_accuser(keys: Keys, key: str, suspicion: Suspicion) -> None:
    """etcd lets each kind of process write its own suspicions alone: it says who raised this one.
    Raises WireError if that process may not have this reason, or speaks of another rank."""
    ids = suspicion.rank, suspicion.incarnation
    may_raise = ACCUSERS[suspicion.reason]
    if all(key != keys.suspicion(*ids, accuser, suspicion.by) for accuser in may_raise):
        raise WireError(
            f"its writer may not suspect {suspicion.reason.value} of {suspicion.member}"
        )


def _check_doubt(keys: Keys, key: str, doubt: LeaderDoubt) -> None:
    """Raises WireError if it speaks for another rank."""
    if key != keys.leader_doubt(doubt.rank, doubt.incarnation):
        raise WireError(f"it is not the doubt of {doubt.member}")


def _index_of(
    key: str,
    value: RankRecord
    | SlotContents
    | Suspicion
    | LeaderDoubt
    | ProcessView
    | Verdict
    | AgentRecord,
) -> Member | NodeId | str:
    """Many may suspect one member, so suspicions are found by key."""
    if isinstance(value, AgentRecord):
        return value.node
    return key if isinstance(value, Suspicion) else value.member


def _changes_of_put(value: Any) -> list[StateChange]:
    match value:
        case RankRecord():
            return [RecordPut(record=value)]
        case Suspicion():
            return [SuspicionRaised(suspicion=value)]
        case ProcessView():
            return [ViewPut(view=value)]
        case Verdict():
            return [VerdictPut(verdict=value)]
        case ExpertMap():
            return [MapPut(expert_map=value)]
        case DesiredState():
            return [DesiredPut(desired=value)]
        case LeaderRecord():
            return [LeaderPut(record=value)]
    return []
