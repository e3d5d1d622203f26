"""How long steps take, for how much of that this rank waits for its peers, and which of them come
late. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from shared.types import RankId
from shared.wire import LatePeer

_WEIGHT = 1 / 32
"""Of the newest step in the averages."""

_LATE_PEERS_MAX = 8
_LATE_MIN_MS = 1.0
"""So many are told, and none that is late by less: a Load stays small in a large instance."""

_OWN_PAUSE_S = 0.05
"""A rank that has not looked for so long did not run itself. It cannot say that a peer was late."""


class StepTiming:
    """`on_beat` is called often during each wait, and once at its end. A peer is late for as long
    as this rank waits for it and most members are there: ranks that are slow alike, as those of one
    host, do not hide one another."""

    def __init__(self) -> None:
        self.step_ms = 0.0  # averages; 0 before the first step
        self.waited_ms = 0.0
        self._late_ms: dict[RankId, float] = {}  # averages
        self._at: tuple[int, int] = (0, 0)
        self._began_at: float | None = None
        self._beat_at = 0.0
        self._awaited: Sequence[RankId] = ()  # at the last beat
        self._waited_s = 0.0
        self._late_s: dict[RankId, float] = {}

    def on_beat(
        self, at: tuple[int, int], awaited: Sequence[RankId], num_members: int, now: float
    ) -> None:
        """`at`: epoch and step. `awaited`: peers that this rank waits for from now on."""
        if at != self._at:
            self._end_step(at, now)
        elif self._awaited:
            self._count_wait(now - self._beat_at, num_members)
        self._awaited, self._beat_at = awaited, now

    def on_sleep(self) -> None:
        """There is no step to run: what comes next does not belong to the last one."""
        self._began_at, self._awaited = None, ()

    def late_peers(self) -> tuple[LatePeer, ...]:
        """The latest ones."""
        late = sorted(self._late_ms.items(), key=_by_ms, reverse=True)[:_LATE_PEERS_MAX]
        return tuple(LatePeer(rank=rank, ms=ms) for rank, ms in late if ms >= _LATE_MIN_MS)

    def _count_wait(self, elapsed_s: float, num_members: int) -> None:
        self._waited_s += elapsed_s
        if 2 * len(self._awaited) < num_members and elapsed_s <= _OWN_PAUSE_S:
            for rank in self._awaited:
                self._late_s[rank] = self._late_s.get(rank, 0.0) + elapsed_s

    def _end_step(self, at: tuple[int, int], now: float) -> None:
        """A step that was thrown away, as at the end of an epoch, says nothing."""
        if self._began_at is not None and at[0] == self._at[0]:
            weight = _WEIGHT if self.step_ms else 1.0
            self.step_ms += weight * ((now - self._began_at) * 1000 - self.step_ms)
            self.waited_ms += weight * (self._waited_s * 1000 - self.waited_ms)
            for rank in self._late_ms.keys() | self._late_s.keys():
                before_ms = self._late_ms.get(rank, 0.0)
                newest_ms = self._late_s.get(rank, 0.0) * 1000
                self._late_ms[rank] = before_ms + weight * (newest_ms - before_ms)
        self._at, self._began_at = at, now
        self._waited_s = 0.0
        self._late_s.clear()


def _by_ms(late: tuple[RankId, float]) -> float:
    return late[1]
