"""How long steps take, and for how much of it a rank waits."""

from __future__ import annotations

import pytest

from gpu_worker.engine.step_timing import StepTiming


def run_step(timing: StepTiming, at: tuple[int, int], began_at: float, *waits: float) -> float:
    """Waits of the given lengths, 10 ms of work after each. Returns when it ended."""
    now = began_at
    for wait_s in waits:
        timing.on_beat(at, True, now)
        timing.on_beat(at, True, now + wait_s / 2)
        timing.on_beat(at, False, now + wait_s)
        now += wait_s + 0.01
    return now


def test_a_step_is_known_when_the_next_begins() -> None:
    timing = StepTiming()
    now = run_step(timing, (1, 0), 5.0, 0.02, 0.03)
    assert (timing.step_ms, timing.waited_ms) == (0.0, 0.0)
    run_step(timing, (1, 1), now, 0.0)
    assert timing.step_ms == pytest.approx(70.0)
    assert timing.waited_ms == pytest.approx(50.0)


def test_averages_follow_the_newest_steps() -> None:
    timing, now = StepTiming(), 0.0
    for step in range(3):
        now = run_step(timing, (1, step), now, 0.0)
    for step in range(3, 300):
        now = run_step(timing, (1, step), now, 0.09)
    assert timing.step_ms == pytest.approx(100.0, abs=1.0)
    assert timing.waited_ms == pytest.approx(90.0, abs=1.0)


def test_a_step_that_an_epoch_ended_says_nothing() -> None:
    timing = StepTiming()
    run_step(timing, (1, 5), 0.0, 3.0)
    run_step(timing, (2, 0), 9.0, 0.0)
    assert (timing.step_ms, timing.waited_ms) == (0.0, 0.0)


def test_sleep_is_not_part_of_a_step() -> None:
    timing = StepTiming()
    run_step(timing, (1, 0), 0.0, 0.01)
    timing.on_sleep()
    run_step(timing, (1, 1), 60.0, 0.01)
    assert timing.step_ms == 0.0
