"""Alarms that there are too few slots for all experts: each once, until there were enough again.
Pure."""

from __future__ import annotations

from control_plane.formation import TooFewSlots
from control_plane.judgements import Alarm, AlarmKind
from shared.expert_map import ExpertMap


class CapacityAlarms:
    def __init__(self) -> None:
        self._alarms: list[Alarm] = []
        self._alarmed: set[AlarmKind] = set()
        self._expert_map: ExpertMap | None = None

    def on_too_few_slots(self, step: TooFewSlots) -> None:
        detail = (
            f"{step.num_ranks} ranks have too few slots: {step.num_unplaced} experts find no "
            "place; serving waits for more ranks"
        )
        self._raise(AlarmKind.TOO_FEW_SLOTS, detail)

    def on_enough_slots(self) -> None:
        """For a map to be formed."""
        self._alarmed.discard(AlarmKind.TOO_FEW_SLOTS)

    def on_map(self, expert_map: ExpertMap | None) -> None:
        """The newest map, as often as one likes."""
        if expert_map is None or expert_map is self._expert_map:
            return
        self._expert_map = expert_map
        num_experts = int((expert_map.on_demand >= 0).sum())
        if num_experts:
            detail = f"{num_experts} experts have no slot; their weights are read for every step"
            self._raise(AlarmKind.BELOW_CAPACITY, detail)
        else:
            self._alarmed.discard(AlarmKind.BELOW_CAPACITY)

    def take(self) -> list[Alarm]:
        """Those since the last call."""
        alarms, self._alarms = self._alarms, []
        return alarms

    def _raise(self, kind: AlarmKind, detail: str) -> None:
        if kind not in self._alarmed:
            self._alarmed.add(kind)
            self._alarms.append(Alarm(kind=kind, detail=detail))
