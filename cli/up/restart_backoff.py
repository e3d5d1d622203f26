"""How long a crashed service waits for its restart. Pure."""

from __future__ import annotations

FIRST_S = 0.2
MAX_S = 10.0
HEALTHY_AFTER_S = 20.0


class RestartBackoff:
    """A process that served for long is restarted at once; one that crashes again and again waits
    twice as long each time. A control plane that led, or a standby that was needed, has done its
    work, so that however often it is killed its next restart is soon."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def on_exit(self, lived_s: float, *, led: bool) -> float:
        """Seconds to wait before the restart."""
        if lived_s >= HEALTHY_AFTER_S:
            self._next_s = 0.0
        elif led:
            self._next_s = min(self._next_s, FIRST_S)
        backoff_s = self._next_s
        self._next_s = min(max(2 * backoff_s, FIRST_S), MAX_S)
        return backoff_s
