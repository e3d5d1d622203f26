"""Whom to probe: the last record of every rank that is registered or in the map."""

from __future__ import annotations

from collections.abc import Collection

from control_plane.cluster_state import ClusterState
from control_plane.state_applier import MapPut, RecordPut, StateChange
from shared.records import RankRecord
from shared.types import Member


class ProbeTargets:
    """Kept on standby too: if etcd's own trouble lets healthy leases expire, their records are gone
    from etcd, and the next leader must still know the addresses of the members."""

    def __init__(self) -> None:
        self._last_records: dict[Member, RankRecord] = {}

    def on_change(self, change: StateChange, state: ClusterState) -> None:
        """`state` contains the change."""
        if isinstance(change, RecordPut):
            self._last_records[change.record.member] = change.record
        elif isinstance(change, MapPut):
            kept = {*state.records, *change.expert_map.members}
            self._last_records = {m: r for m, r in self._last_records.items() if m in kept}

    def records(self, state: ClusterState, dead: Collection[Member]) -> list[RankRecord]:
        """All registered ranks, and the members without a record that are not in `dead`."""
        members = state.expert_map.members if state.expert_map else ()
        kept = {m for m in members if m not in dead}
        return [r for m, r in self._last_records.items() if m in state.records or m in kept]
