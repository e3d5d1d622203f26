"""What every rank of the GPU experiment writes down of its steps, in shared memory where the
control process sees it at once; and what is read off it: gaps, throughput, and whether the tokens
are those of an undisturbed run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

STEPS_MAX = 60_000
_HEADER = 8
_COMMITTED, _TICK, _ABANDONED, _EPOCH = 0, 1, 2, 3


class StepLog:
    """Of one life of a rank. Written by its engine thread only."""

    def __init__(self, folder: Path, rank: int, incarnation: int, tokens: int, mode: str) -> None:
        self.rank, self.incarnation = rank, incarnation
        base = folder / f"steps-{rank:03d}-{incarnation:03d}"
        shape = (STEPS_MAX + _HEADER, 2)
        self._log = np.memmap(f"{base}.log", dtype=np.int64, mode=mode, shape=shape)  # type: ignore[call-overload]
        self._ids = np.memmap(
            f"{base}.ids",
            dtype=np.int32,
            mode=mode,
            shape=(STEPS_MAX, tokens),  # type: ignore[call-overload]
        )

    def commit(self, now_ns: int, epoch: int, ids: NDArray[np.int32]) -> None:
        index = int(self._log[_COMMITTED, 0])
        self._log[_HEADER + index] = (now_ns, epoch)
        self._ids[index] = ids
        self._log[_COMMITTED, 0] = index + 1

    def note_tick(self, tick: int) -> None:
        self._log[_TICK, 0] = tick

    def note_abandoned(self) -> None:
        self._log[_ABANDONED, 0] += 1

    def note_epoch(self, epoch: int) -> None:
        self._log[_EPOCH, 0] = epoch

    @property
    def committed(self) -> int:
        return int(self._log[_COMMITTED, 0])

    @property
    def tick(self) -> int:
        return int(self._log[_TICK, 0])

    @property
    def abandoned(self) -> int:
        return int(self._log[_ABANDONED, 0])

    @property
    def epoch(self) -> int:
        return int(self._log[_EPOCH, 0])

    def times_ns(self) -> NDArray[np.int64]:
        return np.array(self._log[_HEADER : _HEADER + self.committed, 0])

    def wrong_steps(self, reference: NDArray[np.int32]) -> int:
        """Steps whose tokens differ from the reference; the sequence starts anew every
        `len(reference)` steps, so that a lost or doubled step shows in all that follow."""
        ids = self._ids[: self.committed]
        wanted = reference[np.arange(len(ids)) % len(reference)]
        return int((ids != wanted).any(axis=1).sum())

    def first_ids(self, steps: int) -> NDArray[np.int32]:
        return np.array(self._ids[:steps])


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """One fault or join, as the ranks that lived through it saw it. Times in ms after its start."""

    gap_ms_p50: float  # over ranks, of the longest pause between two committed steps
    gap_ms_max: float
    usual_gap_ms: float
    recovered_ms: float  # until throughput is at 95 % of what it settles at
    tokens_per_s_before: float
    tokens_per_s_after: float


def disturbance(
    before: list[StepLog],
    survivors: list[StepLog],
    at_ns: int,
    until_ns: int,
    tokens_a_step: int,
    *,
    window_s: float = 0.3,
) -> Disturbance:
    """`before`: all lives that served up to `at_ns`; `survivors`: those that went on."""
    gaps, usual = [], []
    for log in survivors:
        times = log.times_ns()
        started_ns = at_ns - 1_000_000_000
        quiet = times[(times > started_ns) & (times < at_ns)]
        usual.append(np.diff(quiet).max(initial=0) / 1e6)
        last = quiet[-1:] if quiet.size else np.array([at_ns])
        around = np.concatenate((last, times[(times >= at_ns) & (times < until_ns)], [until_ns]))
        gaps.append(np.diff(around).max() / 1e6)
    settled_ns = max(at_ns, until_ns - 700_000_000)
    rate_after = _rate(survivors, settled_ns, until_ns, tokens_a_step)
    return Disturbance(
        gap_ms_p50=float(np.median(gaps)),
        gap_ms_max=float(np.max(gaps)),
        usual_gap_ms=float(np.median(usual)),
        recovered_ms=_recovered_ms(survivors, at_ns, until_ns, rate_after, tokens_a_step, window_s),
        tokens_per_s_before=_rate(before, at_ns - 700_000_000, at_ns, tokens_a_step),
        tokens_per_s_after=rate_after,
    )


def _rate(logs: list[StepLog], start_ns: int, end_ns: int, tokens_a_step: int) -> float:
    steps = sum(
        int(((t := log.times_ns()) >= start_ns).sum() - (t >= end_ns).sum()) for log in logs
    )
    return steps * tokens_a_step / max((end_ns - start_ns) / 1e9, 1e-9)


def _recovered_ms(
    logs: list[StepLog], at_ns: int, until_ns: int, rate: float, tokens: int, window_s: float
) -> float:
    """Until every rank has committed the first step of the first window that is fast enough."""
    window_ns = int(window_s * 1e9)
    times = np.sort(np.concatenate([log.times_ns() for log in logs]))
    starts = np.arange(at_ns, until_ns - window_ns, 2_000_000)
    counts = np.searchsorted(times, starts + window_ns) - np.searchsorted(times, starts)
    fast = np.flatnonzero(counts * tokens / window_s >= 0.95 * rate)
    if fast.size == 0 or rate == 0:
        return float("inf")
    start_ns = starts[fast[0]]
    first_ns = [t[t >= start_ns][:1] for t in (log.times_ns() for log in logs)]
    return float((np.concatenate(first_ns).max() - at_ns) / 1e6)
