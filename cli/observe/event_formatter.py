"""Turns each change in etcd into one line. Pure: events in, lines out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cli.observe.desired_words import changes_in_words
from cli.observe.instance_view import Record, decode_value
from shared.desired_state import DesiredState
from shared.expert_map import ExpertMap
from shared.keys import Keys
from shared.records import (
    AgentRecord,
    GatewayRecord,
    LeaderRecord,
    RankRecord,
    SlotContents,
    Suspicion,
    Verdict,
)
from shared.store import WatchEvent
from shared.types import EMPTY_SLOT, SuspicionReason


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLine:
    """One change: `kind` and `fields` for machines, `text` for people."""

    kind: str
    text: str
    fields: dict[str, Any]


class EventFormatter:
    """Remembers the last records, to describe what a deletion removed and what a map changed."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._known: dict[str, Record] = {}

    def lines(self, events: Iterable[WatchEvent]) -> Iterator[EventLine]:
        """`events` are changes that were not shown before."""
        for event in events:
            yield from self._change(event.key, event.value)

    def _change(self, key: str, value: bytes | None) -> Iterator[EventLine]:
        old = self._known.pop(key, None)
        new = None if value is None else decode_value(self._keys, key, value)
        if new is not None:
            self._known[key] = new
            line = self._appeared(key, new, old)
        else:
            line = None if old is None else _disappeared(old)
        if line is not None:
            yield line

    def _appeared(self, key: str, new: Record, old: Record | None) -> EventLine | None:
        match new:
            case RankRecord():
                return _rank(new, old if isinstance(old, RankRecord) else None)
            case ExpertMap():
                return _map(new, old if isinstance(old, ExpertMap) else None)
            case SlotContents():
                return _slots(new, key.startswith(self._keys.assignments))
            case Suspicion():
                return _suspicion(new)
            case Verdict():
                return _verdict(new)
            case DesiredState():
                return _desired(new, old if isinstance(old, DesiredState) else DesiredState())
            case _:
                return _presence(new, appeared=True) if new != old else None


def _rank(new: RankRecord, old: RankRecord | None) -> EventLine:
    fields = {"rank": new.rank, "incarnation": new.incarnation, "state": new.state.value}
    if old is None:
        text = f"rank {new.member} registered on {new.node} (pid {new.pid}, {new.state.value})"
        return EventLine(kind="lease_came", text=text, fields=fields | {"pid": new.pid})
    if new.state is not old.state:
        return EventLine(
            kind="rank_state", text=f"rank {new.member} is {new.state.value}", fields=fields
        )
    peers = ", ".join(str(member) for member in new.links) or "no rank"
    return EventLine(
        kind="rank_links",
        text=f"rank {new.member} has links with {peers}",
        fields=fields | {"links": [str(member) for member in new.links]},
    )


def _map(new: ExpertMap, old: ExpertMap | None) -> EventLine:
    before = set(old.members) if old else set()
    joined = sorted(str(m) for m in set(new.members) - before)
    left = sorted(str(m) for m in before - set(new.members))
    moved = _slots_changed(new, old)
    parts = [
        *([f"joined: {', '.join(joined)}"] if joined else []),
        *([f"left: {', '.join(left)}"] if left else []),
        f"{moved} slots of survivors changed" if old else f"{len(new.members)} ranks",
    ]
    return EventLine(
        kind="map",
        text=f"epoch {new.epoch}: {new.cause or 'published'} ({'; '.join(parts)})",
        fields={
            "epoch": new.epoch,
            "cause": new.cause,
            "members": [str(member) for member in new.members],
            "joined": joined,
            "left": left,
            "slots_changed": moved,
        },
    )


def _slots_changed(new: ExpertMap, old: ExpertMap | None) -> int:
    """Counts over all layers, on ranks that are members of both maps."""
    if old is None or old.placement.shape != new.placement.shape:
        return 0
    both = [member.rank for member in new.members if old.has(member)]
    return int(np.count_nonzero(new.placement[:, both] != old.placement[:, both]))


def _slots(new: SlotContents, assigned: bool) -> EventLine:
    filled = int(np.count_nonzero(new.array() > EMPTY_SLOT))
    verb = "is assigned" if assigned else "holds"
    member = f"{new.rank}.{new.incarnation}"
    return EventLine(
        kind="assignment" if assigned else "residents",
        text=f"rank {member} {verb} {filled} experts in {new.num_layers} layers",
        fields={"rank": new.rank, "incarnation": new.incarnation, "experts": filled},
    )


def _suspicion(new: Suspicion) -> EventLine:
    detail = f": {new.detail}" if new.detail else ""
    return EventLine(
        kind="suspicion",
        text=f"{new.by} suspects rank {new.rank}.{new.incarnation} ({new.reason.value}{detail})",
        fields={
            "rank": new.rank,
            "incarnation": new.incarnation,
            "by": new.by,
            "reason": new.reason.value,
            "epoch": new.epoch,
            "step": new.step,
            "detail": new.detail,
        },
    )


def _verdict(new: Verdict) -> EventLine:
    took_ms = (new.decided_at - new.first_signal_at) * 1000
    signals = sorted({signal.by for signal in new.signals})
    text = (
        f"verdict: rank {new.rank}.{new.incarnation} is dead ({new.cause.value}), "
        f"{took_ms:.0f} ms after the first signal"
    )
    if new.cause is SuspicionReason.DRAINED:
        text = f"rank {new.rank}.{new.incarnation} left, as was asked"
    return EventLine(
        kind="verdict",
        text=text,
        fields={
            "rank": new.rank,
            "incarnation": new.incarnation,
            "cause": new.cause.value,
            "epoch": new.epoch,
            "took_ms": round(took_ms, 3),
            "by": signals,
        },
    )


def _desired(new: DesiredState, old: DesiredState) -> EventLine | None:
    words = changes_in_words(old, new)
    if not words:
        return None
    return EventLine(
        kind="desired",
        text=f"change {new.change}: {'; '.join(words)}",
        fields={"change": new.change, "what": list(words)},
    )


def _disappeared(old: Record) -> EventLine | None:
    match old:
        case RankRecord():
            return EventLine(
                kind="lease_gone",
                text=f"the lease of rank {old.member} is gone (pid {old.pid})",
                fields={"rank": old.rank, "incarnation": old.incarnation, "pid": old.pid},
            )
        case Suspicion():
            return EventLine(
                kind="suspicion_gone",
                text=f"{old.by} no longer suspects rank {old.rank}.{old.incarnation}",
                fields={"rank": old.rank, "incarnation": old.incarnation, "by": old.by},
            )
        case _:
            return _presence(old, appeared=False)


def _presence(record: Record, *, appeared: bool) -> EventLine | None:
    match record:
        case LeaderRecord():
            name, who = "leader", f"{record.control_plane} (term {record.term})"
            text = f"{who} leads" if appeared else f"{who} leads no longer"
        case AgentRecord():
            name, who = "agent", record.node
            text = f"node agent {who} {'is here' if appeared else 'is gone'}"
        case GatewayRecord():
            name, who = "gateway", record.gateway
            text = f"gateway {who} {'is here' if appeared else 'is gone'}"
        case _:
            return None
    return EventLine(kind=f"{name}_{'came' if appeared else 'gone'}", text=text, fields={name: who})
