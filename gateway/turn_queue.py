"""Whose request is prepared next: few are at a time, and a client that sends many does not keep
others waiting. Pure; `preparation` waits for the turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from gateway.api_keys import ApiKey
from shared.errors import Overloaded
from shared.fair_share import FairShare, fits_share

RETRY_AFTER_S = 1


@dataclass(slots=True, eq=False)
class Turn:
    key: ApiKey
    cost: float
    is_granted: bool = False


class TurnQueue:
    """Unlike admission it lets requests wait, because a turn lasts milliseconds. At most
    `waiting_max` wait, and no more than `waiting_cost_max` in all, or one. Of the turns at a time,
    and of the places to wait, a client with a name leaves some to others. Among those who wait, the
    client whose requests cost least so far is next, and of its requests the oldest."""

    def __init__(self, *, running_max: int, waiting_max: int, waiting_cost_max: float) -> None:
        self._running_max = running_max
        self._waiting_max = waiting_max
        self._waiting_cost_max = waiting_cost_max
        self._fair = FairShare()
        self._running: dict[str, int] = {}  # of each client that has any
        self._num_running = 0
        self._waiting: dict[str, deque[Turn]] = {}

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def ask(self, key: ApiKey, cost: float) -> Turn:
        """Either it is granted at once, or `finish` or `give_up` of another returns it later.
        Raises Overloaded. The caller must `finish` or `give_up` it once."""
        turn, own = Turn(key, cost), self._waiting.get(key.name)
        if own is None and self._may_run(key):
            self._fair.enter(key.name, key.weight)
            self._grant(turn)
            return turn
        if not self._has_place_for(turn, own or ()):
            raise Overloaded(
                "too many requests wait to be prepared; retry later", retry_after_s=RETRY_AFTER_S
            )
        self._fair.enter(key.name, key.weight)
        self._waiting.setdefault(key.name, deque()).append(turn)
        return turn

    def finish(self, turn: Turn) -> list[Turn]:
        """Returns the turns that are granted now."""
        name = turn.key.name
        self._num_running -= 1
        left = self._running[name] - 1
        if left:
            self._running[name] = left
        else:
            del self._running[name]
        self._fair.leave(name)
        return self._grant_waiting()

    def give_up(self, turn: Turn) -> list[Turn]:
        """Its client has gone, or its time is over. Returns the turns that are granted now."""
        if turn.is_granted:
            return self.finish(turn)
        name = turn.key.name
        self._waiting[name].remove(turn)
        self._drop_empty(name)
        self._fair.leave(name)
        return []

    def _grant_waiting(self) -> list[Turn]:
        granted: list[Turn] = []
        while able := [n for n, line in self._waiting.items() if self._may_run(line[0].key)]:
            name = min(able, key=self._fair.virtual_time)
            turn = self._waiting[name].popleft()
            self._drop_empty(name)
            self._grant(turn)
            granted.append(turn)
        return granted

    def _grant(self, turn: Turn) -> None:
        turn.is_granted = True
        self._num_running += 1
        self._running[turn.key.name] = self._running.get(turn.key.name, 0) + 1
        self._fair.charge(turn.key.name, turn.cost)

    def _has_place_for(self, turn: Turn, own: Collection[Turn]) -> bool:
        cost = sum(each.cost for line in self._waiting.values() for each in line)
        return _fits(turn.key, len(own), self._waiting_max - self.num_waiting) and (
            not self._waiting
            or _fits(
                turn.key,
                sum(each.cost for each in own),
                self._waiting_cost_max - cost,
                added=turn.cost,
            )
        )

    def _may_run(self, key: ApiKey) -> bool:
        used = self._running.get(key.name, 0)
        return _fits(key, used, self._running_max - self._num_running)

    def _drop_empty(self, name: str) -> None:
        if not self._waiting[name]:
            del self._waiting[name]


def _fits(key: ApiKey, used: float, free: float, added: float = 1) -> bool:
    if not key.name:
        return free >= added
    return fits_share(used=used, added=added, free=free, weight=key.weight)
