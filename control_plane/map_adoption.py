"""Which members run under the present map, according to their Pongs, and which of its joiners have
therefore been seen to step under it. Pure; it decides no map."""

from __future__ import annotations

from collections.abc import Iterable

from shared.expert_map import ExpertMap
from shared.types import Epoch, Member, RankId


class MapAdoption:
    """A new leader has heard no Pong yet, so it assumes that no joiner of the present map has
    stepped under it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._map: ExpertMap | None = None
        self._since = 0.0
        self._epochs: dict[Member, Epoch] = {}
        self._out_of_step: dict[Member, Epoch] = {}
        self._standstill = Epoch(0)

    def on_map(self, expert_map: ExpertMap | None, kept: set[Member], now: float) -> None:
        """The present map. Forgets all members that are not in `kept`."""
        known = self._map.epoch if self._map is not None else None
        if expert_map is None or expert_map.epoch != known:
            self._since = now
        self._map = expert_map
        self._epochs = {m: epoch for m, epoch in self._epochs.items() if m in kept}
        self._out_of_step = {m: epoch for m, epoch in self._out_of_step.items() if m in kept}

    def on_adopted(self, member: Member, epoch: Epoch) -> None:
        self._epochs[member] = max(epoch, self._epochs.get(member, epoch))

    def on_out_of_step(self, member: Member, epoch: Epoch) -> None:
        """Under this map the member has lost count of its peers; 0: it has not, or no longer."""
        self._out_of_step[member] = epoch

    def on_standstill(self) -> None:
        """No step moves under the present map."""
        self._standstill = self._map.epoch if self._map is not None else Epoch(0)

    def needs_resync(self, members: Iterable[Member]) -> bool:
        """Whether one of these can go on only as a joiner, and the present map does not name it as
        one, or it has lost count under that map; or whether nothing moves under that map."""
        current_map = self._map
        if current_map is None:
            return False
        return self._standstill == current_map.epoch or any(
            epoch == current_map.epoch or (epoch > 0 and m.rank not in current_map.joiners)
            for m in members
            if current_map.has(m) and (epoch := self._out_of_step.get(m, Epoch(0)))
        )

    @property
    def is_complete(self) -> bool:
        """Whether every member is known to run under the map or a newer one."""
        if self._map is None:
            return True
        needed = self._map.epoch
        return all(self._epochs.get(m, Epoch(0)) >= needed for m in self._map.members)

    @property
    def unproven(self) -> tuple[RankId, ...]:
        """The present map's joiners, until all members are known to run under it."""
        return () if self._map is None or self.is_complete else self._map.joiners

    def may_follow(self, now: float) -> bool:
        """Whether a map that removes nobody may come next. A member that does not adopt the present
        map delays that only until the timeout."""
        return self.is_complete or now - self._since >= self._timeout_s

    def joiners(self, members: Iterable[Member]) -> tuple[RankId, ...]:
        """The ranks among the next map's members that have not been seen to step under the present
        one; all of them, if one has lost count."""
        members = list(members)
        current_map = self._map
        if current_map is None or self.needs_resync(members):
            return tuple(sorted(m.rank for m in members))
        unproven = self.unproven
        return tuple(
            sorted(m.rank for m in members if not current_map.has(m) or m.rank in unproven)
        )
