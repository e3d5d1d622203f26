"""Finds stop strings in a text that comes in pieces, and holds back what may yet become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class FilteredText(NamedTuple):
    text: str  # may be shown
    stopped: bool


class _Match(NamedTuple):
    end: int
    start: int


class StopStrings:
    """The result does not depend on how the text is cut: the stop string that is complete first
    ends the text, of several the longest, and the text before it is what is shown; with
    `include_stop` it, too."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def feed(self, text: str) -> FilteredText:
        """After `stopped` nothing more may be fed."""
        if not self._stops:
            return FilteredText(text, False)
        self._held += text
        found = self._first_match()
        if found is not None:
            return FilteredText(
                self._held[: found.end if self._include_stop else found.start], True
            )
        kept = len(self._held) - self._num_held_back()
        passed, self._held = self._held[:kept], self._held[kept:]
        return FilteredText(passed, False)

    def flush(self) -> str:
        """The text has ended: what was held back is no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_match(self) -> _Match | None:
        """The stop string whose end comes first."""
        matches = [
            _Match(start + len(stop), start)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        return min(matches, default=None)

    def _num_held_back(self) -> int:
        """The length of the longest end of the text that begins a stop string."""
        text = self._held
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
