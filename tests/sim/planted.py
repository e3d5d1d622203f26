"""Whether schedules notice a bug that a test has planted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.sim.many_schedules import outcome_of
from tests.sim.schedules import Outcome, run_schedule

MORE_SEEDS = range(120)


def is_noticed(*likely: int, run: Callable[[int], Outcome] = run_schedule) -> bool:
    """`likely` are seeds that noticed it, and soon, when this was written: which ones do changes
    with every message. So the first of all others come after them."""
    seeds: Sequence[int] = (*likely, *MORE_SEEDS)
    return any(isinstance(outcome_of(seed, run), str) for seed in seeds)
