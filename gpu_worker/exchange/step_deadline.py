"""When a peer's data is late enough to be worth a suspicion. Pure.

A deadline that is fixed in milliseconds fits neither steps of 1.5 ms nor of 250 ms. So it follows
the steps that this rank has seen: a multiple of the longest of the last ones, and never under the
floor. Before the first step, and after one that was thrown away, nothing is known of what the next
one takes: compilation, first contact, a long prefill.
"""

from __future__ import annotations

from collections import deque

STEPS_KEPT = 32
TIMES_LONGEST = 3.0
UNKNOWN_MS = 1000.0


class StepDeadline:
    """`floor_ms` is the configured exchange deadline. Written by the engine thread alone."""

    def __init__(self, floor_ms: float) -> None:
        self._floor_ms = floor_ms
        self._step_ms: deque[float] = deque(maxlen=STEPS_KEPT)

    @property
    def ms(self) -> float:
        """For a wait within a step, in milliseconds."""
        if not self._step_ms:
            return max(self._floor_ms, UNKNOWN_MS)
        return max(self._floor_ms, TIMES_LONGEST * self.longest_step_ms)

    @property
    def longest_step_ms(self) -> float:
        """Of the last steps; 0 if there was none."""
        return max(self._step_ms, default=0.0)

    def on_committed(self, step_ms: float) -> None:
        """`step_ms`: from the step's beginning to its end."""
        self._step_ms.append(step_ms)
