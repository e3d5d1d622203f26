"""What the ranks have said of their load, by their answers to the leader's probes."""

from __future__ import annotations

from control_plane.probe_events import ProbeBroken, ProbeEvent, ProbePong, ProbeRefused
from control_plane.state_applier import RecordDeleted, StateChange
from shared.types import Member
from shared.wire import Load


class RankLoads:
    """Forgets a rank that cannot be asked any more."""

    def __init__(self) -> None:
        self._loads: dict[Member, Load] = {}

    def of(self, member: Member) -> Load | None:
        return self._loads.get(member)

    def on_probe(self, event: ProbeEvent) -> None:
        match event:
            case ProbePong():
                self._loads[event.member] = event.pong.load
            case ProbeBroken() | ProbeRefused():
                self._loads.pop(event.member, None)

    def on_change(self, change: StateChange) -> None:
        if isinstance(change, RecordDeleted):
            self._loads.pop(change.member, None)

    def clear(self) -> None:
        """This process leads no more: what it knows grows old."""
        self._loads.clear()
