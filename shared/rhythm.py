"""How slow answers have been lately. Pure."""

from __future__ import annotations

_SPAN_S = 30.0


class Rhythm:
    """The slowest answer of those observed. Remembers each for 30 s at least, 60 s at most."""

    def __init__(self, now: float) -> None:
        self._began_at = now
        self._longest_s = 0.0
        self._longest_before_s = 0.0

    def observe(self, answer_s: float, now: float) -> None:
        """`answer_s`: for how long it was waited for."""
        self._roll(now)
        self._longest_s = max(self._longest_s, answer_s)

    def usual_s(self, now: float) -> float:
        self._roll(now)
        return max(self._longest_s, self._longest_before_s)

    def _roll(self, now: float) -> None:
        spans = int((now - self._began_at) / _SPAN_S)
        if spans > 0:
            self._longest_before_s = self._longest_s if spans == 1 else 0.0
            self._longest_s = 0.0
            self._began_at += spans * _SPAN_S
