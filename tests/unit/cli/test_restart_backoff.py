"""When a crashed service is started again."""

from __future__ import annotations

import pytest

from cli.up.restart_backoff import FIRST_S, HEALTHY_AFTER_S, MAX_S, RestartBackoff


def test_a_service_that_served_for_long_is_restarted_at_once() -> None:
    backoff = RestartBackoff()
    for _ in range(5):
        backoff.on_exit(0.1, led=False)
    assert backoff.on_exit(HEALTHY_AFTER_S, led=False) == 0.0


def test_one_that_crashes_at_every_start_waits_longer_each_time() -> None:
    backoff = RestartBackoff()
    waits = [backoff.on_exit(0.1, led=False) for _ in range(12)]
    assert waits[:4] == [0.0, FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert waits[-1] == MAX_S


@pytest.mark.parametrize("num_kills", [1, 2, 20])
def test_a_leader_that_is_killed_again_and_again_is_back_soon(num_kills: int) -> None:
    """Each life is short, but it led: nothing is wrong with it."""
    backoff = RestartBackoff()
    for _ in range(num_kills):
        waited_s = backoff.on_exit(3.0, led=True)
    assert waited_s <= FIRST_S
