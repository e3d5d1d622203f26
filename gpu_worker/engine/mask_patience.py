"""For which masks a step waits, and how long: for those of matchers that are quick, a moment.
Pure."""

from __future__ import annotations

SLOW_S = 0.001
"""A mask that took more CPU than this makes its matcher slow."""
QUICK_AGAIN_AFTER = 32
"""A slow matcher counts as quick again after so many quick masks."""
_WAIT_S = 0.002  # with the way to the child and back
_WAIT_EACH_S = 0.0002
_WAIT_MAX_S = 0.01


class MaskPatience:
    """A matcher that is slow, or stuck behind one that is, sits out steps: no step waits for it
    twice."""

    def __init__(self) -> None:
        self._due: set[int] = set()  # requests
        self._quick_masks: dict[int, int] = {}  # of slow matchers, since they were slow

    @property
    def wait_s(self) -> float:
        """How long the next step may wait; 0: nothing is due."""
        if not self._due:
            return 0.0
        return min(_WAIT_S + _WAIT_EACH_S * len(self._due), _WAIT_MAX_S)

    def on_sent(self, job: int, matcher: int) -> None:
        if matcher not in self._quick_masks:
            self._due.add(job)

    def on_mask(self, job: int, matcher: int, cost_s: float) -> None:
        self._due.discard(job)
        if cost_s > SLOW_S:
            self._quick_masks[matcher] = 0
        elif matcher in self._quick_masks:
            self._quick_masks[matcher] += 1
            if self._quick_masks[matcher] >= QUICK_AGAIN_AFTER:
                del self._quick_masks[matcher]

    def on_waited(self) -> None:
        """A step has waited in vain, and waits no more for what it waited for."""
        self._due.clear()

    def forget(self, job: int, matcher: int) -> None:
        """The matcher is closed."""
        self._due.discard(job)
        self._quick_masks.pop(matcher, None)
