"""How long steps take, and for how much of that this rank waits for its peers. Pure."""

from __future__ import annotations

_WEIGHT = 1 / 32
"""Of the newest step in the averages."""


class StepTiming:
    """`on_beat` is called often during each wait, and once at its end."""

    def __init__(self) -> None:
        self.step_ms = 0.0  # averages; 0 before the first step
        self.waited_ms = 0.0
        self._at: tuple[int, int] = (0, 0)
        self._began_at: float | None = None
        self._wait_began_at: float | None = None
        self._waited_s = 0.0

    def on_beat(self, at: tuple[int, int], is_waiting: bool, now: float) -> None:
        """`at`: epoch and step."""
        if at != self._at:
            self._end_step(at, now)
        if is_waiting and self._wait_began_at is None:
            self._wait_began_at = now
        elif not is_waiting and self._wait_began_at is not None:
            self._waited_s += now - self._wait_began_at
            self._wait_began_at = None

    def on_sleep(self) -> None:
        """There is no step to run: what comes next does not belong to the last one."""
        self._began_at = self._wait_began_at = None

    def _end_step(self, at: tuple[int, int], now: float) -> None:
        """A step that was thrown away, as at the end of an epoch, says nothing."""
        if self._began_at is not None and at[0] == self._at[0]:
            step_ms, waited_ms = (now - self._began_at) * 1000, self._waited_s * 1000
            weight = _WEIGHT if self.step_ms else 1.0
            self.step_ms += weight * (step_ms - self.step_ms)
            self.waited_ms += weight * (waited_ms - self.waited_ms)
        self._at, self._began_at = at, now
        self._wait_began_at, self._waited_s = None, 0.0
