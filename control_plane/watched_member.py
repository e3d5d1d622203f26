"""What the failure detector knows of one member of the map: its connection, its lease, the
suspicions against it, and its last sign of life. It judges nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import inf

from shared.records import Suspicion
from shared.types import Member, NodeId, ProcessState


class ProbeState(Enum):
    """The control plane's connection to a rank's control port."""

    UNTRIED = "untried"
    CONNECTED = "connected"
    BROKEN = "broken"
    REFUSED = "refused"


@dataclass(slots=True)
class WatchedMember:
    """Times whose names end in `_attentive_s` are in attentive time: seconds that leave out our own
    stalls."""

    member: Member
    added_attentive_s: float
    node: NodeId | None = None  # of its record
    probe: ProbeState = ProbeState.UNTRIED
    exited: bool = False
    signals: list[Suspicion] = field(default_factory=list)
    first_signal_at: float = 0.0
    suspected_attentive_s: float | None = None
    heartbeat_attentive_s: float = -inf
    pong_attentive_s: float = -inf
    view: ProcessState | None = None  # what its node agent said last
    view_attentive_s: float = -inf
    stopped_attentive_s: float = -inf  # when it was first said to be stopped
    host_silent_attentive_s: float = -inf  # when its whole host was last silent
    unleased_attentive_s: float | None = None
    announced_until_attentive_s: float = -inf  # it may be kept from answering until then
    lease_grace: bool = False  # lost its lease in a mass expiry
    epoch: int = 0  # the newest that a Pong of it has told
    accusers: set[str] = field(default_factory=set)  # since the last progress
    waiting_for: frozenset[int] = frozenset()  # ranks, in its last Pong
    unheard: dict[int, float] = field(default_factory=dict)  # ranks, since when; in its last Pong
    answering_since_attentive_s: float = -inf  # without a pause
    prompt_since_attentive_s: float = -inf  # without even a short one

    @property
    def is_never_probed(self) -> bool:
        return self.unleased_attentive_s is not None and self.probe is ProbeState.UNTRIED

    @property
    def is_stopped(self) -> bool:
        return self.view is ProcessState.STOPPED

    def view_at(self, attentive_s: float, age_max_s: float) -> ProcessState | None:
        """What its node agent says, if it said so no longer ago than `age_max_s`. A stopped process
        stays so until the agent says otherwise, or nothing for long."""
        if self.is_stopped or attentive_s - self.view_attentive_s <= age_max_s:
            return self.view
        return None

    @property
    def may_be_alive_without_lease(self) -> bool:
        """Whether its lease is gone, but nothing else suggests that it is dead."""
        return (
            self.unleased_attentive_s is not None
            and not self.exited
            and self.probe in (ProbeState.CONNECTED, ProbeState.UNTRIED)
        )
