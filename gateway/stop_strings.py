"""Finds stop strings in a text that comes in pieces, and holds back what may become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class FilteredText(NamedTuple):
    text: str  # may be shown
    stop: str | None  # the stop string that ended the text


class _Match(NamedTuple):
    end: int
    start: int
    stop: str


class StopStrings:
    """The result does not depend on how the text is cut into pieces. The stop string that is
    complete first ends the text; if several are, the longest. The text before it is shown, and with
    `include_stop` the stop string as well."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def feed(self, text: str) -> FilteredText:
        """Do not call it again after it returned a `stop`."""
        if not self._stops:
            return FilteredText(text, None)
        self._held += text
        found = self._first_match()
        if found is not None:
            shown = self._held[: found.end if self._include_stop else found.start]
            return FilteredText(shown, found.stop)
        kept = len(self._held) - self._num_held_back()
        passed, self._held = self._held[:kept], self._held[kept:]
        return FilteredText(passed, None)

    def flush(self) -> str:
        """Call at the end of the text: returns what was held back, which is no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_match(self) -> _Match | None:
        """The stop string that ends first."""
        matches = [
            _Match(start + len(stop), start, stop)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        return min(matches, default=None)

    def _num_held_back(self) -> int:
        """Length of the longest suffix of the text that is a prefix of a stop string."""
        text = self._held
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stops):
                return length
        return 0
