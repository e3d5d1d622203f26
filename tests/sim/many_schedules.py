"""`python -m tests.sim.many_schedules`: thousands of fresh schedules in several processes, with
progress and the command that replays each one that failed."""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

import structlog

from tests.sim.change_schedules import run_change_schedule
from tests.sim.etcd_schedules import run_etcd_schedule
from tests.sim.schedules import CARD_FIRST_SEED, Outcome, run_schedule

KINDS: dict[str, Callable[[int], Outcome]] = {
    "faults": run_schedule,
    "changes": run_change_schedule,
    "etcd": run_etcd_schedule,
}
BROKEN_MAX = 20
"""So many are told; the rest is not run."""
_CHUNK = 4
_PROGRESS_S = 5.0
_THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(slots=True)
class ManyOutcomes:
    """Of the schedules that have been run so far. `broken` says of each one that failed why."""

    num_done: int = 0
    moves: int = 0
    restored: int = 0
    broken: list[str] = field(default_factory=list)

    def add(self, each: Outcome | str) -> None:
        self.num_done += 1
        if isinstance(each, str):
            self.broken.append(each)
        else:
            self.moves += each.moves
            self.restored += each.restored


def be_quiet() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def outcome_of(seed: int, run: Callable[[int], Outcome] = run_schedule) -> Outcome | str:
    be_quiet()
    try:
        return run(seed)
    except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - it becomes text
        notes = "; ".join(getattr(error, "__notes__", []))
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        return f"seed {seed}: {type(error).__name__}: {error} [{notes}]"


def _outcomes_of(seeds: Sequence[int], run: Callable[[int], Outcome]) -> list[Outcome | str]:
    return [outcome_of(seed, run) for seed in seeds]


def run_many(
    seeds: Sequence[int],
    *,
    jobs: int,
    run: Callable[[int], Outcome] = run_schedule,
    on_progress: Callable[[ManyOutcomes], None] = lambda _: None,
) -> ManyOutcomes:
    """In `jobs` processes of one thread each. Ends early if BROKEN_MAX have failed."""
    for name in _THREAD_LIMITS:
        os.environ.setdefault(name, "1")  # for the processes, which begin anew
    chunks = [seeds[first : first + _CHUNK] for first in range(0, len(seeds), _CHUNK)]
    found = ManyOutcomes()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        for done in as_completed([pool.submit(_outcomes_of, chunk, run) for chunk in chunks]):
            for each in done.result():
                found.add(each)
            on_progress(found)
            if len(found.broken) >= BROKEN_MAX:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    return found


class _ProgressLines:
    """A line every few seconds, and one at once for each schedule that failed."""

    def __init__(self, num_seeds: int, kind: str) -> None:
        self._num_seeds, self._kind = num_seeds, kind
        self._began = self._told_at = time.monotonic()
        self._num_told = 0

    def tell(self, found: ManyOutcomes) -> None:
        for text in found.broken[self._num_told :]:
            seed = text.split(":")[0].removeprefix("seed ")
            replay = f"python -m tests.sim.replay --kind {self._kind} {seed}"
            print(f"FAILED {text}\n  replay: {replay}", flush=True)
        self._num_told = len(found.broken)
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_S or found.num_done == self._num_seeds:
            self._told_at = now
            each_s = (now - self._began) / max(1, found.num_done)
            left_s = each_s * (self._num_seeds - found.num_done)
            print(
                f"{found.num_done} of {self._num_seeds} schedules, {len(found.broken)} failed, "
                f"{now - self._began:.0f} s, {1 / each_s:.1f} a second, about {left_s:.0f} s left",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim.many_schedules", description=__doc__)
    parser.add_argument("--schedules", type=int, default=20000, help="on CPU ranks")
    parser.add_argument("--card-schedules", type=int, help="on cards (default: half as many)")
    parser.add_argument("--first-seed", type=int, default=100000)
    parser.add_argument(
        "--kind",
        choices=KINDS,
        default="faults",
        help="of schedule: with faults alone (default), in which people change the instance, or "
        "in which etcd misbehaves",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    flags = parser.parse_args()
    num_on_cards = flags.schedules // 2 if flags.card_schedules is None else flags.card_schedules
    first, first_on_cards = flags.first_seed, CARD_FIRST_SEED + flags.first_seed
    seeds = [
        *range(first, first + flags.schedules),
        *range(first_on_cards, first_on_cards + num_on_cards),
    ]
    random.Random(flags.first_seed).shuffle(seeds)  # the cost of the rest is that of the first
    began = time.monotonic()
    lines = _ProgressLines(len(seeds), flags.kind)
    found = run_many(seeds, jobs=flags.jobs, run=KINDS[flags.kind], on_progress=lines.tell)
    each_ms = (time.monotonic() - began) * flags.jobs / max(1, found.num_done) * 1000
    print(
        f"{found.num_done} schedules from seed {first} on, {len(found.broken)} failed; "
        f"{each_ms:.0f} ms each on one of {flags.jobs} processes"
    )
    return 1 if found.broken else 0


if __name__ == "__main__":
    sys.exit(main())
