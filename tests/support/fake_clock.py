"""A clock that moves only when a test says so."""

from __future__ import annotations


class FakeClock:
    """See `shared.clock.Clock`."""

    def __init__(self, now: float = 1000.0) -> None:
        self._now = now

    def now(self) -> float:
        return self._now

    def wall(self) -> float:
        return 1.7e9 + self._now

    def advance(self, seconds: float) -> None:
        assert seconds >= 0
        self._now += seconds
