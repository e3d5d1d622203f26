"""How many tokens the host may draw for one tenant in a step."""

from __future__ import annotations

import pytest

from gpu_worker.engine.draw_costs import PART, DrawCosts


def learned(row_s: float, rest_s: float, *, rows_max: int = 64, num_rows: int = 4) -> DrawCosts:
    costs = DrawCosts(rows_max)
    for _ in range(3):
        drawn_s = num_rows * row_s
        costs.learn(num_rows=num_rows, drawn_s=drawn_s, step_s=rest_s + drawn_s)
    return costs


def test_before_anything_was_measured_the_configured_number_is_the_limit() -> None:
    costs = DrawCosts(4)
    assert (costs.rows(1.0), costs.rows(2.0), costs.rows(0.1)) == (4, 8, 1)


@pytest.mark.parametrize("num_rows", [1, 4, 40])
def test_a_quarter_of_the_rest_of_a_step_is_the_limit_however_many_were_drawn(
    num_rows: int,
) -> None:
    costs = learned(0.0078125, 0.25, num_rows=num_rows)
    assert costs.rows(1.0) == int(PART * 0.25 / 0.0078125) == 8


def test_cheap_ones_are_no_more_than_configured_and_dear_ones_are_one() -> None:
    assert learned(0.00001, 0.1).rows(1.0) == 64
    assert learned(1.0, 0.1).rows(1.0) == 1


def test_a_weight_is_a_part() -> None:
    costs = learned(0.0078125, 0.25)
    assert (costs.rows(2.0), costs.rows(0.5)) == (16, 4)


def test_steps_without_draws_and_without_a_clock_teach_nothing() -> None:
    costs = DrawCosts(7)
    costs.learn(num_rows=0, drawn_s=1.0, step_s=1.0)
    costs.learn(num_rows=3, drawn_s=0.0, step_s=1.0)
    costs.learn(num_rows=3, drawn_s=1.0, step_s=0.0)
    assert costs.rows(1.0) == 7


def test_one_step_that_was_held_up_changes_little() -> None:
    costs = learned(0.001, 0.1)
    before = costs.rows(1.0)
    costs.learn(num_rows=4, drawn_s=0.02, step_s=0.12)
    assert before / 2 <= costs.rows(1.0) <= before
