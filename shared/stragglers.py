"""Which ranks hold the others up: all step together, so the slowest one waits for nobody, and
everybody waits for it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from shared.types import RankId
from shared.wire import Load

LATE_MIN_MS = 20.0
LATE_FRACTION = 0.2
"""A straggler is late by this part of a step, and by this many milliseconds. A rank with a
twentieth of a core is late by 0.2 to 0.3 of a step: what it is kept from running while it waits
looks like waiting, too."""


def lateness_ms(loads: Mapping[RankId, Load]) -> dict[RankId, float]:
    """How much longer a step takes because of each rank: how much less it waits than the others
    do. Of ranks that tell nothing of their steps, and of fewer than three, nothing is known."""
    known = {rank: load for rank, load in loads.items() if load.step_ms > 0}
    if len(known) < 3:
        return {}
    usual_ms = median(load.waited_ms for load in known.values())
    return {rank: max(0.0, usual_ms - load.waited_ms) for rank, load in known.items()}


def stragglers(loads: Mapping[RankId, Load]) -> dict[RankId, float]:
    """By how many ms each straggler is late."""
    return {
        rank: late_ms
        for rank, late_ms in lateness_ms(loads).items()
        if late_ms >= max(LATE_MIN_MS, LATE_FRACTION * loads[rank].step_ms)
    }
