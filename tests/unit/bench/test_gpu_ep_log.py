"""What is read off the ranks' logs: a lost or doubled step shows, and so does every pause."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.gpu_ep_log import StepLog, disturbance

TOKENS, PERIOD = 2, 8
SECOND_NS, STEP_NS = 1_000_000_000, 10_000_000


def sequence(step: int) -> np.ndarray:
    return np.array([step % PERIOD, 100 + step % PERIOD], dtype=np.int32)


def log_of(folder: Path, rank: int, times_ns: list[int], skip: int | None = None) -> StepLog:
    log = StepLog(folder, rank, 1, TOKENS, "w+")
    for index, time_ns in enumerate(times_ns):
        lost = skip is not None and index >= skip
        log.commit(time_ns, 1, sequence(index + lost))
    return log


def every_step(start_ns: int, end_ns: int) -> list[int]:
    return list(range(start_ns, end_ns, STEP_NS))


def test_a_lost_step_makes_all_that_follow_wrong(tmp_path: Path) -> None:
    times = every_step(0, 40 * STEP_NS)
    reference = log_of(tmp_path, 0, times).first_ids(PERIOD)
    assert log_of(tmp_path, 1, times).wrong_steps(reference) == 0
    assert log_of(tmp_path, 2, times, skip=30).wrong_steps(reference) == 10


def test_pause_recovery_and_throughput_are_those_of_the_logs(tmp_path: Path) -> None:
    at, back, end = 2 * SECOND_NS, 2 * SECOND_NS + 80_000_000, 4 * SECOND_NS
    before, after = every_step(0, at), every_step(back, end)
    survivors = [log_of(tmp_path, rank, before + after) for rank in range(3)]
    victim = log_of(tmp_path, 3, before)
    seen = disturbance([*survivors, victim], survivors, at, end, TOKENS)
    assert seen.gap_ms_max == pytest.approx(90)
    assert seen.usual_gap_ms == pytest.approx(10)
    assert seen.recovered_ms == pytest.approx(80, abs=12)
    assert seen.tokens_per_s_before == pytest.approx(4 * TOKENS * 100, rel=0.02)
    assert seen.tokens_per_s_after == pytest.approx(3 * TOKENS * 100, rel=0.02)


def test_who_never_comes_back_has_paused_to_the_end(tmp_path: Path) -> None:
    log = log_of(tmp_path, 0, every_step(0, 2 * SECOND_NS))
    seen = disturbance([log], [log], 2 * SECOND_NS, 3 * SECOND_NS, TOKENS)
    assert seen.gap_ms_max == pytest.approx(1010)
    assert seen.tokens_per_s_after == 0
