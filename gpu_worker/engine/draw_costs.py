"""How many tokens of one tenant the host may draw in a step that others share, by what they have
cost so far. Pure: the caller measures."""

from __future__ import annotations

PART = 0.25
"""Of the rest of a usual step, for the tokens of one tenant of weight 1."""
_WEIGHT = 1 / 16
"""Of the newest step in the averages."""


class DrawCosts:
    """A token's cost goes by the vocabulary and by what the request asks for: from a tenth of a
    millisecond to seven and more. So a fixed number is too many here and too few there."""

    def __init__(self, rows_max: int) -> None:
        self._rows_max = rows_max
        self._row_s = 0.0  # averages; 0 before the first
        self._rest_s = 0.0

    def learn(self, *, num_rows: int, drawn_s: float, step_s: float) -> None:
        """The host has drawn so many tokens in a step, and needed so long for all of them.
        `step_s` is what steps take of late, with their draws."""
        if num_rows <= 0 or drawn_s <= 0.0 or step_s <= 0.0:
            return
        weight = _WEIGHT if self._row_s else 1.0
        self._row_s += weight * (drawn_s / num_rows - self._row_s)
        self._rest_s += weight * (max(0.0, step_s - drawn_s) - self._rest_s)

    def rows(self, weight: float) -> int:
        """At least one, so that nobody starves."""
        most = self._rows_max * weight
        if self._row_s:
            most = min(most, PART * weight * self._rest_s / self._row_s)
        return max(1, int(most))
