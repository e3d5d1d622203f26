"""The deadline follows the steps, not the clock on the wall."""

from __future__ import annotations

from gpu_worker.exchange.step_deadline import STEPS_KEPT, UNKNOWN_MS, StepDeadline


def test_before_the_first_step_nobody_is_late_soon() -> None:
    assert StepDeadline(40.0).ms == UNKNOWN_MS
    assert StepDeadline(5000.0).ms == 5000.0


def test_short_steps_have_the_floor_and_long_ones_three_times_themselves() -> None:
    deadline = StepDeadline(40.0)
    deadline.on_committed(1.5)
    assert deadline.ms == 40.0
    deadline.on_committed(245.0)
    assert deadline.ms == 735.0
    assert deadline.longest_step_ms == 245.0


def test_a_long_step_is_forgotten_after_many_short_ones() -> None:
    deadline = StepDeadline(40.0)
    deadline.on_committed(245.0)
    for _ in range(STEPS_KEPT):
        deadline.on_committed(2.0)
    assert deadline.ms == 40.0
