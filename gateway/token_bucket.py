"""A rate limit per minute, as a bucket that fills evenly. Pure."""

from __future__ import annotations

_MINUTE_S = 60.0


class TokenBucket:
    """Holds at most a minute's amount, and is full at first. What is larger than that needs a full
    bucket, and leaves a debt: so the rate holds, and nothing is refused for ever."""

    def __init__(self, per_minute: float, now: float) -> None:
        self.per_minute = per_minute
        self._level = per_minute
        self._at = now

    def change_limit(self, per_minute: float, now: float) -> None:
        """What was taken stays taken."""
        taken = self.per_minute - self.level(now)
        self.per_minute = per_minute
        self._level, self._at = per_minute - taken, now

    def level(self, now: float) -> float:
        """Below 0: a debt."""
        filled = self._level + max(0.0, now - self._at) * self.per_minute / _MINUTE_S
        return min(self.per_minute, filled)

    def wait_s(self, amount: float, now: float) -> float:
        """Until `take` may take so much; 0 if it may now."""
        return self._until(min(amount, self.per_minute), now)

    def full_in_s(self, now: float) -> float:
        return self._until(self.per_minute, now)

    def take(self, amount: float, now: float) -> None:
        """The caller has asked `wait_s`. A negative amount gives back what was taken."""
        self._level = min(self.per_minute, self.level(now) - amount)
        self._at = now

    def _until(self, level: float, now: float) -> float:
        return max(0.0, (level - self.level(now)) * _MINUTE_S / self.per_minute)
