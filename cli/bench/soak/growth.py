"""Whether a quantity grows: the last third of its samples against the first one. No I/O.

A quantity has grown if the medians of the thirds rise from each to the next, and the last one is
above the first by more than a tolerance: what goes up and down, or rises once, is no leak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median

THIRD_MIN = 5
"""Samples that a third has at least: of fewer nothing is said."""

_MB = 1 << 20
_GOES_ON = 0.5
"""What rises less from the second third to the last than this part of what it rose before is on its
way to a bound, as what etcd keeps until it compacts, and caches."""


class Quantity(Enum):
    """What can grow."""

    PROCESSES = "processes"
    MEMORY = "memory"
    DESCRIPTORS = "descriptors"
    SOCKETS = "sockets"
    THREADS = "threads"
    ETCD_KEYS = "etcd keys"
    ETCD_VERDICTS = "etcd verdicts"
    ETCD_DATA = "etcd data"
    LOGS = "logs"
    RUN_FOLDER = "run folder"
    SHARED_MEMORY = "shared memory"

    @property
    def is_bytes(self) -> bool:
        return self in _BYTES


_BYTES = {
    Quantity.MEMORY,
    Quantity.ETCD_DATA,
    Quantity.LOGS,
    Quantity.RUN_FOLDER,
    Quantity.SHARED_MEMORY,
}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Whichever is more: a share of the first third's median, or an absolute amount."""

    share: float
    least: float

    def of(self, first: float) -> float:
        return max(self.share * first, self.least)


TOLERANCES = {
    Quantity.PROCESSES: Tolerance(0.0, 0.5),
    Quantity.MEMORY: Tolerance(0.05, 8.0 * _MB),
    Quantity.DESCRIPTORS: Tolerance(0.05, 4.0),
    Quantity.SOCKETS: Tolerance(0.05, 4.0),
    Quantity.THREADS: Tolerance(0.05, 4.0),  # pools begin them one by one
    Quantity.ETCD_KEYS: Tolerance(0.05, 4.0),
    Quantity.ETCD_VERDICTS: Tolerance(0.25, 16.0),
    Quantity.ETCD_DATA: Tolerance(0.05, 2.0 * _MB),
    Quantity.LOGS: Tolerance(0.05, 6.0 * _MB),  # two files of 0.25 MB for each of a dozen
    Quantity.RUN_FOLDER: Tolerance(0.05, 1.0 * _MB),
    Quantity.SHARED_MEMORY: Tolerance(0.05, 1.0 * _MB),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """`where` is a process, a kind of process, or the instance. `first`, `middle` and `last` are
    medians of thirds, in bytes or by number; `per_hour` is what would be added in one."""

    where: str
    quantity: Quantity
    lasted_s: float
    first: float
    middle: float
    last: float
    tolerance: float
    per_hour: float

    @property
    def has_grown(self) -> bool:
        rises = self.first < self.middle < self.last
        goes_on = self.last - self.middle > _GOES_ON * (self.middle - self.first)
        return rises and goes_on and self.last - self.first > self.tolerance


def growth_of(
    where: str, quantity: Quantity, samples: Sequence[tuple[float, float]]
) -> Growth | None:
    """`samples` are (seconds, value), in order and without the warm-up. None if there are too
    few."""
    size = len(samples) // 3
    if size < THIRD_MIN:
        return None
    thirds = (samples[:size], samples[size:-size], samples[-size:])
    first, middle, last = (median(value for _, value in third) for third in thirds)
    apart_s = median(at for at, _ in thirds[2]) - median(at for at, _ in thirds[0])
    return Growth(
        where=where,
        quantity=quantity,
        lasted_s=samples[-1][0] - samples[0][0],
        first=first,
        middle=middle,
        last=last,
        tolerance=TOLERANCES[quantity].of(first),
        per_hour=(last - first) / apart_s * 3600.0,
    )
