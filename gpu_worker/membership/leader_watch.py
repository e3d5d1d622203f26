"""Whether this rank hears the control plane that leads, which is the one that pings it. Pure.

What most ranks do not hear leads nobody, whatever its lease says: etcd grants none of less than two
seconds, and a host that is lost revokes none."""

from __future__ import annotations

from shared.rhythm import Rhythm

LOOK_S = 0.1
OWN_PAUSE_S = 0.3
"""Pings may be unread if this process has not looked for so long: that time does not count."""
SILENCE_MIN_S = 1.0
UNKNOWN_SILENCE_S = 5.0
"""The same for one that has pinged too seldom to tell how often it does."""
_TIMES_USUAL = 2.0
_INTERVALS_MIN = 2


class LeaderWatch:
    """Call `on_look` every LOOK_S. Times are those of one monotonic clock, in seconds."""

    def __init__(self, now: float) -> None:
        self._name: str | None = None
        self._heard_at = self._looked_at = now
        self._is_closed = False
        self._num_intervals = 0
        self._rhythm = Rhythm(now)

    def on_ping(self, name: str, now: float) -> None:
        if name != self._name:
            self._num_intervals = 0
        elif not self._is_closed:
            self._rhythm.observe(now - self._heard_at, now)
            self._num_intervals += 1
        self._name, self._heard_at, self._is_closed = name, now, False

    def on_closed(self, name: str) -> None:
        """The last connection of that control plane has ended, as when its process has."""
        self._is_closed |= name == self._name

    def on_look(self, now: float) -> None:
        gap_s = now - self._looked_at
        self._looked_at = now
        if gap_s > OWN_PAUSE_S:
            self._heard_at = min(now, self._heard_at + gap_s)

    def unheard(self, now: float) -> str | None:
        """The name of the control plane that led and is not heard; None if one is heard, or none
        ever was."""
        if self._is_closed:
            return self._name
        floor_s = SILENCE_MIN_S if self._num_intervals >= _INTERVALS_MIN else UNKNOWN_SILENCE_S
        patience_s = max(floor_s, _TIMES_USUAL * self._rhythm.usual_s(now))
        return self._name if now - self._heard_at > patience_s else None
