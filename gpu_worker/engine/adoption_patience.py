"""How long a planned map waits for members of the map before it that have not heard of it. Pure."""

from __future__ import annotations

from collections.abc import Set

from shared.expert_map import ExpertMap
from shared.types import Epoch, Member

ADOPTION_PATIENCE_S = 0.5
"""For so long steps are begun under the map before. A rank that leaves waits twice as long: the
others go on without it then, and it is not they who wait."""


class AdoptionPatience:
    def __init__(self, member: Member) -> None:
        self._member = member
        self._running: ExpertMap | None = None
        self._newest_epoch = Epoch(0)
        self._until = 0.0  # of the newest map

    def on_adopted(self, expert_map: ExpertMap) -> None:
        self._running = expert_map

    def steps_with(self, peer: Member) -> bool:
        """Whether steps run that the peer takes part in."""
        return self._running is not None and self._running.has(peer)

    def until(self, expert_map: ExpertMap, broken_links: Set[Member], now: float) -> float:
        """Until when this map, which is newer than all before, waits; 0: not at all. Maps that
        follow one another do not prolong the wait. Who has lost a link may be unable to complete
        any step."""
        until, running = 0.0, self._running
        if (
            expert_map.is_planned
            and running is not None
            and broken_links.isdisjoint(running.members)
        ):
            until = now + ADOPTION_PATIENCE_S * (1 if expert_map.has(self._member) else 2)
            if self._newest_epoch > running.epoch:
                until = min(until, self._until)
        self._newest_epoch, self._until = expert_map.epoch, until
        return until
