"""Which ranks hold the others up: all step together, so everybody waits for the slowest one. Pure.

Each rank tells for whom it waits while most are there. A rank counts as late by what more than half
of the others tell at least: one that is itself kept from running takes what is there for late, and
is not believed alone. How long a rank itself waits says nothing of it, for it is kept from running
in its waits as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from shared.types import RankId
from shared.wire import Load

LATE_MIN_MS = 20.0
LATE_FRACTION = 0.4
"""A straggler is late by this part of a step, and by this many milliseconds."""


def lateness_ms(loads: Mapping[RankId, Load]) -> dict[RankId, float]:
    """By how much each rank is late in an average step. Of ranks that tell nothing of their steps,
    and of fewer than three, nothing is known."""
    known = {rank: load for rank, load in loads.items() if load.step_ms > 0}
    if len(known) < 3:
        return {}
    told: dict[RankId, list[float]] = defaultdict(list)
    for rank, load in known.items():
        for late in load.late_peers:
            if late.rank != rank:
                told[late.rank].append(late.ms)
    num_believed = (len(known) + 1) // 2  # more than half of the others
    return {rank: _nth_largest(told[rank], num_believed) for rank in known}


def stragglers(loads: Mapping[RankId, Load]) -> dict[RankId, float]:
    """By how many ms each straggler is late."""
    return {
        rank: late_ms
        for rank, late_ms in lateness_ms(loads).items()
        if late_ms >= max(LATE_MIN_MS, LATE_FRACTION * loads[rank].step_ms)
    }


def _nth_largest(values: list[float], n: int) -> float:
    """0 if there are fewer."""
    return sorted(values, reverse=True)[n - 1] if len(values) >= n else 0.0
